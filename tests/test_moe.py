"""Packed experts in transformers, PEFT and vLLM, against the stock models on the weights that they decode to."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from moe import FAMILIES, LAYOUTS, decode, decoded_model, write_source
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import qpack
from qpack import AdapterError, CheckpointError, TrainSettings
from qpack.adapters.trained import changes
from qpack.loading.experts import Experts, Projections
from qpack.loading.names import Names
from qpack.training.model import add_lora

TOKENS = torch.arange(5, 69).reshape(2, 32)

# Float32 sums in another order: transformers multiplies all experts' rows by one grouped kernel and gate and up as one
# matrix. Seen: 1.7e-6 on logits of 5, and on gradients 2e-7 of the largest.
TOLERANCE = 1e-5


CASES = [*FAMILIES, *(f"{family} {layout}" for family, layout in LAYOUTS.items())]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of `CASES` packed by qpack, ``olmoe`` by mode best, beside its source. Read only."""
    folder = tmp_path_factory.mktemp("moe")
    for case in CASES:
        family, _, layout = case.partition(" ")
        write_source(family, source_of(folder / case), layout)
        qpack.convert(source_of(folder / case), folder / case, mode="best" if case == "olmoe" else "exact")
    return {case: folder / case for case in CASES}


def source_of(packed: Path) -> Path:
    return packed.with_name(f"{packed.name}-source")


