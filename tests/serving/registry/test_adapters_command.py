"""``qpack adapters``, in the registry's directory and over the API of a running server: the same commands and words."""

import getpass
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import factors
import hub
import huggingface_hub
import pytest
from gated import site

from qpack import cli
from serve.gate.keys import Keys, Role
from serve.registry import Limits, Registry

Run = Callable[..., str]
Where = tuple[str, str]
"""The flag that says which server's adapters are meant, and its value."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the program in this process; what it prints, or its errors."""

    def call(*arguments: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["qpack", "adapters", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == status, printed.err
        if status == 1:  # the server in this process writes its log there too
            return "".join(line for line in printed.err.splitlines(keepends=True) if line.startswith("error: "))
        return printed.err if status else printed.out

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    logger = logging.getLogger("qpack")
    before = logger.handlers, logger.propagate, logger.level
    yield call
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture(params=["--registry", "--url"])
def where(request: pytest.FixtureRequest, registry: Registry) -> Iterator[Where]:
    """A new registry, on disk and behind a server."""
    if request.param == "--registry":
        yield "--registry", str(registry.directory)
    else:
        with site(registry.directory, registry=registry) as running:
            yield "--url", running.url


def test_a_life_of_two_versions(run: Run, where: Where, adapter: Path, other: Path) -> None:
    first = run("add", "support", adapter, *where).strip()
    second = run("add", "support", other, "--no-promote", *where).strip()
    digest = second.partition("@")[2]
    assert run("canary", "support", f"{digest[:6]}=2.5", *where) == f"97.5 % {first}\n2.5 % {second}\n"
    assert run("shadow", "support", digest, *where) == f"support has the shadow {second}\n"
    assert run("pin", first, *where) == f"{first} is pinned\n"
    headings, *rows = run("list", *where).splitlines()
    assert headings.split() == ["version", "state", "rank", "size", "added", "by"]
    user = re.escape(getpass.getuser())
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.fullmatch(rf"{first}  live, pinned +4     17\.\d kB  {when}  {user}", rows[0])
    assert re.fullmatch(rf"{second}  canary 2\.5 %, shadow  4     17\.\d kB  {when}  {user}", rows[1])
    assert run("promote", second, *where) == f"support is {second}\n"
    listed = [json.loads(line) for line in run("list", "--json", *where).splitlines()]
    assert [(one["id"], one["live"], one["canary"], one["pinned"]) for one in listed] == [
        (first, False, 0, True),
        (second, True, 0, False),
    ]
    assert run("rollback", "support", *where) == f"support is {first}\n"
    assert run("pin", first, "--off", *where) == f"{first} is not pinned\n"
    assert run("shadow", "support", *where) == "support has no shadow\n"
    assert run("remove", second, *where) == f"removed {second}\n"
    assert f"error: {first} is live; promote another version first" in run("remove", first, *where, status=1)
    assert run("remove", "support", *where) == f"removed {first}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("promote", "support"), 2, "'support' is no version, expected NAME@DIGEST"),
        (("canary", "support", "abcd=x"), 2, "'abcd=x' is no share, expected DIGEST=PERCENT"),
        (("rollback", "support"), 1, "error: no adapter 'support'\n"),
        (("promote", "support@abcd"), 1, "error: no version support@abcd\n"),
        (("remove", "support@abcd"), 1, "error: no version support@abcd\n"),
        (("shadow", "support"), 1, "error: no adapter 'support'\n"),
        (("add", "support", "no such"), 1, "error: no such: no such file or directory, and not the id of an adapter"),
        (("add", "../x", "."), 1, "error: the name '../x' is not 1 to 128 letters"),
        (("add", "support", __file__), 1, f"error: {__file__}: not a directory\n"),
        (("add", "support", Path(__file__).parent), 1, "adapter_config.json: no such file\n"),
        (("add", "base", Path(__file__).parent), 1, "error: the name 'base' is the base's own\n"),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, tuple) else "",
)
def test_mistakes(
    run: Run, where: Where, registry: Registry, arguments: tuple[object, ...], status: int, message: str
) -> None:
    assert message in run(*arguments, *where, status=status)
    assert not registry.versions()


