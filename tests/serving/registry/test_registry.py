"""Versions, aliases and files of the registry, with real adapters and several processes."""

import json
import multiprocessing
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import factors
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qpack
from qpack.adapters.adapter import Adapter
from serve.registry import Limits, Registry, RegistryError


def test_an_upload_is_a_version_and_its_name_an_alias(registry: Registry, adapter: Path, packed: Path) -> None:
    version = registry.add("support", adapter, by="ann")
    assert version.id == f"support@{version.digest[:12]}"
    assert (version.rank, version.by, version.pinned) == (4, "ann", False)
    assert version.base == json.loads((packed / "qpack.json").read_text())["fingerprint"]
    files = {path.name: path for path in version.path.iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert version.size == sum(path.stat().st_size for path in files.values())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o444 for path in files.values())
    for model in ("support", version.id):
        assert registry.resolve(model) == version
    for model in ("other", "support@000000000000", "../support", str(version.path), ""):
        assert registry.resolve(model) is None


def test_the_same_adapter_is_one_version_however_it_is_written(
    registry: Registry, adapter: Path, packed: Path, tmp_path: Path
) -> None:
    first = registry.add("support", adapter, by="ann")
    tensors = dict(reversed(factors.draw(packed).items()))
    layers = ["model.layers.0.self_attn.q_proj", "q_proj"]
    again = factors.write(
        tmp_path / "again", tensors, r=2, rank_pattern=dict.fromkeys(layers, 4), target_modules="q.*", revision="main"
    )
    assert registry.add("support", again, by="ben") == first
    copy = registry.add("copy", adapter, by="ben")
    assert (copy.digest, copy.path) == (first.digest, first.path)
    other_scale = factors.write(tmp_path / "scale", tensors, lora_alpha=9)
    assert registry.add("support", other_scale, by="ben").digest != first.digest


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {
            "r": 2,
            "rank_pattern": {"up_proj": 4, r".*\.[qv]_proj": 4},
            "alpha_pattern": {r"layers\.1\..*": 3.5, "q_proj": 6},
        },
    ],
)
def test_the_settings_written_anew_mean_the_same_to_peft(
    registry: Registry, llama: Path, packed: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    tensors = factors.draw(packed, modules=("q_proj", "v_proj", "up_proj"))
    source = factors.write(tmp_path / "source", tensors, **settings)
    version = registry.add("support", source, by="me")

    def logits(path: Path) -> torch.Tensor:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(path))
        with torch.no_grad():
            found: torch.Tensor = model(torch.arange(20)[None]).logits
        return found

    assert torch.equal(logits(source), logits(version.path))


def test_a_flip_and_a_rollback_are_one_call_each(registry: Registry, adapter: Path, other: Path) -> None:
    a = registry.add("support", adapter, by="ann")
    b = registry.add("support", other, by="ben")
    assert registry.alias("support").live == b
    assert registry.rollback("support").live == a
    with pytest.raises(RegistryError, match="no version was live before support@") as refused:
        registry.rollback("support")
    assert refused.value.status == 409
    assert registry.promote("support", b.digest[:6], by="cam").by == "cam"
    assert registry.resolve("support") == b
    assert registry.resolve(a.id) == a  # still there for whoever names it
    assert [version.id for version in registry.versions("support")] == [a.id, b.id]


def test_without_promotion_a_version_is_reached_by_its_id_alone(registry: Registry, adapter: Path) -> None:
    version = registry.add("support", adapter, by="me", promote=False)
    assert registry.resolve("support") is None
    assert registry.resolve(version.id) == version
    assert registry.remove(version.id) == (version,)


def test_everything_survives_a_restart(registry: Registry, packed: Path, adapter: Path, other: Path) -> None:
    a, b = registry.add("support", adapter, by="me"), registry.add("support", other, by="me")
    registry.pin("support", a.digest, True)
    registry.canary("support", {a.digest: 12.5})
    registry.shadow("support", a.digest)
    expected = registry.aliases()
    registry.close()
    with Registry.open(registry.directory) as again:
        assert again.aliases() == expected
        assert again.versions()[0].pinned
        assert again.alias("support").shadow == again.versions()[0]
        assert again.find("support", b.digest) == b


