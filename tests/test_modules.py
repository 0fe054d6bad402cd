"""What is packed: by names and by structure alike, as transformers' own replacement has it, and readable by loaders."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from carried_out import select
from moe import decode
from safetensors.torch import load_file, save_file
from skeleton import SIZES, meta_model, meta_model_of, quiet, skeleton, stored_shapes, write_skeleton
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.base import get_keys_to_not_convert

import qpack
from qpack.checkpoint import Checkpoint
from qpack.errors import CheckpointError
from qpack.manifest import Manifest
from qpack.policy import families, structure
from qpack.policy.encoded import read_sources
from qpack.policy.modules import Plan, groups, plan
from qpack.policy.plan import Packing, Part

EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": SIZES | LATENT | {"moe_intermediate_size": 32, "n_routed_experts": 8, "first_k_dense_replace": 1},
    "glm4_moe": SIZES | {"moe_intermediate_size": 32, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "gpt_oss": SIZES | {"num_local_experts": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "mixtral": SIZES | {"num_local_experts": 4},
    "olmoe": SIZES | EXPERTS,
    "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": SIZES | EXPERTS,
}
OTHERS: dict[str, dict[str, Any]] = {
    "falcon": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128},
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 128},
}
TINY = {family: MIXTURES.get(family, OTHERS.get(family, SIZES)) for family in sorted(families.FAMILIES)}
TINY["cohere qk_norm"] = SIZES | {"use_qk_norm": True}
TINY["falcon new_decoder"] = TINY["falcon"] | {"new_decoder_architecture": True, "num_kv_heads": 2}

PROJECTIONS = 7
"""Linear modules of a layer of Llama."""


def planned(directory: Path, **options: Any) -> Plan:
    return plan(Checkpoint.open(directory), packing=options.pop("packing", Packing()), **options)


def anatomies(directory: Path) -> tuple[Any, Any]:
    """The model in ``directory`` as its names tell it, and as its structure does."""
    checkpoint = Checkpoint.open(directory)
    shapes = {source.name: source.shape for source in read_sources(checkpoint)}
    by_structure = structure.read_anatomy(directory / "config.json", checkpoint.config, shapes)
    return families.read_anatomy(checkpoint.config, shapes), by_structure


def replaced(model: PreTrainedModel, skip: list[str]) -> set[str]:
    """The weights that transformers reads in 4 bits, given ``skip`` as the list in config.json."""
    with quiet():
        model = replace_with_bnb_linear(
            model,
            modules_to_not_convert=[*skip, *(model._keep_in_fp32_modules or ())],
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )
    return {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def landed(result: Plan, model: PreTrainedModel) -> set[str]:
    """The parameters of ``model`` that the packed weights become, routed experts aside."""
    landing = structure._Landing(model)
    return {landing.find(name)[0][0] for name in result.packed if not re.search(r"\.experts\.\d+\.", name)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TINY)
def test_a_known_family_is_packed_alike_by_names_and_by_structure(family: str, tied: bool, tmp_path: Path) -> None:
    model = meta_model(family.split()[0], **TINY[family], tie_word_embeddings=tied)
    by_name, by_structure = anatomies(skeleton(tmp_path, model))
    assert by_name == by_structure
    result = planned(tmp_path)
    # transformers also skips whichever parameter happens to come last: a down_proj in OLMo with tied embeddings, whose
    # norms have no weights. The list that convert writes into config.json replaces that default.
    skipped = [name for name in get_keys_to_not_convert(model) if not name.startswith("model.layers.")]
    ours, theirs = landed(result, model), replaced(meta_model(family.split()[0], **TINY[family]), skipped)
    gates = {name for name in theirs if name.endswith("shared_expert_gate.weight")}
    if family.startswith("falcon"):  # transformers passes its own Linear over, and leaves the model in 16 bits
        assert theirs == set()
        assert result.foreign == ("FalconLinear",)
        assert len(ours) == 4 * 2
    else:
        assert ours == theirs - gates
        assert len(ours) >= 8
        assert ours == replaced(model, list(result.skip_modules))
        assert bool(result.foreign) == (family in MIXTURES)


@pytest.mark.parametrize("family", sorted(families.FAMILIES - {"gpt_oss"}))
def test_what_a_family_ties_without_saying_so(family: str, tmp_path: Path) -> None:
    model = meta_model(family, **TINY[family])
    config = {key: value for key, value in model.config.to_dict().items() if key != "tie_word_embeddings"}
    write_skeleton(tmp_path, config, stored_shapes(model))
    by_name, _ = anatomies(tmp_path)
    assert by_name.tied == AutoConfig.for_model(family).tie_word_embeddings


def shrunk(config: Any) -> Any:
    """``config`` with four layers and eight experts in every tower."""
    towers = [getattr(config, name, None) for name in config.sub_configs]
    for section in filter(None, (config, config.get_text_config(decoder=True), *towers)):
        for name, value in list(vars(section).items()):
            if isinstance(value, int) and re.search(
                r"(num|n_routed)(_local)?_experts$|n(um)?(_hidden)?_layers?(_per_stack)?$|coder_layers$|^depth$", name
            ):
                setattr(section, name, min(value, 8 if name.endswith("experts") else 4))
            elif isinstance(value, list) and "layer" in name:
                setattr(section, name, value[:4])
    return config


CONFIGURATIONS: list[Callable[[str], Any]] = [
    lambda family: shrunk(AutoConfig.for_model(family)),
    lambda family: AutoConfig.for_model(family),
    lambda family: AutoConfig.for_model(family, **SIZES),
    lambda family: AutoConfig.for_model(family, **SIZES, num_experts=4, layer_types=["full_attention"] * 2),
]


def default_model(family: str, auto: Any) -> tuple[Any, PreTrainedModel]:
    """The first configuration that transformers builds, and reads again from what config.json would say.

    Where it builds none, the test is skipped with what transformers says of the family's own.
    """
    problems = []
    for configuration in CONFIGURATIONS:
        try:
            with quiet():
                config = configuration(family)
                AutoConfig.for_model(**config.to_dict())
                return config, meta_model_of(config, auto)
        except Exception as error:  # each family has its own way to fail
            problems.append(f"{type(error).__name__} {str(error).splitlines()[:1]}")
    pytest.skip(f"transformers builds no {family} by default: {problems[1]}")


def check_against_transformers(family: str, auto: Any, directory: Path) -> None:
    config, model = default_model(family, auto)
    content = config.to_dict() | {"architectures": [type(model).__name__]}
    result = planned(write_skeleton(directory, content, stored_shapes(model)))
    ours, theirs = landed(result, model), replaced(meta_model_of(config, auto), list(result.skip_modules))
    if result.foreign != ("FalconLinear",):
        assert ours == theirs
    assert ours
    assert all(result.kept.values())
    assert ("routed experts" in result.foreign) == (len(result.packed) > len(ours))


@pytest.mark.parametrize("family", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_family_is_packed_as_transformers_would(family: str, tmp_path: Path) -> None:
    check_against_transformers(family, AutoModelForCausalLM, tmp_path)


MULTIMODAL = (
    "gemma4 glm4v idefics3 internvl llama4 llava mistral3 mllama paligemma pp_chart2table "
    "qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe smolvlm"
)


@pytest.mark.parametrize("family", MULTIMODAL.split())
def test_models_of_images_and_text_are_packed_as_transformers_would(family: str, tmp_path: Path) -> None:
    check_against_transformers(family, AutoModelForImageTextToText, tmp_path)


def test_the_text_tower_of_a_multimodal_model(tmp_path: Path) -> None:
    text = SIZES | {"num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = meta_model("gemma3", text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    result = planned(skeleton(tmp_path, model))
    assert len(result.packed) == 2 * PROJECTIONS
    assert all(name.startswith("language_model.model.layers.") for name in result.packed)
    assert landed(result, model) == replaced(model, list(result.skip_modules))
    assert result.kept["vision_tower.encoder.layers.0.mlp.fc1.weight"] == "vision tower"
    assert result.kept["multi_modal_projector.mm_input_projection_weight"] == "projector"
    assert result.kept["language_model.model.embed_tokens.weight"] == "input embedding"
    towers = {"vision_tower", "multi_modal_projector"}
    assert set(result.skip_modules) == {"lm_head"} | towers | {f"model.{tower}" for tower in towers}


def test_nothing_is_dropped_and_everything_kept_has_a_reason(tmp_path: Path) -> None:
    """Buffers, layers for multi-token prediction, and tensors that nobody knows."""
    model = meta_model("deepseek_v3", **TINY["deepseek_v3"], tie_word_embeddings=False)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (4,)),
        "model.layers.0.self_attn.masked_bias": ("F32", ()),
        "model.layers.2.eh_proj.weight": ("BF16", (64, 128)),
        "model.layers.2.mlp.experts.0.gate_proj.weight": ("BF16", (32, 64)),
        "unheard_of": ("I64", (3, 3)),
    }
    tensors = stored_shapes(model) | extra
    result = planned(write_skeleton(tmp_path, model.config.to_dict(), tensors))
    assert [recipe.source for recipe in result.recipes] == list(tensors)
    assert result.packed.keys() | result.kept.keys() == tensors.keys()
    assert all(result.kept.values())
    assert {result.kept[name] for name in extra} == {"vector", "bias", "no weight of a Linear of this model"}
    assert result.kept["lm_head.weight"] == "output embedding"
    assert result.kept["model.layers.1.mlp.gate.weight"] == "router"
    assert result.skip_modules == ("lm_head", "model.layers.1.mlp.gate")
    by_name, by_structure = anatomies(tmp_path)
    assert by_name == by_structure


def parts(result: Plan, source: str) -> tuple[Part, ...]:
    return next(recipe.parts for recipe in result.recipes if recipe.source == source)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_become_those_of_the_hub(family: str, tmp_path: Path) -> None:
    model = meta_model(family, **TINY[family])
    hub = planned(skeleton(tmp_path / "hub", model))
    fused = planned(skeleton(tmp_path / "fused", model, fused=True))
    assert fused.packed == hub.packed
    assert fused.kept == hub.kept
    assert fused.skip_modules == hub.skip_modules
    gate, up = {"mixtral": ("w1", "w3"), "qwen3_moe": ("gate_proj", "up_proj")}[family]
    found = parts(fused, "model.layers.1.mlp.experts.gate_up_proj")
    rows = found[0].shape[0]
    assert [(part.name.split(".experts.")[1], part.matrix, part.rows, part.transpose) for part in found[:3]] == [
        (f"0.{gate}.weight", 0, (0, 1), False),
        (f"0.{up}.weight", 0, (rows, 1), False),
        (f"1.{gate}.weight", 1, (0, 1), False),
    ]
    assert sum(len(names) for group, names in groups(fused).items() if group.endswith(".experts")) == 2 * 3 * 4


def test_gpt_oss_in_16_bits_and_in_mxfp4(tmp_path: Path) -> None:
    """The two layouts on the hub: matrices transposed, or 32 values in 16 bytes and a scale; gate and up alternate."""
    model = meta_model("gpt_oss", **TINY["gpt_oss"])
    plain = planned(skeleton(tmp_path / "plain", model))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in stored_shapes(model).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            number, columns, rows = shape
            tensors[f"{name}_blocks"] = ("U8", (number, rows, columns // 32, 16))
            tensors[f"{name}_scales"] = ("U8", (number, rows, columns // 32))
        else:
            tensors[name] = (dtype, shape)
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    mxfp4 = planned(write_skeleton(tmp_path / "mxfp4", config, tensors))
    assert mxfp4.packed == plain.packed
    assert mxfp4.kept == plain.kept
    assert mxfp4.skip_modules == plain.skip_modules
    assert plain.skip_modules == ("lm_head", "model.layers.0.mlp.router", "model.layers.1.mlp.router")
    experts = "model.layers.0.mlp.experts"
    assert plain.packed[f"{experts}.3.up_proj.weight"] == (96, 64)
    assert plain.packed[f"{experts}.3.down_proj.weight"] == (64, 96)
    up = parts(plain, f"{experts}.gate_up_proj")[7]
    assert (up.name, up.matrix, up.rows, up.transpose) == (f"{experts}.3.up_proj.weight", 3, (1, 2), True)
    up = parts(mxfp4, f"{experts}.gate_up_proj_blocks")[7]
    assert (up.name, up.matrix, up.rows, up.transpose) == (f"{experts}.3.up_proj.weight", 3, (1, 2), False)
    scales = {recipe.source: recipe.scale for recipe in mxfp4.recipes if recipe.scale}
    assert scales[f"{experts}.down_proj_blocks"] == f"{experts}.down_proj_scales"
    bias = parts(plain, f"{experts}.gate_up_proj_bias")[7]
    assert (bias.name, bias.shape, bias.rows) == (f"{experts}.3.up_proj.bias", (96,), (1, 2))
    assert bias.reason == "bias"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_parts_of_experts_are_what_transformers_makes_of_them(family: str, tmp_path: Path) -> None:
    """Of Mixtral, the tensors that it saves for the hub; of gpt-oss, those that its forward takes apart."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY[family]), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_()
    with quiet():
        model.save_pretrained(tmp_path, save_original_format=False)
    state = load_file(tmp_path / "model.safetensors")
    recipes = planned(tmp_path).recipes
    found = {part.name: select(state[recipe.source], part) for recipe in recipes for part in recipe.parts}
    found = {name: value for name, value in found.items() if ".experts." in name}
    expected = revert_weight_conversion(model, state)
    if family == "gpt_oss":
        expected = {}
        for path, number in itertools.product([f"model.layers.{layer}.mlp.experts" for layer in range(2)], range(4)):
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                gate_up, down = (state[f"{path}.{name}_proj{suffix}"][number] for name in ("gate_up", "down"))
                parts = {"gate": gate_up[..., ::2], "up": gate_up[..., 1::2], "down": down}
                expected |= {f"{path}.{number}.{name}_proj.{kind}": part.movedim(0, -1) for name, part in parts.items()}
    assert len(found) == 2 * 4 * {"mixtral": 3, "gpt_oss": 6}[family]
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def fp8_tensors(model: PreTrainedModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in stored_shapes(model).items():
        tensors[name] = (dtype, shape)
        if name.endswith("_proj.weight"):
            tensors[name] = ("F8_E4M3", shape)
            tensors[f"{name}_scale_inv"] = ("F32", tuple(-(-size // 128) for size in shape))
    return tensors


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_fp8_with_scales_of_blocks(tmp_path: Path) -> None:
    model = meta_model("qwen3", **(SIZES | {"hidden_size": 192, "head_dim": 48}))
    tensors = fp8_tensors(model)
    result = planned(write_skeleton(tmp_path, model.config.to_dict() | {"quantization_config": FP8}, tensors))
    recipes = {recipe.source: recipe for recipe in result.recipes}
    assert recipes.keys() == {name for name in tensors if not name.endswith("_scale_inv")}
    name = "model.layers.0.mlp.up_proj.weight"
    assert recipes[name].scale == f"{name}_scale_inv"
    assert len(result.packed) == 2 * PROJECTIONS


BAD_FP8 = {
    "a scale is missing": (lambda t: t.pop("{}_scale_inv"), r"no tensor \S+_scale_inv, which decodes"),
    "a scale of another shape": (
        lambda t: t.update({"{}_scale_inv": ("F32", (3, 3))}),
        r"is F32 of shape \(3, 3\), expected F32 or F8_E8M0 of shape \(1, 1\)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FP8.values(), ids=BAD_FP8)
def test_fp8_that_cannot_be_decoded_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    model = meta_model("qwen3", **SIZES)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {key.replace(name, "{}"): value for key, value in fp8_tensors(model).items()}
    damage(tensors)
    tensors = {key.replace("{}", name): value for key, value in tensors.items()}
    write_skeleton(tmp_path, model.config.to_dict() | {"quantization_config": FP8}, tensors)
    with pytest.raises(CheckpointError, match=message):
        planned(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq"}, r"config\.json: the model is quantized already \(gptq\); expected 16 or 32-bit"),
        ({"quant_method": "bitsandbytes"}, r"quantized already \(bitsandbytes\)"),
        ({"quant_method": "compressed-tensors"}, r"quantized already \(compressed-tensors\)"),
        ({"quant_method": "fp8"}, r"quantized already \(fp8\) with weight_block_size None, expected \[128, 128\]"),
        ("torchao", r"quantized already \(torchao\)"),
    ],
)
def test_other_quantized_sources_are_refused_by_name(quantization: Any, message: str, tmp_path: Path) -> None:
    model = meta_model("llama", **SIZES)
    config = model.config.to_dict() | {"quantization_config": quantization}
    with pytest.raises(CheckpointError, match=message):
        planned(write_skeleton(tmp_path, config, stored_shapes(model)))


BAD_MODELS = {
    "unknown to transformers": ({"model_type": "abacus"}, "model_type is 'abacus', which transformers does not know"),
    "no language model": ({"model_type": "vit"}, "of which transformers builds no language model"),
    "of another family": ({"model_type": "bert"}, r"config\.json: no tensor for bert\.encoder\.layer\.0\."),
    "settings that do not fit": (
        {"model_type": "apertus", "num_attention_heads": 0},
        "transformers cannot build the model: ",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_models_without_a_known_structure_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = meta_model("llama", **SIZES)
    with pytest.raises(CheckpointError, match=message):
        planned(write_skeleton(tmp_path, model.config.to_dict() | changes, stored_shapes(model)))


def test_weights_that_cannot_be_packed_are_refused(tmp_path: Path) -> None:
    model = meta_model("llama", **SIZES)
    tensors = stored_shapes(model) | {"model.layers.1.mlp.up_proj.weight": ("I64", (96, 64))}
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is I64, expected BF16, F16, F32"
    ):
        planned(write_skeleton(tmp_path, model.config.to_dict(), tensors))


def test_a_layer_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    model = meta_model("mixtral", **TINY["mixtral"])
    tensors = stored_shapes(model)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight"):
        planned(write_skeleton(tmp_path, model.config.to_dict(), tensors))


def test_experts_that_are_stored_twice_are_refused(tmp_path: Path) -> None:
    model = meta_model("mixtral", **TINY["mixtral"])
    tensors = stored_shapes(model) | stored_shapes(model, fused=True)
    with pytest.raises(CheckpointError, match=r"\.\S+ is stored twice, by itself and in one tensor of experts"):
        planned(write_skeleton(tmp_path, model.config.to_dict(), tensors))


def test_fp8_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    model = meta_model("mixtral", **TINY["mixtral"])
    tensors = stored_shapes(model, fused=True) | {"model.layers.0.mlp.experts.down_proj": ("F8_E4M3", (4, 64, 96))}
    with pytest.raises(CheckpointError, match=r"down_proj is F8_E4M3 of shape \(4, 64, 96\), expected \(out_features"):
        planned(write_skeleton(tmp_path, model.config.to_dict() | {"quantization_config": FP8}, tensors))


def test_the_output_embedding_is_packed_when_asked_for(tmp_path: Path) -> None:
    model = meta_model("llama", **SIZES, tie_word_embeddings=False)
    result = planned(skeleton(tmp_path / "untied", model), pack_lm_head=True)
    assert result.packed["lm_head.weight"] == (128, 64)
    assert result.skip_modules == ()
    assert landed(result, model) == replaced(model, [])
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = meta_model("gemma3", text_config=SIZES, vision_config=vision, tie_word_embeddings=False)
    assert "language_model.lm_head.weight" in planned(skeleton(tmp_path / "gemma3", model), pack_lm_head=True).packed
    skeleton(tmp_path / "tied", meta_model("llama", **SIZES, tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match="the output embedding is tied to the input embedding"):
        planned(tmp_path / "tied", pack_lm_head=True)


def test_chosen_settings_of_groups(tmp_path: Path) -> None:
    skeleton(tmp_path, meta_model("llama", **SIZES))
    coarse = Packing(256, double_quant=False)
    attention, mlp = "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"
    result = planned(tmp_path, chosen={attention: coarse, mlp: None})
    packings = {part.name: part.packing for recipe in result.recipes for part in recipe.parts}
    assert packings["model.layers.0.self_attn.k_proj.weight"] == coarse
    assert packings["model.layers.0.self_attn.o_proj.weight"] == Packing()
    assert result.kept["model.layers.1.mlp.up_proj.weight"] == "target bits"
    assert {mlp, "model.layers.1.mlp.up_proj"} <= set(result.skip_modules)
    assert set(groups(planned(tmp_path))) >= {attention, mlp, "model.layers.0.mlp.down_proj"}


def test_routed_experts_are_not_chosen_to_be_kept(tmp_path: Path) -> None:
    skeleton(tmp_path, meta_model("qwen3_moe", **TINY["qwen3_moe"]))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts is chosen to be kept, but vLLM reads"):
        planned(tmp_path, chosen={"model.layers.0.mlp.experts": None})


@pytest.mark.parametrize("family", ["gpt2", "gpt2 hub", "phi3", "gemma3", "olmo2"])
def test_what_is_packed_loads_in_stock_transformers(family: str, tmp_path: Path) -> None:
    """The loaded model computes what the source's does with the weights that bitsandbytes decodes."""
    torch.manual_seed(0)
    # All in_features are multiples of 64: of others bitsandbytes' CPU kernel reads rows with a wrong stride.
    family, _, hub = family.partition(" ")
    settings: dict[str, Any] = OTHERS.get(family, SIZES | {"intermediate_size": 128})
    if family == "gemma3":
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        settings = {"text_config": settings, "vision_config": vision, "mm_tokens_per_image": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    if hub:  # where GPT-2 was saved from the model inside, with its masks
        source = load_file(tmp_path / "source" / "model.safetensors")
        source = {name.removeprefix("transformer."): value for name, value in source.items()}
        source["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        save_file(source, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    result = qpack.convert(tmp_path / "source", tmp_path / "packed").result
    transposed = Manifest.read(tmp_path / "packed").transposed
    assert len(transposed) == (8 if family == "gpt2" else 0)
    decoded = decode(tmp_path / "packed", torch.float32)
    decoded |= {name: decoded[name].T.contiguous() for name in transposed}
    (tmp_path / "decoded").mkdir()
    save_file(decoded, tmp_path / "decoded" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "decoded" / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
    packed, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, device_map="cpu") for name in ("packed", "decoded")
    )
    modules = [(name, module) for name, module in packed.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(modules) == len(result.packed)
    for name, module in modules:
        weight = expected.get_parameter(f"{name}.weight")
        conv = type(expected.get_submodule(name)).__name__ == "Conv1D"
        read = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(read, weight.T if conv else weight), name
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        ours, theirs, plain = (one.eval()(input_ids=ids).logits for one in (packed, expected, model))
    # bitsandbytes' CPU kernel multiplies in bf16: four ulps of the largest logit over the layers.
    assert (ours - theirs).abs().max() <= theirs.abs().max() * 2**-6
    assert (plain - theirs).abs().max() > 10 * (ours - theirs).abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
def test_vllm_skips_what_transformers_skips(tmp_path: Path) -> None:
    """vLLM's names are those on the hub, with q, k and v, or gate and up, in one module."""
    from vllm_bnb_plugin.quantization.utils import is_layer_skipped_bnb  # type: ignore[import-untyped]

    chosen: dict[str, Packing | None] = {
        "model.layers.1.self_attn.qkv_proj": None,
        "model.layers.0.mlp.down_proj": None,
    }
    skeleton(tmp_path / "llama", meta_model("llama", **(SIZES | {"num_hidden_layers": 12})))
    skip = list(planned(tmp_path / "llama", chosen=chosen).skip_modules)
    modules = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    names = [f"model.layers.{layer}.{module}" for layer in range(12) for module in modules]
    assert {name for name in names if is_layer_skipped_bnb(name, skip)} == set(chosen)
    assert is_layer_skipped_bnb("lm_head", skip)

    skeleton(tmp_path / "mixtral", meta_model("mixtral", **TINY["mixtral"]))
    skip = list(planned(tmp_path / "mixtral").skip_modules)
    assert is_layer_skipped_bnb("model.layers.1.block_sparse_moe.gate", skip)
    assert not is_layer_skipped_bnb("model.layers.1.block_sparse_moe.experts", skip)

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    skeleton(tmp_path / "gemma3", meta_model("gemma3", text_config=SIZES, vision_config=vision))
    skip = list(planned(tmp_path / "gemma3").skip_modules)
    assert is_layer_skipped_bnb("vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj", skip)
    assert is_layer_skipped_bnb("multi_modal_projector.linear", skip)
    assert not is_layer_skipped_bnb("language_model.model.layers.0.self_attn.qkv_proj", skip)
