"""``qpack estimate``: the memory that training would take, before anything is loaded."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qpack.cli.options import DIRECTORY, Size, pattern, setting, switch, verbosity


@click.command()
@click.argument("base", type=DIRECTORY)
@click.option("--gpu", type=Size(), help="Memory of a GPU, for example 24GB.  [default: what is free here]")
@setting("--r", int, "Rank of the LoRA factors.")
@setting("--lora-dropout", float, "Dropout before the adapter.")
@setting("--target-modules", str, "all-linear, names by commas, or a regular expression for full names.")
@pattern("--rank-pattern", "Another rank for the modules that match; repeatable.")
@switch("--use-dora", "DoRA: learn the magnitude of rows apart.")
@switch("--gradient-checkpointing", "Compute activations again instead of keeping them.  [default: on a GPU]")
@setting("--batch-size", int, "Sequences in a forward pass.")
@setting("--grad-accum", int, "Forward passes in an optimizer step.")
@setting("--max-length", int, "Longest sequence, in tokens.")
@switch("--packing", "Fill every sequence up to max-length with short ones.")
@setting("--optim", str, "Optimizer, by transformers' name.")
@setting("--method", str, "sft, or dpo: two sequences for each pair.")
@switch("--fsdp", "Of several processes each holds a part of the base.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Each with its device.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings; flags take precedence.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@verbosity
def estimate(
    base: Path, gpu: int | None, processes: int, config: Path | None, as_json: bool, quiet: bool, **flags: Any
) -> None:
    """Print the memory that training on the model BASE takes on a device, and the nearest settings that fit."""
    from qpack.checkpoint import Checkpoint
    from qpack.estimate import Device, Model, fit
    from qpack.reports.text import print_estimate
    from qpack.training import TrainSettings, load_settings

    given = {name: value for name, value in flags.items() if value is not None}
    settings = load_settings(config, **given) if config else TrainSettings(**given)
    device = Device.gpu(gpu) if gpu else Device.here()
    found = fit(Model.open(Checkpoint.open(base)), settings, device, processes)
    if as_json:
        click.echo(json.dumps(asdict(found) | {"bytes": found.need.bytes, "fits": found.fits}, indent=1))
    else:
        print_estimate(base, found, settings)
