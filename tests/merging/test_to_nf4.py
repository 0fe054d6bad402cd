"""`qpack.merge(..., to="nf4")`: packed from the original's weights and the change, never from a packed weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora import tensors, unpacked, write_adapter
from moe import write_source
from tiny import write_llama
from transformers import AutoModelForCausalLM, GPT2Config

import qpack
from qpack.cli import cli
from qpack.errors import AdapterError, CheckpointError, DataError
from qpack.manifest import Manifest

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

STATE = ".quant_state.bitsandbytes__nf4"


def is_what_converting_the_sum_gives(merged: Path, converted: Path) -> None:
    """Codes and scales are those of the sum in f32; what is kept is that sum, rounded to the original's type."""
    found, expected = tensors(merged), tensors(converted)
    packed = {weight.name for weight in qpack.inspect(merged).packed}
    assert found.keys() == expected.keys()
    assert packed
    for name, tensor in found.items():
        if name.endswith(STATE):
            state, other = (json.loads(bytes(one.tolist())) for one in (tensor, expected[name]))
            assert (state.pop("dtype"), other.pop("dtype")) == ("bfloat16", "float32")
            assert state == other
        elif name in packed or name.rpartition(".")[0] in packed:
            assert torch.equal(tensor, expected[name]), name
        else:
            assert tensor.dtype == torch.bfloat16, name


@pytest.fixture(scope="module")
def originals(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain checkpoints by name. Read only."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_layer=1, n_embd=64, n_head=2, bos_token_id=256, eos_token_id=257)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "gpt2")
    mixtral = write_source("mixtral", folder / "mixtral", "fused")
    untied = write_llama(folder / "untied", tied=False)
    return {"tied": llama, "untied": untied, "gpt2": folder / "gpt2", "mixtral": mixtral}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("tied", {}, {}),
    "best, large blocks": ("tied", {}, {"mode": "best", "blocksize": 128}),
    "embedding, packed head": (
        "untied",
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"pack_lm_head": True, "double_quant": False},
    ),
    "dora and saved": ("untied", {"target_modules": ["k_proj"], "use_dora": True, "modules_to_save": ["q_proj"]}, {}),
    "tied head": ("tied", {"target_modules": ["lm_head", "v_proj"]}, {}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, {}),
    "fused experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {},
    ),
}


@pytest.mark.parametrize(("name", "adapter", "packing"), CASES.values(), ids=CASES)
def test_the_codes_are_those_of_the_sum_in_f32(
    name: str, adapter: dict[str, Any], packing: dict[str, Any], originals: dict[str, Path], tmp_path: Path
) -> None:
    original = originals[name]
    trained = write_adapter(tmp_path / "adapter", original, **adapter)
    report = qpack.merge(original, trained, tmp_path / "nf4", to="nf4", **packing)
    qpack.merge(original, trained, tmp_path / "f32", dtype="float32")
    qpack.convert(tmp_path / "f32", tmp_path / "converted", **packing)
    is_what_converting_the_sum_gives(tmp_path / "nf4", tmp_path / "converted")
    assert qpack.verify(tmp_path / "nf4").ok
    made, expected = Manifest.read(tmp_path / "nf4"), Manifest.read(tmp_path / "converted")
    assert (made.kept, made.transposed) == (expected.kept, expected.transposed)
    for weight, error in made.errors.items():
        assert error.relative == pytest.approx(expected.errors[weight].relative, rel=1e-6)
    changed = [effect for effect in report.effects.values() if effect.error is not None]
    assert report.errors_of == "result"
    assert changed
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    other = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["quantization_config"].pop("bnb_4bit_compute_dtype") == "bfloat16"
    assert other["quantization_config"].pop("bnb_4bit_compute_dtype") == "float32"
    assert config["quantization_config"] == other["quantization_config"]
    assert config.get("tie_word_embeddings") == other.get("tie_word_embeddings")


def test_stock_transformers_loads_it(llama: Path, packed: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, target_modules=["lm_head", "q_proj", "up_proj"])
    arguments = ["merge", "-q", str(packed), str(adapter), str(tmp_path / "nf4")]
    shown = CliRunner().invoke(cli, [*arguments, "--onto", "original", "--source", str(llama), "--to", "nf4"])
    assert shown.exit_code == 0, shown.stderr
    assert "bits a packed weight" in shown.stdout
    qpack.merge(packed, adapter, tmp_path / "plain", original=llama)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)  # untied, and kept as it is
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    # The decoded weights in the plain model give the same logits, in bf16 as in f32.
    plain.load_state_dict(unpacked(tmp_path / "nf4"))
    ids = torch.arange(64)[None]
    with torch.no_grad():
        assert (model(ids).logits - plain(ids).logits).abs().max() < 0.2
    assert "packed" in (tmp_path / "nf4" / "README.md").read_text()


