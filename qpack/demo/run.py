"""The demo, step by step: what ``make demo`` and ``qpack demo`` run."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import qpack
from qpack import terminal
from qpack.demo.answers import ask, generate, serving
from qpack.demo.model import write_model
from qpack.demo.report import DemoReport
from qpack.demo.skills import SKILLS, Order, orders, write_examples
from qpack.training import TrainSettings

logger = logging.getLogger(__name__)

TRAINING_ORDERS = 128
HELD_OUT_ORDERS = 20
SETTINGS = TrainSettings(lr=1e-3, max_steps=24, batch_size=8, max_length=128)
MERGED = next(iter(SKILLS))


def run(directory: Path, *, model: str | None = None, quiet: bool = False) -> DemoReport:
    """Convert, train, serve and merge under ``directory``, from the default model or from ``model`` (hub id or path).

    Raises:
        QpackError: if a step fails. Accuracies that are not as expected are the report's `DemoReport.failures`.
    """
    seconds: dict[str, float] = {}
    source, base, merged = (directory / name for name in ("model", "base", "merged"))
    adapters = {skill: directory / "adapters" / skill for skill in SKILLS}
    directory.mkdir(parents=True, exist_ok=True)
    seen, held_out = orders(TRAINING_ORDERS, HELD_OUT_ORDERS, seed=0)

    with _step("model", seconds):
        write_model(source, model)
    with _step("convert", seconds), terminal.progress("convert", "bytes", quiet=quiet) as on_progress:
        converted = qpack.convert(source, base, force=True, on_progress=on_progress)
    for skill, adapter in adapters.items():
        data = directory / f"{skill}.jsonl"
        write_examples(data, seen, skill)
        with _step(f"train {skill}", seconds), terminal.progress("train", "steps", quiet=quiet) as on_progress:
            qpack.train(base, data, adapter, SETTINGS, force=True, on_progress=on_progress)

    questions = [(name, order) for name in (base.name, *adapters) for order in held_out]
    with ExitStack() as stack:
        with _step("serve: start", seconds):
            url = stack.enter_context(serving(base, adapters, directory / "serve.log"))
        with _step(f"serve: {len(questions)} answers", seconds):
            texts = ask(url, questions)
    answers = dict(zip(questions, texts, strict=True))

    with _step("merge", seconds), terminal.progress("merge", "bytes", quiet=quiet) as on_progress:
        qpack.merge(base, adapters[MERGED], merged, force=True, on_progress=on_progress)
    with _step("merged: answers", seconds):
        merged_answers = dict(zip(held_out, generate(merged, held_out), strict=True))

    def accuracy(name: str, skill: str) -> float:
        return _accuracy(held_out, lambda order: answers[name, order], skill)

    return DemoReport(
        model=model or "SmolLM2-135M-Instruct",
        plain_bytes=converted.source_bytes,
        packed_bytes=converted.result.bytes,
        packed_bits=converted.result.packed_bits,
        held_out=len(held_out),
        base={skill: accuracy(base.name, skill) for skill in SKILLS},
        adapters={skill: accuracy(skill, skill) for skill in SKILLS},
        merged_skill=MERGED,
        merged=_accuracy(held_out, merged_answers.__getitem__, MERGED),
        merged_differences=sum(merged_answers[order] != answers[MERGED, order] for order in held_out),
        seconds=seconds,
    )


def _accuracy(held_out: list[Order], answer: Callable[[Order], str], skill: str) -> float:
    right = [answer(order).strip() == SKILLS[skill](order) for order in held_out]
    return sum(right) / len(right)


@contextmanager
def _step(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a step and keep its time."""
    logger.info("%s ...", title)
    begin = time.monotonic()
    yield
    seconds[title] = time.monotonic() - begin
