"""``modules_to_save``: float32 copies learn on a packed base, tied where it ties; saved, resumed and merged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from runs import contents, finish, kill
from safetensors.torch import load_file
from tiny import write_llama
from transformers import AutoModelForCausalLM

import qpack
from qpack.adapters.adapter import Adapter
from qpack.errors import AdapterError, DataError, TrainingError
from qpack.training import TrainSettings, train
from qpack.training.compute import Compute
from qpack.training.model import add_lora, load_base, require_float32_adapter

SETTINGS = TrainSettings(r=4, lora_dropout=0.1, lr=1e-2, max_steps=4, batch_size=4, save_steps=2, samples=0)
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    qpack.convert(write_llama(folder / "source", tied=False), folder / "packed")
    return folder / "packed"


def check_merged(base: Path, adapter: Path, merged: Path, *, tied: bool) -> None:
    """What is merged computes what was trained, and is tied as the base is."""
    qpack.merge(base, adapter, merged, dtype="float32")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] == tied
    ids = torch.arange(64)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(qpack.load(base, dtype=torch.float32), adapter)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    assert (found - expected).abs().max() < 0.02 * expected.std()  # decoded weights in f32, not bf16


def test_a_tied_embedding_and_norms_learn_and_stay_tied(base: Path, data: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, modules_to_save="embed_tokens,norm")
    finish(base, data, tmp_path / "whole", settings)
    kill(base, data, tmp_path / "resumed", settings, 3, delay=0)
    assert finish(base, data, tmp_path / "resumed", settings) == 2
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")

    saved = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    whole = {name.removeprefix(PREFIX): tensor for name, tensor in saved.items() if ".lora_" not in name}
    assert whole.keys() >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert whole.keys() <= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    plain = qpack.load(base, dtype=torch.float32).state_dict()
    for name, tensor in whole.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, plain[name]), name
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=5e-2)  # four steps of 1e-2 from where they began
    check_merged(base, tmp_path / "whole", tmp_path / "merged", tied=True)

    with pytest.raises(AdapterError, match=r"modules_to_save is .* not plain LoRA; merge the adapter into its base"):
        Adapter.open(tmp_path / "whole").require_plain()


def test_a_head_of_its_own_learns(untied: Path, data: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=2, modules_to_save="lm_head, input_layernorm")
    train(untied, data, tmp_path / "adapter", settings)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    layers = [f"model.layers.{layer}.input_layernorm" for layer in (0, 1)]
    assert config["modules_to_save"] == [*layers, "lm_head"]
    check_merged(untied, tmp_path / "adapter", tmp_path / "merged", tied=False)


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_copies_are_float32_and_all_around_them_stays_in_the_compute_dtype(plain: bool, base: Path) -> None:
    directory = base.parent / "source" if plain else base
    settings = replace(SETTINGS, lora_dropout=0.0, modules_to_save="lm_head,norm,input_layernorm")
    bfloat16 = load_base(directory, Compute("cpu", torch.bfloat16), plain=plain)
    ids = torch.arange(32)[None]
    expected = bfloat16(input_ids=ids).logits
    model: Any = add_lora(bfloat16, settings)
    require_float32_adapter(model)
    found = model(input_ids=ids, output_hidden_states=True)  # as samples are drawn: no autocast
    assert {state.dtype for state in found.hidden_states} == {found.logits.dtype} == {torch.bfloat16}
    assert (found.logits - expected).abs().max() < 0.1 * expected.std()  # norms in float32 within
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    learning = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(learning) == 4  # one for embedding and head
    assert all(p.grad is not None and p.grad.any() for p in learning.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": "head"}, r"'head' matches no module; they end in embed_tokens, input_layernorm, .*norm"),
        ({"modules_to_save": "q_proj"}, r"'model\.layers\.0\.self_attn\.q_proj' is in 4 bits, of which there is"),
        ({"modules_to_save": "mlp"}, r"'model\.layers\.0\.mlp' is in 4 bits, of which there is no gradient"),
        ({"modules_to_save": "lm_head"}, r"'lm_head' is in 4 bits, of which there is no gradient"),
        ({"modules_to_save": "act_fn"}, r"'model\.layers\.0\.mlp\.act_fn' holds no weights of its own"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    change: dict[str, Any], message: str, data: Path, untied: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    qpack.convert(untied.parent / "source", packed, pack_lm_head=True)
    with pytest.raises(TrainingError, match=f"^modules_to_save: {message}"):
        train(packed, data, tmp_path / "adapter", replace(SETTINGS, **change))
    assert list(tmp_path.iterdir()) == [packed]


def test_shards_are_not_copied() -> None:
    with pytest.raises(DataError, match=r"^modules_to_save: copies whole modules, which no process has with fsdp"):
        replace(SETTINGS, fsdp=True, modules_to_save="norm")


def test_what_is_copied_gets_no_lora() -> None:
    with pytest.raises(DataError, match=r"^modules_to_save: embed_tokens stands in target_modules too; name it in one"):
        replace(SETTINGS, modules_to_save="norm,embed_tokens", target_modules="q_proj,embed_tokens")
