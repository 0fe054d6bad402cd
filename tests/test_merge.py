"""`qpack.merge` against an f64 reference, against PEFT, and the adapters that it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora import tensors, unpacked, write_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import write_llama
from transformers import AutoModelForCausalLM

import qpack
from qpack.errors import AdapterError, OutputExistsError

PRECISION = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-24}
"""Half an ulp, relative: the largest error of rounding once."""


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "plain", llama)


def reference(
    base: dict[str, torch.Tensor], adapter: Path, scale: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Merged weights in f64, and a bound on the error of computing them in f32: r + 2 roundings of the sum of sizes."""
    factors = load_file(adapter / "adapter_model.safetensors")
    merged = {name: weight.double() for name, weight in base.items()}
    error = {name: torch.zeros_like(weight) for name, weight in merged.items()}
    for key, a in factors.items():
        if "lora_A" in key:
            b = factors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            size = merged[name].abs() + scale * b.double().abs() @ a.double().abs()
            merged[name] = merged[name] + scale * b.double() @ a.double()
            error[name] = size * (len(a) + 2) * 2**-24
    return merged, error


@pytest.mark.parametrize("dtype", PRECISION)
def test_merged_weights_are_the_f64_reference_rounded_once(
    dtype: str, llama: Path, packed: Path, adapter: Path, tmp_path: Path
) -> None:
    report = qpack.merge(packed, adapter, tmp_path / "merged", dtype=dtype)
    assert report.merged == 14
    merged = tensors(tmp_path / "merged")
    expected, error = reference(unpacked(packed), adapter, scale=2.0)
    assert merged.keys() == expected.keys() == tensors(llama).keys()
    torch_dtype = getattr(torch, dtype)
    differing, total = 0.0, 0
    for name, weight in merged.items():
        assert weight.dtype == torch_dtype
        rounded = expected[name].to(torch_dtype)
        # Where f32 rounds to another value than f64, the exact value lies within the f32 error of the midpoint.
        smallest = torch.finfo(torch_dtype).smallest_normal  # below it the ulp no longer shrinks
        limit = expected[name].abs().clamp(min=smallest) * PRECISION[dtype] + error[name]
        assert ((weight.double() - expected[name]).abs() <= limit).all()
        differing += (weight != rounded).sum().item()
        total += weight.numel()
    if dtype != "float32":
        # The share of values so near a midpoint: about error / ulp, 10 * 2**-24 against 2**-8 and 2**-11.
        assert differing <= total * 10 * 2**-24 / PRECISION[dtype]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "r": 1, "lora_alpha": 1},
    ],
    ids=["rslora", "patterns", "some modules"],
)
def test_merged_logits_are_peft_s(settings: dict[str, Any], llama: Path, packed: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, **settings)
    qpack.merge(packed, adapter, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    base.load_state_dict(unpacked(packed), strict=False)
    peft = PeftModel.from_pretrained(base, str(adapter))
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = merged(ids).logits, peft(ids).logits
        with peft.disable_adapter():
            without = peft(ids).logits
    # The same products in another order: f32 rounding over two layers of at most 512 terms each.
    assert (logits - expected).abs().max() < 1e-3
    assert (without - expected).abs().max() > 0.5


def test_a_plain_base_is_merged_too(llama: Path, adapter: Path, tmp_path: Path) -> None:
    qpack.merge(llama, adapter, tmp_path / "merged", dtype="float32")
    expected, error = reference(tensors(llama), adapter, scale=2.0)
    for name, weight in tensors(tmp_path / "merged").items():
        limit = expected[name].abs() * PRECISION["float32"] + error[name]
        assert ((weight.double() - expected[name]).abs() <= limit).all()


def test_the_merged_directory_is_plain_sharded_and_the_same_for_any_number_of_threads(
    packed: Path, adapter: Path, tmp_path: Path
) -> None:
    one = qpack.merge(packed, adapter, tmp_path / "one", max_shard_size="1MB", threads=1)
    qpack.merge(packed, adapter, tmp_path / "many", max_shard_size="1MB", threads=4)
    assert len(one.result.files) > 1
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.dtype == torch.bfloat16
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (packed / name).read_bytes()
    with pytest.raises(OutputExistsError):
        qpack.merge(packed, adapter, tmp_path / "one")


def edit(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(adapter: Path, change: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"

BAD_ADAPTERS = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), r"adapter_config\.json: no such file"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: No such file"),
    "truncated": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:-9]),
        r"truncated\?",
    ),
    "other method": (lambda d: edit(d, peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
    "aLoRA": (
        lambda d: edit(d, alora_invocation_tokens=[1]),
        r"alora_invocation_tokens is \[1\], which is no change of the base's weights",
    ),
    "QALoRA": (lambda d: edit(d, use_qalora=True), "use_qalora is True"),
    "biases of factors": (lambda d: edit(d, lora_bias=True), "lora_bias is True"),
    "replicated layers": (lambda d: edit(d, layer_replication=[[0, 2]]), r"layer_replication is \[\[0, 2\]\]"),
    "PiSSA": (lambda d: edit(d, init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changes the base too"),
    "alpha": (lambda d: edit(d, lora_alpha="x"), "lora_alpha is 'x', expected a number over 0"),
    "rank": (lambda d: edit(d, r=4), "have ranks 8 and 8, expected 4"),
    "stray tensor": (
        lambda d: edit_tensors(d, lambda w: w.update({f"{PREFIX}.lora_magnitude": torch.ones(3)})),
        "does not have: .*q_proj.lora_magnitude",
    ),
    "lone factor": (
        lambda d: edit_tensors(d, lambda w: w.pop(f"{PREFIX}.lora_B.weight")),
        r"q_proj\.lora_A\.weight has no partner",
    ),
    "nothing": (lambda d: edit_tensors(d, lambda w: w.clear()), "holds no tensors"),
    "not finite": (
        lambda d: edit_tensors(d, lambda w: w[f"{PREFIX}.lora_B.weight"].index_fill_(1, torch.tensor([3]), torch.inf)),
        r"q_proj\.lora_B\.weight is not finite at flat index 3",
    ),
    "other names": (
        lambda d: edit_tensors(
            d, lambda w: [w.update({key.replace("layers.0", "layers.7"): w.pop(key)}) for key in list(w)]
        ),
        r"does not have: .*layers\.7\.mlp\.down_proj\.lora_A\.weight, .*layers\.7\.self_attn\.v_proj\.lora_B\.weight$",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_bad_adapters_are_refused_and_nothing_is_written(
    damage: Any, message: str, llama: Path, packed: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama)
    damage(adapter)
    with pytest.raises(AdapterError, match=message):
        qpack.merge(packed, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_a_base_of_other_shapes_is_refused(packed: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", intermediate_size=384)
    adapter = write_adapter(tmp_path / "adapter", other)
    with pytest.raises(
        AdapterError, match=r"down_proj\.weight of shape \(256, 384\); in the base .* it is \(256, 512\)"
    ):
        qpack.merge(packed, adapter, tmp_path / "merged")
