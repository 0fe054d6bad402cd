"""`qpack convert --mode best`: whole files, of which some chunks are seen twice."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qpack

NAME = "model.layers.0.mlp.up_proj.weight"


def write_weight(directory: Path, weight: torch.Tensor) -> Path:
    """A Llama's config, and one weight of its only layer."""
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    save_file({NAME: weight}, directory / "model.safetensors")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("rows", "blocksize", "double_quant"),
    [
        pytest.param(1000, 64, True, id="three chunks, all of them the sample"),
        pytest.param(8000, 64, True, id="seventeen chunks, sixteen of them the sample"),
        pytest.param(2000, 4096, True, id="chunks of half a group of scales"),
        pytest.param(1000, 64, False, id="without double quantization"),
    ],
)
def test_chunks_make_what_the_whole_weight_makes(rows: int, blocksize: int, double_quant: bool, tmp_path: Path) -> None:
    """A chunk is half a million weights; the levels of scales are fitted to the first 131,072 of them."""
    weight = torch.randn(rows, 1104, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight[rows // 2 :] *= 3
    source = write_weight(tmp_path / "source", weight)
    for threads in (1, 3):
        output = tmp_path / f"{threads}"
        qpack.convert(source, output, mode="best", double_quant=double_quant, blocksize=blocksize, threads=threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    stored = load_file(tmp_path / "1" / "model.safetensors")
    expected = qpack.quantize(weight, mode="best", double_quant=double_quant, blocksize=blocksize).tensors(NAME)
    for key, value in expected.items():
        if not key.endswith("__nf4"):  # which convert pads with spaces
            assert (stored[key].numpy() == value).all(), key
    assert qpack.verify(tmp_path / "1", against=source).ok


def test_it_is_exact_mode_where_that_has_less_error(tmp_path: Path) -> None:
    """Weights that exact mode stores without error, but for the rounding of their scales, which are all alike."""
    levels = torch.tensor(qpack._core.LEVELS)
    weight = levels[torch.arange(600_000) % 16].reshape(600, 1000)
    source = write_weight(tmp_path / "source", weight)
    reports = {mode: qpack.convert(source, tmp_path / mode, mode=mode).result for mode in ("exact", "best")}
    assert reports["exact"].error == 0
    assert reports["best"].error == 0


def test_the_report_says_what_it_gains(llama: Path, packed: Path, tmp_path: Path) -> None:
    best = qpack.convert(llama, tmp_path / "best", mode="best").result
    exact = qpack.inspect(packed)
    assert best.bits == exact.bits
    assert best.error is not None
    assert exact.error is not None
    assert best.error < 0.92 * exact.error  # at least 15 % less of its square
    for ours, theirs in zip(best.packed, exact.packed, strict=True):
        assert ours.error is not None
        assert theirs.error is not None
        assert ours.error.relative < theirs.error.relative


def test_transformers_multiplies_by_its_scales_as_by_those_of_exact_mode(
    llama: Path, packed: Path, tmp_path: Path
) -> None:
    """How far stock logits are from those of the decoded weights in f32: bitsandbytes' own rounding, in both modes."""
    qpack.convert(llama, tmp_path / "best", mode="best")
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    distance, change = {}, {}
    for mode, directory in (("exact", packed), ("best", tmp_path / "best")):
        stock = AutoModelForCausalLM.from_pretrained(directory)
        plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        with torch.no_grad():
            before = plain(ids).logits
            for module in plain.modules():
                if isinstance(module, torch.nn.Linear) and module is not plain.get_output_embeddings():
                    weight = module.weight.to(torch.bfloat16)  # what bitsandbytes decodes to
                    module.weight.copy_(qpack.dequantize(qpack.quantize(weight, mode=mode), weight))
            decoded = plain(ids).logits
            distance[mode] = (stock(ids).logits.float() - decoded).square().mean().sqrt()
            change[mode] = (decoded - before).square().mean().sqrt()
    assert distance["best"] < 1.5 * distance["exact"]
    assert distance["best"] < 0.1 * change["best"]
