"""``qpack.json``, which stands beside packed weights: what they were made from and how, and a digest of every tensor.

Digests are BLAKE3, in hexadecimal, of a tensor's bytes as stored. The fingerprint is the digest of the sorted lines
``NAME DTYPE SHAPE DIGEST`` of all tensors: it names the base that an adapter is trained on, whatever files the base is
spread over. The lines themselves are kept, so that a header which was changed is found by name too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qpack._core import TensorInfo
from qpack.checkpoint import read_json_object
from qpack.errors import CheckpointError

MANIFEST_NAME = "qpack.json"
FORMAT = 1


def describe(info: TensorInfo, digest: str) -> str:
    """What stands behind a tensor's name in the lines of the fingerprint: ``U8 [512, 1] 5ce2...``."""
    return f"{info.dtype} {list(info.shape)} {digest}"


@dataclass(frozen=True, slots=True)
class WeightError:
    """How far a packed weight is from what it was packed from."""

    relative: float
    """Frobenius norm of the difference over that of the weight."""
    norm: float
    """Frobenius norm of the weight."""
    worst: float
    """The relative error of the block where it is largest."""
    worst_block: int
    """Index of that block in the row-major flattened weight."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of ``qpack.json``.

    Raises:
        CheckpointError: from `read`, naming the file and what is missing or of another kind.
    """

    version: str
    """Of qpack."""
    options: Mapping[str, Any]
    """What `qpack.convert` was asked for."""
    source: Mapping[str, Any]
    """``digest`` (over names, dtypes, shapes and bytes of all source tensors), ``bytes``, ``tensors``, and where it is
    from: ``name``, and ``revision`` for a hub id. Where adapters were merged, ``adapters``, which the digest covers."""
    fingerprint: str
    tensors: Mapping[str, str]
    """``DTYPE SHAPE DIGEST`` of every stored tensor by name, see `describe`."""
    errors: Mapping[str, WeightError]
    """By the name of the packed weight."""
    kept: Mapping[str, str]
    """Why a weight was not packed, by name."""
    transposed: tuple[str, ...]
    """The packed weights that 16-bit checkpoints of the model have as (in_features, out_features): under the names here
    and unpacked, stock transformers would read them wrongly."""

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read ``qpack.json`` in ``directory``."""
        path = directory / MANIFEST_NAME
        content = read_json_object(path)
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format is {content.get('format')!r}, expected {FORMAT}")
        try:
            errors = {name: WeightError(**error) for name, error in content["errors"].items()}
            fields = {name: content[name] for name in ("options", "source", "fingerprint", "tensors", "kept")}
            return cls(version=content["qpack"], errors=errors, transposed=tuple(content["transposed"]), **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not as qpack writes it ({error!r})") from None

    def write(self, directory: Path) -> None:
        """Write ``qpack.json`` into ``directory``."""
        content = {"format": FORMAT, "qpack": self.version} | asdict(self)
        del content["version"]
        (directory / MANIFEST_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
