"""The whole of a training run: check the input, load the base, train, publish the adapter.

What can be refused without torch (the data, the base's config, the output) is refused before torch is imported, and
what can be refused without the weights before they are loaded.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qpack.adapters.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from qpack.adapters.record import Base, Record
from qpack.data import DataOptions, Dataset, Rows, encode, encode_preferences, read, read_preferences
from qpack.data.reading import Arguments
from qpack.errors import DataError, TrainingError
from qpack.loading.base import require_packed, require_plain
from qpack.loading.weights import Original
from qpack.output import resumable_directory
from qpack.training.checkpoints import Checkpoints
from qpack.training.distributed import Processes
from qpack.training.metrics import METRICS_NAME, recording
from qpack.training.report import Event, Foreseen, Listener, RunBegin, Sample, StepLog, TrainReport
from qpack.training.settings import TrainSettings
from qpack.training.trackers import require_trackers

if TYPE_CHECKING:
    from qpack.estimate import Need
    from qpack.training.loop import AdapterTrainer

logger = logging.getLogger(__name__)

LIBRARIES = ("qpack", "torch", "transformers", "peft", "bitsandbytes")
"""Whose versions an adapter depends on and its record holds: the arithmetic is theirs."""

WITHOUT_EFFECT = ("save_steps", "keep", "fsdp", "samples", "report_to")
"""Settings that leave the adapter as it is."""

CHECKPOINTS_NAME = ".checkpoints"
"""In the directory that the work goes on in; not published."""

RECORDED = ("steps", "tokens", "trainable_parameters", "first_loss", "final_loss")
"""What the record holds of the report: nothing that another run of the same input would give otherwise."""

FINAL_STEPS = 10
"""How many steps the report's final loss is the mean of: single batches differ too much."""


def train(
    base: Path | str,
    data: Arguments,
    output: Path | str,
    settings: TrainSettings = TrainSettings(),  # noqa: B008  # frozen
    *,
    eval_data: Arguments | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_event: Listener | None = None,
) -> TrainReport:
    """Train a LoRA adapter for a base, packed or not, on conversations and texts.

    The output directory holds what PEFT and vLLM load: adapter_config.json, adapter_model.safetensors (float32), the
    tokenizer with its chat template, and qpack_adapter.json, which says what it was trained on; beside them
    metrics.jsonl and report.html tell of the run. It appears when training has succeeded, and not otherwise.

    A run that was interrupted, or stopped for want of memory or of a finite loss, leaves its checkpoints beside the
    output, and the same call goes on from the last of them. On a CPU the adapter is then, to the bit, that of a run
    without interruption. A call with another base, other data or settings that matter begins anew.

    Args:
        base: directory of a bitsandbytes NF4 checkpoint, or with ``settings.base`` of a plain one; the adapter names
            it as it is given here.
        data: a file, directory or data set of the hub, or several with weights: see :mod:`qpack.data.sources`; what a
            row may be, :mod:`qpack.data.formats` says.
        output: the directory to make.
        settings: the hyper-parameters.
        eval_data: what to evaluate on, as ``data``; ``settings.eval_split`` takes a share of ``data`` instead. The
            adapter is then that of the step after which the loss on it was lowest.
        force: replace an adapter that is already at ``output``.
        on_progress: called with the optimizer steps done and their total, first with 0.
        on_event: called with everything that happens, see `qpack.training.report`.

    Raises:
        CheckpointError: the base is not what ``settings.base`` says, or cannot be loaded.
        DataError: the data cannot be used; the message names file and line.
        OutputExistsError: the output exists and ``force`` was not given, or it is not an adapter.
        TrainingError: the loss or a gradient is no longer finite, memory does not suffice for one sequence, the run is
            shorter than its warm-up, or a tracker is not installed.
    """
    listeners = [*filter(None, [on_event, _progress(on_progress) if on_progress else None])]
    processes = Processes.launched()
    if settings.fsdp and processes.size == 1:
        raise TrainingError("fsdp: there is one process; start several with torchrun --nproc-per-node N -m qpack train")
    require_trackers(settings.report_to)
    with processes.joined():
        return _train(Path(base), data, eval_data, Path(output), settings, processes, force, listeners)


