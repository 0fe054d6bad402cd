"""Every kind of bad adapter is refused with a status and a reason, and leaves no trace in the registry."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import factors
import pytest
from spoilt import BAD, header, settings

from serve.registry import Limits, Registry, RegistryError

LIMITS = Limits(max_rank=16, max_bytes=8_000_000, seconds=30)


@pytest.fixture(scope="module")
def strict(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with narrow limits that holds one good adapter."""
    with Registry.open(tmp_path_factory.mktemp("strict") / "registry", base=packed, limits=LIMITS) as opened:
        opened.add("good", factors.write(tmp_path_factory.mktemp("good") / "a", factors.draw(packed, seed=9)), by="me")
        yield opened


@pytest.mark.parametrize(("spoil", "status", "reason"), BAD.values(), ids=BAD)
def test_refused(
    spoil: Callable[[Path], None], status: int, reason: str, strict: Registry, adapter: Path, tmp_path: Path
) -> None:
    before = (strict.generation(), strict.versions(), sorted(strict.directory.rglob("*")))
    bad = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    spoil(bad)
    with pytest.raises(RegistryError) as refused:
        strict.add("good", bad, by="me")
    assert reason in str(refused.value)
    assert str(bad) in str(refused.value)  # as the user knows it, not as the registry copied it
    assert refused.value.status == status
    assert len(str(refused.value).splitlines()) == 1
    assert (strict.generation(), strict.versions(), sorted(strict.directory.rglob("*"))) == before


def test_refusals_are_counted_by_kind(strict: Registry, packed: Path, adapter: Path, tmp_path: Path) -> None:
    """By another process's registry, too: the counts are on disk."""
    before = strict.refusals()
    kinds = {
        "no settings": "malformed",
        "settings that are no JSON": "malformed",
        "DoRA": "unsupported",
        "another base": "base",
        "another hidden size": "tensors",
        "NaN": "values",
        "20 GB of nothing": "too large",
    }
    for name in kinds:
        bad = Path(shutil.copytree(adapter, tmp_path / name))
        BAD[name][0](bad)
        with pytest.raises(RegistryError):
            strict.add("good", bad, by="me")
    large = factors.write(tmp_path / "large", factors.draw(packed, r=32), r=32)
    for name in ("large", "a b", "base"):
        with pytest.raises(RegistryError):
            strict.add(name, large, by="me")
    strict.add("good", adapter, by="me")
    with Registry.open(strict.directory) as other:
        counted = Counter(other.refusals())
    counted.subtract(before)
    assert +counted == Counter([*kinds.values(), "rank", "name", "conflict"])


def test_the_rank_has_a_limit(strict: Registry, packed: Path, tmp_path: Path) -> None:
    large = factors.write(tmp_path / "large", factors.draw(packed, r=32), r=32)
    with pytest.raises(RegistryError, match="large: rank 32 is over the limit of 16"):
        strict.add("large", large, by="me")


@pytest.mark.parametrize("name", ["", "../x", "/etc/passwd", "a/b", "a@1", ".hidden", "a b", "a\n", "x" * 129, "ü"])
def test_bad_names_are_refused(strict: Registry, adapter: Path, name: str) -> None:
    with pytest.raises(RegistryError, match="letters, digits") as refused:
        strict.add(name, adapter, by="me")
    assert refused.value.status == 400


def test_the_name_of_the_base_is_taken(strict: Registry, adapter: Path) -> None:
    with pytest.raises(RegistryError, match="the name 'base' is the base's own") as refused:
        strict.add("base", adapter, by="me")
    assert refused.value.status == 409


def many_tensors(adapter: Path) -> None:
    """300,000 tensors of no bytes, in a header of just under the limit."""
    entry = '{"dtype":"F32","shape":[0,1],"data_offsets":[0,0]}'
    names = (f"base_model.model.{number}.lora_A.weight" for number in range(300_000))
    text = "{" + ",".join(f'"{name}":{entry}' for name in names) + "}"
    (adapter / "adapter_model.safetensors").write_bytes(header(text))


def slow_pattern(adapter: Path) -> None:
    settings(rank_pattern={"(.*.*.*.*.*.*.*)*#": 4})(adapter)


@pytest.mark.parametrize(
    ("spoil", "limits", "reason"),
    [
        (many_tensors, Limits(memory=128 << 20), "needs more than 134 MB of memory"),
        (many_tensors, Limits(), "changes what the base"),
        (slow_pattern, Limits(seconds=1), "adapter: takes more than 1 s to check"),
    ],
    ids=["memory", "many tensors", "time"],
)
def test_what_takes_too_much_is_stopped(
    spoil: Callable[[Path], None], limits: Limits, reason: str, packed: Path, adapter: Path, tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    spoil(bad)
    with Registry.open(tmp_path / "registry", base=packed, limits=limits) as registry:
        with pytest.raises(RegistryError, match=reason) as refused:
            registry.add("bad", bad, by="me")
        assert refused.value.status in (413, 422)
        assert not registry.versions()
        assert not list((registry.directory / "incoming").iterdir())