def test_a_canary_gets_its_share_and_keeps_its_users(registry: Registry, adapter: Path, other: Path) -> None:
    a, b = registry.add("support", adapter, by="me"), registry.add("support", other, by="me", promote=False)
    registry.canary("support", {b.digest: 5})
    users = [f"user {number}" for number in range(20_000)]

    def on_b() -> set[str]:
        return {user for user in users if registry.resolve("support", user) == b}

    few = on_b()
    assert 0.045 < len(few) / len(users) < 0.055  # 3 standard deviations of 5 %
    assert on_b() == few
    registry.canary("support", {b.digest: 20})
    assert few < on_b()
    drawn = Counter(registry.resolve("support") for _ in range(5_000))
    assert 0.17 < drawn[b] / 5_000 < 0.23
    registry.canary("support", {})
    assert not on_b()
    registry.canary("support", {b.digest: 100})
    assert on_b() == set(users)
    registry.promote("support", b.digest, by="me")
    assert not registry.alias("support").canaries
    assert registry.rollback("support").live == a


def test_a_version_may_not_be_its_own_canary_or_shadow(registry: Registry, adapter: Path, other: Path) -> None:
    a, b = registry.add("support", adapter, by="me", promote=False), registry.add("support", other, by="me")
    for shares in ({a.digest: 0}, {a.digest: 101}, {a.digest: float("nan")}, {b.digest: 5}):
        with pytest.raises(RegistryError) as refused:
            registry.canary("support", shares)
        assert refused.value.status == 400
    with pytest.raises(RegistryError, match="is live and gets all requests already"):
        registry.shadow("support", b.digest)
    assert registry.shadow("support", a.digest).shadow == a
    assert registry.shadow("support", None).shadow is None


def test_what_is_not_there_is_not_found(registry: Registry, adapter: Path) -> None:
    version = registry.add("support", adapter, by="me")
    for attempt in (
        lambda: registry.alias("other"),
        lambda: registry.rollback("other"),
        lambda: registry.promote("support", "0" * 12, by="me"),
        lambda: registry.promote("support", version.digest[:3], by="me"),
        lambda: registry.remove("other"),
        lambda: registry.remove("support@00000000"),
        lambda: registry.pin("other", version.digest, True),
    ):
        with pytest.raises(RegistryError, match="no ") as refused:
            attempt()
        assert refused.value.status == 404


def test_files_stay_until_nobody_holds_them(registry: Registry, adapter: Path, other: Path) -> None:
    a, b = registry.add("support", adapter, by="me"), registry.add("support", other, by="me")
    with pytest.raises(RegistryError, match="is live; promote another version first"):
        registry.remove(b.id)
    code = (
        "import sys; from pathlib import Path; from serve.registry import Registry\n"
        "print(Registry.open(Path(sys.argv[1])).remove(sys.argv[2])[0].id)"
    )
    command = [sys.executable, "-c", code, str(registry.directory), a.id]
    with registry.hold(a) as path:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == a.id
        assert registry.resolve(a.id) is None  # seen here at once
        assert Adapter.open(path).rank == 4
        assert registry.add("support", adapter, by="me") == registry.resolve("support")  # comes back meanwhile
        registry.promote("support", b.digest, by="me")
        registry.remove(a.id)
    assert a.path.exists()
    registry.remove("support")
    assert not a.path.exists()
    assert not b.path.exists()
    with pytest.raises(RegistryError, match="no such version"), registry.hold(a):
        pass


def test_one_file_serves_two_names(registry: Registry, adapter: Path) -> None:
    one, two = registry.add("one", adapter, by="me"), registry.add("two", adapter, by="me")
    registry.remove("one")
    assert one.path.exists()
    assert registry.resolve("two") == two


def test_readers_never_wait_for_an_upload(registry: Registry, adapter: Path, other: Path) -> None:
    registry.add("support", adapter, by="me")
    upload = threading.Thread(target=registry.add, args=("support", other), kwargs={"by": "me"})
    seen = set()
    with registry._database.change():  # the longest that any writer can be at it
        upload.start()
        for _ in range(100):
            seen.add(registry.resolve("support"))
    upload.join()
    assert seen == {registry.versions()[0]}
    assert registry.resolve("support") == registry.versions()[1]


