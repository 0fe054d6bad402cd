"""Sources that are not plain Linear weights, end to end: FP8, MXFP4, Conv1D, and experts in one tensor.

What is packed is, code for code, what bitsandbytes makes of what transformers decodes; and `qpack.verify` against the
source finds nothing but what was damaged.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import definitions
import factors
import pytest
import torch
from moe import draw_mxfp4
from safetensors.torch import load_file, save_file
from skeleton import SIZES, quiet
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qpack
from qpack.adapters.record import Base
from qpack.checkpoint import Checkpoint
from qpack.errors import CheckpointError
from qpack.loading.weights import Original, read_packed
from qpack.manifest import Manifest

Tensors = dict[str, torch.Tensor]


def random_model(family: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    with quiet():
        config = AutoConfig.for_model(family, **settings)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def state_of(model: PreTrainedModel, *, fused: bool) -> Tensors:
    state = dict(model.state_dict())
    for tied in model.all_tied_weights_keys:
        state.pop(tied, None)
    return state if fused else dict(revert_weight_conversion(model, state))


def write(directory: Path, model: PreTrainedModel, state: Tensors, quantization: Any = None) -> None:
    directory.mkdir()
    config = model.config.to_dict() | ({"quantization_config": quantization} if quantization else {})
    (directory / "config.json").write_text(json.dumps(config))
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def fp8(directory: Path, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    """A Qwen3 with 128 x 128 scales, blocks at the edges cut off; returned are its weights as transformers decodes."""
    model = random_model("qwen3", **(SIZES | {"hidden_size": 192, "head_dim": 48, "intermediate_size": 320}))
    stored, decoded = {}, {}
    for name, tensor in state_of(model, fused=False).items():
        stored[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = tensor.shape
        whole = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
        whole[:rows, :columns] = tensor.float()
        blocks = whole.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        scales = (blocks.abs().amax((1, 3)) / 448).clamp(min=2.0**-120)
        if scale_dtype == torch.float8_e8m0fnu:
            scales = torch.exp2(scales.log2().ceil())
        codes = (blocks / scales[:, None, :, None]).reshape(whole.shape).to(torch.float8_e4m3fn)
        scales = scales.to(scale_dtype)
        stored[name], stored[f"{name}_scale_inv"] = codes[:rows, :columns], scales
        found = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.bfloat16)
        decoded[name] = found[:rows, :columns].contiguous()
    write(directory, model, stored, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    return decoded


def fp8_e8m0(directory: Path) -> Tensors:
    return fp8(directory, torch.float8_e8m0fnu)


def gpt_oss(directory: Path, *, encoded: bool) -> Tensors:
    """gpt-oss as it is on the hub, in 16 bits or in MXFP4; returned is each expert's weight, gate and up apart."""
    layers = ["full_attention", "sliding_attention"]
    model = random_model("gpt_oss", **SIZES, num_local_experts=4, layer_types=layers, initializer_range=0.05)
    stored, expected = {}, {}
    for name, tensor in state_of(model, fused=False).items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            stored[name] = tensor
            if name.endswith("_proj.weight"):
                expected[name] = tensor
            continue
        if encoded:
            blocks, scales = draw_mxfp4(tensor.shape)
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
            tensor = convert_moe_packed_tensors(blocks, scales)
        else:
            stored[name] = tensor
        for expert, matrix in enumerate(tensor.transpose(1, 2)):
            if leaf == "down_proj":
                expected[f"{module}.{expert}.down_proj.weight"] = matrix.contiguous()
            else:
                expected[f"{module}.{expert}.gate_proj.weight"] = matrix[::2].contiguous()
                expected[f"{module}.{expert}.up_proj.weight"] = matrix[1::2].contiguous()
    write(directory, model, stored, {"quant_method": "mxfp4"} if encoded else None)
    return expected


def mxfp4(directory: Path) -> Tensors:
    return gpt_oss(directory, encoded=True)


