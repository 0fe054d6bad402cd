"""Paging the optimizer's state again after it was loaded.

bitsandbytes' paged optimizers keep large states (from 1e5 elements) in CUDA's unified memory, from which the driver
moves pages to the host when the GPU runs full. Loading a state gives plain tensors on the GPU instead, so a run that
fitted before it was interrupted may not fit after. Reference: bitsandbytes 0.50, ``Optimizer8bit.get_state_buffer``.
"""

from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

_STATES = ("state1", "state2")


def page_again(optimizer: torch.optim.Optimizer) -> int:
    """Move what the optimizer would have paged to paged memory, and return the bytes moved.

    Whether a tensor is paged is bitsandbytes' own decision, asked for with a new buffer of the same shape.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
    if not isinstance(inner, Optimizer8bit) or not inner.is_paged:
        return 0
    moved = 0
    for parameter, state in inner.state.items():
        for name in _STATES:
            loaded = state.get(name)
            if loaded is None or getattr(loaded, "is_paged", False):
                continue
            buffer = inner.get_state_buffer(parameter, dtype=loaded.dtype)
            if getattr(buffer, "is_paged", False):
                buffer.copy_(loaded)
                state[name] = buffer
                moved += buffer.nbytes
    return moved
