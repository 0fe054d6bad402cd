"""A finished run as one HTML page, ``report.html`` beside the adapter: curves, data, settings, samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from qpack.adapters.record import Record
from qpack.reports.page.document import document, pairs, section, table, tiles
from qpack.reports.training.curve import Series, figure
from qpack.sizes import format_size
from qpack.training.report import Sample, TrainReport

REPORT_NAME = "report.html"

_TABLE_ROWS = 20
"""Steps in the table under the curve, spread evenly."""


@dataclass(frozen=True, slots=True)
class Run:
    """What there is to tell of a run."""

    report: TrainReport
    record: Record
    metrics: Sequence[Mapping[str, Any]]
    """The rows of metrics.jsonl."""
    samples: Sequence[Sample]


def page(run: Run) -> str:
    """The page."""
    steps = [row for row in run.metrics if "loss" in row]
    sections = [_tiles(run.report), _loss(run.metrics, steps), _rate(steps), _memory(run.report, steps)]
    if run.samples:
        sections.append(_samples(run.samples))
    sections += [_data(run), _settings(run.record)]
    name = run.report.output.resolve().name
    return document(
        title=f"{name}: how the adapter was trained",
        eyebrow=f"adapter for {run.record.base.name}",
        heading=name,
        skip=("samples", "samples") if run.samples else ("data", "data"),
        sections=sections,
        by="qpack train",
    )


def _tiles(report: TrainReport) -> str:
    values = [
        (f"{report.final_loss:.3f}", "loss at the end"),
        (f"{report.first_loss:.3f}", "loss in the first step"),
        (f"{report.steps:,}", "steps"),
        (f"{report.tokens:,}", "tokens"),
        (f"{report.tokens_per_second:,.0f}", "tokens a second"),
        (format_size(report.peak_memory), "memory at most"),
    ]
    if report.best_eval_loss is not None:
        values.insert(1, (f"{report.best_eval_loss:.3f}", f"best eval loss, step {report.best_step}"))
    return tiles(values)


def _loss(metrics: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> str:
    evaluated = {row["step"]: row["eval_loss"] for row in metrics if "eval_loss" in row}
    series = [
        Series("training", [(row["step"], row["loss"]) for row in steps]),
        Series("evaluation", list(evaluated.items()), marked=True),
    ]
    shown = steps[:: max(1, len(steps) // _TABLE_ROWS)]
    headings = ["step", "loss", *(["eval loss"] if evaluated else []), "gradient norm", "tokens/s", "memory"]
    rows = [
        [
            str(row["step"]),
            f"{row['loss']:.4f}",
            *([f"{evaluated[row['step']]:.4f}" if row["step"] in evaluated else ""] if evaluated else []),
            f"{row['grad_norm']:.3g}",
            f"{row['tokens_per_second']:,.0f}",
            format_size(row["memory"]),
        ]
        for row in shown
    ]
    content = f"""{figure(series, what="Loss")}
<details>
<summary>Some of it as a table</summary>
{table(headings, rows, label="Loss by step")}
</details>"""
    return section("loss", "Loss", content, "The mean over the learned tokens of a step.")


def _rate(steps: Sequence[Mapping[str, Any]]) -> str:
    series = [Series("learning rate", [(row["step"], row["lr"]) for row in steps])]
    return section("rate", "Learning rate", figure(series, what="Learning rate"))


def _memory(report: TrainReport, steps: Sequence[Mapping[str, Any]]) -> str:
    series = [Series("memory", [(row["step"], row["memory"] / 10**9) for row in steps])]
    lines = {"measured": format_size(report.peak_memory)}
    if need := report.estimated_memory:
        lines["estimated before"] = format_size(need.bytes)
        lines |= {f"of it {name}": format_size(size) for name, size in need.parts.items()}
    text = "In GB, the most that the process had taken up to each step, and what was estimated before the first."
    return section("memory", "Memory", figure(series, what="Memory in GB") + "\n" + pairs(lines), text)


def _samples(samples: Sequence[Sample]) -> str:
    parts = []
    for sample in samples:
        lines = {"prompt": sample.prompt, "data": sample.expected, "before": sample.before, "after": sample.after}
        items = "\n".join(
            f'<div><dt>{label}</dt><dd class="text">{escape(text)}</dd></div>' for label, text in lines.items()
        )
        parts.append(f'<dl class="pairs sample">\n{items}\n</dl>')
    text = "Greedy answers of the base before and of the adapter after, to prompts of the data; cut after some tokens."
    return section("samples", "Samples", "\n".join(parts), text)


def _data(run: Run) -> str:
    report = run.report
    seen = {
        "cut at max length": report.truncated,
        "skipped rows": report.skipped,
        "tokens seen": f"{report.tokens:,}",
    }
    return section("data", "Data", pairs(_shown({**run.record.data, **seen})))


def _settings(record: Record) -> str:
    lines = {name.replace("_", " "): value for name, value in record.settings.items() if value is not None}
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines |= {"base": str(record.base), "versions": versions}
    return section("settings", "Settings", pairs(_shown(lines)))


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in values.items()
    }