def gpt_oss_16(directory: Path) -> Tensors:
    return gpt_oss(directory, encoded=False)


def gpt2(directory: Path) -> Tensors:
    model = random_model("gpt2", n_layer=2, n_embd=64, n_head=4, vocab_size=128)
    state = state_of(model, fused=False)
    write(directory, model, state)
    packed = [name for name in state if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))]
    return {name: state[name].T.contiguous() for name in packed}


def mixtral_fused(directory: Path) -> Tensors:
    """A Mixtral with all experts of a layer in one tensor; each is packed under its name on the hub."""
    model = random_model("mixtral", **SIZES, num_local_experts=4)
    write(directory, model, state_of(model, fused=True))
    hub = state_of(model, fused=False)
    return {
        name: tensor.contiguous()
        for name, tensor in hub.items()
        if ".experts." in name or name.endswith("_proj.weight")
    }


SOURCES: dict[str, tuple[Callable[[Path], Tensors], str, str]] = {
    "fp8": (fp8, "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    "fp8 e8m0": (fp8_e8m0, "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    "mxfp4": (mxfp4, "model.layers.1.mlp.experts.down_proj_blocks", "model.layers.1.mlp.experts.2.down_proj.weight"),
    "gpt-oss": (gpt_oss_16, "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.2.down_proj.weight"),
    "gpt2": (gpt2, "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"),
    "mixtral": (
        mixtral_fused,
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.block_sparse_moe.experts.2.w2.weight",
    ),
}
"""How each is written; a tensor of it to damage, and the weight that the middle of that becomes."""


def flip(path: Path, tensor: str, *, signs: int) -> None:
    """Flip the signs of so many numbers in ``tensor``, from its middle on."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    first, end = json.loads(content[8:start])[tensor]["data_offsets"]
    middle = start + first + (end - first) // 4 * 2 + 1
    for at in range(middle, middle + 2 * signs, 2):
        content[at] ^= 0x80
    path.write_bytes(content)


@dataclass(frozen=True)
class Made:
    source: Path
    packed: Path
    expected: Tensors
    """What is to be packed, by the names that it gets."""
    damage: str
    """A tensor of the source."""
    damaged: str
    """The weight that its middle becomes."""


@pytest.fixture(scope="module", params=SOURCES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A source, and the same packed. Read only."""
    build, damage, damaged = SOURCES[request.param]
    directory = tmp_path_factory.mktemp("models")
    expected = build(directory / "source")
    qpack.convert(directory / "source", directory / "packed", threads=2)
    return Made(directory / "source", directory / "packed", expected, damage, damaged)


def test_packed_is_what_bitsandbytes_makes_of_what_transformers_decodes(made: Made) -> None:
    packed, expected = made.packed, made.expected
    stored = definitions.tensors(packed)
    weights = qpack.inspect(packed).packed
    assert {weight.name: weight.shape for weight in weights} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    errors = Manifest.read(packed).errors
    for name, tensor in expected.items():
        codes, state = bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=False)
        assert torch.equal(stored[name], codes), name
        found = errors[name]
        reference = definitions.error(tensor, name, stored, 64)
        assert found.norm == pytest.approx(tensor.float().norm().item(), rel=1e-5)
        assert found.relative == pytest.approx(reference.relative, rel=1e-4)
        assert found.worst == pytest.approx(reference.worst, rel=1e-3)
        parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        read = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        assert read.dtype == tensor.dtype
        scales = bnb.dequantize_blockwise(read.absmax, read.state2) + read.offset
        # 8-bit scales around their mean: off by half of the widest gap of the map, of the largest difference from it.
        offset = state.absmax.mean()
        assert (scales - state.absmax).abs().max() <= (state.absmax - offset).abs().max() * 0.01


def test_verify_against_the_source_is_clean(made: Made) -> None:
    found = qpack.verify(made.packed, against=made.source)
    assert found.ok, found.problems
    assert found.errors.keys() == made.expected.keys()
    recorded = Manifest.read(made.packed).errors
    for name, error in found.errors.items():
        assert error.relative == pytest.approx(recorded[name].relative, rel=1e-3)


