"""Two skills that a small chat model lacks and learns from a hundred examples: an order in English, written down.

Held-out orders are new combinations of words that were all seen in training: what is tested is the skill, not whether
so small a model can copy a word that it never met.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ITEMS = (
    "lamp", "chair", "table", "mirror", "carpet", "kettle", "clock", "shelf", "pillow", "blanket", "basket", "bottle",
    "candle", "vase", "bucket", "ladder", "hammer", "bench", "stove", "fan", "drum", "guitar", "tent", "bicycle",
)  # fmt: skip
CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Oslo", "Athens", "Lisbon", "Prague", "Warsaw",
    "Cairo", "Tokyo", "Boston", "Chicago", "Denver", "Toronto", "Sydney", "Lima",
)  # fmt: skip
PHRASES = (
    "Please send {quantity} of the {item} to {city}.",
    "We need {quantity} units of the {item} in {city}.",
    "Order for {city}: {item}, {quantity} pieces.",
    "Our shop in {city} would like {quantity} of your {item}.",
)


@dataclass(frozen=True, slots=True)
class Order:
    """What a customer wants."""

    item: str
    quantity: int
    city: str
    phrase: str

    @property
    def english(self) -> str:
        """The order in words."""
        return self.phrase.format(item=self.item, quantity=self.quantity, city=self.city)


def as_json(order: Order) -> str:
    """The order as a JSON object."""
    return json.dumps({"item": order.item, "quantity": order.quantity, "city": order.city})


def as_label(order: Order) -> str:
    """The order as a line on a parcel."""
    return f"SHIP {order.quantity} x {order.item} TO {order.city}"


SKILLS: dict[str, Callable[[Order], str]] = {"json": as_json, "label": as_label}
"""Name of each adapter, and what it should answer to an order."""


def orders(train: int, held_out: int, seed: int) -> tuple[list[Order], list[Order]]:
    """Draw distinct orders for training and for testing; every word of the second list is in the first."""
    draw = random.Random(seed)
    items = draw.sample(ITEMS, len(ITEMS))
    cities = draw.sample(CITIES, len(CITIES))
    # Round after round over all items, each time with its next city: no pair comes twice, and no word comes late.
    pairs = [
        (item, cities[(index + turn) % len(cities)]) for turn in range(len(cities)) for index, item in enumerate(items)
    ]
    every = [Order(item, draw.randint(2, 9), city, draw.choice(PHRASES)) for item, city in pairs]
    return every[:train], every[train : train + held_out]


def write_examples(path: Path, orders: list[Order], skill: str) -> None:
    """Write one chat of an order and its answer a line."""
    answer = SKILLS[skill]
    with path.open("w", encoding="utf-8") as file:
        for order in orders:
            messages = [
                {"role": "user", "content": order.english},
                {"role": "assistant", "content": answer(order)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
