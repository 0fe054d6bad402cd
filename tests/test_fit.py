"""Sizing: against sums written out, published figures, and the bytes of the real objects."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit

import qpack
from qpack.checkpoint import Checkpoint
from qpack.errors import CheckpointError
from qpack.fit import ALLOWANCE, CARDS, Model, Need, serving, training


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int = 32000) -> Model:
    """A Llama with untied embeddings in 16 bits, packed with blocks of 64 and double quantization."""
    width = hidden // heads * kv_heads
    shapes = {"q": (hidden, hidden), "k": (width, hidden), "v": (width, hidden), "o": (hidden, hidden)}
    shapes |= {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    packed = {f"model.layers.{i}.{name}_proj.weight": shape for i in range(layers) for name, shape in shapes.items()}
    weights = sum(rows * columns for rows, columns in packed.values())
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }
    return Model.of(config, packed, int(weights * (4 + 8 / 64 + 32 / (64 * 256)) / 8) + 2 * 2 * vocab * hidden)


LLAMA_7B = llama(4096, 11008, 32, 32, 32)
LLAMA_33B = llama(6656, 17920, 60, 52, 52)
LLAMA_65B = llama(8192, 22016, 80, 64, 64)


def test_the_papers_models() -> None:
    """QLoRA: 7B has a base of about 5 GB, 33B trains near 24 GB and 65B under 48 GB, one sequence of 512 at a time."""
    assert 3.5e9 < LLAMA_7B.bytes < 5e9
    assert training(LLAMA_33B).smallest() == 24
    need = training(LLAMA_65B)
    assert need.smallest() == 48
    assert 36e9 < need.bytes < 46e9
    assert not training(LLAMA_65B, length=4096, batch=4).fits(48)


def test_the_kv_cache_of_llama_2_7b_is_half_a_megabyte_a_token() -> None:
    need = serving(LLAMA_7B, length=4096)
    assert need.parts["KV cache"] == 2 * 32 * 128 * 32 * 2 * 4096 == 2**31
    assert serving(LLAMA_7B, length=4096, batch=4).parts["KV cache"] == 4 * 2**31
    assert serving(LLAMA_7B).parts == need.parts  # its longest
    assert need.smallest() == 12
    assert need.share == 0.92
    grouped = llama(4096, 14336, 32, 32, 8, vocab=128256)
    assert serving(grouped, length=4096).parts["KV cache"] == 2**29


def test_the_parts_of_training_written_out() -> None:
    packed = {"model.layers.0.a.weight": (100, 300), "model.layers.1.b.weight": (8000, 10)}
    model = Model(packed, 10**6, hidden_size=50, layers=2, cached=20, vocab_size=1000, max_length=64)
    need = training(model, length=8, batch=2, r=16)
    assert need.parts == {
        "weights": 10**6,
        "LoRA": 4 * 16 * (400 + 8010),
        "gradients": 4 * 16 * (400 + 8010),
        # B of a, 1600, and A of b, 160, are too small for 8 bits.
        "optimizer": 8 * 1600 + 2 * (4800 + 4 * 19) + 2 * (128000 + 4 * 500) + 8 * 160,
        "activations": 16 * (2 * 50 * 2 + max(6 * 300 + 2 * 100 + 64, 6 * 10 + 2 * 8000 + 64)),
        "logits": 14 * 16 * 1000,
        "workspace": ALLOWANCE + 2 * 80000,
    }
    assert need.pageable == 2 * (128000 + 4 * 500)


def test_optimizer_state_is_what_bitsandbytes_allocates() -> None:
    sizes = {"small": (16, 200), "large": (16, 5000)}
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in sizes.values()]
    optimizer = AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = 0
    for state in optimizer.state.values():
        kept += sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2") if name in state)
    model = Model({"w": (200, 5000)}, 0, hidden_size=1, layers=1, cached=1, vocab_size=1, max_length=1)
    assert training(model, r=16).parts["optimizer"] == kept


def test_lora_is_what_peft_adds(packed: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(packed)
    adapted = get_peft_model(plain, LoraConfig(r=16, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    checkpoint = Checkpoint.open(packed)
    shapes = {weight.name: weight.shape for weight in qpack.inspect(packed).packed}
    model = Model.of(checkpoint.config, shapes, checkpoint.tensor_bytes)
    assert (model.cached, model.layers, model.max_length) == (2 * 2 * 64, 2, 512)
    assert training(model, r=16).parts["LoRA"] == 4 * trained


def test_a_token_goes_through_some_experts_and_a_latent_cache() -> None:
    config: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "vocab_size": 100,
        "max_position_embeddings": 128,
        "num_experts_per_tok": 2,
    }
    packed = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (128, 64) for i in range(8)}
    model = Model.of({"text_config": config}, packed, 1000)
    assert model.cached == 48
    assert model.in_layer(lambda rows, columns: rows + columns) == 2 * (128 + 64)
    assert training(model).parts["LoRA"] == 8 * 4 * 16 * (128 + 64)
    del config["num_experts_per_tok"]
    with pytest.raises(CheckpointError, match=r"config\.json: has no num_experts_per_tok, which the sizing needs"):
        Model.of(config, packed, 1000)


def test_a_line_says_it_all() -> None:
    need = Need("train 1 x 9 tokens", {"weights": 30 * 10**9, "optimizer": 3 * 10**9}, pageable=2 * 10**9)
    assert [card for card in CARDS if need.fits(card)] == [32, 48, 80, 96, 141]
    assert str(need) == (
        "train 1 x 9 tokens: 33 GB (weights 30 GB, optimizer 3 GB); fits a GPU of 32 GB with its optimizer paged"
    )
    assert str(Need("serve 1 x 9 tokens", {"weights": 10**12})).endswith("; fits no GPU of up to 141 GB")
    assert str(serving(LLAMA_7B, length=4096)).startswith("serve 1 x 4096 tokens: 7.")
