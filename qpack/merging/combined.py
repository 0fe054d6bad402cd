"""One adapter of several, as a PEFT directory: what `qpack serve`, stock PEFT and vLLM load as any other.

How the factors become one is `qpack.adapters.combining`'s matter. Beside them stand the tokenizer and the template of
the first adapter, and ``qpack_adapter.json``, which names the base and what the adapter was made of.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from qpack import _core
from qpack.adapters.adapter import CONFIG_NAME
from qpack.adapters.combining import CAT, Combination, combine_factors, describe, module_names
from qpack.adapters.record import Base, Record, check_base
from qpack.adapters.trained import changes
from qpack.checkpoint import Checkpoint
from qpack.companions import copy_tokenizer
from qpack.merging.merging import Adapters, open_adapters
from qpack.output import new_directory
from qpack.policy.modules import transposed_weights


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What `combine` did."""

    output: Path
    """The adapter's directory."""
    r: int
    """Its rank."""
    weights: int
    """How many weights of the base it changes."""
    bytes: int
    """Size of its factors' file."""
    seconds: float


def combine(
    base: Path | str,
    adapters: Adapters,
    destination: Path | str,
    combination: Combination = CAT,
    *,
    force: bool = False,
) -> CombineReport:
    """Write what ``combination`` makes of ``adapters`` of ``base``, each times its weight, as one adapter.

    The base is only read: every tensor of the adapters must be of use to it. ``force`` replaces an adapter at
    ``destination``, and takes adapters that were trained on another base.

    Raises:
        CheckpointError: if the base is malformed.
        AdapterError: if an adapter is malformed, holds more than factors, or is of another base; if they do not go
            together.
        OutputExistsError: if ``destination`` exists and ``force`` is not set, or is or holds an input.
        ValueError: for a weight that is not finite, or a ``combination`` of one adapter.
    """
    start = time.monotonic()
    checkpoint = Checkpoint.open(base)
    opened = open_adapters(adapters, combination)
    paths = [adapter.path for adapter, _ in opened]
    check_base(paths, checkpoint, force=force)
    transposed = () if checkpoint.packed else transposed_weights(checkpoint)
    for adapter, weight in opened:
        changes(adapter, checkpoint, transposed, weight=weight, by_model=True)
    destination = Path(destination)
    inputs = [checkpoint.directory, *paths]
    with new_directory(destination, force=force, marker=CONFIG_NAME, inputs=inputs) as directory:
        made = combine_factors(opened, combination, module_names(checkpoint), directory)
        found = changes(made, checkpoint, transposed, by_model=True)
        copy_tokenizer(paths[0], directory)
        records = [record for path in paths if (record := Record.find(path))]
        corrects = [source for record in records if (source := record.settings.get("init_from_error"))]
        Record(
            versions={"qpack": _core.__version__},
            base=records[0].base if records else Base.of(checkpoint),
            settings=describe(combination, opened) | ({"init_from_error": corrects[0]} if corrects else {}),
            data={},
            template=records[0].template if records else None,
            metrics={},
        ).write(directory)
        size = made.weights_path.stat().st_size
    seconds = time.monotonic() - start
    return CombineReport(destination, made.config["r"], len(found.by_weight), size, seconds)
