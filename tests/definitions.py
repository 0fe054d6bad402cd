"""What ``qpack.json`` must hold, from the definitions alone: BLAKE3's own package, torch and bitsandbytes."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import blake3
import torch
from safetensors.torch import load_file

from qpack.manifest import WeightError


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files in ``directory``."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def lines(directory: Path) -> dict[str, str]:
    """``DTYPE SHAPE DIGEST`` of every tensor, read from the bytes of the files."""
    found = {}
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            digest = blake3.blake3(content[start + first : start + end]).hexdigest()
            found[name] = f"{entry['dtype']} {json.dumps(entry['shape'])} {digest}"
    return found


def fingerprint(directory: Path) -> str:
    """The digest of the sorted lines."""
    text = "".join(sorted(f"{name} {line}\n" for name, line in lines(directory).items()))
    return blake3.blake3(text.encode()).hexdigest()


def error(original: torch.Tensor, name: str, stored: dict[str, torch.Tensor], blocksize: int) -> WeightError:
    """The error of a packed weight, from sums over its blocks in f32, its codes and scales decoded by bitsandbytes."""
    parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([stored[name] >> 4, stored[name] & 15], dim=-1).flatten()[: original.numel()].long()
    pad = -original.numel() % blocksize
    x = torch.nn.functional.pad(original.float().flatten(), (0, pad)).view(-1, blocksize)
    q = torch.nn.functional.pad(state.code[codes], (0, pad)).view(-1, blocksize)
    xx, xq, qq = ((left * right).sum(1).double() for left, right in ((x, x), (x, q), (q, q)))
    scale = scales.double()
    squares = (xx - 2 * scale * xq + scale**2 * qq).clamp(min=0)
    ratios = torch.where(xx > 0, squares / xx.clamp(min=1e-300), 0)
    worst = int(ratios.argmax())
    relative, norm = float((squares.sum() / xx.sum()).sqrt()), float(xx.sum().sqrt())
    return WeightError(relative, norm, float(ratios[worst].sqrt()), worst)
