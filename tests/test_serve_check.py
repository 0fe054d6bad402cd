"""``qpack serve --check``: it finds all that a start would refuse, says what would be served, and changes nothing."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import factors
import pytest
from safetensors.torch import load_file, save_file

from qpack.errors import QpackError
from qpack.reports.serving import as_lines
from serve import ServeConfig
from serve.gate.keys import Keys
from serve.gate.limits import RequestLimits
from serve.preflight import Preflight, preflight
from serve.registry import Registry


@pytest.fixture
def site(packed: Path, tmp_path: Path) -> Path:
    """A base, a registry with an adapter and a key, and two adapters beside it, one of them in a watched directory."""
    shutil.copytree(packed, tmp_path / "base")
    for seed, path in enumerate(("old", "support", "watched/sales")):
        factors.write(tmp_path / path, factors.draw(packed, seed=seed))
    with Registry.open(tmp_path / "registry", base=tmp_path / "base") as registry:
        registry.add("old", tmp_path / "old", by="test")
    with closing(Keys(tmp_path / "registry")) as keys:
        keys.add("someone")
    return tmp_path


def check(site: Path, **options: Any) -> Preflight:
    """Check the whole site, but for ``options``."""
    usual: dict[str, Any] = {
        "base": site / "base",
        "adapters": {"support": site / "support"},
        "watch": site / "watched",
        "registry": site / "registry",
        "host": "127.0.0.1",
        "port": 0,
    }
    return preflight(**(usual | options))


def problems(site: Path, **options: Any) -> list[str]:
    with pytest.raises(QpackError) as error:
        check(site, **options)
    return [line.replace(f"{site}/", "") for line in str(error.value).splitlines()]


def state(directory: Path) -> dict[str, bytes]:
    """Every file, but for those that SQLite has beside an open database."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files if not path.name.endswith(("-wal", "-shm"))}


_PROGRAM = """
import sys
from qpack import cli
sys.argv[0] = "qpack"
try:
    cli.main()
finally:
    print(sorted({"torch", "vllm", "fastapi"} & set(sys.modules)))
"""


