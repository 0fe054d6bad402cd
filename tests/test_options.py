"""The options of `qpack convert` end to end: rules, a budget of bits, the output embedding, and codes in floats."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import definitions
import pytest
import torch
from lora import write_adapter
from safetensors.torch import load_file, save_file
from test_cli import contents, run
from tiny import write_llama
from transformers import AutoModelForCausalLM

import qpack
from qpack.errors import CheckpointError
from qpack.manifest import Manifest

DOWN = "model.layers.1.mlp.down_proj.weight"
IDS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


def linears(directory: Path) -> set[str]:
    """The weights that transformers reads in 4 bits."""
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    modules = dict(model.named_modules()).items()
    return {f"{name}.weight" for name, module in modules if type(module).__name__ == "Linear4bit"}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an output embedding of its own. Read only."""
    return write_llama(tmp_path_factory.mktemp("models") / "untied", tied=False)


# ---- what qpack.json says ------------------------------------------------------------------------------------------


def test_qpack_json_holds_what_was_done(llama: Path, tmp_path: Path) -> None:
    qpack.convert(llama, tmp_path / "packed", blocksize=128, max_shard_size="400KB")
    manifest = Manifest.read(tmp_path / "packed")
    originals, stored = definitions.tensors(llama), definitions.tensors(tmp_path / "packed")
    assert manifest.version == qpack.__version__
    assert manifest.options == {
        "mode": "exact",
        "blocksize": 128,
        "double_quant": True,
        "quant_storage": "uint8",
        "rules": None,
        "target_bits": None,
        "pack_lm_head": False,
        "max_shard_size": 400_000,
    }
    assert manifest.source == {
        "name": llama.name,
        "revision": None,
        "digest": definitions.fingerprint(llama),
        "bytes": sum(tensor.nbytes for tensor in originals.values()),
        "tensors": len(originals),
    }
    assert manifest.fingerprint == definitions.fingerprint(tmp_path / "packed")
    assert manifest.tensors == definitions.lines(tmp_path / "packed")
    assert len(manifest.errors) == 14
    for name, found in manifest.errors.items():
        expected = definitions.error(originals[name], name, stored, 128)
        assert found.relative == pytest.approx(expected.relative, rel=1e-4)
        assert found.norm == pytest.approx(expected.norm, rel=1e-5)
        assert found.worst == pytest.approx(expected.worst, rel=1e-3)
        assert found.worst_block == expected.worst_block
    assert set(manifest.kept.values()) == {"norm", "input embedding"}
    assert manifest.kept.keys() == originals.keys() - manifest.errors.keys()


# ---- rules ---------------------------------------------------------------------------------------------------------


RULES = """
[[rule]]
match = "model.layers.1.mlp.down_proj.weight"
keep = true
dtype = "float32"

[[rule]]
match = "*.down_proj.weight"
blocksize = 32
double_quant = false

[[rule]]
match = "model.norm.weight"
dtype = "float32"
"""


