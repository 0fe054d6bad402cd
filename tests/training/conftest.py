"""One tiny packed base for all training tests."""

import json
from pathlib import Path

import pytest
from tiny import write_llama

from qpack.conversion import convert


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama of 1.4 M parameters with a byte-level tokenizer and a ChatML template."""
    directory = tmp_path_factory.mktemp("base")
    convert(write_llama(directory / "source"), directory / "packed")
    return directory / "packed"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen orders and as many answers: little enough to learn by heart."""
    path = tmp_path_factory.mktemp("data") / "orders.jsonl"
    lines = [{"prompt": f"order {chr(97 + index)}", "completion": f"item {index}"} for index in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
