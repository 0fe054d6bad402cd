"""Small random models whose families differ in what they do to their logits, and a watch on how large tensors get."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 4096

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_chunk_size": 16}

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 32}),
    ("granite", {"logits_scaling": 8.0}),
    ("cohere", {"logit_scale": 0.25}),
    ("falcon_h1", {"lm_head_multiplier": 0.5, **MAMBA}),
]


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def of_family(family: str, special: dict[str, Any]) -> Any:
    """One layer of it, with logits that are far from uniform."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads, **tokens, **special))
