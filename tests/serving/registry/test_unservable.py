"""Versions of a larger rank than a later server has room for: the server starts, and refuses them by name."""

import logging
from collections.abc import Callable
from pathlib import Path

import factors
import httpx
import pytest
from gated import site

from serve import ServeConfig
from serve.registry import Registry, RegistryError, Version
from serve.stock import stocked


@pytest.fixture
def large(registry: Registry, packed: Path, adapter: Path, tmp_path: Path) -> Version:
    """Of rank 32 and live; before it was one of rank 4."""
    registry.add("support", adapter, by="test")
    source = factors.write(tmp_path / "large", factors.draw(packed, r=32), r=32)
    version = registry.add("support", source, by="test")
    registry.pin("support", version.digest, True)
    return version


def start(packed: Path, registry: Registry, rank: int | None) -> None:
    """Do to the registry what a start does."""
    with stocked(ServeConfig(packed, registry=registry.directory, max_lora_rank=rank)):
        pass


def test_a_smaller_server_starts_and_says_what_it_does_not_serve(
    packed: Path, registry: Registry, large: Version, caplog: pytest.LogCaptureFixture
) -> None:
    reason = "rank 32 is over the server's --max-lora-rank 16"
    with caplog.at_level(logging.WARNING, "qpack.serve"):
        start(packed, registry, 16)
    assert caplog.messages == [f"adapter {large.id} is not served: {reason}"]
    small, found = registry.versions()
    assert (small.unservable, found.unservable) == (None, reason)
    with site(registry.directory, registry=registry) as running:
        with running.client() as client:
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny", small.id]
            listed = client.get("/v1/adapters").json()["versions"]
            assert [one["unservable"] for one in listed] == [None, reason]
        for model in ("support", large.id):
            answer = running.ask(model=model)
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == f"{large.id} is not served: {reason}"
        assert running.ask(model=small.id).status_code == 200
        assert not running.engine.asked[1:], "and the engine hears nothing of the others"

        answered = httpx.post(f"{running.url}/v1/adapters/support/promote", json={"version": small.digest})
        assert answered.status_code == 200
        assert running.ask(model="support").status_code == 200
    changes: list[Callable[[], object]] = [
        lambda: registry.promote("support", large.digest, by="test"),
        lambda: registry.rollback("support"),
        lambda: registry.canary("support", {large.digest: 5}),
        lambda: registry.shadow("support", large.digest),
    ]
    for change in changes:
        with pytest.raises(RegistryError, match=f"{large.id}: {reason}"):
            change()


@pytest.mark.parametrize("rank", [None, 32, 64])
def test_a_server_with_room_serves_them_again(
    packed: Path, registry: Registry, large: Version, rank: int | None
) -> None:
    start(packed, registry, 16)
    start(packed, registry, rank)
    assert [version.unservable for version in registry.versions()] == [None, None]
    with site(registry.directory, registry=registry) as running:
        assert running.ask(model="support").json()["model"] == large.id
