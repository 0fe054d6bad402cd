"""`qpack.load` on dense models: what stock transformers reads as that does, and Linear layers by another name too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from moe import decoded_model
from tiny import write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

import qpack
from qpack.loading.in_place import keep_weights_in_place

TOKENS = torch.arange(5, 69).reshape(2, 32)


def test_a_model_that_stock_reads_is_as_stock_loads_it(packed: Path) -> None:
    model: Any = qpack.load(packed)
    stock: Any = AutoModelForCausalLM.from_pretrained(packed)
    keep_weights_in_place(stock)
    expected = dict(stock.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert type(parameter) is type(expected[name])
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name])
    assert isinstance(model.hf_quantizer, Bnb4BitHfQuantizer)
    assert model.config.quantization_config.to_dict() == stock.config.quantization_config.to_dict()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, stock(TOKENS).logits)


def test_codes_in_floats_stay_as_they_are(llama: Path, packed: Path, tmp_path: Path) -> None:
    """``quant_storage`` for FSDP: loading in another dtype must not take the bytes for numbers."""
    qpack.convert(llama, tmp_path / "packed", quant_storage="bfloat16")
    with torch.no_grad():
        found = qpack.load(tmp_path / "packed", dtype=torch.float32)(TOKENS).logits
        assert torch.equal(found, qpack.load(packed, dtype=torch.float32)(TOKENS).logits)


@pytest.fixture(scope="module", params=[False, True], ids=["7b", "40b"])
def falcon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Falcon with the layers of the 7B, or of the 40B. Read only."""
    torch.manual_seed(0)
    settings = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    if request.param:
        settings |= {"new_decoder_architecture": True, "num_kv_heads": 1, "bias": True}
    config = AutoConfig.for_model("falcon", **settings, initializer_range=0.08)
    directory = tmp_path_factory.mktemp("falcon")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory / "source")
    write_tokenizer(directory / "source")
    report = qpack.convert(directory / "source", directory / "packed")
    assert report.foreign == ("FalconLinear",)
    return directory / "packed"


def test_linears_by_another_name_compute_what_the_stock_model_computes(falcon: Path) -> None:
    model = qpack.load(falcon, dtype=torch.float32)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    assert {f"{name}.weight" for name in layers} == {weight.name for weight in qpack.inspect(falcon).packed}
    assert len(layers) == 2 * 4
    with torch.no_grad():
        found, expected = model(TOKENS).logits, decoded_model(falcon)(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32 sums in another order
    assert expected.std() > 0.5