def test_the_generation_grows_with_every_change(registry: Registry, adapter: Path, other: Path) -> None:
    with Registry.open(registry.directory) as watcher:
        seen = [watcher.generation()]
        a, b = registry.add("support", adapter, by="me"), registry.add("support", other, by="me")
        seen.append(watcher.generation())
        for change in (
            lambda: registry.promote("support", a.digest, by="me"),
            lambda: registry.pin("support", a.digest, True),
            lambda: registry.canary("support", {b.digest: 1}),
            lambda: registry.rollback("support"),
            lambda: registry.remove("support"),
        ):
            change()
            seen.append(watcher.generation())
        assert seen == sorted(set(seen))
        assert not watcher.versions()


def test_a_registry_is_for_one_base(registry: Registry, packed: Path, llama: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(packed, tmp_path / "moved")
    with Registry.open(registry.directory, base=moved) as again:
        assert again.bound.base == str(moved)
    qpack.convert(llama, tmp_path / "second", blocksize=128)
    with pytest.raises(RegistryError, match=r"is for the base .*moved with fingerprint \w{12}, not for second"):
        Registry.open(registry.directory, base=tmp_path / "second")
    with pytest.raises(RegistryError, match="nowhere: no registry of adapters"):
        Registry.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_limits_are_those_of_the_server(registry: Registry, packed: Path, tmp_path: Path) -> None:
    registry.close()
    Registry.open(registry.directory, base=packed, limits=Limits(max_rank=8)).close()
    large = factors.write(tmp_path / "large", factors.draw(packed, r=16), r=16)
    with Registry.open(registry.directory) as again, pytest.raises(RegistryError, match="over the limit of 8"):
        again.add("large", large, by="me")


def test_a_file_that_is_no_registry_is_refused(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "registry.sqlite").write_bytes(b"not SQLite" * 100)
    with pytest.raises(RegistryError, match=r"registry\.sqlite: file is not a database"):
        Registry.open(tmp_path, base=packed)
    other = tmp_path / "other"
    other.mkdir()
    with sqlite3.connect(other / "registry.sqlite") as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    with pytest.raises(RegistryError, match="format is 0, expected 1"):
        Registry.open(other, base=packed)


def _upload(directory: Path, base: Path, name: str, sources: tuple[Path, ...]) -> None:
    with Registry.open(directory, base=base) as registry:
        for source in sources:
            registry.add(name, source, by=name)


def test_processes_share_a_registry_from_its_first_moment(
    packed: Path, adapter: Path, other: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["serve.registry"])
    work = [("a", (adapter, other)), ("a", (other, adapter)), ("b", (adapter, other))]
    processes = [context.Process(target=_upload, args=(tmp_path / "new", packed, *each)) for each in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with Registry.open(tmp_path / "new") as registry:
        assert Counter(version.name for version in registry.versions()) == {"a": 2, "b": 2}
        assert len(list((registry.directory / "store").iterdir())) == 2
        assert registry.generation() == 1 + 6


def test_links_of_the_hub_s_cache_are_followed(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--a" / "snapshots" / "0"
    blobs = tmp_path / "models--org--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in adapter.iterdir():
        shutil.copy(path, blobs / f"of-{path.name}")
        (snapshot / path.name).symlink_to(blobs / f"of-{path.name}")
    version = registry.add("support", snapshot, by="me")
    assert not any(path.is_symlink() for path in version.path.iterdir())


def test_a_source_that_changes_later_changes_nothing(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(adapter, tmp_path / "source"))
    version = registry.add("support", source, by="me")
    before = (version.path / "adapter_model.safetensors").read_bytes()
    save_file({"x": torch.zeros(1)}, source / "adapter_model.safetensors")
    assert (version.path / "adapter_model.safetensors").read_bytes() == before


def test_errors_cross_processes_whole() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(RegistryError("no", 409)))
    assert (str(error), error.status) == ("no", 409)
