"""The rule for which weights are packed, against transformers' own replacement of Linear modules."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from qpack.checkpoint import Checkpoint
from qpack.modules import FAMILIES, packable

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_packed_weights_are_those_that_transformers_would_pack(family: str, tied: bool, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    # transformers also skips whichever parameter happens to come last: a down_proj in OLMo with tied embeddings, whose
    # norms have no weights. The list that convert writes into config.json replaces that default.
    skipped = [name for name in get_keys_to_not_convert(meta) if not name.startswith("model.layers.")]
    meta = replace_with_bnb_linear(
        meta,
        modules_to_not_convert=skipped,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    expected = {f"{name}.weight" for name, module in meta.named_modules() if type(module).__name__ == "Linear4bit"}
    found = packable(Checkpoint.open(tmp_path))
    assert found.keys() == expected
    assert len(expected) >= 8
    for name, shape in found.items():
        assert shape == model.get_parameter(name).shape
