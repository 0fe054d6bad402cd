"""Checkpoints that many tests share, made once a process; and how ``make test`` deals the tests to its processes.

A file's tests stay together, for the sake of what they share, and so do all tests of the real engine. These take
longest, so they come first, and some look for pauses, so other processes stand back. Each process computes in one
thread, and so does what it starts: there are as many of them as cores, and the tiny models gain nothing by more.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import write_llama
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

import qpack

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch is not imported yet
    if worker != "gw0":  # which gets the first tests
        os.nice(10)


class Lots(LoadScopeScheduling):  # type: ignore[misc]  # of no type
    """What goes to one process together, by the ids of tests."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return "engine" if _starts_engine(self.config.rootpath / file) else file


@cache
def _starts_engine(file: Path) -> bool:
    return "pytest.mark.vllm" in file.read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lots:
    """Deal the tests as this file says."""
    return Lots(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and begin with what starts the engine."""
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: not _starts_engine(item.path))


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