def _train(
    base: Path,
    data: Arguments,
    eval_data: Arguments | None,
    output: Path,
    settings: TrainSettings,
    processes: Processes,
    force: bool,
    listeners: Sequence[Listener],
) -> TrainReport:
    """`train` as one of ``processes``."""
    options = DataOptions(settings.format, settings.loss, settings.chat_template, settings.on_bad_row)
    dpo = settings.method == "dpo"

    identity, (rows, held_out) = processes.once(
        lambda: (_identify(base, settings), _read(data, eval_data, options, settings))
    )
    inputs = [base, *rows.paths, *(held_out.paths if held_out else ())]
    if settings.init_from_error:
        inputs.append(Path(settings.init_from_error))
    with processes.shared(
        lambda: resumable_directory(output, force=force, marker=ADAPTER_CONFIG_NAME, inputs=inputs)
    ) as work:
        from qpack.quiet import quiet_libraries

        with quiet_libraries():
            from transformers import set_seed

            from qpack.loading.adapters import save_adapter
            from qpack.loading.model import outline
            from qpack.loading.tokenizer import load_tokenizer
            from qpack.reports.training import REPORT_NAME, Run, page
            from qpack.training.compute import choose_compute
            from qpack.training.from_error import begin_from_error
            from qpack.training.loop import fit, optimizer_for
            from qpack.training.memory import peak_memory
            from qpack.training.model import add_lora, load_base, require_targets
            from qpack.training.samples import draw_samples

            plain = settings.base == "16bit"
            require_targets(outline(base, plain=plain), settings)
            tokenizer = load_tokenizer(base)
            encoding: Any = encode_preferences if dpo else encode

            def encoded(rows: Rows[Any]) -> Dataset[Any]:
                dataset: Dataset[Any] = encoding(rows, tokenizer, base, options, settings.max_length)
                return dataset

            dataset = processes.once(lambda: encoded(rows))
            evaluation = processes.once(lambda: encoded(held_out)) if held_out else None
            compute = choose_compute()
            if processes.size > 1 and processes.first:
                logger.info("%s", processes.describe(settings, compute.device))
            estimated = _foretell(base, settings, dataset, processes, listeners)
            set_seed(settings.seed)
            loaded = load_base(base, compute, plain=plain, sharded=settings.fsdp)
            model = add_lora(loaded, settings)
            record = Record(
                versions={library: version(library) for library in LIBRARIES},
                base=identity,
                settings=asdict(settings),
                data=_counts(dataset) | ({"held_out": _counts(evaluation)} if evaluation else {}),
                template=dataset.template,
                metrics={},
            )
            processes.once(lambda: work.begin(_inputs(record, processes)))
            checkpoints = work.directory / CHECKPOINTS_NAME
            if settings.init_from_error:
                source = Path(settings.init_from_error)

                def begin() -> None:
                    if Checkpoints(checkpoints, settings.keep).latest() is None:  # else the run goes on from that
                        begin_from_error(model, base, source, compute.device)

                processes.once(begin)  # of several processes the first is enough: its adapter is sent to the others
            with recording(work.directory / METRICS_NAME, checkpoints) as metrics:
                steps = fit(
                    model,
                    dataset.examples,
                    settings,
                    compute,
                    held_out=evaluation.examples if evaluation else (),
                    trainer_class=_trainer_class(settings),
                    directory=checkpoints,
                    name=output.resolve().name,
                    processes=processes,
                    listeners=[metrics, *listeners] if processes.first else (),
                )
            samples: tuple[Sample, ...] = ()
            if processes.first or settings.fsdp:  # no process has a sharded base for itself
                asked = (evaluation or dataset).examples
                answers = [example["chosen"] for example in asked] if dpo else asked
                samples = draw_samples(model, tokenizer, answers, settings.samples)
            if processes.first:
                save_adapter(model, work.directory)
                tokenizer.chat_template = dataset.template or tokenizer.chat_template
                tokenizer.save_pretrained(work.directory)
        report = TrainReport(
            output=output,
            steps=len(steps.losses),
            examples=len(dataset.examples),
            truncated=dataset.truncated,
            skipped=len(dataset.skipped),
            tokens=steps.tokens,
            trainable_parameters=model.num_parameters(only_trainable=True),
            first_loss=steps.losses[0],
            final_loss=fmean(steps.losses[-FINAL_STEPS:]),
            seconds=steps.seconds,
            tokens_per_second=steps.tokens / steps.seconds,
            compute_dtype=compute.dtype_name,
            optimizer=optimizer_for(settings, compute),
            peak_memory=peak_memory(compute.device),
            estimated_memory=estimated,
            resumed_step=steps.resumed,
            best_step=steps.best,
            best_eval_loss=steps.best_loss,
        )
        if processes.first:
            record = replace(record, metrics={name: getattr(report, name) for name in RECORDED})
            record.write(work.directory)
            shown = page(Run(report, record, metrics.rows(), samples))
            (work.directory / REPORT_NAME).write_text(shown, encoding="utf-8")
    return report