def copy_with(packed: Path, directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same checkpoint with other tensors."""
    directory.mkdir()
    (directory / "config.json").write_bytes((packed / "config.json").read_bytes())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_computes_what_the_stock_model_computes_on_the_decoded_weights(case: str, checkpoints: dict[str, Path]) -> None:
    packed = checkpoints[case]
    loaded = qpack.load(packed, dtype=torch.float32)
    for layer in loaded.modules():
        if isinstance(layer, Linear4bit):  # whose backward pass would round the weights to the source's bf16
            cast(Params4bit, layer.weight).quant_state.dtype = torch.float32
    gradients, logits = [], []
    for model in (loaded, decoded_model(packed)):
        embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        logits.append(model(inputs_embeds=embeddings).logits)
        logits[-1].square().mean().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=TOLERANCE)
    assert logits[1].std() > 0.5  # not compared on nothing
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=TOLERANCE * gradients[1].abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_packed_weight_is_a_4bit_layer_and_nothing_else_is(family: str, checkpoints: dict[str, Path]) -> None:
    weights = load_file(checkpoints[family] / "model.safetensors")
    packed = {name: codes for name, codes in weights.items() if f"{name}.absmax" in weights}
    assert any(".experts." in name for name in packed)
    model = qpack.load(checkpoints[family])
    names = Names(model)
    by_name = {
        names.in_checkpoint(f"{name}.weight"): cast(Params4bit, layer.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, Linear4bit)
    }
    assert by_name.keys() == packed.keys()
    assert all(torch.equal(weight.data, packed[name]) for name, weight in by_name.items())
    layers = by_name.values()
    assert all(weight.dtype == torch.uint8 and weight.quant_state.nested for weight in layers)
    assert all(weight.quant_state.offset.dtype == torch.float32 for weight in layers)
    assert not any(parameter.dim() > 2 for name, parameter in model.named_parameters() if ".experts." in name)


def test_packed_from_experts_in_one_tensor_is_packed_from_the_layout_of_the_hub(checkpoints: dict[str, Path]) -> None:
    found, expected = (load_file(checkpoints[case] / "model.safetensors") for case in ("mixtral fused", "mixtral"))
    source = load_file(source_of(checkpoints["mixtral fused"]) / "model.safetensors")
    assert "model.layers.1.mlp.experts.gate_up_proj" in source
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_the_report_says_what_is_kept_and_who_loads_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    report = qpack.convert(source_of(checkpoints["qwen2_moe"]), tmp_path / "packed")
    assert report.foreign == ("routed experts",)
    reasons = {tensor.name: tensor.reason for tensor in report.result.tensors if tensor.reason}
    routers = {f"model.layers.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in ("gate", "shared_expert_gate")}
    assert {name for name, reason in reasons.items() if reason == "router"} == routers
    assert Counter(reasons.values()) == {
        "router": 4,
        "norm": 5,
        "bias": 6,  # of q, k and v
        "input embedding": 1,
        "output embedding": 1,
    }
    assert len(report.result.packed) == 2 * (4 + 3 + 3 * 8)  # attention, the shared expert, eight experts
    skipped = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert set(skipped["llm_int8_skip_modules"]) == {"lm_head", *(name.removesuffix(".weight") for name in routers)}


@pytest.mark.parametrize("keep", ["model.layers.1.block_sparse_moe.experts.", "model.layers.0.self_attn."])
def test_what_the_checkpoint_keeps_stays(keep: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(f'[[rule]]\nmatch = "{keep}*"\nkeep = true\n')
    packed = tmp_path / "packed"
    qpack.convert(source_of(checkpoints["mixtral"]), packed, rules=tmp_path / "rules.toml")
    kept = [name for name in load_file(packed / "model.safetensors") if name.startswith(keep)]
    assert kept
    assert all(name.endswith(".weight") for name in kept)
    with torch.no_grad():
        found = qpack.load(packed, dtype=torch.float32)(TOKENS).logits
        torch.testing.assert_close(found, decoded_model(packed)(TOKENS).logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, None])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_dtype_of_what_is_not_packed(family: str, dtype: torch.dtype | None, checkpoints: dict[str, Path]) -> None:
    # transformers itself leaves what it renames in the dtype of the file, bf16 here: Mixtral's router.
    model = qpack.load(checkpoints[family], dtype=dtype)
    expected = dtype or torch.bfloat16
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("e_score_correction_bias", "inv_freq")):
            assert tensor.dtype == torch.float32, name
        elif tensor.is_floating_point():
            assert tensor.dtype == expected, name
    assert {layer.compute_dtype for layer in model.modules() if isinstance(layer, Linear4bit)} == {expected}


def test_declares_plain_bitsandbytes(checkpoints: dict[str, Path]) -> None:
    model: Any = qpack.load(checkpoints["mixtral"])
    assert model.is_loaded_in_4bit
    assert model.config.quantization_config.quant_method == model.quantization_method == "bitsandbytes"
    assert model.config.quantization_config.load_in_4bit


def test_passes_on_what_from_pretrained_takes(checkpoints: dict[str, Path]) -> None:
    model: Any = qpack.load(str(checkpoints["mixtral"]), attn_implementation="eager", device_map={"": "cpu"})
    assert model.config._attn_implementation == "eager"


@pytest.mark.gpu
def test_computes_the_same_on_a_gpu(checkpoints: dict[str, Path]) -> None:
    for family in ("mixtral", "gpt_oss"):
        with torch.no_grad():
            found = qpack.load(checkpoints[family], dtype=torch.float32)(TOKENS.cuda()).logits.cpu()
            expected = decoded_model(checkpoints[family])(TOKENS).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # TF32 and another order of sums


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_missing_expert_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["mixtral"] / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if ".layers.1.block_sparse_moe.experts.3." not in name}
    message = r"lacking: missing keys: model\.layers\.1\.mlp\.experts\.3\.w1\.weight, .*w2\.weight, .*w3\.weight$"
    with pytest.raises(CheckpointError, match=message):
        qpack.load(copy_with(checkpoints["mixtral"], tmp_path / "lacking", lacking))


def test_long_lists_are_cut(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["mixtral"] / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if ".layers.1.block_sparse_moe.experts." not in name}
    with pytest.raises(CheckpointError, match=r"missing keys: \S+, \S+, \S+ and 9 more$"):
        qpack.load(copy_with(checkpoints["mixtral"], tmp_path / "lacking", lacking))


def test_model_that_is_not_packed_is_refused(checkpoints: dict[str, Path]) -> None:
    source = source_of(checkpoints["mixtral"])
    with pytest.raises(
        CheckpointError, match=r"expected quant_method 'bitsandbytes' in quantization_config, found None"
    ):
        qpack.load(source)


def test_experts_in_a_dense_model_are_refused(packed: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    experts = load_file(checkpoints["qwen3_moe"] / "model.safetensors")
    tensors = load_file(packed / "model.safetensors") | {name: t for name, t in experts.items() if ".experts." in name}
    with pytest.raises(
        CheckpointError, match=r"mixed: LlamaForCausalLM: holds no experts in the form that can be loaded"
    ):
        qpack.load(copy_with(packed, tmp_path / "mixed", tensors))


def test_experts_without_a_gate_are_refused() -> None:
    config = SimpleNamespace(
        n_routed_experts=2, hidden_size=64, moe_latent_size=None, moe_intermediate_size=64, mlp_hidden_act="relu2"
    )
    with pytest.raises(CheckpointError, match=r"^NemotronHExperts: experts without a gate cannot be loaded packed$"):
        Experts(NemotronHExperts(config), Projections())


def test_experts_with_other_parameters_are_refused() -> None:
    fused = torch.nn.Module()
    fused.down_proj = torch.nn.Parameter(torch.empty(2, 64, 64))
    fused.scale = torch.nn.Parameter(torch.empty(2))
    for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated"):
        setattr(fused, flag, True)
    with pytest.raises(CheckpointError, match=r"^Module: experts with a parameter scale cannot be loaded packed$"):
        Experts(fused, Projections())


# ---- training -------------------------------------------------------------------------------------------------------


def adapted(packed: Path, dtype: torch.dtype | None = torch.float32, **settings: Any) -> PeftModel:
    """The model with fresh LoRA of rank 4, as a user of PEFT would make it."""
    set_seed(0)
    base = qpack.load(packed, dtype=dtype)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | settings)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model


def train(model: PeftModel, steps: int = 8) -> Iterator[float]:
    """Learn two lines by heart; yields the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=TOKENS).logits
    return result


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_lora_on_experts_trains_and_comes_back(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(checkpoints[family])
    targets = cast(LoraConfig, model.peft_config["default"]).target_modules
    assert set(targets or ()) >= ({"w1", "w2", "w3"} if family == "mixtral" else {"gate_proj", "up_proj", "down_proj"})
    losses = list(train(model))
    assert losses[-1] < 0.6 * losses[0]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and ".experts." in name}
    experts = sum(isinstance(layer, Linear4bit) for name, layer in model.named_modules() if ".experts." in name)
    assert len(gradients) == 2 * experts
    # With 64 tokens and two experts a token, every expert of these models was chosen at least once.
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())

    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(qpack.load(checkpoints[family], dtype=torch.float32), str(tmp_path))
    assert torch.equal(logits(again), logits(model))


