"""Rules on names: what they change, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from skeleton import SIZES, meta_model, skeleton, stored_shapes, write_skeleton

from qpack.checkpoint import Checkpoint
from qpack.errors import DataError
from qpack.policy.modules import Plan, plan
from qpack.policy.plan import Packing, Part
from qpack.policy.rules import Rules
from qpack.policy.skipping import skips

MIXTRAL = SIZES | {"num_local_experts": 4}
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = meta_model("llama", **(SIZES | {"num_hidden_layers": 11}), tie_word_embeddings=False)
    return skeleton(tmp_path_factory.mktemp("rules") / "llama", model)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return skeleton(tmp_path_factory.mktemp("rules") / "mixtral", meta_model("mixtral", **MIXTRAL))


def rules(directory: Path, text: str) -> Rules:
    path = directory / "rules.toml"
    path.write_text(text)
    return Rules.read(path)


def followed(source: Path, text: str, tmp_path: Path) -> Plan:
    return plan(Checkpoint.open(source), packing=Packing(), rules=rules(tmp_path, text))


def parts(result: Plan) -> dict[str, Part]:
    return {part.name: part for recipe in result.recipes for part in recipe.parts}


def test_the_first_rule_that_matches_decides(llama: Path, tmp_path: Path) -> None:
    text = """
    [[rule]]
    match = "model.layers.0.mlp.down_proj.weight"
    keep = true
    dtype = "float32"

    [[rule]]
    match = "*.down_proj.weight"
    blocksize = 128

    [[rule]]
    match = "model.layers.?.*_proj.weight"
    double_quant = false

    [[rule]]
    match = "*norm.weight"
    dtype = "float32"
    """
    result = followed(llama, text, tmp_path)
    found = parts(result)
    down = found[f"{LAYER}.mlp.down_proj.weight"]
    assert (down.packing, down.dtype) == (None, "float32")
    assert down.reason == "rule keep: model.layers.0.mlp.down_proj.weight"
    assert found["model.layers.1.mlp.down_proj.weight"].packing == Packing(128, double_quant=True)
    assert found["model.layers.9.self_attn.q_proj.weight"].packing == Packing(64, double_quant=False)
    assert found["model.layers.10.self_attn.q_proj.weight"].packing == Packing()
    assert found["model.norm.weight"].dtype == "float32"
    assert found["model.embed_tokens.weight"].dtype is None
    assert result.skip_modules == ("lm_head", "model.layers.0.mlp.down_proj")


def test_a_layer_that_is_kept_does_not_take_others_with_it(llama: Path, tmp_path: Path) -> None:
    """transformers takes an entry for the start of a name: model.layers.1 is in model.layers.10 too."""
    result = followed(llama, '[[rule]]\nmatch = "model.layers.1.*"\nkeep = true', tmp_path)
    skipped = {
        name
        for name in parts(result)
        if any(skips(entry, name.removesuffix(".weight")) for entry in result.skip_modules) and "_proj" in name
    }
    assert skipped == {name for name in parts(result) if name.startswith("model.layers.1.") and "_proj" in name}
    assert "model.layers.1.self_attn.qkv_proj" in result.skip_modules
    assert "model.layers.1.mlp.gate_up_proj" in result.skip_modules
    assert "model.layers.10.self_attn.q_proj.weight" in result.packed


def test_experts_are_kept_or_packed_by_layer(mixtral: Path, tmp_path: Path) -> None:
    text = f"""
    [[rule]]
    match = "{LAYER}.block_sparse_moe.experts.*"
    keep = true

    [[rule]]
    match = "*.experts.*"
    blocksize = 32
    """
    result = followed(mixtral, text, tmp_path)
    experts = [part for name, part in parts(result).items() if ".experts." in name]
    kept = [part for part in experts if part.packing is None]
    assert len(experts) == 2 * len(kept) == 2 * 3 * 4
    assert all(part.name.startswith(LAYER) and part.reason.startswith("rule keep") for part in kept)
    assert {part.packing for part in experts if part.packing} == {Packing(32)}
    assert {f"{LAYER}.block_sparse_moe.experts", f"{LAYER}.mlp.experts"} < set(result.skip_modules)


def test_what_is_kept_by_default_can_be_packed(llama: Path, tmp_path: Path) -> None:
    result = followed(llama, '[[rule]]\nmatch = "lm_head.weight"\npack = true\nblocksize = 32', tmp_path)
    assert parts(result)["lm_head.weight"].packing == Packing(32)
    assert result.skip_modules == ()


def test_names_of_experts_in_one_tensor_are_those_of_the_outputs(tmp_path: Path) -> None:
    skeleton(tmp_path / "fused", meta_model("mixtral", **MIXTRAL), fused=True)
    text = f'[[rule]]\nmatch = "{LAYER}.block_sparse_moe.experts.*.w?.weight"\nblocksize = 128'
    result = followed(tmp_path / "fused", text, tmp_path)
    assert sum(part.packing == Packing(128) for part in parts(result).values()) == 3 * 4


KEEP = "\nkeep = true\n"
BAD_RULES = {
    "unknown key": ('[[rule]]\nmatch = "*"\nkep = true', r"rule 1 \('\*'\) has the unknown key 'kep', expected match,"),
    "no pattern": ("[[rule]]\nkeep = true", "rule 1 has no match, expected a pattern of names"),
    "not TOML": ("[[rule]", "not valid TOML"),
    "no rules": ("", r"expected a list of \[\[rule\]\] and nothing else, found none"),
    "another table": ('[[rule]]\nmatch = "*"\nkeep = true\n[model]', "nothing else, found model"),
    "another type": ('[[rule]]\nmatch = "*"\nblocksize = true', "blocksize is True, expected int"),
    "blocksize": ('[[rule]]\nmatch = "*"\nblocksize = 48', "blocksize is 48, expected one of 32, 64"),
    "dtype": ('[[rule]]\nmatch = "*"\nkeep = true\ndtype = "int8"', "dtype is 'int8', expected one of bfloat16"),
    "keeps and packs": ('[[rule]]\nmatch = "*"\nkeep = true\nblocksize = 32', "keeps and packs"),
    "packs into floats": ('[[rule]]\nmatch = "*"\npack = true\ndtype = "float16"', "packs, so dtype has no meaning"),
    "says nothing": ('[[rule]]\nmatch = "*"\nkeep = false', "says nothing of what it matches"),
    "matches nothing": (f'[[rule]]\nmatch = "layers.*"{KEEP}', r"rule 1 \('layers\.\*'\) matches no tensor"),
    "shadowed": (
        f'[[rule]]\nmatch = "model.layers.0.*"{KEEP}[[rule]]\nmatch = "model.layers.0.mlp.*"{KEEP}',
        r"rule 2 \('model\.layers\.0\.mlp\.\*'\) matches only what rules before it decide",
    ),
    "changes nothing": (f'[[rule]]\nmatch = "model.norm.weight"{KEEP}', "changes nothing of what it matches"),
    "packs a norm": ('[[rule]]\nmatch = "*norm*"\npack = true', r"packs \S+norm\.weight, which is norm"),
    "splits q, k, v": (
        f'[[rule]]\nmatch = "*.v_proj.weight"{KEEP}',
        r"rule 1 \('\*\.v_proj\.weight'\) stores model\.layers\.0\.self_attn\.v_proj\.weight otherwise than "
        r"model\.layers\.0\.self_attn\.\w_proj\.weight, with which vLLM fuses it into \S+\.self_attn\.qkv_proj",
    ),
    "splits gate, up": (f'[[rule]]\nmatch = "*.gate_proj.weight"{KEEP}', r"fuses it into \S+\.gate_up_proj"),
}


@pytest.mark.parametrize(("text", "message"), BAD_RULES.values(), ids=BAD_RULES)
def test_bad_rules_are_refused(text: str, message: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path}/rules\.toml: .*{message}"):
        followed(llama, text, tmp_path)


@pytest.mark.parametrize("change", ["blocksize = 32", "double_quant = false", "keep = true"])
def test_experts_of_a_layer_are_stored_alike(change: str, mixtral: Path, tmp_path: Path) -> None:
    message = r"rule 1 .* with which vLLM fuses it into model\.layers\.0\.block_sparse_moe\.experts"
    with pytest.raises(DataError, match=message):
        followed(mixtral, f'[[rule]]\nmatch = "{LAYER}.*.w2.weight"\n{change}', tmp_path)


def test_a_tied_output_embedding_is_not_packed(tmp_path: Path) -> None:
    model = meta_model("llama", **SIZES, tie_word_embeddings=True)
    tensors = stored_shapes(model) | {"lm_head.weight": ("BF16", (128, 64))}
    write_skeleton(tmp_path / "tied", model.config.to_dict(), tensors)
    with pytest.raises(DataError, match=r"packs lm_head\.weight, which is tied to another weight"):
        followed(tmp_path / "tied", '[[rule]]\nmatch = "lm_head*"\npack = true', tmp_path)


def test_experts_that_only_4_bit_readers_know_are_not_kept(tmp_path: Path) -> None:
    settings: dict[str, Any] = SIZES | {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}
    skeleton(tmp_path / "gpt_oss", meta_model("gpt_oss", **settings))
    with pytest.raises(
        DataError, match=r"keeps \S+experts\.0\.gate_proj\.weight, an expert that is read in 4 bits only"
    ):
        followed(tmp_path / "gpt_oss", f'[[rule]]\nmatch = "*.experts.*"{KEEP}', tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rules\.toml: No such file"):
        Rules.read(tmp_path / "rules.toml")
