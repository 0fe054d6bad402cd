"""The whole of a training run: check the input, load the base, train, publish the adapter.

What can be refused without torch (the data, the base's config, the output) is refused before torch is imported, and
what can be refused without the weights before they are loaded.
"""

from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from qpack.adapters.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from qpack.adapters.record import Base, Record
from qpack.data import DataOptions, encode, read
from qpack.data.reading import Arguments
from qpack.loading.base import require_packed
from qpack.output import new_directory
from qpack.training.report import StepLog, TrainReport
from qpack.training.settings import TrainSettings

LIBRARIES = ("qpack", "torch", "transformers", "peft", "bitsandbytes")
"""Whose versions the adapter's record holds: the arithmetic is theirs."""

FINAL_STEPS = 10
"""How many steps the report's final loss is the mean of: single batches differ too much."""


def train(
    base: Path | str,
    data: Arguments,
    output: Path | str,
    settings: TrainSettings = TrainSettings(),  # noqa: B008  # frozen
    *,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_log: Callable[[StepLog], None] | None = None,
) -> TrainReport:
    """Train a LoRA adapter for a packed base on conversations and texts.

    The output directory holds what PEFT and vLLM load: adapter_config.json, adapter_model.safetensors (float32), the
    tokenizer with its chat template, and qpack_adapter.json, which says what it was trained on. It appears when
    training has succeeded, and not otherwise.

    Args:
        base: directory of a bitsandbytes NF4 checkpoint; the adapter names it as it is given here.
        data: a file, directory or data set of the hub, or several with weights: see :mod:`qpack.data.sources`; what a
            row may be, :mod:`qpack.data.formats` says.
        output: the directory to make.
        settings: the hyper-parameters.
        force: replace an adapter that is already at ``output``.
        on_progress: called with the optimizer steps done and their total, first with 0.
        on_log: called after every optimizer step.

    Raises:
        CheckpointError: the base is not a packed checkpoint or cannot be loaded.
        DataError: the data cannot be used; the message names file and line.
        OutputExistsError: the output exists and ``force`` was not given, or it is not an adapter.
        TrainingError: the loss or a gradient is no longer finite, or the run is shorter than its warm-up.
    """
    identity = Base.of(require_packed(Path(base)))
    options = DataOptions(settings.format, settings.loss, settings.chat_template, settings.on_bad_row)
    rows = read(data, options, seed=settings.seed)
    with new_directory(
        Path(output), force=force, marker=ADAPTER_CONFIG_NAME, inputs=[Path(base), *rows.paths]
    ) as partial:
        from qpack.quiet import quiet_libraries

        with quiet_libraries():
            from transformers import set_seed

            from qpack.loading.adapters import save_adapter
            from qpack.training.compute import choose_compute
            from qpack.training.loop import fit, optimizer_for
            from qpack.training.model import add_lora, load_base, load_tokenizer

            tokenizer = load_tokenizer(Path(base))
            dataset = encode(rows, tokenizer, Path(base), options, settings.max_length)
            compute = choose_compute()
            set_seed(settings.seed)
            model = add_lora(load_base(Path(base), compute), settings)
            steps = fit(
                model, dataset.examples, settings, compute, scratch=partial, on_progress=on_progress, on_log=on_log
            )
            save_adapter(model, partial)
            (partial / "README.md").unlink()  # PEFT's model card, a form with nothing filled in
            tokenizer.chat_template = dataset.template or tokenizer.chat_template
            tokenizer.save_pretrained(partial)
        report = TrainReport(
            output=Path(output),
            steps=len(steps.losses),
            examples=len(dataset.examples),
            truncated=dataset.truncated,
            tokens=steps.tokens,
            trainable_parameters=model.num_parameters(only_trainable=True),
            first_loss=steps.losses[0],
            final_loss=fmean(steps.losses[-FINAL_STEPS:]),
            seconds=steps.seconds,
            tokens_per_second=steps.tokens / steps.seconds,
            compute_dtype=compute.dtype_name,
            optimizer=optimizer_for(settings, compute),
        )
        metrics = ("steps", "tokens", "trainable_parameters", "first_loss", "final_loss")
        Record(
            versions={library: version(library) for library in LIBRARIES},
            base=identity,
            settings=asdict(settings),
            data={"digest": dataset.digest, "examples": len(dataset.examples)},
            template=dataset.template,
            metrics={name: getattr(report, name) for name in metrics},
        ).write(partial)
    return report
