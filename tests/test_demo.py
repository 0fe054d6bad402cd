"""The parts of the demo: its data, its verdict. The whole of it is ``make demo``, which takes minutes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qpack.demo import DemoReport
from qpack.demo.skills import SKILLS, orders, write_examples


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
