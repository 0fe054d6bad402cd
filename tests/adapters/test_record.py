"""The adapter's record: the base it names is the only one that it is served on or merged into, unless by force."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import write_llama

import qpack
from qpack.adapters.record import RECORD_NAME, Base, Record
from qpack.checkpoint import Checkpoint
from qpack.errors import AdapterError, CheckpointError
from qpack.manifest import MANIFEST_NAME, Manifest
from serve import ServeConfig

SETTINGS = qpack.TrainSettings(r=2, max_steps=1, optim="adamw_torch")


@pytest.fixture(scope="module")
def adapter(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by qpack on ``packed``, one step. Read only."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "data.jsonl").write_text('{"prompt": "order a", "completion": "item 0"}\n')
    return qpack.train(packed, directory / "data.jsonl", directory / "adapter", SETTINGS).output


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed base with the names and shapes of ``packed`` and other weights. Read only."""
    directory = tmp_path_factory.mktemp("twin")
    qpack.convert(write_llama(directory / "source", seed=1), directory / "other")
    return directory / "other"


def test_what_train_records(adapter: Path, packed: Path, llama: Path) -> None:
    record = Record.find(adapter)
    assert record is not None
    manifest = Manifest.read(packed)
    assert record.base == Base("packed", manifest.fingerprint, manifest.source["digest"])
    assert record.settings == json.loads(json.dumps(asdict(SETTINGS)))
    assert record.template == (llama / "chat_template.jinja").read_text()
    assert (record.metrics["steps"], record.data["examples"]) == (1, 1)
    assert record.versions["qpack"] == qpack.__version__
    text = (adapter / RECORD_NAME).read_text()
    assert str(packed.parent) not in text  # no paths


def test_another_base_of_the_same_shapes_is_refused(
    adapter: Path, packed: Path, twin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ServeConfig(packed, {"mine": adapter})
    own, other = (Manifest.read(base).fingerprint[:12] for base in (packed, twin))
    message = rf"trained on the base packed \(fingerprint {own}\), not on other \(fingerprint {other}\) \(--force "
    with pytest.raises(AdapterError, match=message):
        ServeConfig(twin, {"mine": adapter})
    with pytest.raises(AdapterError, match=message):
        qpack.merge(twin, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    with caplog.at_level(logging.WARNING, logger="qpack"):
        ServeConfig(twin, {"mine": adapter}, force=True)
        qpack.merge(twin, adapter, tmp_path / "merged", force=True)
    assert [record.message.partition(" (fingerprint")[0] for record in caplog.records] == 2 * [
        f"{adapter}: was trained on the base packed"
    ]


def test_a_base_is_known_by_its_tensors_alone(adapter: Path, packed: Path, twin: Path, tmp_path: Path) -> None:
    """Without qpack.json, under another name, in other files."""
    copy = shutil.copytree(packed, tmp_path / "copy", ignore=shutil.ignore_patterns(MANIFEST_NAME))
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors", metadata={"format": "pt"})
    assert Base.of(Checkpoint.open(copy)) == replace(Base.of(Checkpoint.open(packed)), name="copy", source=None)
    ServeConfig(copy, {"mine": adapter})
    shutil.copyfile(twin / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(AdapterError, match="not on copy"):
        ServeConfig(copy, {"mine": adapter})


def test_an_adapter_without_a_record_is_taken(adapter: Path, twin: Path, tmp_path: Path) -> None:
    stock = shutil.copytree(adapter, tmp_path / "stock", ignore=shutil.ignore_patterns(RECORD_NAME))
    ServeConfig(twin, {"mine": stock})


def edit(directory: Path, change: Callable[[dict[str, Any]], None], name: str) -> None:
    content = json.loads((directory / name).read_text())
    change(content)
    (directory / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(fingerprint=64 * "0"), "fingerprint is 0{64}, that of the recorded tensors is"),
        (lambda content: content["tensors"].popitem(), "does not record tensor "),
        (
            lambda content: content["tensors"].update({"model.norm.weight": "F32 [256] 00"}),
            r"records tensor model\.norm\.weight as F32 \[256\], found BF16 \[256\]",
        ),
    ],
)
def test_an_edited_manifest_is_told(
    adapter: Path, packed: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    edit(copy, change, MANIFEST_NAME)
    with pytest.raises(CheckpointError, match=rf"qpack\.json: {message}"):
        ServeConfig(copy, {"mine": adapter})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format=2), "format is 2, expected 1"),
        (lambda content: content.pop("settings"), r"not as qpack writes it \(KeyError\('settings'\)\)"),
        (lambda content: content.update(base="packed"), r"not as qpack writes it \(TypeError"),
    ],
)
def test_a_malformed_record_is_refused(
    adapter: Path, packed: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    edit(copy, change, RECORD_NAME)
    with pytest.raises(AdapterError, match=rf"{RECORD_NAME}: {message}"):
        ServeConfig(packed, {"mine": copy})