def test_a_change_smaller_than_the_error_is_there_all_the_same(llama: Path, packed: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, target_modules=["q_proj"], lora_alpha=1)
    arguments = ["merge", "-q", str(llama), str(adapter), str(tmp_path / "nf4"), "--to", "nf4"]
    shown = CliRunner().invoke(cli, arguments)
    assert "in 2 of 2 weights packing changes more than the adapters do" in shown.stdout
    qpack.merge(packed, adapter, tmp_path / "plain", dtype="float32")
    qpack.convert(tmp_path / "plain", tmp_path / "again")  # what is refused: packed from packed weights
    source, base = tensors(llama), unpacked(packed)
    nf4, plain, again = (unpacked(tmp_path / name) for name in ("nf4", "plain", "again"))
    for name in (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)):
        change = plain[name] - base[name]
        # How much of the change is in the result: the error of quantization is in another direction.
        kept = ((nf4[name] - source[name]) * change).sum() / change.square().sum()
        assert kept == pytest.approx(1.0, abs=0.1)
        assert ((again[name] - base[name]) * change).sum() / change.square().sum() < 0.6


def test_a_budget_is_spent_as_on_the_original(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama)
    report = qpack.merge(llama, adapter, tmp_path / "nf4", to="nf4", target_bits=4.3)
    expected = qpack.convert(llama, tmp_path / "converted", target_bits=4.3).result
    assert expected.packed_bits == report.result.packed_bits
    ways = [
        {one.name: (one.blocksize, one.double_quant) for one in result.tensors} for result in (report.result, expected)
    ]
    assert ways[0] == ways[1]
    assert len(set(ways[0].values())) > 2


def test_what_it_was_packed_from_is_the_original_no_more(llama: Path, packed: Path, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", llama, target_modules=["q_proj"])
    qpack.merge(packed, one, tmp_path / "nf4", original=llama, to="nf4")
    made = Manifest.read(tmp_path / "nf4")
    assert made.source["digest"] != Manifest.read(packed).source["digest"]
    assert [adapter["name"] for adapter in made.source["adapters"]] == ["one"]
    # So an adapter that is trained on it is not merged onto the original by mistake.
    two = write_adapter(tmp_path / "two", llama, target_modules=["q_proj"])
    base = {"name": "nf4", "fingerprint": made.fingerprint, "source": made.source["digest"]}
    record = {key: {} for key in ("versions", "settings", "data", "metrics")} | {"format": 1, "base": base}
    (two / "qpack_adapter.json").write_text(json.dumps(record | {"template": None}))
    with pytest.raises(AdapterError, match=r"has digest .*, but the base nf4 .* was packed from one with digest"):
        qpack.merge(tmp_path / "nf4", two, tmp_path / "merged", original=llama)
    qpack.merge(tmp_path / "nf4", two, tmp_path / "merged")


def test_an_interrupted_run_of_other_options_is_not_gone_on_with(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    small: dict[str, Any] = {"max_shard_size": "100kB", "threads": 1, "to": "nf4"}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            qpack.merge(llama, adapter, tmp_path / "nf4", on_progress=interrupt, **small)
    assert qpack.merge(llama, adapter, tmp_path / "nf4", blocksize=32, **small).resumed_bytes == 0
    with pytest.raises(KeyboardInterrupt):
        qpack.merge(llama, adapter, tmp_path / "again", blocksize=32, on_progress=interrupt, **small)
    assert qpack.merge(llama, adapter, tmp_path / "again", blocksize=32, **small).resumed_bytes > 0
    for path in (tmp_path / "nf4").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_dry_run_says_what_is_written(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, target_modules=["lm_head"])
    plan = qpack.plan_merge(llama, adapter, tmp_path / "nf4", to="nf4")
    qpack.merge(llama, adapter, tmp_path / "nf4", to="nf4")
    assert {name: (tmp_path / "nf4" / name).stat().st_size for name, _ in plan.files} == dict(plan.files)


def test_refused_before_anything_is_written(llama: Path, packed: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"is packed, and packed again, .* \(--onto original --source SRC\)"):
        qpack.merge(packed, adapter, tmp_path / "no", to="nf4")
    with pytest.raises(DataError, match="bits"):
        qpack.merge(llama, adapter, tmp_path / "no", to="nf4", target_bits=2.0)
    for wrong, message in (
        ({"to": "int8"}, "to is 'int8', expected one of plain, nf4"),
        ({"to": "nf4", "dtype": "float16"}, "dtype is of a plain result"),
        ({"blocksize": 128}, "blocksize: of a packed result"),
        ({"to": "nf4", "blocksize": 48}, "blocksize is 48, expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            qpack.merge(llama, adapter, tmp_path / "no", **wrong)
    for arguments, message in (
        (["--blocksize", "128"], "--blocksize is not for --to plain"),
        (["--to", "nf4", "--dtype", "bfloat16"], "--dtype is not for --to nf4"),
    ):
        done = CliRunner().invoke(cli, ["merge", str(llama), str(adapter), str(tmp_path / "no"), *arguments])
        assert done.exit_code == 2
        assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
