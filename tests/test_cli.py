"""The ``qpack`` program: real processes, their output, their exit status."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qpack


def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qpack", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


def test_version_and_help() -> None:
    assert run("--version").stdout == f"qpack, version {qpack.__version__}\n"
    commands = run("--help").stdout.split("Commands:")[1]
    for command in ("convert", "train", "serve", "merge", "inspect", "verify", "demo"):
        assert f"\n  {command} " in commands
        text = run(command, "--help").stdout
        assert f"Usage: qpack {command} " in text.replace("python -m qpack", "qpack")
        assert "-v, --verbose" in text
        assert "-q, --quiet" in text


def test_convert_inspect_and_merge_without_torch(llama: Path, packed: Path, tmp_path: Path) -> None:
    """Block torch, transformers and numpy: these commands never need them."""
    blocker = tmp_path / "blocker"
    for package in ("torch", "transformers", "numpy", "peft", "vllm"):
        (blocker / package).mkdir(parents=True)
        (blocker / package / "__init__.py").write_text("raise ImportError('blocked')")
    environment = os.environ | {"PYTHONPATH": str(blocker)}
    command = [sys.executable, "-m", "qpack", "convert", str(llama), str(tmp_path / "packed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "14 weights packed, 2.53 MB to 792 kB" in done.stdout
    assert "2.53 MB of 2.53 MB" in done.stderr
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()

    command[3:] = ["inspect", str(tmp_path / "packed"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    inspection = qpack.inspect(packed)
    assert (report["weights"], report["bytes"], report["bits"]) == (
        inspection.weights,
        inspection.bytes,
        inspection.bits,
    )
    assert len(report["tensors"]) == len(inspection.tensors)
    command[5:] = []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"^up_proj +2 +512 x 256 +NF4/64 nested ", done.stdout, re.MULTILINE)
    assert done.stdout.endswith(f" {inspection.bits:.3f}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "nowhere", "packed"), "error: nowhere: not a directory\n"),
        (("inspect", "nowhere"), "error: nowhere: not a directory\n"),
        (("verify", "nowhere"), "error: nowhere: not a directory\n"),
        (("merge", "nowhere", "adapter", "merged"), "error: nowhere: not a directory\n"),
        (("train", "nowhere", "data.jsonl", "-o", "adapter"), "error: nowhere: not a directory\n"),
        (("serve", "nowhere"), "error: "),
    ],
)
def test_what_fails_is_one_line_and_status_1(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments, status=1)
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "a"),
        ("convert", "a", "b", "--blocksize", "48"),
        ("convert", "a", "b", "--threads", "0"),
        ("merge", "a", "b", "c", "--dtype", "int8"),
        ("merge", "a", "b", "c", "--max-shard-size", "big"),
        ("train", "a", "b"),
        ("serve", "a", "--port", "70000"),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    assert "Usage: " in run(*arguments, status=2).stderr


def test_train_takes_flags_over_the_file_and_names_the_bad_line(packed: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    config = tmp_path / "train.yaml"
    config.write_text("r: 4\nmax_steps: 9\nbatch_size: 1\n")
    arguments = ("train", packed, data, "-o", tmp_path / "adapter", "--config", config, "--max-steps", 1)
    assert run(*arguments, status=1).stderr.startswith(f"error: {data}:2: ")
    assert not (tmp_path / "adapter").exists()
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    done = run(*arguments)
    assert "1 steps, " in done.stdout
    assert "train: 1 steps of 1 steps" in done.stderr
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert run(*arguments, "--r", 0, status=1).stderr == "error: r: expected at least 1, found 0\n"


def test_quiet_and_verbose(llama: Path, tmp_path: Path) -> None:
    assert run("convert", llama, tmp_path / "a", "-q").stderr == ""
    assert (
        "pack model.layers.0.mlp.up_proj.weight BF16 (512, 256)"
        in run("convert", llama, tmp_path / "b", "--verbose").stderr
    )


def test_a_terminal_gets_a_bar(llama: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qpack", "convert", str(llama), str(tmp_path / "packed")]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # how Linux ends a pseudo-terminal whose other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    assert "━".encode() in shown
    assert b"2.5/2.5 MB" in shown
