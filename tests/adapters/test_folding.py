"""An error that lists tensors names all of them, in few words."""

import itertools
import random
import re
from pathlib import Path

import factors
import pytest
import torch

import qpack
from qpack.adapters.folding import fold
from qpack.errors import AdapterError


def unfold(folded: str) -> list[str]:
    """Every name that a folded one stands for."""
    parts = []
    for part in folded.split("."):
        runs = re.fullmatch(r"\{([\d,-]+)\}", part)
        ends = [run.split("-") for run in runs[1].split(",")] if runs else []
        numbers = [str(number) for first, *last in ends for number in range(int(first), int((last or [first])[0]) + 1)]
        parts.append(numbers or [part])
    return [".".join(chosen) for chosen in itertools.product(*parts)]


def test_names_are_folded_by_their_numbers_in_order() -> None:
    experts = [f"layers.{layer}.experts.{expert}.w1" for layer in range(12) for expert in range(8)]
    experts.remove("layers.3.experts.6.w1")
    assert fold([*experts, "norm.weight", "layers.10.q", "layers.2.q", "layers.07.q"]) == [
        "layers.{0-2,4-11}.experts.{0-7}.w1",
        "layers.{2,10}.q",
        "layers.3.experts.{0-5,7}.w1",
        "layers.07.q",
        "norm.weight",
    ]
    assert fold([]) == []


def test_a_folded_name_stands_for_exactly_its_names() -> None:
    draw = random.Random(0)
    every = [f"a.{i}.b.{j}.{leaf}" for i in range(5) for j in range(11) for leaf in ("x", "y.3", "y.4")]
    for _ in range(50):
        names = draw.sample([*every, "a.1", "a.2", "2", "3"], draw.randrange(1, 100))
        unfolded = [name for folded in fold(names) for name in unfold(folded)]
        assert sorted(unfolded) == sorted(names)


def test_an_adapter_of_a_deeper_model_is_refused_with_all_that_the_base_lacks(packed: Path, tmp_path: Path) -> None:
    weights = factors.draw(packed, modules=("q_proj", "up_proj"))
    of_layer_1 = {name: value for name, value in weights.items() if ".layers.1." in name}
    deeper = {
        name.replace(".1.", f".{layer}."): torch.clone(value)
        for name, value in of_layer_1.items()
        for layer in range(2, 40)
    }
    adapter = factors.write(tmp_path / "adapter", weights | deeper)
    with pytest.raises(AdapterError, match=r"changes what the base .* does not have: ") as refused:
        qpack.merge(packed, adapter, tmp_path / "merged")
    listed = str(refused.value).partition(" does not have: ")[2].split(", ")
    assert sorted(name for folded in listed for name in unfold(folded)) == sorted(deeper)
    assert len(listed) == 4  # both factors of two modules
    assert not (tmp_path / "merged").exists()
