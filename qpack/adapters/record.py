"""``qpack_adapter.json``, which stands beside an adapter's weights: what it was trained on, and by which settings.

LoRA factors fit any base of the same shapes, and on another one they do harm that no error tells of. So the record
names the base by its fingerprint (see `qpack.manifest`), and whoever puts the two together again asks `check_base`
first. An adapter without a record, such as stock PEFT writes, is taken as it is.

The file holds nothing that differs from one run to the next of the same input: no times, no paths.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qpack import _core
from qpack.checkpoint import Checkpoint, read_json_object
from qpack.errors import AdapterError, CheckpointError
from qpack.manifest import MANIFEST_NAME, Manifest

logger = logging.getLogger(__name__)

RECORD_NAME = "qpack_adapter.json"
FORMAT = 1

_DIGITS = 12
"""Of a fingerprint in a message: enough to tell any two bases apart."""


@dataclass(frozen=True, slots=True)
class Base:
    """Which base it was. Two directories with the same tensors are the same base."""

    name: str
    """Of its directory; for people."""
    fingerprint: str
    """Over names, dtypes, shapes and bytes of all tensors."""
    source: str | None
    """The same of what the base was packed from; None if it is not packed, or was packed by others."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Base":
        """Identify a checkpoint by its ``qpack.json``; without one by reading all of it, at the speed of the disk.

        Raises:
            CheckpointError: ``qpack.json`` is not of these tensors.
        """
        name = checkpoint.directory.resolve().name
        if (checkpoint.directory / MANIFEST_NAME).is_file():
            manifest = Manifest.read(checkpoint.directory)
            _require_own(manifest, checkpoint)
            return cls(name, manifest.fingerprint, manifest.source.get("digest"))
        tensors = checkpoint.tensors
        digests = {tensor: digest for _, tensor, digest in _core.digest_tensors(checkpoint.shards)}
        lines = [(tensor, info.dtype, info.shape, digests[tensor]) for tensor, info in tensors.items()]
        return cls(name, _core.fingerprint(lines), None)

    def __str__(self) -> str:
        return f"{self.name} (fingerprint {shown(self.fingerprint)})"


@dataclass(frozen=True, slots=True)
class Record:
    """The content of ``qpack_adapter.json``.

    Raises:
        AdapterError: from `find`, naming the file and what is wrong with it.
    """

    versions: Mapping[str, str]
    """Of qpack and of the libraries that it trained with."""
    base: Base
    settings: Mapping[str, Any]
    """The fields of `qpack.TrainSettings`; of a combined adapter, what it was made of."""
    data: Mapping[str, Any]
    """``digest`` of what was trained on, and counts; empty for a combined adapter, as are the metrics."""
    template: str | None
    """The chat template that the data was rendered with; None for plain text."""
    metrics: Mapping[str, float]
    """What the run came to."""

    @classmethod
    def find(cls, directory: Path) -> "Record | None":
        """Read ``qpack_adapter.json`` in ``directory``, if there is one."""
        path = directory / RECORD_NAME
        if not path.exists():
            return None
        try:
            content = read_json_object(path)
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
        if content.get("format") != FORMAT:
            raise AdapterError(f"{path}: format is {content.get('format')!r}, expected {FORMAT}")
        try:
            fields = {name: content[name] for name in ("versions", "settings", "data", "template", "metrics")}
            return cls(base=Base(**content["base"]), **fields)
        except (KeyError, TypeError) as error:
            raise AdapterError(f"{path}: not as qpack writes it ({error!r})") from None

    def write(self, directory: Path) -> None:
        """Write ``qpack_adapter.json`` into ``directory``."""
        content = {"format": FORMAT} | asdict(self)
        (directory / RECORD_NAME).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def check_base(adapters: Iterable[Path], base: Checkpoint, *, force: bool = False) -> None:
    """Refuse ``base`` if the record in one of the ``adapters`` names another one; with ``force`` only warn of it.

    Raises:
        AdapterError: naming both bases, or for a record that cannot be read.
        CheckpointError: as `Base.of`.
    """
    records = {adapter: record for adapter in adapters if (record := Record.find(adapter))}
    if not records:
        return
    found = Base.of(base)
    for adapter, record in records.items():
        if record.base.fingerprint != found.fingerprint:
            refuse(f"{adapter}: was trained on the base {record.base}, not on {found}", force=force)


def refuse_correction(adapters: Iterable[Path], *, force: bool = False) -> None:
    """Refuse adapters that begin by correcting what packing lost: onto the original that would be added once more.

    Raises:
        AdapterError: naming the adapter.
    """
    for adapter in adapters:
        record = Record.find(adapter)
        if record is not None and record.settings.get("init_from_error"):
            refuse(
                f"{adapter}: was trained with init_from_error, so that it corrects the packed base; merge it onto that",
                force=force,
            )


def shown(digest: str) -> str:
    """As much of it as a message needs."""
    return digest[:_DIGITS]


def refuse(message: str, *, force: bool) -> None:
    """Raise an `AdapterError`; with ``force`` only warn."""
    if not force:
        raise AdapterError(f"{message} (--force takes it all the same)")
    logger.warning("%s", message)


def _require_own(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Refuse a ``qpack.json`` that was edited or is of other tensors; the tensors' bytes are left to `qpack.verify`."""
    path = checkpoint.directory / MANIFEST_NAME
    lines = {}
    for name, line in manifest.tensors.items():
        header, _, digest = line.rpartition(" ")
        info = checkpoint.tensors.get(name)
        found = "none" if info is None else f"{info.dtype} {list(info.shape)}"
        if header != found:
            raise CheckpointError(f"{path}: records tensor {name} as {header}, found {found}")
        lines[name] = digest
    if unknown := checkpoint.tensors.keys() - lines.keys():
        raise CheckpointError(f"{path}: does not record tensor {min(unknown)}")
    own = _core.fingerprint([(name, info.dtype, info.shape, lines[name]) for name, info in checkpoint.tensors.items()])
    if own != manifest.fingerprint:
        raise CheckpointError(f"{path}: fingerprint is {manifest.fingerprint}, that of the recorded tensors is {own}")
