"""The ``qpack`` program: real processes, their output, their exit status."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qpack

HEAVY = ("torch", "transformers", "numpy", "peft", "bitsandbytes", "accelerate", "pyarrow", "vllm")
"""What takes seconds to import."""


def run(
    *arguments: object, status: int = 0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program; what is no path is not looked up on the hub."""
    command = [sys.executable, "-m", "qpack", *map(str, arguments)]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment or {})
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


def without(directory: Path, *packages: str) -> dict[str, str]:
    """An environment in which these packages cannot be imported."""
    for package in packages:
        (directory / package).mkdir(parents=True)
        (directory / package / "__init__.py").write_text(f"raise ImportError('{package} is blocked')")
    return {"PYTHONPATH": str(directory)}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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
    """Block torch, transformers and numpy: these commands never need them for a model that is known by names."""
    output, blocked = tmp_path / "packed", without(tmp_path / "blocker", *HEAVY)
    done = run("convert", llama, output, environment=blocked)
    inspection = qpack.inspect(packed)
    title, *lines = done.stdout.splitlines()
    assert title == str(output)
    shown = {label: value for label, _, value in (line.partition(" ") for line in lines)}
    assert list(shown) == ["packed", "bits", "error", "kept"]
    assert re.fullmatch(r" *14 weights, 2\.53 MB to 792 kB, in \d+\.\d s", shown["packed"])
    assert shown["bits"].strip() == f"{inspection.packed_bits:.3f} bits a packed weight, {inspection.bits:.3f} over all"
    assert re.fullmatch(r" *9\.\d\d %, worst 9\.\d\d % in model\.layers\.\d\.\S+\.weight", shown["error"])
    assert shown["kept"].strip() == "5 x norm (2.56 kB), 1 x input embedding (164 kB)"
    assert "2.53 MB of 2.53 MB" in done.stderr
    assert contents(output) == contents(packed)
    assert "would pack  14 weights" in run("convert", llama, tmp_path / "dry", "--dry-run", environment=blocked).stdout

    report = json.loads(run("inspect", output, "--json", environment=blocked).stdout)
    found = (report["weights"], report["bytes"], report["bits"])
    assert found == (inspection.weights, inspection.bytes, inspection.bits)
    assert len(report["tensors"]) == len(inspection.tensors)
    done = run("inspect", output, environment=blocked)
    assert re.search(r"^up_proj +2 +512 x 256 +NF4/64 nested ", done.stdout, re.MULTILINE)
    assert re.search(rf" {inspection.bits:.3f} +9\.\d\d %$", done.stdout, re.MULTILINE)

    assert f"as packed from {llama}" in run("verify", output, "--against", llama, environment=blocked).stdout

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    module = "model.layers.0.self_attn.q_proj"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": torch.ones(2, 256), "lora_B": torch.ones(256, 2)}
    named = {f"base_model.model.{module}.{factor}.weight": value for factor, value in factors.items()}
    save_file(named, adapter / "adapter_model.safetensors")
    done = run("merge", output, adapter, tmp_path / "merged", environment=blocked)
    assert re.search(r"^merged +1 weights, ", done.stdout, re.MULTILINE)
    # What stands in qpack.json is of the packed weights, and goes no further.
    assert (output / "qpack.json").is_file()
    assert not (tmp_path / "merged" / "qpack.json").exists()
    assert qpack.inspect(tmp_path / "merged").manifest is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("convert", "nowhere", "packed"),
            "error: nowhere: no such path, not in the cache of the hub, and HF_HUB_OFFLINE is set\n",
        ),
        (
            ("convert", "./nowhere", "packed"),
            "error: ./nowhere: no such file or directory, and not the id of a model of the hub\n",
        ),
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
    config.write_text("r: 4\nmax_steps: 9\nbatch_size: 1\nsamples: 0\n")
    arguments = ("train", packed, data, "-o", tmp_path / "adapter", "--config", config, "--max-steps", 1)
    assert run(*arguments, status=1).stderr.startswith(f"error: {data}:2: ")
    assert not (tmp_path / "adapter").exists()
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    unused = without(tmp_path / "blocker", "trl", "vllm", "serve", "tensorboard", "wandb", "mlflow")
    done = run(*arguments, environment=unused)
    assert "1 steps, " in done.stdout
    assert "train: step 1 of 1, loss " in done.stderr
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert run(*arguments, "--r", 0, status=1).stderr == "error: r: expected at least 1, found 0\n"


def test_mistakes_in_training_are_told_without_torch(packed: Path, tmp_path: Path) -> None:
    """And so is what there is to set, and what a run would take on a GPU."""
    environment = without(tmp_path / "blocker", *HEAVY)
    data, bad, settings, taken = (tmp_path / name for name in ("data.jsonl", "bad.jsonl", "settings.yaml", "taken"))
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1, "completion": "b"}\n')
    settings.write_text("rank: 4\n")
    taken.mkdir()
    output = ("-o", tmp_path / "adapter")
    for arguments, message in (
        (("train", packed, bad, *output), f"{bad}:2: prompt: expected a string or a list of messages"),
        (("train", packed, data, *output, "--r", 0), "r: expected at least 1, found 0"),
        (("train", packed, data, *output, "--packing", "--method", "dpo"), "packing: not for method 'dpo'"),
        (("train", packed, data, *output, "--config", settings), f"{settings}: unknown setting 'rank'"),
        (("train", packed, data, *output, "--early-stopping", 1), "early_stopping: nothing is held out"),
        (("train", packed, data, *output, "--base", "16bit"), f"{packed}: expected weights of 16 or 32 bits"),
        (("train", packed, data, *output, "--fsdp"), "fsdp: there is one process"),
        (("train", packed, data, "-o", taken), f"{taken}: already exists"),
        (("data", packed, bad), f"{bad}:2: prompt: expected a string"),
    ):
        assert run(*arguments, status=1, environment=environment).stderr.startswith(f"error: {message}")
    for told in (("train", "--help"), ("data", "--help"), ("estimate", packed, "--gpu", "24GB")):
        assert run(*told, environment=environment).stdout


def test_quiet_and_verbose(llama: Path, tmp_path: Path) -> None:
    assert run("convert", llama, tmp_path / "a", "-q").stderr == ""
    lines = run("convert", llama, tmp_path / "b", "--verbose").stderr.splitlines()
    assert "pack model.layers.0.mlp.up_proj.weight (512, 256) in blocks of 64" in lines
    assert "keep model.norm.weight (256,): norm" in lines


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
