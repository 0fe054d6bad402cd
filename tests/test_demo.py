"""The parts of the demo: its model, its data, its verdict. The whole of it is ``make demo``, which takes minutes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qpack.checkpoint import Checkpoint
from qpack.demo import DemoReport
from qpack.demo.model import write_model
from qpack.demo.skills import SKILLS, orders, write_examples
from qpack.errors import CheckpointError
from qpack.policy.modules import plan
from qpack.policy.plan import Packing


def report(**changes: Any) -> DemoReport:
    good: dict[str, Any] = {
        "model": "tiny",
        "plain_bytes": 269_000_000,
        "packed_bytes": 111_000_000,
        "packed_bits": 4.16,
        "held_out": 20,
        "base": {"json": 0.0, "label": 0.2},
        "adapters": {"json": 1.0, "label": 0.95},
        "merged_skill": "json",
        "merged": 1.0,
        "merged_differences": 1,
        "seconds": {"convert": 1.0, "merge": 2.0},
    }
    return DemoReport(**(good | changes))


def test_held_out_orders_are_new_combinations_of_words_seen_in_training() -> None:
    seen, held_out = orders(128, 20, seed=0)
    assert (len(seen), len(held_out)) == (128, 20)
    assert not {(order.item, order.city) for order in seen} & {(order.item, order.city) for order in held_out}
    for word in ("item", "city", "quantity", "phrase"):
        assert {getattr(order, word) for order in held_out} <= {getattr(order, word) for order in seen}
    assert orders(128, 20, seed=0) == (seen, held_out)


@pytest.mark.parametrize("model", [None, "llama"])
def test_the_model_is_an_ordinary_sharded_checkpoint(model: str | None, llama: Path, tmp_path: Path) -> None:
    """The real one, out of its GGUF file, and any other by its directory."""
    write_model(tmp_path / "model", model and str(llama))
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert len(checkpoint.shards) >= 2
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert "quantization_config" not in checkpoint.config
    assert len(plan(checkpoint, packing=Packing()).packed) == 7 * checkpoint.config["num_hidden_layers"]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    if model:
        assert checkpoint.tensors.keys() == Checkpoint.open(llama).tensors.keys()


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        write_model(tmp_path / "model", str(tmp_path))
    assert not (tmp_path / "model").exists()


def test_examples_are_chats(tmp_path: Path) -> None:
    seen, _ = orders(3, 0, seed=0)
    for skill, answer in SKILLS.items():
        write_examples(tmp_path / "data.jsonl", seen, skill)
        for order, line in zip(seen, (tmp_path / "data.jsonl").read_text().splitlines(), strict=True):
            question, reply = json.loads(line)["messages"]
            assert question == {"role": "user", "content": order.english}
            assert reply == {"role": "assistant", "content": answer(order)}


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"adapters": {"json": 1.0, "label": 0.94}}, "adapter label answers 94% right, expected at least 95%"),
        ({"base": {"json": 0.25, "label": 0.0}}, "the base answers 25% of json right, expected at most 20%"),
        ({"merged_differences": 2}, "the merged model differs from its adapter on 2 orders"),
    ],
)
def test_the_verdict(changes: Mapping[str, Any], failure: str) -> None:
    assert report().failures == ()
    assert report(**changes).failures == (failure,)


def test_the_table_shows_every_figure() -> None:
    table = report().table()
    for text in ("269 MB", "111 MB, 4.160 bits", "base on label", "adapter json, served", "differs on 1", "3.0"):
        assert text in table