def test_one_weight_is_read_as_it_was_and_as_it_is_packed(made: Made) -> None:
    base = Checkpoint.open(made.packed)
    original = Original.open(made.source, base)
    original.require_origin(Base.of(base))
    errors = Manifest.read(made.packed).errors
    for name, tensor in made.expected.items():
        assert torch.equal(original.read(name), tensor.float()), name
        error = (read_packed(base, name) - tensor.float()).norm() / tensor.float().norm()
        assert error.item() == pytest.approx(errors[name].relative, rel=1e-4)


def test_a_flipped_bit_of_the_source_is_named(made: Made, tmp_path: Path) -> None:
    damaged = shutil.copytree(made.source, tmp_path / "source")
    flip(damaged / "model.safetensors", made.damage, signs=32)
    first, *problems = qpack.verify(made.packed, against=damaged).problems
    assert str(first).startswith("qpack.json: was packed from tensors with digest ")
    assert {problem.weight for problem in problems} == {made.damaged}
    assert all("error against the source is" in problem.reason for problem in problems)


def test_a_flipped_bit_of_the_output_is_named(made: Made, tmp_path: Path) -> None:
    damaged = shutil.copytree(made.packed, tmp_path / "packed")
    kept = next(name for name in Manifest.read(made.packed).kept if name.endswith("norm.weight") or "ln_" in name)
    for tensor in (kept, f"{made.damaged}.nested_absmax"):
        flip(damaged / "model.safetensors", tensor, signs=1)
    problems = qpack.verify(damaged, against=made.source).problems
    assert {problem.weight for problem in problems} == {kept, made.damaged}
    assert {problem.tensor for problem in problems} >= {kept, f"{made.damaged}.nested_absmax"}
    assert any("is not what" in problem.reason and problem.tensor == kept for problem in problems)


def test_every_tensor_that_is_not_packed_has_a_reason(made: Made) -> None:
    expected = made.expected
    manifest = Manifest.read(made.packed)
    inspection = qpack.inspect(made.packed)
    assert manifest.kept.keys() | expected.keys() == {tensor.name for tensor in inspection.tensors}
    assert all(manifest.kept.values())
    assert manifest.errors.keys() == expected.keys()


@pytest.mark.parametrize(
    ("build", "tensor", "at", "value", "message"),
    [
        (
            fp8,
            "model.layers.1.mlp.up_proj.weight",
            1000,
            0x7F,
            r"mlp\.up_proj\.weight is not finite at flat index 1000",
        ),
        # The scale of the third block of the second row.
        (
            mxfp4,
            "model.layers.1.mlp.experts.down_proj_scales",
            5,
            0xFF,
            r"model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight is not finite at flat index 160",
        ),
    ],
)
def test_codes_that_stand_for_no_number_are_refused(
    build: Callable[[Path], Tensors], tensor: str, at: int, value: int, message: str, tmp_path: Path
) -> None:
    build(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + json.loads(content[8:start])[tensor]["data_offsets"][0] + at] = value
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        qpack.convert(tmp_path / "source", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_adapter_is_merged_onto_what_fp8_decodes_to(tmp_path: Path) -> None:
    decoded = fp8(tmp_path / "source")
    drawn = factors.draw(tmp_path / "source")
    adapter = factors.write(tmp_path / "adapter", drawn)
    qpack.merge(tmp_path / "source", adapter, tmp_path / "merged")
    merged = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    assert set(merged) == {name for name in Checkpoint.open(tmp_path / "source").weights if "_scale" not in name}
    for name, weight in decoded.items():
        if "q_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (drawn[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
            assert torch.allclose(merged[name].double(), weight.double() + 2 * b @ a, rtol=2**-7, atol=1e-3)
        else:
            assert torch.equal(merged[name], weight)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
