"""``qpack serve --config``: what a file says is as good as flags, and what is wrong in it is told by line."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import factors
import pytest
import yaml
from click.testing import CliRunner

import serve
from qpack.cli.config_file import read_options, settings
from qpack.cli.serve import serve as command
from qpack.errors import QpackError
from serve import ServeConfig

Started = tuple[ServeConfig, int]
"""With which config, and at which level of the log."""
Start = Callable[..., Started]

SAMPLES: dict[str, Any] = {
    "base": "other",
    "adapter": {"support": "support", "billing": "watched/sales"},
    "adapters": "watched",
    "registry": "elsewhere",
    "host": "127.0.0.2",
    "port": 8001,
    "without-keys": True,
    "max-loras": 5,
    "max-cpu-loras": 17,
    "max-lora-rank": 32,
    "max-model-len": 128,
    "drain-timeout": 1.5,
    "vllm": ["tool-call-parser=hermes", "enable-auto-tool-choice"],
    "otlp-traces-endpoint": "http://localhost:4317",
    "max-body": "1MB",
    "max-output-tokens": 7,
    "max-choices": 2,
    "max-waiting": 3,
    "queue-timeout": 10,
    "request-timeout": 20,
    "turn-seconds": 0.5,
    "weight": {"support": 2, "billing": 0.5},
    "force": True,
    "verbose": True,
    "quiet": True,
}
"""A value for every key, other than the default."""


@pytest.fixture
def folder(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two bases and two adapters, and we are there."""
    for name in ("base", "other"):
        shutil.copytree(packed, tmp_path / name)
    for path in ("support", "watched/sales"):
        factors.write(tmp_path / path, factors.draw(packed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Run the command up to where the server would start, which takes an engine."""
    started: list[ServeConfig] = []
    monkeypatch.setattr(serve, "serve", started.append)
    monkeypatch.setattr("serve.config.TRACING_PACKAGES", ())  # which are not vLLM's own dependencies
    logger = logging.getLogger("qpack")
    before = logger.handlers, logger.propagate, logger.level

    def run(*arguments: object) -> Started:
        started.clear()
        done = CliRunner().invoke(command, [*map(str, arguments)], catch_exceptions=False)
        assert not done.exit_code, done.output
        return started[0], logger.level

    yield run
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def flags(key: str, value: Any) -> list[str]:
    """The same on the command line."""
    if key == "base":
        return [value]
    if isinstance(value, dict):
        return [part for name, one in value.items() for part in (f"--{key}", f"{name}={one}")]
    if isinstance(value, list):
        return [part for one in value for part in (f"--{key}", one)]
    return [f"--{key}"] if value is True else [f"--{key}", str(value)]


def test_no_option_is_forgotten() -> None:
    assert settings(command).keys() == SAMPLES.keys(), "an option that is new needs a value in SAMPLES"


@pytest.mark.parametrize("key", SAMPLES)
def test_every_option_has_its_effect_from_the_file(folder: Path, start: Start, key: str) -> None:
    usual = {"base": "base", "registry": "registry"}
    without = {name: value for name, value in usual.items() if name != key}
    given = [flag for name, value in (without | {key: SAMPLES[key]}).items() for flag in flags(name, value)]
    from_file = start("--config", write(folder / "serve.yaml", usual | {key: SAMPLES[key]}))
    assert from_file == start(*given)
    assert from_file != start("--config", write(folder / "serve.yaml", usual))


def test_flags_take_precedence(folder: Path, start: Start) -> None:
    said = {"base": "base", "port": 8001, "adapter": {"a": "support", "b": "support"}, "max-body": "1MB", "quiet": True}
    path = write(folder / "serve.yaml", said)
    config, level = start("other", "--config", path, "--port", 8002, "--adapter", "c=support", "-v")
    assert (config.name, config.port, [*config.adapters]) == ("other", 8002, ["c"])
    assert (config.limits.max_body_bytes, level) == (10**6, logging.DEBUG)


def test_paths_start_where_the_file_is(folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"base": "base", "adapter": ["a=support"], "adapters": "./watched", "registry": str(folder / "registry")}
    path = write(folder / "serve.yaml", said)
    (folder / "away").mkdir()
    monkeypatch.chdir(folder / "away")
    config, _ = start("--config", Path("..") / path.name)
    assert config.base == folder / "base"
    assert config.adapters == {"a": folder / "support"}
    assert (config.watch, config.registry) == (folder / "watched", folder / "registry")


def test_an_empty_file_says_nothing(folder: Path, start: Start) -> None:
    (folder / "serve.yaml").write_text("# nothing yet\n")
    assert start("base", "--config", "serve.yaml") == start("base")


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("prot: 80", ["1: prot: is no option; did you mean port?"]),
        ("\nmax_loras: 4", ["2: max_loras: is no option; did you mean max-loras?"]),
        ("zzz: 1", [f"1: zzz: is no option; expected one of {', '.join(settings(command))}"]),
        ("check: true", [f"1: check: is no option; expected one of {', '.join(settings(command))}"]),
        ("port: 1\nport: 1", ["2: port: is in line 1 already"]),
        ("port:", ["1: port: has no value"]),
        ("port: high", ["1: port: 'high' is not a valid integer range"]),
        ("port: 80.5", ["1: port: '80.5' is not a valid integer range"]),
        ("port: 70000", ["1: port: 70000 is not in the range 0<=x<=65535"]),
        ("port: true", ["1: port: expected a value, found true"]),
        ("host: [a]", ["1: host: expected one value, found a list"]),
        ("registry: no", ["1: registry: expected a value, found no"]),
        ("registry: ~", ["1: registry: has no value"]),
        ("force: 1", ["1: force: expected true or false, found 1"]),
        ("max-body: much", ["1: max-body: 'much' is not a size, expected for example 5GB or 500MiB"]),
        ("adapter: a=x", ["1: adapter: expected a list or a mapping, found one value"]),
        ("adapter: [a]", ["1: adapter: 'a': expected NAME=DIR"]),
        ("adapter:\n- a=x\n- b=", ["3: adapter: 'b=': expected NAME=DIR"]),
        ("adapter:\n  a: x\n  a: y", ["3: adapter: 'a' comes twice"]),
        ("adapter: {a: [x]}", ["1: adapter: expected one value, found a list"]),
        ("weight: {a: 0}", ["1: weight: 'a=0': expected NAME=NUMBER, the number more than 0"]),
        (
            "host: []\nport: 0\n\nport: 1",
            ["1: host: expected one value, found a list", "4: port: is in line 2 already"],
        ),
        ("- port", [" expected lines of OPTION: VALUE"]),
        ("? [a]\n: 1", [" expected lines of OPTION: VALUE"]),
    ],
)
def test_what_is_wrong_is_told_by_line(tmp_path: Path, text: str, problems: list[str]) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(QpackError) as error:
        read_options(path, click.Context(command))
    assert str(error.value).splitlines() == [f"{path}:{problem}" for problem in problems]


def test_what_is_no_file_of_options(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    for content, message in ((b"a: [", "not a YAML file: "), (b"\xff", "not a YAML file: "), (None, "no such file")):
        if content is not None:
            path.write_bytes(content)
        else:
            path.unlink()
        with pytest.raises(QpackError, match=f"{path}: {message}"):
            read_options(path, click.Context(command))


def test_all_problems_are_printed(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("prot: 1\nhost:\n")
    arguments = [sys.executable, "-m", "qpack", "serve", "--config", str(path), "--check"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {path}:1: prot: is no option; did you mean port?\nerror: {path}:2: host: has no value\n"
    )
