"""The model card of a merged checkpoint: what it was made of. The same inputs give the same card: no times."""

from dataclasses import asdict
from pathlib import Path

from qpack._core import __version__
from qpack.adapters.combining import Combination, Weighted
from qpack.adapters.record import Base
from qpack.checkpoint import Checkpoint

CARD_NAME = "README.md"


def write_card(
    directory: Path,
    base: Checkpoint,
    onto: Checkpoint,
    adapters: Weighted,
    combination: Combination,
    stored: str,
) -> None:
    """Write README.md into ``directory``; ``stored`` says how the result is, in words."""
    made = Base.of(base)
    name = str(base.config.get("_name_or_path") or made.name)
    lines = ["---", f"base_model: {name}", "library_name: transformers", "tags:", "- merge", "- qpack", "---", ""]
    lines += [f"# {made.name}, merged", "", f"Made by qpack {__version__}, {stored}.", ""]
    lines += [f"- base: {made.name}, fingerprint `{made.fingerprint}`"]
    if onto.directory != base.directory:
        lines += [f"- merged onto the original that it was packed from: {onto.directory.resolve().name}"]
    elif base.packed:
        lines += ["- merged onto its packed weights, decoded"]
    for adapter, weight in adapters:
        name = adapter.path.resolve().name
        lines += [f"- adapter: {name}, fingerprint `{adapter.fingerprint()}`, weight {weight:g}"]
    if len(adapters) > 1:
        kind, *settings = (f"{name} {value}" for name, value in asdict(combination).items() if value is not None)
        lines += [f"- adapters combined as PEFT's {', '.join([kind.removeprefix('kind '), *settings])}"]
    (directory / CARD_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
