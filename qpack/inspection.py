"""What a checkpoint holds: tensors, dtypes, sizes, bits a weight."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qpack.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One weight of the model. A packed one counts all its tensors."""

    name: str
    shape: tuple[int, ...]
    """As the model sees it: (out_features, in_features) for a packed weight."""
    dtype: str
    """safetensors' name of the dtype, or ``NF4``."""
    bytes: int
    blocksize: int | None = None
    """Weights per block scale, where packed."""
    double_quant: bool | None = None
    """Whether the block scales are in 8 bits, where packed."""

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits a weight, scales and quant state included."""
        return self.bytes * 8 / self.weights if self.weights else 0.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """Every weight of a checkpoint, with sums over them."""

    directory: Path
    model_type: str
    files: tuple[str, ...]
    tensors: tuple[TensorReport, ...]

    @property
    def weights(self) -> int:
        """Number of weights in all."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bits(self) -> float:
        """Bits a weight over the whole model."""
        return self.bytes * 8 / self.weights if self.weights else 0.0

    @property
    def packed(self) -> tuple[TensorReport, ...]:
        """The NF4 weights."""
        return tuple(tensor for tensor in self.tensors if tensor.blocksize is not None)

    @property
    def packed_bits(self) -> float:
        """Bits a weight over the packed weights alone; 0 if there are none."""
        weights = sum(tensor.weights for tensor in self.packed)
        return sum(tensor.bytes for tensor in self.packed) * 8 / weights if weights else 0.0

    def by_dtype(self) -> dict[str, tuple[int, int, int]]:
        """Number of tensors, weights and bytes of each dtype, largest first."""
        count, weights, size = Counter[str](), Counter[str](), Counter[str]()
        for tensor in self.tensors:
            count[tensor.dtype] += 1
            weights[tensor.dtype] += tensor.weights
            size[tensor.dtype] += tensor.bytes
        return {dtype: (count[dtype], weights[dtype], total) for dtype, total in size.most_common()}


def inspect(directory: Path | str) -> Inspection:
    """Read what the checkpoint in ``directory`` holds, from headers and quant states alone.

    Raises:
        CheckpointError: if it is not a model directory, or a file of it is malformed.
    """
    checkpoint = Checkpoint.open(directory)
    tensors = []
    for name, shape in checkpoint.weights.items():
        if weight := checkpoint.packed.get(name):
            tensors.append(TensorReport(name, shape, "NF4", weight.bytes, weight.blocksize, weight.double_quant))
        else:
            info = checkpoint.tensors[name]
            tensors.append(TensorReport(name, shape, info.dtype, info.bytes))
    return Inspection(
        directory=checkpoint.directory,
        model_type=str(checkpoint.config.get("model_type")),
        files=tuple(shard.name for shard in checkpoint.shards),
        tensors=tuple(tensors),
    )
