"""Copies of a base's weights in an adapter's file, which PEFT makes of embeddings that are adapted."""

from pathlib import Path

from qpack.checkpoint import Checkpoint


def is_copy(file: Path, key: str, base: Checkpoint, name: str) -> bool:
    """Whether the tensor ``key`` of an adapter's ``file`` has the values of ``name`` in ``base``, in any float type."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as one, safe_open(base.files[name], "pt") as other:
        first, second = one.get_tensor(key), other.get_tensor(name)
        if first.shape != second.shape:
            return False
        narrow = min(first.dtype, second.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        return torch.equal(first.to(narrow), second.to(narrow))
