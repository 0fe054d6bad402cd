"""The model card of a merged checkpoint: what it was made of. The same inputs give the same card: no times."""

from collections.abc import Iterable
from pathlib import Path

from qpack import _core
from qpack.adapters.adapter import Adapter
from qpack.adapters.record import Base
from qpack.checkpoint import Checkpoint

CARD_NAME = "README.md"


def write_card(
    directory: Path, base: Checkpoint, onto: Checkpoint, adapters: Iterable[tuple[Adapter, float]], dtype: str
) -> None:
    """Write README.md into ``directory``."""
    made = Base.of(base)
    name = str(base.config.get("_name_or_path") or made.name)
    lines = ["---", f"base_model: {name}", "library_name: transformers", "tags:", "- merge", "- qpack", "---", ""]
    lines += [f"# {made.name}, merged", "", f"Made by qpack {_core.__version__}, in {dtype}, without quantization.", ""]
    lines += [f"- base: {made.name}, fingerprint `{made.fingerprint}`"]
    if onto.directory != base.directory:
        lines += [f"- merged onto the original that it was packed from: {onto.directory.resolve().name}"]
    elif base.packed:
        lines += ["- merged onto its packed weights, decoded"]
    for adapter, weight in adapters:
        digests = {name: digest for _, name, digest in _core.digest_tensors([adapter.weights_path])}
        shapes = _core.read_header(adapter.weights_path)
        digest = _core.fingerprint([(info.name, info.dtype, info.shape, digests[info.name]) for info in shapes])
        lines += [f"- adapter: {adapter.path.resolve().name}, fingerprint `{digest}`, weight {weight:g}"]
    (directory / CARD_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
