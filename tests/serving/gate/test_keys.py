"""API keys: what is kept of them, what they open, and two processes at one file."""

import json
import re
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qpack.errors import ServeError
from serve.gate.keys import FILE_NAME, Keys, Role


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    with closing(Keys(tmp_path)) as opened:
        yield opened


def test_a_key_is_found_and_only_its_hash_is_kept(keys: Keys, tmp_path: Path) -> None:
    key, token = keys.add("team-a", models=["support"], requests_per_minute=60, weight=2.0)
    assert re.fullmatch(r"qp-[0-9a-f]{8}-[\w-]{43}", token)
    assert keys.find(token) == key
    assert (key.name, key.role, key.models) == ("team-a", Role.INFERENCE, frozenset({"support"}))
    assert (key.requests_per_minute, key.tokens_per_minute, key.weight) == (60, None, 2.0)
    secret = token.split("-", 2)[2].encode()
    files = list(tmp_path.iterdir())
    assert not any(secret in path.read_bytes() for path in files)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)


def test_only_the_whole_key_is_found(keys: Keys) -> None:
    _, token = keys.add("a")
    _, other = keys.add("b")
    head, tail = token[:11], other[11:]
    flipped = token[:-1] + ("A" if token[-1] != "A" else "B")
    for wrong in ("", token[:-1], token + "A", flipped, head + tail, token.upper(), f" {token}", f"{token}\n", "qp-é"):
        assert keys.find(wrong) is None, wrong


def test_what_a_key_may_use(keys: Keys) -> None:
    some, _ = keys.add("some", models=["support", "support"])
    every, _ = keys.add("every")
    assert some.may_use("support")
    assert not some.may_use("billing")
    assert every.may_use("anything")


def test_a_revoked_key_is_refused_at_once_and_by_other_processes(keys: Keys, tmp_path: Path) -> None:
    key, token = keys.add("a")
    with closing(Keys(tmp_path)) as server:
        assert server.find(token) is not None
        keys.revoke("a")
        assert server.find(token) is None
        keys.add("a")  # the name is free again
        by_id, _ = keys.add("b")
        assert keys.revoke(f"qp-{by_id.id}").name == "b"
        assert [(found.name, found.revoked is None) for found in server.list()] == [
            ("a", False),
            ("a", True),
            ("b", False),
        ]
    assert key.revoked is None, "what was known then"


def test_the_server_stays_closed_when_the_last_key_is_revoked(keys: Keys) -> None:
    assert not keys.required
    keys.add("a")
    assert keys.required
    keys.revoke("a")
    assert keys.required


def test_use_is_noted_to_the_minute(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    key, token = keys.add("a")
    now = key.created

    def use(seconds: float) -> float | None:
        monkeypatch.setattr(time, "time", lambda: now + seconds)
        keys.note_use(key.id)
        found = keys.find(token)
        assert found is not None
        return found.last_used

    assert key.last_used is None
    assert [use(seconds) for seconds in (1, 30, 62)] == [now + 1, now + 1, now + 62]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, "the name is not 1 to 128"),
        ("a b", {}, "the name is not 1 to 128"),
        ("taken", {}, "there is a key of this name"),
        ("a", {"requests_per_minute": 0}, "requests_per_minute 0: expected at least 1"),
        ("a", {"tokens_per_minute": -5}, "tokens_per_minute -5: expected at least 1"),
        ("a", {"concurrency": 0}, "concurrency 0: expected at least 1"),
        ("a", {"weight": 0.0}, "weight 0.0: expected more than 0"),
        ("a", {"weight": float("nan")}, "weight nan: expected more than 0"),
    ],
)
def test_bad_keys_are_refused(keys: Keys, name: str, options: dict[str, int], message: str) -> None:
    keys.add("taken")
    with pytest.raises(ServeError, match=re.escape(f"key {name!r}: {message}")):
        keys.add(name, **options)  # type: ignore[arg-type]
    assert len(keys.list()) == 1


def test_a_key_that_is_not_there_can_not_be_revoked(keys: Keys) -> None:
    keys.add("a")
    keys.revoke("a")
    with pytest.raises(ServeError, match="key 'a': no live key has this name or id"):
        keys.revoke("a")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="missing: not a directory"):
        Keys(tmp_path / "missing")
    (tmp_path / FILE_NAME).write_bytes(b"not a database" * 100)
    with pytest.raises(ServeError, match=rf"{FILE_NAME}: file is not a database"):
        Keys(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as newer:
        newer.execute("PRAGMA user_version = 2")
    with pytest.raises(ServeError, match="expected version 1 of the file of keys, found 2"):
        Keys(tmp_path)


def qpack(*arguments: object, status: int = 0) -> str:
    command = [sys.executable, "-m", "qpack", "keys", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_the_program(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    limits = ("--model", "support", "--model", "base", "--requests-per-minute", 60, "--tokens-per-minute", 90000)
    token = qpack("add", "team-a", "--registry", registry, *limits).strip()
    with closing(Keys(registry)) as server:
        found = server.find(token)
        assert found is not None
        assert found.models == frozenset({"support", "base"})
        qpack("add", "ops", "--role", "admin", "--registry", registry)
        heading, first, second = qpack("list", "--registry", registry).splitlines()
        assert re.split(r"\s{2,}", heading)[:4] == ["name", "key", "role", "models"]
        shown = [
            "team-a",
            f"{token[:11]}-...",
            "inference",
            "base,support",
            "60",
            "90,000",
            "any",
            "1",
            "never",
            "live",
        ]
        assert re.split(r"\s{2,}", first) == shown
        assert second.startswith("ops ")
        assert qpack("revoke", "team-a", "--registry", registry) == f"revoked team-a ({token[:11]})\n"
        assert server.find(token) is None
    lines = [json.loads(line) for line in qpack("list", "--json", "--registry", registry).splitlines()]
    assert [(line["name"], line["revoked"] is None) for line in lines] == [("team-a", False), ("ops", True)]
    assert "sha256" not in lines[0]
    assert qpack("revoke", "x", "--registry", registry, status=1).startswith("error: key 'x': no live key")
    assert qpack("list", "--registry", tmp_path / "none", status=1) == f"error: {tmp_path / 'none'}: not a directory\n"


def test_the_guide_s_commands_run(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "serve.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```sh\n(qpack keys .*?)^```$", guide, re.MULTILINE | re.DOTALL)
    for command in commands.splitlines():
        program, group, *arguments = command.replace(" registry", f" {tmp_path / 'registry'}").split()
        assert (program, group) == ("qpack", "keys")
        qpack(*arguments)
    with closing(Keys(tmp_path / "registry")) as keys:
        assert [(key.name, key.revoked is None) for key in keys.list()] == [("team-a", False), ("ops", True)]
