"""A watched directory and its registry, look by look; nothing here waits."""

import os
import shutil
from pathlib import Path

import factors
import pytest

from serve.registry import Registry
from serve.registry.watch import Change, Watch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty directory."""
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


def put(source: Path, target: Path) -> None:
    """Replace an adapter's directory, as a copy would: new files, new times."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    os.utime(target / "adapter_model.safetensors", ns=(1, os.stat(source).st_mtime_ns + len(str(source))))


def test_what_appears_changes_and_goes_is_followed(
    registry: Registry, folder: Path, adapter: Path, other: Path
) -> None:
    watch = Watch(registry, folder)
    assert watch.scan() == ()
    put(adapter, folder / "support")
    (folder / ".hidden").mkdir()
    (folder / "notes").mkdir()
    assert watch.scan() == ()  # it may still be copied
    [added] = watch.scan()
    live = registry.alias("support").live
    assert added == Change("support", "added", live.id)
    assert live.by == f"directory {folder}"
    assert watch.scan() == ()

    put(other, folder / "support")
    assert watch.scan() == ()
    [changed] = watch.scan()
    assert registry.alias("support").live.id == changed.detail != live.id
    assert registry.resolve(live.id) == live  # requests in flight end on it

    put(adapter, folder / "support")
    watch.scan()
    assert watch.scan() == (Change("support", "added", live.id),)  # back to the first

    shutil.rmtree(folder / "support")
    assert watch.scan() == ()
    assert watch.scan() == (Change("support", "removed", f"{folder / 'support'} is gone"),)
    assert not registry.versions()
    assert watch.scan() == ()


def test_a_copy_that_goes_on_is_waited_for(registry: Registry, folder: Path, adapter: Path) -> None:
    watch = Watch(registry, folder)
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    watch.scan()
    put(adapter, folder / "support")
    target = folder / "support" / "adapter_model.safetensors"
    for size in (0, 100, 5000):
        target.write_bytes(weights[:size])
        assert watch.scan() == ()
    target.write_bytes(weights)
    assert watch.scan() == ()
    assert [change.kind for change in watch.scan()] == ["added"]


def test_a_bad_adapter_is_reported_once(registry: Registry, folder: Path, adapter: Path, packed: Path) -> None:
    watch = Watch(registry, folder)
    put(adapter, folder / "good")
    put(adapter, folder / "bad name")
    put(adapter, folder / "bad")
    (folder / "bad" / "adapter_model.safetensors").write_bytes(b"")
    watch.scan()
    changes = {change.name: change for change in watch.scan()}
    assert {name: change.kind for name, change in changes.items()} == {
        "good": "added",
        "bad name": "refused",
        "bad": "refused",
    }
    assert "adapters/bad/adapter_model.safetensors: 0 bytes are too few" in changes["bad"].detail
    for _ in range(3):
        assert watch.scan() == ()
    factors.write(folder / "bad", factors.draw(packed, seed=3))
    watch.scan()
    assert [change.kind for change in watch.scan()] == ["added"]


def test_a_restart_keeps_what_was_decided_since(registry: Registry, folder: Path, adapter: Path, other: Path) -> None:
    put(adapter, folder / "support")
    watch = Watch(registry, folder)
    watch.scan()
    watch.scan()
    first = registry.alias("support").live
    put(other, folder / "support")
    put(other, folder / "gone")
    watch.scan()
    watch.scan()
    registry.rollback("support")
    shutil.rmtree(folder / "gone")

    again = Watch(registry, folder)
    again.scan()
    assert [change.kind for change in again.scan()] == ["removed"]
    assert registry.alias("support").live == first
    assert {version.name for version in registry.versions()} == {"support"}


def test_uploads_are_never_taken_away(registry: Registry, folder: Path, adapter: Path, other: Path) -> None:
    watch = Watch(registry, folder)
    put(adapter, folder / "support")
    watch.scan()
    watch.scan()
    uploaded = registry.add("support", other, by="ann")
    shutil.rmtree(folder / "support")
    watch.scan()
    assert watch.scan() == ()
    assert registry.resolve("support") == uploaded
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):  # a network that is away: nothing is removed
        watch.scan()
    assert registry.resolve("support") == uploaded
