"""Why safetensors files are read by position and not mapped: one pass over 256 MB in the page cache.

python -m pytest benches/test_read.py
"""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIZE = 256 << 20
CHUNK = 1 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("read") / "data"
    path.write_bytes(os.urandom(CHUNK) * (SIZE // CHUNK))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def positioned(path: Path) -> int:
    buffer = bytearray(CHUNK)
    total = 0
    with path.open("rb", buffering=0) as file:
        for offset in range(0, SIZE, CHUNK):
            os.preadv(file.fileno(), [buffer], offset)
            total += int(np.frombuffer(buffer, np.uint64).max())
    return total


def mapped(path: Path) -> int:
    # A new mapping, as a converter sees it: every page faults once.
    total = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        mapping.madvise(mmap.MADV_SEQUENTIAL)
        for offset in range(0, SIZE, CHUNK):
            total += int(np.frombuffer(mapping, np.uint64, CHUNK // 8, offset).max())
    return total


@pytest.mark.benchmark(group="read from the page cache")
@pytest.mark.parametrize("read", [positioned, mapped])
def test_read(read: Any, path: Path, benchmark: Any) -> None:
    benchmark.pedantic(read, (path,), rounds=9, warmup_rounds=1)
