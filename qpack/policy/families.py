"""The structure of well-known families, told from the names of their tensors alone: packing them needs no torch.

In a dense decoder every two-dimensional weight of a layer belongs to a Linear, save norms with one row a head; GPT-2
and Falcon name theirs otherwise; a mixture of experts adds routers and, one tensor an expert, the experts. Whatever is
not as expected (all experts of a layer in one tensor, a mixture's config without the number of layers) is left to
`structure`; a test compares the two.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

from qpack.policy.roles import OUTPUT, ROUTER, Anatomy, Experts, Kept, Linear, Role

_DENSE = frozenset(
    {
        "arcee",
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "granite",
        "helium",
        "llama",
        "ministral3",
        "mistral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
_MIXTURES = frozenset({"deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})

# Those whose configuration, where it says nothing, ties the output embedding to the input embedding.
_TIED = frozenset({"cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "smollm3", "starcoder2"})

FAMILIES = _DENSE | _MIXTURES | {"falcon", "gpt2"}
"""Values of ``model_type`` that are known by name."""

_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<rest>.+)\.weight")
_PATTERNS = {
    "gpt2": re.compile(r"(transformer\.)?h\.(?P<layer>\d+)\.(?P<rest>(attn|mlp)\.c_(attn|proj|fc))\.weight"),
    "falcon": re.compile(r"transformer\.h\.(?P<layer>\d+)\.(?P<rest>(self_attention|mlp)\..+)\.weight"),
}
_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.\d+\.(w[123]|(gate|up|down)_proj)")
_FUSED = re.compile(
    r"(?P<module>model\.layers\.(?P<layer>\d+)\.mlp\.experts)\.(?P<leaf>(gate_up|down)_proj)(?P<bias>_bias)?"
)

OUTPUT_EMBEDDING = "lm_head"
"""What the output embedding's module is called in all of these."""


def read_anatomy(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Anatomy | None:
    """Tell what each tensor of ``shapes`` is to the model of ``config``; None if names do not tell it.

    ``shapes`` has no tensors that only decode others, and the shapes as decoded.
    """
    family = config.get("model_type")
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if family not in FAMILIES or (layers is None and family in _MIXTURES):
        return None
    if not isinstance(layers, int):
        layers = sys.maxsize  # only mixtures are stored with layers for multi-token prediction behind the model's own
    roles: dict[str, Role] = {}
    for name, shape in shapes.items():
        match = _PATTERNS.get(family, _LAYER).fullmatch(name)
        fused = _FUSED.fullmatch(name) if family in _MIXTURES else None
        if name == f"{OUTPUT_EMBEDDING}.weight":
            roles[name] = Linear(OUTPUT_EMBEDDING, keep=OUTPUT)
        elif match and len(shape) == 2 and "norm" not in match["rest"] and int(match["layer"]) < layers:
            if role := _layer_weight(family, match["layer"], match["rest"]):
                roles[name] = role
        elif fused and int(fused["layer"]) < layers:
            if family != "gpt_oss":
                return None
            roles[name] = _gpt_oss_experts(fused["module"], fused["leaf"], fused["bias"])
    if all(isinstance(role, Kept) or role.keep for role in roles.values()):
        return None
    return Anatomy(
        roles,
        output=OUTPUT_EMBEDDING,
        tied=bool(config.get("tie_word_embeddings", family in _TIED)),
        unstored=frozenset({OUTPUT_EMBEDDING} if f"{OUTPUT_EMBEDDING}.weight" not in shapes else ()),
    )


def _layer_weight(family: str, layer: str, rest: str) -> Role | None:
    """The role of the two-dimensional weight of the module ``rest`` of a decoder layer."""
    if family == "gpt2":
        return Linear(f"transformer.h.{layer}.{rest}", transpose=True)
    if family == "falcon":
        return Linear(f"transformer.h.{layer}.{rest}", foreign="FalconLinear")
    module = f"model.layers.{layer}.{rest}"
    if family in _MIXTURES:
        module = module.replace(".block_sparse_moe.", ".mlp.")  # as transformers calls Mixtral's
        if match := _EXPERT.fullmatch(module):
            return None if family == "gpt_oss" else Experts(match["experts"])  # the model has gpt-oss's in one tensor
        if module.endswith((".mlp.gate", ".mlp.router")):
            return Kept(module, ROUTER)
        if module.endswith(".mlp.shared_expert_gate"):
            return Linear(module, keep=ROUTER)
    return Linear(module)


def _gpt_oss_experts(module: str, leaf: str, bias: str | None) -> Experts:
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    outputs = tuple(f"{module}.*.{part}.{'bias' if bias else 'weight'}" for part in parts)
    return Experts(module, outputs, not bias, len(parts) > 1, "bias" if bias else "")