def test_rules_decide_how_single_tensors_are_stored(llama: Path, packed: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(RULES)
    output = tmp_path / "ruled"
    done = run("convert", llama, output, "--rules", rules)
    assert "1 x rule keep: model.layers.1.mlp.down_proj.weight" in done.stdout
    before, after, plain = (definitions.tensors(directory) for directory in (llama, output, packed))
    assert torch.equal(after[DOWN], before[DOWN].float())
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"].float())
    other = DOWN.replace("layers.1", "layers.0")
    codes, state = bnb.quantize_4bit(before[other], blocksize=32, quant_type="nf4", compress_statistics=False)
    assert torch.equal(after[other], codes)
    assert torch.equal(after[f"{other}.absmax"], state.absmax)
    changed = {name for name in after if not name.startswith((DOWN, other)) and name != "model.norm.weight"}
    assert all(torch.equal(after[name], plain[name]) for name in changed)
    assert Manifest.read(output).options["rules"] == RULES
    assert qpack.verify(output, against=llama).ok
    assert linears(output) == {weight.name for weight in qpack.inspect(output).packed}
    assert (logits(output) - logits(packed)).abs().max() > 0


# ---- a budget of bits ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama some of whose weights have rare large values, which coarse blocks store badly. Read only."""
    directory = write_llama(tmp_path_factory.mktemp("models") / "uneven")
    for path in directory.glob("*.safetensors"):
        weights = load_file(path)
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.view(-1)[::97] *= 12
        save_file(weights, path, metadata={"format": "pt"})
    return directory


def test_target_bits_are_kept_to_and_spent_where_they_save_most(uneven: Path, tmp_path: Path) -> None:
    uniform = qpack.convert(uneven, tmp_path / "uniform", blocksize=64)
    target = uniform.result.packed_bits + 0.06  # the sizes are reckoned with some bytes more a weight
    report = qpack.convert(uneven, tmp_path / "spent", target_bits=target, threads=1)
    result = report.result
    assert result.packed_bits <= target
    assert result.error is not None
    assert uniform.result.error is not None
    assert result.error < 0.97 * uniform.result.error
    assert len({(weight.blocksize, weight.double_quant) for weight in result.packed}) > 1
    coarse = {weight.name: weight.blocksize or 0 for weight in result.packed}
    assert max(coarse[name] for name in coarse if "o_proj" in name) < max(coarse.values())
    again = qpack.convert(uneven, tmp_path / "again", target_bits=target, threads=3)
    assert contents(tmp_path / "again") == contents(tmp_path / "spent")
    assert again.result.packed == result.packed
    assert qpack.verify(tmp_path / "spent", against=uneven).ok
    assert linears(tmp_path / "spent") == {weight.name for weight in result.packed}


def test_many_bits_leave_weights_unpacked_and_say_so(uneven: Path, tmp_path: Path) -> None:
    report = qpack.convert(uneven, tmp_path / "packed", target_bits=9.0)
    kept = [tensor for tensor in report.result.tensors if tensor.reason == "target bits"]
    assert kept
    assert report.result.packed
    weights = sum(tensor.weights for tensor in (*kept, *report.result.packed))
    assert sum(tensor.bytes for tensor in (*kept, *report.result.packed)) * 8 / weights <= 9.0
    assert linears(tmp_path / "packed") == {weight.name for weight in report.result.packed}
    assert qpack.verify(tmp_path / "packed", against=uneven).ok


def test_a_target_that_cannot_be_met_is_refused(uneven: Path, tmp_path: Path) -> None:
    for options in ((), ("--dry-run",)):
        done = run("convert", uneven, tmp_path / "packed", "--target-bits", "4", *options, status=1)
        assert done.stderr.startswith(f"error: {uneven}: target is 4 bits a weight, expected at least 4.")
        assert done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_what_is_kept_of_a_target_costs_its_own_width(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", dtype="float32")
    result = qpack.convert(source, tmp_path / "packed", target_bits=10.0).result
    kept = [tensor for tensor in result.tensors if tensor.reason == "target bits"]
    assert kept
    weights = sum(tensor.weights for tensor in (*kept, *result.packed))
    assert sum(tensor.bytes for tensor in (*kept, *result.packed)) * 8 / weights <= 10.0


# ---- the output embedding ------------------------------------------------------------------------------------------


def test_the_output_embedding_is_packed_when_asked_for(untied: Path, llama: Path, tmp_path: Path) -> None:
    kept = qpack.convert(untied, tmp_path / "kept").result
    assert {tensor.name: tensor.reason for tensor in kept.tensors}["lm_head.weight"] == "output embedding"
    done = run("convert", untied, tmp_path / "packed", "--pack-lm-head")
    assert "15 weights" in done.stdout
    before, after = definitions.tensors(untied), definitions.tensors(tmp_path / "packed")
    codes, _ = bnb.quantize_4bit(before["lm_head.weight"], blocksize=64, quant_type="nf4")
    assert torch.equal(after["lm_head.weight"], codes)
    assert "lm_head.weight" in linears(tmp_path / "packed")
    assert qpack.verify(tmp_path / "packed", against=untied).ok
    with pytest.raises(CheckpointError, match="the output embedding is tied to the input embedding"):
        qpack.convert(llama, tmp_path / "tied", pack_lm_head=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "packed"]


# ---- codes in floats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)],
)
def test_codes_may_be_stored_in_a_float_type(
    storage: str, dtype: torch.dtype, llama: Path, packed: Path, tmp_path: Path
) -> None:
    """As FSDP needs them: the same bytes under another type, which transformers, inspect, verify and merge read."""
    output = tmp_path / "floats"
    run("convert", llama, output, "--quant-storage", storage)
    floats, plain = definitions.tensors(output), definitions.tensors(packed)
    config: dict[str, Any] = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_storage"] == storage
    weights = {weight.name for weight in qpack.inspect(packed).packed}
    assert floats.keys() == plain.keys()
    for name, tensor in floats.items():
        if name in weights:
            assert tensor.dtype == dtype
            assert torch.equal(tensor.view(torch.uint8), plain[name].view(1, -1).T.view(tensor.view(torch.uint8).shape))
        else:
            assert torch.equal(tensor, plain[name])
    inspection = qpack.inspect(output)
    assert {weight.name: weight.bits for weight in inspection.packed} == {
        weight.name: weight.bits for weight in qpack.inspect(packed).packed
    }
    assert qpack.verify(output, against=llama).ok
    if storage != "bfloat16":
        return
    model = AutoModelForCausalLM.from_pretrained(output, device_map="cpu")
    assert model.get_parameter(DOWN).dtype == dtype
    assert torch.equal(logits(output), logits(packed))
    adapter = write_adapter(tmp_path / "adapter", llama, target_modules=["q_proj", "v_proj"])
    for base in (packed, output):
        qpack.merge(base, adapter, tmp_path / f"merged-{base.name}")
        (tmp_path / f"merged-{base.name}" / "README.md").unlink()  # names the base
    assert contents(tmp_path / "merged-floats") == contents(tmp_path / "merged-packed")
