"""Multi-LoRA products for vLLM on CPU: one matrix product for each run of tokens of one adapter, none for the base.

In vLLM 0.32 a token of the base has slot -1, and its torch ops gather ``weights[slots]``: -1 picks the LAST slot, so
while all slots are full a base request that shares a batch with an adapter's is answered with that adapter's weights.
The gather also copies a whole (rank, features) matrix for every token. The three ops below take the place of vLLM's
and keep its arithmetic (f32 into the rank, the output's dtype out of it); rows of the base they leave as they are.

GPUs use other kernels, which handle -1 and are not touched.
"""

import inspect
from collections.abc import Iterator
from types import ModuleType

import torch


def bgmv_shrink(
    inputs: torch.Tensor,  # (tokens, in_features)
    lora_b_weights: torch.Tensor,  # (slots, 1, rank, in_features); vLLM's name for what is A here
    output_tensor: torch.Tensor,  # (tokens, rank), f32, zeros
    lora_indices_tensor: torch.Tensor,  # (tokens,), a slot or -1
    scaling: float = 1.0,
) -> None:
    """Write ``scaling * x @ A.T`` into the rows of adapters."""
    for rows, weight in _runs(lora_b_weights, lora_indices_tensor):
        x, a = inputs[rows].to(output_tensor.dtype), weight.to(output_tensor.dtype)
        output_tensor[rows, : a.shape[0]] = scaling * (x @ a.T)


def bgmv_expand(
    inputs: torch.Tensor,  # (tokens, rank)
    lora_b_weights: torch.Tensor,  # (slots, 1, out_features, rank)
    output_tensor: torch.Tensor,  # (tokens, out_features or more: padding)
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """Add ``x @ B.T`` to the rows of adapters, or put it there if ``add_inputs`` is false."""
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    bgmv_expand_slice(inputs, lora_b_weights, output_tensor, lora_indices_tensor, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,  # (tokens, rank)
    lora_b_weights: torch.Tensor,  # (slots, 1, slice_size, rank)
    output_tensor: torch.Tensor,  # (tokens, out_features of all slices)
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Do as `bgmv_expand` for the columns of one slice of a fused projection."""
    columns = slice(slice_offset, slice_offset + slice_size)
    for rows, weight in _runs(lora_b_weights, lora_indices_tensor):
        x, b = inputs[rows].to(output_tensor.dtype), weight[:slice_size].to(output_tensor.dtype)
        if add_inputs:
            output_tensor[rows, columns] += x @ b.T
        else:
            output_tensor[rows, columns] = x @ b.T


def _runs(weights: torch.Tensor, slots: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the rows of each run of one adapter and the matrix of its slot; runs of the base are left out."""
    values, lengths = torch.unique_consecutive(slots, return_counts=True)
    start = 0
    for slot, length in zip(values.tolist(), lengths.tolist(), strict=True):
        if slot >= 0:
            yield slice(start, start + length), weights[slot].squeeze(0)
        start += length


def install() -> None:
    """Put the ops in the place of vLLM's, in this process; do nothing a second time.

    The ops on sequences (``sgmv_*``) of `lora_ops` end in these three, and `punica_cpu` calls all of them by name, so
    those two modules are the whole of it.

    Raises:
        RuntimeError: if one of vLLM's ops is gone or takes other parameters. Better no server than wrong answers.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    modules: tuple[ModuleType, ...] = (lora_ops, punica_cpu)
    for op in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        for module in modules:
            theirs = getattr(module, op.__name__, None)
            if theirs is None or _parameters(theirs) != _parameters(op):
                raise RuntimeError(f"{module.__name__}.{op.__name__} is not vLLM 0.32's: the LoRA fix does not apply")
            setattr(module, op.__name__, op)


def _parameters(op: object) -> list[tuple[str, object]]:
    assert callable(op)
    return [(parameter.name, parameter.default) for parameter in inspect.signature(op).parameters.values()]