def _identify(base: Path, settings: TrainSettings) -> Base:
    """Tell which base it is, and that what the settings say of it is so."""
    if settings.base == "16bit":
        checkpoint = require_plain(base, hint="a packed base is trained without --base 16bit")
    else:
        checkpoint = require_packed(base, hint="run `qpack convert` on it, or train it unpacked with --base 16bit")
    identity = Base.of(checkpoint)
    if settings.init_from_error:
        Original.open(Path(settings.init_from_error), checkpoint).require_origin(identity)
    return identity


def _read(
    data: Arguments, eval_data: Arguments | None, options: DataOptions, settings: TrainSettings
) -> tuple[Rows[Any], Rows[Any] | None]:
    """Read what to train on, and what to evaluate on if anything is held out."""
    if settings.eval_split is not None and eval_data is not None:
        raise DataError("eval_split: expected no evaluation data beside it, found both")
    reader: Any = read_preferences if settings.method == "dpo" else read
    rows = reader(data, options, seed=settings.seed)
    if settings.eval_split is not None:
        return rows.split(settings.eval_split, settings.seed)  # type: ignore[no-any-return]
    if eval_data is not None:
        return rows, reader(eval_data, options, seed=settings.seed)
    for name in ("eval_steps", "early_stopping"):
        if getattr(settings, name) is not None:
            raise DataError(f"{name}: nothing is held out to evaluate on; give eval_split or evaluation data")
    return rows, None


def _foretell(
    base: Path, settings: TrainSettings, dataset: Dataset[Any], processes: Processes, listeners: Sequence[Listener]
) -> "Need | None":
    """Tell what the run is going to take, and return it."""
    from qpack.training.foresight import foresee

    found = foresee(base, settings, dataset.examples, processes)
    if found is None:
        return None
    if processes.first:
        for listen in listeners:
            listen(Foreseen(found))
    return found.need


def _trainer_class(settings: TrainSettings) -> "type[AdapterTrainer]":
    from qpack.training.dpo import PreferenceTrainer
    from qpack.training.loop import AdapterTrainer
    from qpack.training.packing import PackingTrainer

    if settings.method == "dpo":
        return PreferenceTrainer
    return PackingTrainer if settings.packing else AdapterTrainer


def _counts(dataset: Dataset[Any]) -> dict[str, Any]:
    return {"digest": dataset.digest, "examples": len(dataset.examples)}


def _inputs(record: Record, processes: Processes) -> str:
    """All that the adapter depends on, as text."""
    content = {**asdict(record), "processes": processes.size}
    for name in WITHOUT_EFFECT:
        del content["settings"][name]
    return json.dumps(content, indent=1)


def _progress(on_progress: Callable[[int, int], None]) -> Listener:
    def listen(event: Event) -> None:
        if isinstance(event, RunBegin | StepLog):
            on_progress(event.step, event.total)

    return listen
