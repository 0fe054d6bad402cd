"""Copies in memory: whole or not there, and gone with the server that made them, however it ended."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serve import staging
from serve.staging import open_stage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    return directory


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the test's own in the place of /dev/shm."""
    directory = tmp_path / "memory"
    directory.mkdir()
    monkeypatch.setattr(staging, "MEMORY", directory)
    return directory


def test_a_copy_is_whole_and_its_path_is_the_versions(source: Path, memory: Path) -> None:
    with open_stage() as stage:
        copy = stage.put("support@0123456789ab", source)
        assert copy.name == "support@0123456789ab"
        assert copy.is_relative_to(memory)
        assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
            file.name: file.read_bytes() for file in source.iterdir()
        }
        assert stage.put("support@0123456789ab", source) == copy
        stage.drop("support@0123456789ab")
        assert not copy.exists()
    assert not [*memory.iterdir()]


def test_a_failed_copy_leaves_nothing(source: Path, memory: Path) -> None:
    (source / "zz").mkdir()  # the last of three, and nothing that can be copied
    with open_stage() as stage:
        with pytest.raises(IsADirectoryError):
            stage.put("broken", source)
        assert not [file for home in memory.iterdir() for file in home.iterdir()]


def test_a_full_tmpfs_is_left_alone(source: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_free", lambda _: 0)
    with open_stage() as stage:
        copy = stage.put("large", source)
        assert copy.is_dir()
        assert not copy.is_relative_to(memory)


_KILLED = """
import sys, time
from pathlib import Path
from serve import staging
staging.MEMORY = Path(sys.argv[1])
with staging.open_stage() as stage:
    print(stage.put("orphan", Path(sys.argv[2])), flush=True)
    time.sleep(60)
"""


def test_what_a_killed_server_left_is_removed_by_the_next(source: Path, memory: Path) -> None:
    command: list[str | Path] = [sys.executable, "-c", _KILLED, memory, source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        copy = Path(process.stdout.readline().strip())
        with open_stage():
            assert copy.is_dir(), "a server that lives keeps its copies"
        process.send_signal(signal.SIGKILL)
    assert copy.is_dir()
    with open_stage():
        assert not copy.exists()
