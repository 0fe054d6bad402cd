"""Vocabularies that were resized for an adapter: onto a base of the same size it is right, onto another one refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora import tensors
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpack
from qpack.errors import AdapterError

# PEFT says that it saves the embeddings of a vocabulary that was resized, which is what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
GROWN = 328


def resized(llama: Path) -> Any:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {"target_modules": ["embed_tokens"]}],
    ids=["embeddings that PEFT saves", "saved modules", "factors"],
)
def test_onto_a_base_of_the_old_size_it_is_refused(
    settings: dict[str, Any], llama: Path, packed: Path, tmp_path: Path
) -> None:
    config = LoraConfig(**LORA | settings)
    get_peft_model(resized(llama), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(
        AdapterError, match=r"328.*if its vocabulary was resized, resize and save that of the base first"
    ):
        qpack.merge(packed, tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_onto_a_base_of_the_new_size_it_is_right(llama: Path, tmp_path: Path) -> None:
    model = resized(llama)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "grown")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "grown")
    qpack.convert(tmp_path / "grown", tmp_path / "packed")
    config = LoraConfig(**LORA, trainable_token_indices=[GROWN - 1, GROWN - 2])
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32), config)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data = parameter.data + 1
    adapted.save_pretrained(str(tmp_path / "adapter"))
    qpack.merge(tmp_path / "packed", tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    (name,) = (name for name in tensors(tmp_path / "merged") if "embed_tokens" in name)
    before, after = (tensors(tmp_path / folder)[name].float() for folder in ("grown", "merged"))
    assert torch.allclose(after[-2:], before[-2:] + 1)
    assert torch.equal(after[:-2], before[:-2])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == GROWN
