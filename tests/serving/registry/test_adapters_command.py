"""``qpack adapters``, as the program."""

import getpass
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hub
import pytest

from serve.registry import Registry


def run(*arguments: object, status: int = 0, **environment: str) -> str:
    """What it prints, or its error."""
    command = [sys.executable, "-m", "qpack", "adapters", *map(str, arguments)]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_a_life_of_two_versions(packed: Path, adapter: Path, other: Path, tmp_path: Path) -> None:
    here = ("--registry", tmp_path / "registry")
    first = run("add", "support", adapter, "--base", packed, *here).strip()
    second = run("add", "support", other, "--no-promote", *here).strip()
    digest = second.partition("@")[2]
    assert run("canary", "support", f"{digest[:6]}=2.5", *here) == f"97.5 % {first}\n2.5 % {second}\n"
    assert run("shadow", "support", digest, *here) == f"support has the shadow {second}\n"
    assert run("pin", first, *here) == f"{first} is pinned\n"
    headings, *rows = run("list", *here).splitlines()
    assert headings.split() == ["version", "state", "rank", "size", "added", "by"]
    user = re.escape(getpass.getuser())
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.fullmatch(rf"{first}  live, pinned +4     17\.\d kB  {when}  {user}", rows[0])
    assert re.fullmatch(rf"{second}  canary 2\.5 %, shadow  4     17\.\d kB  {when}  {user}", rows[1])
    assert run("promote", second, *here) == f"support is {second}\n"
    listed = [json.loads(line) for line in run("list", "--json", *here).splitlines()]
    assert [(one["id"], one["live"], one["canary"], one["pinned"]) for one in listed] == [
        (first, False, 0, True),
        (second, True, 0, False),
    ]
    assert run("rollback", "support", *here) == f"support is {first}\n"
    assert run("pin", first, "--off", *here) == f"{first} is not pinned\n"
    assert run("shadow", "support", *here) == "support has no shadow\n"
    assert run("remove", second, *here) == f"removed {second}\n"
    assert f"error: {first} is live; promote another version first" in run("remove", first, *here, status=1)
    assert run("remove", "support", *here) == f"removed {first}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("promote", "support"), 2, "'support' is no version, expected NAME@DIGEST"),
        (("canary", "support", "abcd=x"), 2, "'abcd=x' is no share, expected DIGEST=PERCENT"),
        (("rollback", "support"), 1, "error: no adapter 'support'"),
        (("add", "support", "no such"), 1, "error: no such: no such file or directory, and not the id of an adapter"),
        (("add", "../x", "."), 1, "error: the name '../x' is not 1 to 128 letters"),
    ],
)
def test_mistakes(registry: Registry, arguments: tuple[str, ...], status: int, message: str) -> None:
    assert message in run(*arguments, "--registry", registry.directory, status=status)
    assert not registry.versions()


def test_a_registry_is_not_made_by_looking(tmp_path: Path) -> None:
    assert run("list", "--registry", tmp_path / "none", status=1).startswith(f"error: {tmp_path / 'none'}: no registry")
    assert not (tmp_path / "none").exists()


def test_an_adapter_of_the_hub(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    with hub.serve(lora=adapter) as served:
        environment = {"HF_ENDPOINT": served.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        here = ("--registry", registry.directory)
        added = run("add", "support", "org/lora", *here, status=0, **environment).strip()
        assert added == registry.add("local", adapter, by="me").id.replace("local", "support")
        assert "error: org/none: no such path, and no such model on" in run(
            "add", "support", "org/none", *here, status=1, **environment
        )
