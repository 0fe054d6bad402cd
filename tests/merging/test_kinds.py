"""Every kind of adapter, merged by qpack and by stock PEFT in f64: the same bits, once rounded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora import draw_adapter, rounded, tensors
from moe import write_source
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import write_llama
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

import qpack
from qpack.errors import AdapterError, CheckpointError, OutputExistsError

# PEFT warns of tied embeddings that change alone, and of the copies that it saves; both are what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def peft_in_f64(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT's merged model holds, in f64. Embeddings are untied, as merging in place would change both."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    tied = model.config.tie_word_embeddings
    head = model.get_output_embeddings()
    if tied and not json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    adapted = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    merged: Any = adapted.double().merge_and_unload()
    return {name: tensor.contiguous() for name, tensor in merged.state_dict().items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Path]:
    """Plain bases by name. Read only."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 256, "eos_token_id": 257}
    gpt2 = GPT2Config(**sizes, n_layer=1, n_embd=64, n_head=2)
    heads: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    qwen2 = Qwen2Config(**sizes, **heads, hidden_size=128, intermediate_size=192)
    for name, config in (("gpt2", gpt2), ("qwen2", qwen2)):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
    fused = write_source("mixtral", folder / "mixtral", "fused")
    return {
        "tied": llama,
        "untied": write_llama(folder / "untied", tied=False),
        "gpt2": folder / "gpt2",
        "qwen2": folder / "qwen2",
        "mixtral": fused,
        "gpt_oss": write_source("gpt_oss", folder / "gpt_oss"),
    }


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("untied", {"target_modules": "all-linear"}),
    "rslora and patterns": (
        "untied",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"up_proj": 9},
        },
    ),
    "dora": ("untied", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora of an embedding": ("untied", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding": ("untied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("tied", {"target_modules": ["lm_head"]}),
    "both of tied": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "saved modules": ("untied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "saved head of tied": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1]}),
    "tokens of both": (
        "untied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}},
    ),
    "all biases": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "biases beside factors": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "fan in, fan out": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora, fan in, fan out": ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize(("base", "settings"), KINDS.values(), ids=KINDS)
def test_every_kind_is_peft_s_in_f64_rounded_once(
    base: str, settings: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = draw_adapter(tmp_path / "adapter", bases[base], **settings)
    qpack.merge(bases[base], adapter, tmp_path / "merged")
    merged, expected = tensors(tmp_path / "merged"), peft_in_f64(bases[base], adapter)
    tied = json.loads((tmp_path / "merged" / "config.json").read_text()).get("tie_word_embeddings", True)
    assert expected.keys() - merged.keys() == ({"lm_head.weight"} if tied and base != "untied" else set())
    changed = 0
    plain = tensors(bases[base])
    for name, weight in merged.items():
        want = rounded(expected[name if name in expected else f"transformer.{name}"])
        differ = (weight != want).float().mean().item()
        # DoRA's norms and PEFT's products in f64 are summed in another order: on a tie of the rounding they may differ.
        assert differ == 0, (name, differ)
        changed += name not in plain or not torch.equal(weight, plain[name])
    assert changed > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("base", ["mixtral", "gpt_oss"])
def test_fused_experts_are_merged_by_expert(base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = draw_adapter(tmp_path / "adapter", bases[base], target_modules=["q_proj"], target_parameters=parameters)
    report = qpack.merge(bases[base], adapter, tmp_path / "merged")
    assert any(name.endswith("gate_up_proj") for name in report.effects)
    expected = peft_in_f64(bases[base], adapter)
    for name, weight in tensors(tmp_path / "merged").items():
        assert torch.equal(weight, rounded(expected[name])), name


def test_a_packed_gpt2_is_written_as_stock_checkpoints_have_it(bases: dict[str, Path], tmp_path: Path) -> None:
    qpack.convert(bases["gpt2"], tmp_path / "packed")
    adapter = draw_adapter(tmp_path / "adapter", tmp_path / "packed", target_modules=r".*\.attn\.c_proj")
    qpack.merge(tmp_path / "packed", adapter, tmp_path / "merged", dtype="float32")
    ids = torch.arange(48)[None]
    loaded = PeftModel.from_pretrained(qpack.load(tmp_path / "packed", dtype=torch.float32), str(adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (merged(ids).logits - loaded(ids).logits).abs().max() < 1e-4  # f32 in another order


def test_packed_experts_of_gpt_oss_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    qpack.convert(bases["gpt_oss"], tmp_path / "packed")
    adapter = draw_adapter(tmp_path / "adapter", bases["gpt_oss"], target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"of one expert, .* merge onto the original instead, in 16 bits"):
        qpack.merge(tmp_path / "packed", adapter, tmp_path / "merged")
    qpack.merge(tmp_path / "packed", adapter, tmp_path / "merged", original=bases["gpt_oss"])


def test_onto_the_original_the_adapter_changes_what_the_base_was_packed_from(
    packed: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = draw_adapter(tmp_path / "adapter", bases["tied"], target_modules="all-linear")
    qpack.merge(packed, adapter, tmp_path / "merged", original=bases["tied"])
    expected = peft_in_f64(bases["tied"], adapter)
    for name, weight in tensors(tmp_path / "merged").items():
        assert torch.equal(weight, rounded(expected[name]))
    with pytest.raises(CheckpointError, match="is packed, expected the checkpoint that the base was packed from"):
        qpack.merge(packed, adapter, tmp_path / "other", original=packed)


def test_weighted_adapters_add_up(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["untied"]
    one = draw_adapter(tmp_path / "one", base, target_modules=["q_proj"])
    two = draw_adapter(tmp_path / "two", base, target_modules=["q_proj", "up_proj"], r=2)
    qpack.merge(base, [(one, 0.5), (two, -2.0)], tmp_path / "merged")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), str(one), "one", autocast_adapter_dtype=False
    )
    model.load_adapter(str(two), "two", autocast_adapter_dtype=False)
    model.double()
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    expected = model.double().merge_and_unload().state_dict()
    for name, weight in tensors(tmp_path / "merged").items():
        assert torch.equal(weight, rounded(expected[name])), name
    saved = draw_adapter(tmp_path / "saved", base, target_modules=["k_proj"], modules_to_save=["q_proj"])
    with pytest.raises(AdapterError, match=r"q_proj\.weight, which another adapter changes too"):
        qpack.merge(base, [(one, 1.0), (saved, 1.0)], tmp_path / "no")


def test_a_copied_embedding_must_be_the_base_s(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = draw_adapter(tmp_path / "adapter", bases["untied"], target_modules=["embed_tokens"])
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.model.embed_tokens.base_layer.weight"][3] += 1
    save_file(weights, file)
    with pytest.raises(AdapterError, match=r"base_layer\.weight is not model\.embed_tokens\.weight of the base"):
        qpack.merge(bases["untied"], adapter, tmp_path / "merged")


def test_a_plan_writes_nothing_and_says_what_merge_writes(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = draw_adapter(tmp_path / "adapter", bases["tied"], target_modules=["lm_head"])
    plan = qpack.plan_merge(bases["tied"], adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    report = qpack.merge(bases["tied"], adapter, tmp_path / "merged")
    assert plan.merged == report.merged == 1
    assert {name: (tmp_path / "merged" / name).stat().st_size for name, _ in plan.files} == dict(plan.files)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "fingerprint" in card
    assert "weight 1" in card
    with pytest.raises(OutputExistsError):
        qpack.merge(bases["tied"], adapter, tmp_path / "merged")


def test_what_a_16_bit_model_keeps_in_f32_stays_so(tmp_path: Path) -> None:
    base = write_source("deepseek_v3", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("e_score_correction_bias"))
    weights[name] = weights[name].float() + 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = draw_adapter(tmp_path / "adapter", base, target_modules=["o_proj"])
    qpack.merge(base, adapter, tmp_path / "merged")
    assert torch.equal(tensors(tmp_path / "merged")[name], weights[name])


def test_an_interrupted_merge_goes_on_and_ends_in_the_same_bytes(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = draw_adapter(tmp_path / "adapter", bases["untied"], target_modules="all-linear")
    small: dict[str, Any] = {"max_shard_size": "500kB", "threads": 1}

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qpack.merge(bases["untied"], adapter, tmp_path / "merged", on_progress=interrupt, **small)
    assert not (tmp_path / "merged").exists()
    report = qpack.merge(bases["untied"], adapter, tmp_path / "merged", **small)
    assert report.resumed_bytes > 0
    qpack.merge(bases["untied"], adapter, tmp_path / "at-once", **small)
    for path in (tmp_path / "at-once").iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()