def test_trains_in_the_dtype_of_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    losses = list(train(adapted(checkpoints["deepseek_v3"], dtype=None)))
    assert losses[-1] < 0.6 * losses[0]


def test_single_projections_can_be_adapted(checkpoints: dict[str, Path]) -> None:
    model = adapted(checkpoints["mixtral"], target_modules=["w1"])  # stock PEFT asks for w3 as well
    adapters = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(adapters) == 2 * 2 * 4  # A and B, layers, experts
    assert all(re.search(r"\.experts\.\d\.w1\.lora_", name) for name in adapters)


def test_target_parameters_are_refused(checkpoints: dict[str, Path]) -> None:
    message = r"^target_parameters is \['down_proj'\], but the experts of this model are Linear layers; name them in"
    with pytest.raises(AdapterError, match=message):
        adapted(checkpoints["mixtral"], target_modules=["q_proj"], target_parameters=["down_proj"])


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")  # PEFT's about its own
def test_peft_is_as_before_for_other_models(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    qpack.load(checkpoints["mixtral"])
    config = AutoConfig.from_pretrained(source_of(checkpoints["mixtral"]))
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules=["w1", "w2", "w3"]))
    assert set(cast(Any, model.peft_config["default"]).target_parameters) == {"gate_up_proj", "down_proj"}
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    base = model.unload()
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path))), expected)


@pytest.mark.skipif(
    not has_avx512bf16(),
    reason="bitsandbytes repacks only on processors with AVX512-BF16",
)
def test_evaluation_does_not_change_training(checkpoints: dict[str, Path]) -> None:
    expected = list(train(adapted(checkpoints["mixtral"]), steps=3))
    model = adapted(checkpoints["mixtral"])
    logits(model)
    assert list(train(model, steps=3)) == expected


