"""The set-up's checks: a tool that is missing or too old is named in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH of its own, with just what the script calls."""
    for tool in ("sh", "cargo", "cc"):
        found = shutil.which(tool)
        assert found
        (tmp_path / tool).symlink_to(found)
    (tmp_path / "python3").symlink_to(sys.executable)
    return tmp_path


def check(tools: Path, python: str = "python3") -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [tools / "sh", ROOT / "requirements" / "check-tools.sh", python]
    return subprocess.run(command, env=os.environ | {"PATH": str(tools)}, capture_output=True, text=True, check=False)


def test_a_complete_machine_passes_in_silence(tools: Path) -> None:
    done = check(tools)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("cargo", "error: cargo not found: install a Rust toolchain"),
        ("cc", "error: cc not found: install a C compiler and linker"),
        ("python3", "error: python3 not found: install Python 3.11 or newer"),
    ],
)
def test_a_missing_tool_is_one_line(tools: Path, tool: str, message: str) -> None:
    (tools / tool).unlink()
    done = check(tools)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_python_that_is_too_old_is_one_line(tools: Path) -> None:
    """Stands in for an old interpreter: no other is at hand."""
    old = tools / "python3.10"
    old.write_text(
        '#!/bin/sh\ncase "$*" in\n--version) echo Python 3.10.1 ;;\n*version_info*) exit 1 ;;\nesac\nexit 0\n'
    )
    old.chmod(0o755)
    done = check(tools, "python3.10")
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python 3.10.1 is not supported: install Python 3.11 to 3.14")
    assert done.stderr.count("\n") == 1
