"""Whether a checkpoint is the original that a base was packed from.

Onto another one of the same shapes an adapter does harm that no error tells of. The digest of all tensors tells for
certain, once they have been read; merging reads them anyway, and publishes nothing before. What can be told without is
told before the first byte is written: the number and size of the tensors, and the vectors (norms, biases) that the base
holds as they are. These are a few kilobytes, in which other models, further trained ones too, nearly always differ.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from qpack import _core
from qpack.adapters.record import Base, Record, refuse, shown
from qpack.checkpoint import Checkpoint
from qpack.manifest import MANIFEST_NAME, Manifest, describe


def check_likeness(base: Checkpoint, original: Checkpoint, *, force: bool = False) -> None:
    """Refuse ``original`` if that can be seen, going by the ``qpack.json`` of ``base``; with ``force`` only warn of it.

    Raises:
        AdapterError: naming both, and the first tensor that differs.
    """
    if not (base.directory / MANIFEST_NAME).is_file():
        return
    manifest = Manifest.read(base.directory)
    found = {"bytes": original.tensor_bytes, "tensors": len(original.tensors)}
    for what, count in found.items():
        if (expected := manifest.source.get(what, count)) != count:
            refuse(
                f"{original.directory}: has {count} {what}, {base.directory} was packed from {expected}", force=force
            )
            return
    vectors = {
        name
        for name, info in original.tensors.items()
        if len(info.shape) == 1 and manifest.tensors.get(name, "").startswith(describe(info, ""))
    }
    for _, name, digest in _core.digest_tensors(original.shards, names=vectors):
        if not manifest.tensors[name].endswith(digest):
            refuse(f"{original.directory}: {name} is not that of what {base.directory} was packed from", force=force)
            return


def check_digest(
    base: Checkpoint, adapters: Iterable[Path], original: Path, digest: str, *, force: bool = False
) -> None:
    """Refuse ``original``, whose tensors have ``digest``, as that from which ``base`` was packed.

    Which digest that has, ``qpack.json`` says, and the records of the ``adapters``, which were trained on ``base``. If
    there are none, nothing is known and nothing refused. The base itself passes too.

    Raises:
        AdapterError: naming both.
    """
    for known in _known(base, adapters):
        if known.source is not None and digest not in (known.source, known.fingerprint):
            refuse(
                f"{original}: has digest {shown(digest)}, but the base {known} was packed from one with digest "
                f"{shown(known.source)}",
                force=force,
            )
            return


def _known(base: Checkpoint, adapters: Iterable[Path]) -> Iterator[Base]:
    if (base.directory / MANIFEST_NAME).is_file():
        yield Base.of(base)
    for adapter in adapters:
        if record := Record.find(adapter):
            yield record.base