def test_what_would_be_served(site: Path) -> None:
    before = state(site)
    command = [sys.executable, "-c", _PROGRAM, "serve", "base", "--check", "--port", "0", "--registry", "registry"]
    command += ["--adapter", "support=support", "--adapters", "watched", "--max-loras", "2"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *told, imported = done.stdout.splitlines()
    assert imported == "[]"
    facts = [re.split(r"\s{2,}", line, maxsplit=1) for line in told]
    names = ["base", "listens at", "open to", "adapter", "adapter", "in the registry", "slots", "memory"]
    assert [name for name, _ in facts] == names
    text = {name: said for name, said in facts}
    assert re.fullmatch(r"base, \d+ kB, fingerprint [0-9a-f]{12}", text["base"])
    assert text["listens at"] == "http://127.0.0.1:PORT/v1"
    assert text["open to"] == "1 key"
    assert re.fullmatch(r"sales@[0-9a-f]{12}, rank 4, 17\.\d kB", text["adapter"])
    assert text["in the registry"].startswith("old@")
    assert text["slots"] == "2 in a batch, 16 in memory, rank 16"
    assert re.match(r"serve 1 x 512 tokens: .* adapter slots \d", text["memory"])
    assert state(site) == before


def test_a_base_alone(site: Path) -> None:
    lines = as_lines(preflight(base=site / "base", host="127.0.0.1", port=0))
    assert [line.split()[0] for line in lines] == ["base", "listens", "open", "memory"]
    assert "this machine, without a key" in lines[2]


def test_what_would_not_be_served(site: Path) -> None:
    factors.write(site / "large", factors.draw(site / "base", r=32), r=32)
    with Registry.open(site / "registry") as registry:
        version = registry.add("large", site / "large", by="test")
    with closing(Keys(site / "registry")) as keys:
        keys.revoke("someone")
    lines = as_lines(check(site, max_lora_rank=16))
    assert [line for line in lines if version.id in line] == [f"not served       {version.id}, rank 32 is over 16"]
    assert "open to          0 keys" in lines
    assert f"in the registry  {version.id}, rank 32" in as_lines(check(site))


def test_all_problems_are_listed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    factors.write(site / "rank32", factors.draw(site / "base", r=32), r=32)
    (site / "watched/sales/adapter_config.json").write_text("{")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        options: dict[str, Any] = {"adapters": {"base": site / "rank32", "x": site / "none"}, "port": port}
        found = problems(site, max_lora_rank=16, max_cpu_loras=1, max_loras=2, max_model_len=513, **options)
    assert [line.split(": ", 1)[0].split(" is set")[0] for line in found] == [
        "adapter rank32",
        "max_model_len 513",
        "none",
        "watched/sales/adapter_config.json",
        "rank32",
        "max_cpu_loras 1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        f"cannot listen on 127.0.0.1:{port}",
    ]


def edited(path: Path, edit: Callable[[Any], object]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def silence(*adapters: Path) -> None:
    """Put a NaN into each adapter."""
    for adapter in adapters:
        tensors = load_file(adapter / "adapter_model.safetensors")
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, adapter / "adapter_model.safetensors")


def lose(site: Path) -> None:
    """Delete a version's files."""
    [directory] = (site / "registry" / "store").iterdir()
    shutil.rmtree(directory)


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "values of both adapters": (
        lambda site: silence(site / "support", site / "watched/sales"),
        ["support/adapter_model.safetensors: tensor ", "watched/sales/adapter_model.safetensors: tensor "],
    ),
    "a file of the registry": (lose, ["registry/store/"]),
    "the registry": (
        lambda site: (site / "registry/registry.sqlite").write_bytes(b"no database" * 100),
        ["registry/registry.sqlite: file is not a database"],
    ),
    "the keys": (
        lambda site: (site / "registry/keys.sqlite").write_bytes(b"no database" * 100),
        ["registry/keys.sqlite: file is not a database"],
    ),
    "a record of the base": (
        lambda site: edited(site / "base/qpack.json", lambda manifest: manifest["tensors"].popitem()),
        ["base/qpack.json: does not record tensor "],
    ),
    "the number of layers": (
        lambda site: edited(site / "base/config.json", lambda config: config.update(num_hidden_layers=3)),
        ["base/config.json: 3 layers, but no tensor is of layer 2"],
    ),
    "a weight of the base": (
        lambda site: os.truncate(site / "base/model.safetensors", 100_000),
        ["base/model.safetensors: "],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found(site: Path, what: str) -> None:
    break_it, expected = BROKEN[what]
    break_it(site)
    found = problems(site)
    assert len(found) == len(expected)
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(beginning)


WRONG: dict[str, tuple[Any, str]] = {
    "base": ("watched", "watched: no model.safetensors.index.json"),
    "adapters": ({"a": "none"}, "none: not a directory"),
    "watch": ("none", "none: not a directory of adapters"),
    "registry": ("support/adapter_config.json", "registry support/adapter_config.json: not a directory"),
    "host": ("0.0.0.0", "host 0.0.0.0: others could use the server without a key"),
    "port": (65536, "port 65536: expected 0 to 65535"),
    "max_loras": (0, "max_loras 0: expected at least 1"),
    "max_cpu_loras": (3, "max_cpu_loras 3: expected at least max_loras, 4"),
    "max_lora_rank": (4, "max_lora_rank 4: expected one of 1, 8, 16"),
    "max_model_len": (513, "max_model_len 513: the model has max_position_embeddings 512"),
    "vllm_options": (("uds=x",), "vllm option uds: "),
    "otlp_traces_endpoint": ("localhost", "otlp_traces_endpoint localhost: expected a URL"),
    "drain_timeout": (float("nan"), "drain_timeout nan: expected 0 or more seconds"),
    "max_body_bytes": (0, "max_body_bytes 0: expected more than 0"),
    "max_output_tokens": (-1, "max_output_tokens -1: expected more than 0"),
    "max_choices": (0, "max_choices 0: expected more than 0"),
    "max_waiting": (0, "max_waiting 0: expected more than 0"),
    "queue_timeout": (float("nan"), "queue_timeout nan: expected more than 0"),
    "request_timeout": (float("inf"), "request_timeout inf: expected more than 0"),
    "turn_seconds": (0, "turn_seconds 0: expected more than 0"),
    "weights": ({"a": -1}, "weight of 'a': -1: expected more than 0"),
}
"""A bad value of every field, and how it is refused."""

SWITCHES = {"without_keys", "force", "verbose"}
LIMITS = {field.name for field in fields(RequestLimits)}


def test_no_field_is_forgotten() -> None:
    assert WRONG.keys() | SWITCHES == {field.name for field in fields(ServeConfig)} - {"limits"} | LIMITS


@pytest.mark.parametrize("field", WRONG)
def test_every_bad_value_is_refused_by_name(
    site: Path, field: str, monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    """Before anything heavy is imported: that, tests/serving/test_serve_config.py shows in a process of its own."""
    monkeypatch.chdir(site)
    value, message = WRONG[field]
    if isinstance(value, str) and field in ("base", "watch", "registry"):
        value = Path(value)
    if field == "adapters":
        value = {name: Path(path) for name, path in value.items()}
    options: dict[str, Any] = {"base": Path("base"), "adapters": {"support": Path("support")}}
    with pytest.raises(QpackError) as error:
        if field in LIMITS:
            RequestLimits(**{field: value})
        else:
            ServeConfig(**(options | {field: value}))
    assert str(error.value).removeprefix(f"{site}/").startswith(message)


def test_more_pinned_than_there_is_room_for(site: Path) -> None:
    with Registry.open(site / "registry") as registry:
        [old] = registry.versions()
        new = registry.add("new", site / "support", by="test")
        for version in (old, new):
            registry.pin(version.name, version.digest, True)
    assert problems(site, max_loras=1, max_cpu_loras=1) == [
        f"max_cpu_loras 1: 2 versions are pinned, which are to stay: {old.id}, {new.id}"
    ]


def test_a_registry_of_another_base_is_refused_and_left_alone(site: Path, llama: Path) -> None:
    import qpack

    qpack.convert(llama, site / "finer", blocksize=128)
    before = state(site / "registry")
    assert problems(site, base=site / "finer")[0].startswith("registry: is for the base base with fingerprint")
    shutil.copytree(site / "base", site / "twin")
    check(site, base=site / "twin")
    assert state(site / "registry") == before
