"""`qpack.convert`: what it writes, that stock transformers reads it, and what it refuses."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_bad_sources import poison
from tiny import write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qpack
from qpack import _core
from qpack.errors import CheckpointError, OutputExistsError


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_tiny_weight_byte_for_byte(tmp_path: Path) -> None:
    """One weight of 2 x 17 ones and halves, packed in blocks of 32: every byte of the file, written out."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    weight = torch.tensor([[1.0, -1.0, 0.0, 0.5] * 4 + [0.25], [-0.5] * 17])
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, source / "model.safetensors")
    qpack.convert(source, tmp_path / "packed", blocksize=32, double_quant=False)

    name = "model.layers.0.mlp.up_proj.weight"
    state = b'{"quant_type":"nf4","blocksize":32,"dtype":"float32","shape":[2,17]}'
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"%b":{"data_offsets":[72,89],"dtype":"U8","shape":[17,1]},'
        b'"%b.absmax":{"data_offsets":[0,8],"dtype":"F32","shape":[2]},'
        b'"%b.quant_map":{"data_offsets":[8,72],"dtype":"F32","shape":[16]},'
        b'"%b.quant_state.bitsandbytes__nf4":{"data_offsets":[89,157],"dtype":"U8","shape":[68]}}'
    ) % ((name.encode(),) * 4)
    header += b" " * (-len(header) % 8)
    absmax = bytes.fromhex("0000803f 0000003f")
    codes = bytes.fromhex("f07c f07c f07c f07c" + "a2" + "22" * 7 + "00")
    expected = len(header).to_bytes(8, "little") + header + absmax + oracle.LEVELS.tobytes() + codes + state
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_tensor_is_what_bitsandbytes_would_store(tmp_path: Path, dtype: str, double_quant: bool) -> None:
    # in_features of 72: blocks straddle rows, and the last block of the narrow weights is short.
    source = write_llama(tmp_path / "source", hidden_size=256, intermediate_size=72, dtype=dtype)
    qpack.convert(source, tmp_path / "packed", double_quant=double_quant)
    before, after = tensors(source), tensors(tmp_path / "packed")
    packed = qpack.inspect(tmp_path / "packed").packed
    assert len(packed) == 14
    for weight in packed:
        codes, state = bnb.quantize_4bit(before[weight.name], blocksize=64, quant_type="nf4")
        assert torch.equal(after[weight.name], codes)
        if not double_quant:
            assert torch.equal(after[f"{weight.name}.absmax"], state.absmax)
            continue
        stored = json.loads(bytes(after[f"{weight.name}.quant_state.bitsandbytes__nf4"].tolist()))
        offset = np.float32(stored["nested_offset"])
        assert offset == state.absmax.double().mean().float().item()
        nested, nested_state = bnb.quantize_blockwise(state.absmax - offset, blocksize=256)
        assert torch.equal(after[f"{weight.name}.absmax"], nested)
        assert torch.equal(after[f"{weight.name}.nested_absmax"], nested_state.absmax)
    kept = before.keys() - {weight.name for weight in packed}
    assert kept == {"model.embed_tokens.weight", "model.norm.weight"} | {name for name in before if "layernorm" in name}
    for name in kept:
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_transformers_reads_it_as_if_it_had_packed_the_model_itself(llama: Path, packed: Path, device: str) -> None:
    ours = AutoModelForCausalLM.from_pretrained(packed, device_map=device)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map=device)
    plain = AutoModelForCausalLM.from_pretrained(llama, device_map=device)
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        logits, expected, unpacked = (model(ids).logits.float() for model in (ours, theirs, plain))
    # Only the nested offset may differ, by the 2 ulp (2**-22) that torch's order of summing f32 costs: a change of
    # every weight far under the 2**-8 of the bf16 products. Two bf16 ulps of the largest logit bound what is left.
    assert (logits - expected).abs().max() <= expected.abs().max() * 2**-7
    assert (unpacked - expected).abs().max() > 100 * (logits - expected).abs().max()
    assert AutoTokenizer.from_pretrained(packed).chat_template == AutoTokenizer.from_pretrained(llama).chat_template


def test_the_bytes_do_not_depend_on_threads_or_shards(llama: Path, packed: Path, tmp_path: Path) -> None:
    qpack.convert(llama, tmp_path / "one", threads=1)
    qpack.convert(llama, tmp_path / "three", threads=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(packed)

    report = qpack.convert(llama, tmp_path / "sharded", max_shard_size="200KB")
    assert len(report.result.files) > 2
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.result.bytes == qpack.inspect(packed).bytes
    single, sharded = tensors(packed), tensors(tmp_path / "sharded")
    assert index["weight_map"].keys() == single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


def test_bits_a_weight(llama: Path, tmp_path: Path) -> None:
    """0.5 + 1/64 + 4/(64 * 256) bytes (QLoRA, section 3), and 1,088 bytes of maps and the state's JSON a weight."""
    for blocksize in _core.BLOCKSIZES:
        report = qpack.convert(llama, tmp_path / "packed", blocksize=blocksize, force=True)
        for weight in report.result.packed:
            blocks = -(-weight.weights // blocksize)
            payload = weight.weights / 2 + blocks + 4 * -(-blocks // 256) + 16 * 4 + 256 * 4
            assert 0 < weight.bytes - payload < 250
            assert weight.blocksize == blocksize


def test_progress_ends_at_the_bytes_of_the_source(llama: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = qpack.convert(llama, tmp_path / "packed", on_progress=lambda *call: calls.append(call))
    assert calls[-1] == (report.source_bytes, report.source_bytes)


def test_an_output_that_exists_is_kept_unless_forced(llama: Path, packed: Path, tmp_path: Path) -> None:
    output = tmp_path / "packed"
    output.mkdir()
    (output / "config.json").write_text("old")
    with pytest.raises(OutputExistsError, match="already exists"):
        qpack.convert(llama, output)
    assert (output / "config.json").read_text() == "old"
    qpack.convert(llama, output, force=True)
    assert contents(output) == contents(packed)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    with pytest.raises(OutputExistsError, match=r"not a directory with config\.json, so it is not replaced"):
        qpack.convert(llama, precious, force=True)


def test_an_output_that_would_replace_the_input_is_refused(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "models" / "source")
    before = contents(source)
    for output in (source, tmp_path / "models", source / ".." / "source"):
        with pytest.raises(OutputExistsError, match="is or holds the input"):
            qpack.convert(source, output, force=True)
    assert contents(source) == before


def test_a_failed_run_leaves_a_forced_output_as_it_was(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    qpack.convert(source, tmp_path / "packed")
    before = contents(tmp_path / "packed")
    poison(source)
    with pytest.raises(CheckpointError, match="not finite"):
        qpack.convert(source, tmp_path / "packed", force=True)
    assert contents(tmp_path / "packed") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "source"]


def test_inspect_tells_plain_from_packed(llama: Path, packed: Path) -> None:
    plain, four_bit = qpack.inspect(llama), qpack.inspect(packed)
    assert plain.bits == 16
    assert plain.packed_bits == 0
    assert plain.weights == four_bit.weights
    assert four_bit.by_dtype().keys() == {"NF4", "BF16"}
    assert 4.127 < four_bit.packed_bits < 4.3
    with safe_open(packed / "model.safetensors", "pt") as file:
        assert four_bit.bytes == sum(file.get_tensor(name).nbytes for name in file.keys())


def test_a_packed_checkpoint_that_lacks_a_part_is_refused(packed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((packed / "config.json").read_bytes())
    weights = load_file(packed / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight.nested_absmax"]
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight\.nested_absmax"):
        qpack.inspect(broken)