def test_weights_stay_in_place(checkpoints: dict[str, Path]) -> None:
    layers = [layer for layer in qpack.load(checkpoints["mixtral"]).modules() if isinstance(layer, Linear4bit)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_qpack_train_adapts_experts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is the capital of France?", "completion": "Paris"}\n')
    settings = TrainSettings(r=4, lora_dropout=0.0, lr=1e-2, max_steps=6, batch_size=1, optim="adamw_torch")
    report = qpack.train(checkpoints["mixtral"], data, tmp_path / "adapter", settings)
    assert report.final_loss < report.first_loss
    # Under the names of the checkpoint, so that merge and vLLM find them; PEFT finds them too.
    adapter = qpack.Adapter.open(tmp_path / "adapter")
    changed = changes(adapter, qpack.Checkpoint.open(checkpoints["mixtral"]), ()).by_weight
    assert sum(".block_sparse_moe.experts." in name for name in changed) == 2 * 4 * 3
    base = qpack.load(checkpoints["mixtral"], dtype=torch.float32)
    fresh = logits(base)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(loaded) == len(weights)
    for name, parameter in loaded.items():
        saved = weights[name.replace(".default.", ".").replace(".mlp.", ".block_sparse_moe.")]
        assert torch.equal(parameter, saved)
    assert not torch.allclose(logits(model), fresh)

    qpack.merge(checkpoints["mixtral"], tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # x (W + B A) for x W + (x A) B in float32, with factors grown large: seen 4e-5 on logits of 10.
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=2e-4)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("case", ["gpt_oss", "gpt_oss mxfp4"])
def test_experts_that_16_bit_checkpoints_hold_otherwise_are_not_merged(
    case: str, recorded: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoints[case], base)
    if not recorded:
        (base / "qpack.json").unlink()
    adapted(base, target_modules=["q_proj"]).save_pretrained(str(tmp_path / "adapter"))
    message = (
        r"base: model\.layers\.0\.mlp\.experts\.\d\.\w+\.weight is of one expert, but 16-bit checkpoints of gpt_oss"
    )
    with pytest.raises(CheckpointError, match=message):
        qpack.merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_lora_of_training_is_on_every_expert(checkpoints: dict[str, Path]) -> None:
    model = add_lora(qpack.load(checkpoints["qwen3_moe"]), TrainSettings(r=2))
    adapters = {name for name, p in model.named_parameters() if p.requires_grad and ".experts." in name}
    assert len(adapters) == 8 * 3 * 2


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def in_vllm(packed: str, prompt: list[int]) -> tuple[dict[str, Any], list[int]]:
    """Load ``packed`` in vLLM's engine through its bitsandbytes plugin and answer. Runs in a process of its own.

    Returns, by name, the experts of every layer as the plugin decodes them, in float32, and how each router is
    quantized; and eight greedy tokens. The one piece that vLLM lacks on a CPU is the Triton kernel that multiplies
    decoded experts.
    """
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    import vllm.model_executor.layers.fused_moe as fused_moe
    from vllm import LLM, SamplingParams, TokensPrompt

    if not torch.cuda.is_available():
        setattr(fused_moe, "fused_experts", fused_experts_in_torch)  # noqa: B010  # of no other type in vLLM's view

    def read(model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, fused_moe.RoutedExperts):
                w13, w2 = cast(Any, layer.quant_method)._apply_4bit_dequnt(layer)
                found |= {f"{name}.w13": w13.float().cpu().numpy(), f"{name}.w2": w2.float().cpu().numpy()}
            elif isinstance(layer, fused_moe.GateLinear):
                found[name] = type(layer.quant_method).__name__
        return found

    engine = LLM(packed, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, max_num_seqs=1, seed=0)
    weights = engine.apply_model(read)[0]
    greedy = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
    answer = engine.generate(TokensPrompt(prompt_token_ids=prompt), greedy, use_tqdm=False)
    return weights, list(answer[0].outputs[0].token_ids)


def fused_experts_in_torch(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """What vLLM's kernel computes for SiLU experts."""
    result = torch.zeros_like(hidden_states)
    for expert in range(len(w1)):
        token, slot = torch.where(topk_ids == expert)
        gate, up = (hidden_states[token] @ w1[expert].T).chunk(2, dim=-1)
        output = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
        result.index_add_(0, token, (output * topk_weights[token, slot, None]).to(result.dtype))
    return result


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_vllm_reads_the_same_experts_and_answers_alike(family: str, checkpoints: dict[str, Path]) -> None:
    packed = checkpoints[family]
    prompt = list(range(10, 26))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        weights, tokens = pool.submit(in_vllm, str(packed), prompt).result()

    # The plugin decodes to the dtype of the source, and reads states under vLLM's default dtype, in which
    # QuantState.from_dict makes nested_offset: rounded to bf16.
    torch.set_default_dtype(torch.bfloat16)
    try:
        expected = decode(packed, torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    part = "block_sparse_moe" if family == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    layers = {name.split(".experts.")[0] for name in expected if ".experts." in name}
    assert len(weights) == 3 * len(layers)
    for name, found in weights.items():
        layer = f"{name.split(f'.{part}.')[0]}.{part}"
        if name.endswith(".gate"):
            assert found == "UnquantizedLinearMethod"
            continue
        for expert, matrix in enumerate(torch.from_numpy(found)):
            names = [gate, up] if name.endswith(".w13") else [down]
            rows = torch.cat([expected[f"{layer}.experts.{expert}.{projection}.weight"] for projection in names])
            assert torch.equal(matrix, rows.float())

    model: Any = qpack.load(packed, dtype=torch.bfloat16)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert tokens == answer[0, len(prompt) :].tolist()