def test_a_bad_adapter_is_told_of_in_the_server_s_words(run: Run, where: Where, adapter: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(adapter, tmp_path / "bad")
    (bad / "adapter_config.json").write_text('{"peft_type": "LORA"')
    assert re.match(r"error: .*adapter_config\.json: not valid JSON", run("add", "support", bad, *where, status=1))


def test_one_place_must_be_said(run: Run, tmp_path: Path) -> None:
    message = "one of --registry and --url says which server's adapters are meant"
    assert message in run("list", status=2)
    assert message in run("list", "--registry", tmp_path, "--url", "http://127.0.0.1:1", status=2)
    assert "a server has its own" in run("add", "a", "b", "--url", "http://x", "--base", tmp_path, status=2)
    assert run("list", "--url", "127.0.0.1:8000", status=1) == (
        "error: 127.0.0.1:8000: not the address of a server, expected http://HOST:PORT\n"
    )
    assert "error: http://127.0.0.1:1/v1/adapters: " in run("list", "--url", "http://127.0.0.1:1", status=1)


def test_keys_of_a_server(run: Run, registry: Registry, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Keys(registry.directory)) as keys, site(registry.directory, registry=registry) as running:
        _, admin = keys.add("ops", Role.ADMIN)
        _, inference = keys.add("team")
        url = ("--url", f"{running.url}/v1/")  # as an OpenAI client has it
        assert "error: an API key is needed" in run("list", *url, status=1)
        assert "error: this key is for inference" in run("add", "a", adapter, *url, "--key", inference, status=1)
        monkeypatch.setenv("QPACK_API_KEY", admin)
        assert run("add", "a", adapter, *url).startswith("a@")
    assert [version.name for version in registry.versions()] == ["a"]


def test_what_is_no_server_of_ours(run: Run, adapter: Path) -> None:
    with hub.serve(lora=adapter) as other:
        assert run("list", "--url", other.url, status=1) == (
            f"error: {other.url}/v1/adapters: status 401, and not what a server of qpack says\n"
        )


def test_an_upload_shows_its_progress(run: Run, registry: Registry, adapter: Path) -> None:
    from serve.remote import RemoteAdapters

    seen: list[tuple[int, int]] = []
    with site(registry.directory, registry=registry) as running, RemoteAdapters(running.url) as remote:
        remote.add("a", adapter, by="me", on_progress=lambda done, total: seen.append((done, total)))
    total = sum((adapter / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert seen[-1] == (total, total)
    assert len(seen) > 2


def test_a_registry_is_not_made_by_looking(run: Run, tmp_path: Path) -> None:
    assert run("list", "--registry", tmp_path / "none", status=1).startswith(f"error: {tmp_path / 'none'}: no registry")
    assert not (tmp_path / "none").exists()


# The hub's client reads where the hub is when it is imported: whoever asks it here does so in a process of its own.


def test_an_adapter_of_the_hub(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    with hub.serve(lora=adapter) as served:

        def add(source: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "qpack", "adapters", "add", "support", source]
            command += ["--registry", str(registry.directory)]
            return subprocess.run(command, env=of_hub(served, tmp_path), capture_output=True, text=True, check=False)

        assert add("org/lora").stdout.strip() == registry.add("local", adapter, by="me").id.replace("local", "support")
        assert "error: org/none: no such path, and no such model on" in add("org/none").stderr


def of_hub(served: hub.Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that asks this hub."""
    return os.environ | {
        "HF_ENDPOINT": served.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(hub.__file__).parent),
    }


SERVER = """
import sys
from pathlib import Path
from gated import site
from serve.registry import Registry

directory = Path(sys.argv[1])
with Registry.open(directory) as registry, site(directory, registry=registry) as running:
    print(running.url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def server(registry: Registry, environment: dict[str, str]) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-c", SERVER, str(registry.directory)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.communicate()


def test_a_server_fetches_an_adapter_of_the_hub(run: Run, packed: Path, adapter: Path, tmp_path: Path) -> None:
    large = factors.write(tmp_path / "large", factors.draw(packed, r=8), r=8)
    limits = Limits(max_bytes=20_000)
    with (
        Registry.open(tmp_path / "registry", base=packed, limits=limits) as registry,
        hub.serve(lora=adapter, large=large) as served,
        server(registry, of_hub(served, tmp_path)) as url,
    ):
        added = run("add", "support", "org/lora", "--url", url).strip()
        assert added == registry.add("local", adapter, by="me").id.replace("local", "support")
        other = run("add", "again", "org/lora", "--revision", hub.COMMIT, "--no-promote", "--url", url).strip()
        refusals = {
            ("org/none",): "org/none: no such path, and no such model on",
            ("org/lora", "--revision", "later"): "org/lora: no revision later on",
            ("org/large",): "org/large: 33.4 kB, expected at most 20 kB",
            ("name-alone",): "'name-alone' is not the id of an adapter of the hub, expected ORG/NAME",
        }
        for arguments, message in refusals.items():
            assert f"error: {message}" in run("add", "support", *arguments, "--url", url, status=1)
        assert not any("org/large/resolve" in path for _, path, _ in served.requests), "nothing of it was fetched"
        assert not (tmp_path / "cache").exists(), "the client's own cache is left alone"
        assert [version.id for version in registry.versions()] == [added, f"local@{added.partition('@')[2]}", other]


def test_a_server_without_the_hub_fetches_nothing(
    run: Run, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with site(registry.directory, registry=registry) as running:
        refused = run("add", "support", "org/lora", "--url", running.url, status=1)
    assert refused == "error: org/lora: HF_HUB_OFFLINE is set where the server runs; upload the adapter's files\n"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"source": "/etc"}, 400, "'/etc' is not the id of an adapter of the hub, expected ORG/NAME"),
        ({"source": "../../etc"}, 400, "'../../etc' is not the id"),
        ({"path": "/etc"}, 400, "the body is not as expected: field required"),
        ({"source": "org/lora", "path": "/etc"}, 400, "the body is not as expected: extra inputs are not permitted"),
        ({"source": "x" * 70_000}, 413, "an adapter may have 65536 bytes, not 70"),
    ],
    ids=["path", "dots", "field", "more", "long"],
)
def test_a_request_names_no_path(registry: Registry, body: dict[str, str], status: int, message: str) -> None:
    with site(registry.directory, registry=registry) as running, running.client() as client:
        answer = client.post("/v1/adapters/support", json=body)
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]
