"""A packed base that knows nothing, and a registry for it: what is tested here is about files."""

from collections.abc import Iterator
from pathlib import Path

import factors
import pytest

import qpack
from serve.registry import Registry


@pytest.fixture(scope="session")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, packed. Read only."""
    directory = tmp_path_factory.mktemp("models") / "base"
    qpack.convert(llama, directory)
    return directory


@pytest.fixture(scope="session")
def adapter(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter for it. Read only."""
    return factors.write(tmp_path_factory.mktemp("adapters") / "one", factors.draw(packed))


@pytest.fixture(scope="session")
def other(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one. Read only."""
    return factors.write(tmp_path_factory.mktemp("adapters") / "other", factors.draw(packed, seed=1))


@pytest.fixture
def registry(packed: Path, tmp_path: Path) -> Iterator[Registry]:
    """A new one."""
    with Registry.open(tmp_path / "registry", base=packed) as opened:
        yield opened
