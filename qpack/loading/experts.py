"""The experts of one layer as 4-bit Linear layers, in the place of transformers' module with one 3-D parameter.

::

    y[t] = sum over k of  top_k_weights[t, k] * down(apply_gate(gate(x[t]), up(x[t])))   of expert top_k_index[t, k]

Routing stays in the model, and ``apply_gate`` is the replaced module's own: SiLU for most families, and for gpt-oss the
clamped one on interleaved columns. So nothing here depends on a family. The sum is in the dtype of the routing weights,
as in transformers' grouped kernels (5.19, ``integrations/moe.py``, ``grouped_mm_experts_forward``).

Refused: experts without a gate, and experts with parameters besides the projections and their biases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from qpack.errors import CheckpointError

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
"""What transformers' ``use_experts_implementation`` sets on a module that keeps to its interface."""


@dataclass(frozen=True, slots=True)
class Projections:
    """What a checkpoint calls the three Linear layers of an expert: ``gate_proj`` or ``w1``, and so on."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Experts(nn.ModuleList):
    """All experts of a layer; expert ``e`` is a ``ModuleDict`` of Linear layers under the names of the checkpoint."""

    def __init__(self, fused: nn.Module, names: Projections) -> None:
        """Take the shapes and the gate rule of ``fused``, which gives up its parameters. Nothing is allocated."""
        stock = cast(Any, fused)
        if not stock.has_gate:
            raise CheckpointError(f"{type(fused).__name__}: experts without a gate cannot be loaded packed")
        rows, columns = stock.down_proj.shape[1:]
        intermediate, hidden = (rows, columns) if stock.is_transposed else (columns, rows)
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            fused._parameters.pop(name, None)
        if others := [name for name, _ in (*fused.named_parameters(), *fused.named_buffers())]:
            raise CheckpointError(
                f"{type(fused).__name__}: experts with a parameter {others[0]} cannot be loaded packed"
            )

        def expert() -> nn.ModuleDict:
            bias = stock.has_bias
            layers = {
                names.gate: nn.Linear(hidden, intermediate, bias),
                names.up: nn.Linear(hidden, intermediate, bias),
                names.down: nn.Linear(intermediate, hidden, bias),
            }
            return nn.ModuleDict(layers)

        with torch.device("meta"):
            super().__init__(expert() for _ in range(stock.num_experts))
        self.names = names
        self.is_concatenated: bool = stock.is_concatenated
        self.apply_gate: Callable[[torch.Tensor], torch.Tensor] = stock._apply_gate

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts, (tokens, hidden).

        Args:
            hidden_states: (tokens, hidden)
            top_k_index: (tokens, top_k), the experts that the router chose
            top_k_weights: (tokens, top_k)
        """
        tokens, top_k = top_k_index.shape
        chosen = top_k_index.flatten()  # (tokens * top_k,)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        grouped = hidden_states[order // top_k].split(counts)
        outputs = torch.cat([self._expert(index, states) for index, states in enumerate(grouped) if len(states)])
        weighted = outputs * top_k_weights.flatten()[order, None]
        return weighted[order.argsort()].view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)

    def _expert(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Expert ``index`` on the states that were sent to it, (n, hidden)."""
        layers = cast(nn.ModuleDict, self[index])
        gate, up = layers[self.names.gate](states), layers[self.names.up](states)  # (n, intermediate)
        if self.is_concatenated:
            both = torch.cat((gate, up), dim=-1)
        else:
            both = torch.stack((gate, up), dim=-1).flatten(-2)
        return cast(torch.Tensor, layers[self.names.down](self.apply_gate(both)))


def unfuse_experts(model: nn.Module, names: Projections) -> int:
    """Replace every module of fused experts in ``model``, which is on the meta device, and return how many there were.

    Raises:
        CheckpointError: the experts are of a kind that cannot be replaced.
    """
    fused = [(name, module) for name, module in model.named_modules() if _is_fused(module)]
    for name, module in fused:
        model.set_submodule(name, Experts(module, names))
    return len(fused)


def has_experts(model: nn.Module) -> bool:
    """Whether any layer of ``model`` holds :class:`Experts`."""
    return any(isinstance(module, Experts) for module in model.modules())


def holds_fused_experts(model: nn.Module) -> bool:
    """Whether any layer of ``model`` has all experts in 3-D parameters, as transformers itself loads them."""
    return any(map(_is_fused, model.modules()))


def _is_fused(module: nn.Module) -> bool:
    return all(hasattr(module, flag) for flag in _FLAGS)
