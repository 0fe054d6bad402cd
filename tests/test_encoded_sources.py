"""Sources that are not plain Linear weights, end to end: FP8, MXFP4, Conv1D, and experts in one tensor.

What is packed is, code for code, what bitsandbytes makes of what transformers decodes; and `qpack.verify` against the
source finds nothing but what was damaged.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import definitions
import pytest
import torch
from moe import draw_mxfp4
from safetensors.torch import save_file
from skeleton import SIZES, quiet
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qpack
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


SOURCES: dict[str, tuple[Callable[[Path], Tensors], str]] = {
    "fp8": (fp8, "model.layers.1.mlp.up_proj.weight"),
    "fp8 e8m0": (fp8_e8m0, "model.layers.1.mlp.up_proj.weight"),
    "mxfp4": (mxfp4, "model.layers.1.mlp.experts.gate_up_proj_blocks"),
    "gpt-oss": (gpt_oss_16, "model.layers.1.mlp.experts.gate_up_proj"),
    "gpt2": (gpt2, "transformer.h.1.mlp.c_fc.weight"),
    "mixtral": (mixtral_fused, "model.layers.1.mlp.experts.gate_up_proj"),
}
"""How each is written, and a tensor of it to damage."""


def flip(path: Path, tensor: str) -> None:
    """Flip a bit in the middle of ``tensor``: the lowest of the second byte there, so that no float becomes NaN."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    first, end = json.loads(content[8:start])[tensor]["data_offsets"]
    content[start + (first + end) // 4 * 2 + 1] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module", params=SOURCES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensors, str]:
    """A source, the same packed, the weights it stands for, and a tensor of it to damage. Read only."""
    build, victim = SOURCES[request.param]
    directory = tmp_path_factory.mktemp("models")
    expected = build(directory / "source")
    qpack.convert(directory / "source", directory / "packed", threads=2)
    return directory / "source", directory / "packed", expected, victim


def test_packed_is_what_bitsandbytes_makes_of_what_transformers_decodes(made: tuple[Path, Path, Tensors, str]) -> None:
    _, packed, expected, _ = made
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


def test_verify_against_the_source_is_clean(made: tuple[Path, Path, Tensors, str]) -> None:
    source, packed, expected, _ = made
    found = qpack.verify(packed, against=source)
    assert found.ok, found.problems
    assert found.errors.keys() == expected.keys()
    recorded = Manifest.read(packed).errors
    for name, error in found.errors.items():
        assert error.relative == pytest.approx(recorded[name].relative, rel=1e-3)


def test_a_flipped_bit_of_the_source_is_named(made: tuple[Path, Path, Tensors, str], tmp_path: Path) -> None:
    source, packed, _, victim = made
    damaged = tmp_path / "source"
    damaged.mkdir()
    for path in source.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    flip(damaged / "model.safetensors", victim)
    problems = [str(problem) for problem in qpack.verify(packed, against=damaged).problems]
    # One bit of one weight is less than the errors are compared to; the digest of the source is what tells.
    assert problems[0].startswith("qpack.json: was packed from tensors with digest "), problems


def test_a_flipped_bit_of_the_output_is_named(made: tuple[Path, Path, Tensors, str], tmp_path: Path) -> None:
    source, packed, expected, _ = made
    damaged = tmp_path / "packed"
    damaged.mkdir()
    for path in packed.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    kept = next(name for name in Manifest.read(packed).kept if name.endswith("norm.weight") or "ln_" in name)
    victim = list(expected)[-1]
    for tensor in (kept, f"{victim}.nested_absmax"):
        flip(damaged / "model.safetensors", tensor)
    problems = qpack.verify(damaged, against=source).problems
    assert {problem.weight for problem in problems} == {kept, victim}
    assert {problem.tensor for problem in problems} >= {kept, f"{victim}.nested_absmax"}
    assert any("is not what" in problem.reason and problem.tensor == kept for problem in problems)


def test_every_tensor_that_is_not_packed_has_a_reason(made: tuple[Path, Path, Tensors, str]) -> None:
    _, packed, expected, _ = made
    manifest = Manifest.read(packed)
    inspection = qpack.inspect(packed)
    assert manifest.kept.keys() | expected.keys() == {tensor.name for tensor in inspection.tensors}
    assert all(manifest.kept.values())
    assert manifest.errors.keys() == expected.keys()
