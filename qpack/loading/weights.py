"""One weight at a time as float32: of a packed base, and of the checkpoint that it was packed from.

Nothing here loads a model. What the source calls a weight, and where in one of its tensors it stands (transposed, or
one expert among all of a layer), is told by the plan that `qpack.convert` would make; FP8 and MXFP4 are decoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpack import _core
from qpack._core import SUFFIXES
from qpack.adapters.record import Base
from qpack.checkpoint import Checkpoint
from qpack.errors import CheckpointError
from qpack.policy import modules
from qpack.policy.families import OUTPUT_EMBEDDING
from qpack.policy.plan import Packing, Part, Recipe
from qpack.quantization import QuantizedWeight, dequantize

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Original:
    """The checkpoint that a base was packed from.

    Raises:
        CheckpointError: from `open` and `require_origin`, naming the weight or digest by which it is another one.
    """

    checkpoint: Checkpoint
    places: Mapping[str, tuple[Recipe, Part]]
    """What makes each packed weight of the base, by the name that it has there."""

    @classmethod
    def open(cls, path: Path, base: Checkpoint) -> "Original":
        """Open ``path``, and check that it has all that ``base`` holds packed, in the same shapes."""
        checkpoint = Checkpoint.open(path)
        head = f"{OUTPUT_EMBEDDING}.weight" in base.packed
        plan = modules.plan(checkpoint, packing=Packing(), pack_lm_head=head)
        places = {part.name: (recipe, part) for recipe in plan.recipes for part in recipe.parts if part.packing}
        for name, info in base.packed.items():
            if name not in places:
                raise CheckpointError(f"{path}: has nothing that {name} of the base {base.directory} was packed from")
            if (shape := places[name][1].shape) != info.shape:
                raise CheckpointError(f"{path}: {name} has shape {shape}, in the base {base.directory} {info.shape}")
        return cls(checkpoint, places)

    def require_origin(self, base: Base) -> None:
        """Check by every byte, which are read, that ``base`` was packed from it; of one that others packed nothing is
        known."""
        if base.source is not None and (found := Base.of(self.checkpoint).fingerprint) != base.source:
            raise CheckpointError(
                f"{self.checkpoint.directory}: its tensors have digest {found}, expected {base.source}, from which the "
                f"base {base.name} was packed"
            )

    def read(self, name: str) -> "torch.Tensor":
        """What the packed weight ``name`` was made from, (out_features, in_features)."""
        recipe, part = self.places[name]
        matrix = self._matrix(recipe, part.matrix).float()
        matrix = matrix.T if part.transpose else matrix
        first, step = part.rows
        return matrix[first : first + step * part.shape[0] : step]

    def _matrix(self, recipe: Recipe, index: int) -> "torch.Tensor":
        """A source tensor, or number ``index`` of the matrices that it holds, decoded."""
        import torch

        if recipe.scale is None:
            return self._tensor(recipe.source, index, matrix=2)
        codes_are = 2 if recipe.block else 3  # MXFP4's rows are (blocks, 16)
        codes, scales = self._tensor(recipe.source, index, codes_are), self._tensor(recipe.scale, index, matrix=2)
        if recipe.block:
            dtype = self.checkpoint.tensors[recipe.scale].dtype
            decoded = _core.decode_fp8(_bytes(codes), _bytes(scales), dtype, codes.shape, recipe.block)
        else:
            decoded = _core.decode_mxfp4(_bytes(codes), _bytes(scales))
        return torch.frombuffer(bytearray(decoded), dtype=torch.bfloat16).view(len(codes), -1)

    def _tensor(self, name: str, index: int, matrix: int) -> "torch.Tensor":
        """A stored tensor; number ``index`` of those in it where it has a dimension more than a ``matrix``."""
        from safetensors import safe_open

        with safe_open(self.checkpoint.files[name], "pt") as file:
            stored: Any = file.get_slice(name)
            tensor: torch.Tensor = stored[index] if len(stored.get_shape()) > matrix else stored[:]
            return tensor


def read_packed(base: Checkpoint, name: str) -> "torch.Tensor":
    """The packed weight ``name`` of ``base``, decoded, (out_features, in_features)."""
    import torch
    from safetensors import safe_open

    parts = {}
    for part in [name, *(name + suffix for suffix in SUFFIXES if name + suffix in base.tensors)]:
        with safe_open(base.files[part], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(part)
            parts[part] = (tensor.view(torch.uint8) if part == name else tensor).numpy()
    weight = QuantizedWeight.from_tensors(name, parts)
    return dequantize(weight, torch.empty(weight.shape))


def _bytes(tensor: "torch.Tensor") -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
