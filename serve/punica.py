"""vLLM's wrapper of the multi-LoRA products, on a CPU, with the products of `serve.lora_cpu`.

vLLM makes one for a model and calls it in each layer that adapters may change; `serve.plugin` names this class where
vLLM asks its platform for one. Slots are looked at when vLLM says that they have changed, once a step at most.

Not taken over: LoRA that is sharded over processes, and whole layers in place of factors (``modules_to_save``);
`serve.engine` starts no such engine, the registry takes no such adapter.
"""

import inspect
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from qpack.training.compute import cpu_dtype
from serve.lora_cpu import expand, plan, shrink, take


class Products(PunicaWrapperCPU):
    """Takes the place of ``PunicaWrapperCPU``, whose parameters these are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._emulated = cpu_dtype() == torch.float32
        self._tokens = self._samples = plan(())

    def _dtype(self, weights: torch.Tensor) -> torch.dtype:
        return torch.float32 if self._emulated else weights.dtype

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take note of the slots of the next steps' rows."""
        super().update_metadata(*args, **kwargs)
        self._tokens = plan(self.token_lora_indices.tolist())
        self._samples = plan(self.sampler_indices.tolist())

    def add_lora_linear(
        self,
        y: torch.Tensor,  # (tokens, features of all slices)
        x: torch.Tensor,  # (tokens, in_features)
        lora_a_stacked: tuple[torch.Tensor, ...],  # of each slice (slots, 1, rank, in_features)
        lora_b_stacked: tuple[torch.Tensor, ...],  # of each slice (slots, 1, its features, rank)
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add every adapter's product to its rows of ``y``."""
        for share in self._tokens:
            taken = take(share, x, self._dtype(lora_a_stacked[0]))
            column = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                h = shrink(share, taken, a)
                expand(share, h if scale == 1 else scale * h, b, y, column)
                column += width

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add the embedding's products; ``x`` (tokens, rank) are the rows of A that vLLM has looked up."""
        for share in self._tokens:
            h = take(share, x, self._dtype(lora_b_stacked))
            if h.any():  # a model's whole embedding has factors in no adapter that the registry takes
                expand(share, h, lora_b_stacked, y, 0)

    def add_lora_logits(
        self,
        y: torch.Tensor,  # (sampled rows, vocabulary)
        x: torch.Tensor,  # (sampled rows, in_features)
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the products of the output embedding.

        Logits of prompts, which vLLM asks for by the request and without its slot, get none.
        """
        if len(x) != len(self.sampler_indices):
            return
        for share in self._samples:
            h = shrink(share, take(share, x, self._dtype(lora_a_stacked)), lora_a_stacked)
            if h.any():  # most adapters have no factors here, and the vocabulary is long
                expand(share, h if scale == 1 else scale * h, lora_b_stacked, y, 0)

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        """Refuse; only LoRA that is sharded over processes asks for it."""
        raise NotImplementedError("sharded LoRA on a CPU")

    def add_expand(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, as `add_shrink`."""
        raise NotImplementedError("sharded LoRA on a CPU")

    def apply_lora_full_linear(self, *args: Any, **kwargs: Any) -> None:
        """Refuse; the registry takes no adapter with a whole layer."""
        raise NotImplementedError("whole layers of an adapter on a CPU")


def _require_same_parameters() -> None:
    """Refuse another vLLM, before it can call with something else in mind: better no server than wrong answers."""
    for method in ("add_lora_linear", "add_lora_embedding", "add_lora_logits"):
        if _parameters(PunicaWrapperCPU, method) != _parameters(Products, method):
            raise RuntimeError(f"PunicaWrapperCPU.{method} is not vLLM 0.32's: the LoRA fix does not apply")


def _parameters(wrapper: type, method: str) -> list[str]:
    return list(inspect.signature(getattr(wrapper, method)).parameters)


_require_same_parameters()
