"""`--onto original`: what the base was not packed from is refused, before the first byte where that shows."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from lora import draw_adapter
from safetensors.torch import load_file, save_file
from tiny import write_llama

import qpack
from qpack.adapters.record import RECORD_NAME, Base, Record
from qpack.checkpoint import Checkpoint
from qpack.errors import AdapterError
from qpack.manifest import MANIFEST_NAME


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By stock PEFT, which records no base. Read only."""
    return draw_adapter(tmp_path_factory.mktemp("adapters") / "stock", llama, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The names, shapes and norms of ``llama``, but other weights. Read only."""
    return write_llama(tmp_path_factory.mktemp("twin") / "twin", seed=1)


def edited(llama: Path, directory: Path, scale: float, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A copy of ``llama`` with another norm, and in ``dtype``."""
    shutil.copytree(llama, directory)
    for file in directory.glob("*.safetensors"):
        weights = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        if "model.norm.weight" in weights:
            weights["model.norm.weight"] *= scale
        save_file(weights, file, metadata={"format": "pt"})
    return directory


def test_what_shows_is_refused_before_anything_is_written(
    packed: Path, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    further = edited(llama, tmp_path / "further", 1.5)
    wider = edited(llama, tmp_path / "wider", 1.0, torch.float32)
    for other, message in (
        (further, r"further: model\.norm\.weight is not that of what .*packed was packed from \(--force takes it"),
        (wider, r"wider: has \d+ bytes, .*packed was packed from \d+ \(--force takes it"),
    ):
        with pytest.raises(AdapterError, match=message):
            qpack.plan_merge(packed, adapter, tmp_path / "merged", original=other)
    assert qpack.plan_merge(packed, adapter, tmp_path / "merged", original=llama).merged == 2


def test_what_shows_in_the_digest_alone_is_not_published(
    packed: Path, twin: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, expected = (Base.of(Checkpoint.open(path)) for path in (twin, packed))
    message = (
        rf"twin: has digest {found.fingerprint[:12]}, but the base packed \(fingerprint {expected.fingerprint[:12]}"
    )
    with pytest.raises(AdapterError, match=message):
        qpack.merge(packed, adapter, tmp_path / "merged", original=twin)
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.WARNING, logger="qpack"):
        qpack.merge(packed, adapter, tmp_path / "merged", original=twin, force=True)
    (record,) = caplog.records
    assert record.message.startswith(f"{twin}: has digest")


def test_an_adapter_s_record_tells_where_the_base_has_none(
    packed: Path, llama: Path, twin: Path, adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(packed, tmp_path / "base", ignore=shutil.ignore_patterns(MANIFEST_NAME))
    qpack.merge(base, adapter, tmp_path / "unknown", original=twin)  # nobody knows what it was packed from
    recorded = shutil.copytree(adapter, tmp_path / "recorded")
    Record(versions={}, base=Base.of(Checkpoint.open(packed)), settings={}, data={}, template=None, metrics={}).write(
        recorded
    )
    assert (recorded / RECORD_NAME).is_file()
    with pytest.raises(AdapterError, match="twin: has digest"):
        qpack.merge(base, recorded, tmp_path / "merged", original=twin)
    qpack.merge(base, recorded, tmp_path / "merged", original=llama)
