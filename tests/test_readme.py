"""What the README and the guides in docs say is so: commands run, the tree is right, transcripts are the output."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import factors
import pytest
from click.testing import CliRunner

import qpack
from qpack.cli import cli
from qpack.demo import DemoReport
from serve import ServeConfig, collect_adapters
from serve.registry import Registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONVERT = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
RECIPE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
SERVE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
TRAIN = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
MERGE = (ROOT / "docs" / "merge.md").read_text(encoding="utf-8")


def all_blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [block for found, block in all_blocks(README) if found == language]


def run_commands(text: str, directory: Path) -> None:
    """In this process, which has imported torch already."""
    for line in text.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "qpack"
        with chdir(directory):
            done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output


@pytest.fixture
def workspace(llama: Path, tmp_path: Path) -> Path:
    """A directory with what the README's examples start from."""
    shutil.copytree(llama, tmp_path / "model")
    lines = [{"prompt": f"order {index}", "completion": f"item {index}"} for index in range(16)]
    (tmp_path / "orders.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"make (\w+)", README)
    assert {"demo", "test", "bench", "help"} <= set(targets)
    for target in targets:
        assert f"  make {target} " in listed


def test_the_commands_run(workspace: Path) -> None:
    _, commands, _ = blocks("sh")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "qpack"
        subprocess.run([sys.executable, "-m", "qpack", *arguments], cwd=workspace, check=True, capture_output=True)
    assert (workspace / "merged" / "config.json").is_file()


def test_the_server_s_options_are_its_own() -> None:
    """The server itself is started, with these options, by the tests in serving/."""
    *_, line = blocks("sh")
    program, command, *arguments = shlex.split(line)
    assert (program, command) == ("qpack", "serve")
    text = subprocess.run(
        [sys.executable, "-m", "qpack", "serve", "--help"], capture_output=True, text=True, check=True
    )
    for option in arguments[1::2]:
        assert f"  {option} " in text.stdout


def test_the_python_example_runs(workspace: Path) -> None:
    (program,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", program], cwd=workspace, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"4\.\d{3} bits a packed weight\n", done.stdout)
    assert (workspace / "merged" / "config.json").is_file()


def test_the_tree_is_the_repository_s() -> None:
    (tree,) = [block for block in blocks("") if "rust/core/" in block]
    named = [line.split()[0] for line in tree.splitlines()]
    for path in named:
        assert (ROOT / path).exists()
        assert path.endswith("/") == (ROOT / path).is_dir()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {path.split("/")[0] for path in tracked.splitlines() if "/" in path and not path.startswith(".")}
    assert folders == {path.split("/")[0] for path in named if "/" in path}


def test_the_transcript_is_what_the_demo_prints() -> None:
    (transcript,) = [block for block in blocks("") if block.startswith("$ make demo")]
    labels = {re.split(r"\s{2,}", line.strip())[0] for line in transcript.splitlines()}
    names = ("json", "label")
    steps = ["model", "convert", "train json", "train label", "serve: start", "serve: 60 answers", "merge"]
    report = DemoReport(
        model="SmolLM2-135M-Instruct",
        plain_bytes=1,
        packed_bytes=1,
        packed_bits=4.0,
        held_out=20,
        base=dict.fromkeys(names, 0.0),
        adapters=dict.fromkeys(names, 1.0),
        merged_skill="json",
        merged=1.0,
        merged_differences=0,
        seconds=dict.fromkeys([*steps, "merged: answers"], 1.0),
    )
    for line in report.table().splitlines():
        assert re.split(r"\s{2,}", line.strip())[0] in labels


def test_docs_convert_runs_from_top_to_bottom(workspace: Path) -> None:
    (workspace / "tests").symlink_to(ROOT / "tests")
    for language, block in all_blocks(CONVERT):
        if language == "sh":
            run_commands(block, workspace)
        elif language == "toml":
            (workspace / "rules.toml").write_text(block)
        elif language == "python":
            subprocess.run([sys.executable, "-c", block], cwd=workspace, check=True, capture_output=True)

    # The plan of the 70B model, but for what is the machine's own.
    (transcript,) = [block for language, block in all_blocks(CONVERT) if not language]
    command, *expected = transcript.splitlines()
    arguments = shlex.split(command.removeprefix("$ qpack "))
    done = subprocess.run(
        [sys.executable, "-m", "qpack", *arguments], cwd=workspace, check=True, capture_output=True, text=True
    )
    machine = ("time", "disk")
    printed = done.stdout.splitlines()
    assert len(printed) == len(expected)
    assert [line for line in printed if not line.startswith(machine)] == [
        line for line in expected if not line.startswith(machine)
    ]


def test_docs_train_runs_up_to_the_first_step(workspace: Path) -> None:
    """What it says of data and memory; training itself is run by the README and by tests/training."""
    for language, block in all_blocks(TRAIN):
        if language == "jsonl":
            (workspace / "chat.jsonl").write_text(block)
        elif language == "sh":
            run_commands(block, workspace)
        elif not language:
            command, expected = block.split("\n", 1)
            arguments = shlex.split(command.removeprefix("$ qpack "))
            done = subprocess.run(
                [sys.executable, "-m", "qpack", *arguments], cwd=workspace, check=True, capture_output=True, text=True
            )
            assert done.stdout == expected


def test_docs_merge_runs_from_top_to_bottom(workspace: Path) -> None:
    for language, block in all_blocks(MERGE):
        if language == "sh":
            run_commands(block, workspace)
    assert (workspace / "both" / "adapter_config.json").is_file()
    for name in ("merged", "merged-original", "merged-sum", "merged-ties"):
        assert "quantization_config" not in json.loads((workspace / name / "config.json").read_text())
    assert "quantization_config" in json.loads((workspace / "merged-nf4" / "config.json").read_text())


def test_docs_serve_s_commands_run(workspace: Path) -> None:
    qpack.convert(workspace / "model", workspace / "base")
    for seed, name in enumerate(("support-march", "support-april")):
        factors.write(workspace / name, factors.draw(workspace / "base", seed=seed))
    with Registry.open(workspace / "elsewhere", base=workspace / "base") as registry:
        april = registry.add("support", workspace / "support-april", by="test").digest
    for language, block in all_blocks(SERVE):
        if language == "sh" and block.startswith(("qpack adapters", "qpack keys")):
            run_commands(block.replace("7c01", april[:4]), workspace)
    (workspace / "adapters").mkdir()
    [example] = [block for language, block in all_blocks(SERVE) if language == "yaml"]
    (workspace / "serve.yaml").write_text(example)
    [check, _] = next(block for _, block in all_blocks(SERVE) if "--check" in block).splitlines()
    run_commands(check, workspace)
    with Registry.open(workspace / "registry") as registry:
        assert len(registry.versions("support")) == 2


def test_docs_recipe_runs_from_top_to_bottom(workspace: Path) -> None:
    """The server that it starts is shown to take the adapter; it is started by the tests in serving/."""
    for language, block in all_blocks(RECIPE):
        if language == "json":
            (workspace / "chat.jsonl").write_text("".join(block.replace("1", str(number)) for number in range(5)))
        elif language == "sh":
            run_commands(block, workspace)
        elif language == "console":
            arguments = shlex.split(block.splitlines()[0])
            assert arguments[:4] == ["qpack", "serve", "base", "--adapter"]
            ServeConfig(workspace / "base", collect_adapters([arguments[4].replace("=", f"={workspace}/")]))
        else:
            subprocess.run([sys.executable, "-c", block], cwd=workspace, check=True, capture_output=True)
    assert json.loads((workspace / "support" / "qpack_adapter.json").read_text())["metrics"]["steps"] == 6


def test_links_lead_somewhere() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_tests_that_are_named_are_there() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for file, test in re.findall(r"`(tests/\S+\.py)::(\w+)`", path.read_text(encoding="utf-8")):
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{path.name}: {file}::{test}"
