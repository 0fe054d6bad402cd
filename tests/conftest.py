"""Checkpoints that many tests share, made once a session."""

from pathlib import Path

import pytest
from tiny import write_llama

import qpack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and run the tests of the one vLLM engine last."""
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 Llama with tied embeddings in three shards. Read only."""
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, packed by qpack. Read only."""
    directory = tmp_path_factory.mktemp("models") / "packed"
    qpack.convert(llama, directory)
    return directory
