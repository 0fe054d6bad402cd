"""``qpack train``: a LoRA adapter for a base."""

from pathlib import Path
from typing import Any

import click

import qpack
from qpack.cli.options import DIRECTORY, force, pattern, setting, switch, verbosity
from qpack.training.settings import TRACKERS


@click.command()
@click.argument("model", type=DIRECTORY, metavar="BASE")
@click.argument("data", nargs=-1, required=True)
@click.option("-o", "--output", type=DIRECTORY, required=True, help="Adapter directory to write.")
@setting("--base", str, "4bit: BASE is packed; 16bit: plain LoRA on a checkpoint that is not.")
@setting("--r", int, "Rank of the LoRA factors.")
@setting("--lora-alpha", int, "The adapter's output is scaled by lora-alpha / r.")
@setting("--lora-dropout", float, "Dropout before the adapter.")
@setting("--target-modules", str, "all-linear, names by commas, or a regular expression for full names.")
@setting("--modules-to-save", str, "Modules to train whole, by names; vLLM does not serve them.")
@pattern("--rank-pattern", "Another rank for the modules that match; repeatable.")
@pattern("--alpha-pattern", "Another lora-alpha for the modules that match; repeatable.")
@switch("--use-rslora", "Scale by lora-alpha / sqrt(r).")
@switch("--use-dora", "DoRA: learn the magnitude of rows apart.")
@setting("--init-from-error", str, "Directory that BASE was packed from: begin by correcting what packing lost.")
@setting("--loraplus-lr-ratio", float, "LoRA+: the rate of B matrices, as a multiple of lr.")
@switch("--gradient-checkpointing", "Compute activations again instead of keeping them.  [default: on a GPU]")
@setting("--lr", float, "Peak learning rate.")
@setting("--epochs", float, "Passes over the data.")
@setting("--max-steps", int, "Optimizer steps, instead of epochs.")
@setting("--batch-size", int, "Sequences in a forward pass.")
@setting("--grad-accum", int, "Forward passes in an optimizer step.")
@setting("--max-length", int, "Longest sequence, in tokens.")
@switch("--packing", "Fill every sequence up to max-length with short ones.")
@switch("--group-by-length", "Make batches of sequences of like length (the default).")
@setting("--format", str, "Format of every row, if its fields do not tell.")
@setting("--loss", str, "Tokens of a conversation to learn: assistant or all.")
@setting("--chat-template", str, "Jinja file to use instead of the model's chat template.")
@setting("--on-bad-row", str, "fail or skip.")
@setting("--optim", str, "Optimizer, by transformers' name.")
@setting("--weight-decay", float, "AdamW's weight decay.")
@setting("--eval-split", float, "Share of the data to hold out for evaluation.")
@click.option("--eval-data", multiple=True, help="DATA for evaluation; may be given more than once.")
@setting("--eval-steps", int, "Steps between two evaluations; by default a tenth of the run.")
@setting("--early-stopping", int, "Stop after so many evaluations without a new best one.")
@setting("--save-steps", int, "Steps between two checkpoints; by default a twentieth of the run, at most 100.")
@setting("--keep", int, "Checkpoints that stay while the run lasts.")
@setting("--method", str, "sft: learn the answers; dpo: prefer one of two.")
@setting("--beta", float, "DPO: how dear it is to leave the base.")
@switch("--fsdp", "Of several processes each holds a part of the base.")
@setting("--samples", int, "Prompts that base and adapter answer for report.html.")
@click.option(
    "--report-to",
    type=click.Choice(TRACKERS),
    multiple=True,
    callback=lambda context, param, values: values or None,
    help="Show the run in a tracker too; repeatable.",
)
@setting("--seed", int, "Seed of initial adapter, data order and dropout.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings; flags take precedence.")
@force
@verbosity
def train(
    model: Path,
    data: tuple[str, ...],
    output: Path,
    eval_data: tuple[str, ...],
    config: Path | None,
    force: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Train a LoRA adapter for the model BASE on DATA.

    DATA is a file (JSONL, JSON, CSV, Parquet, text), a directory or a data set of the Hugging Face hub; behind a colon
    may stand how often its rows are used in an epoch. `qpack data` shows what the model would see.
    """
    from qpack.training import TrainSettings, load_settings
    from qpack.training.distributed import Processes
    from qpack.training.panel import panel

    given = {name: value for name, value in flags.items() if value is not None}
    settings = load_settings(config, **given) if config else TrainSettings(**given)
    first = Processes.launched().first
    with panel(quiet=quiet or not first) as on_event:
        report = qpack.train(model, data, output, settings, eval_data=eval_data or None, force=force, on_event=on_event)
    if not first:
        return
    loss = f"loss {report.first_loss:.3f} to {report.final_loss:.3f}"
    work = f"{report.steps} steps, {report.tokens} tokens at {report.tokens_per_second:.0f}/s"
    how = f"{report.optimizer}, {report.compute_dtype}"
    best = f", best eval loss {report.best_eval_loss:.3f} at step {report.best_step}" if report.best_step else ""
    cut = f", {report.truncated} of {report.examples} examples cut at max-length" if report.truncated else ""
    skipped = f", {report.skipped} row{'s' * (report.skipped > 1)} skipped" if report.skipped else ""
    click.echo(f"{output}: {loss}, {work} ({how}){best}{cut}{skipped}, in {report.seconds:.1f} s")
