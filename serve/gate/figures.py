"""The figures of this moment as one JSON object, for the page at ``/``.

They are those of Prometheus, with its names but without its text and its arithmetic: counters only grow while the
server runs, so the page takes the difference of two answers over that of their ``seconds``.
"""

import time
from collections import defaultdict
from typing import Any

from prometheus_client import Counter, Histogram

from serve.gate.metrics import Metrics
from serve.gate.queue import FairQueue


def figures(base: str, metrics: Metrics, queue: FairQueue) -> dict[str, Any]:
    """What is in the engine and before it, and what each model has been asked since the start.

    ``models`` has the base by its name, and by their ids the versions that have been asked anything. ``seconds`` is a
    clock that is never set; ``first_tokens`` counts the streams whose times ``first_token_seconds`` adds up.
    """
    models: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for key, family, suffix in (
        ("requests", metrics.requests, "_total"),
        ("output_tokens", metrics.output_tokens, "_total"),
        ("first_tokens", metrics.first_token_seconds, "_count"),
        ("first_token_seconds", metrics.first_token_seconds, "_sum"),
    ):
        for model, value in _sums(family, suffix).items():
            models[model][key] = value
    for one in queue.present():
        models[str(one.adapter or base)] |= {"running": one.inside, "waiting": one.waiting}
    return {
        "seconds": time.monotonic(),
        "running": queue.inside,
        "waiting": queue.waiting,
        "places": queue.places,
        "slots": queue.slots,
        "holders": queue.holders,
        "models": models,
    }


def _sums(family: Counter | Histogram, suffix: str) -> dict[str, float]:
    """One sample of a family by model, over all its other labels; what no adapter was asked is left out."""
    sums: defaultdict[str, float] = defaultdict(float)
    for metric in family.collect():
        for sample in metric.samples:
            adapter, version = sample.labels["adapter"], sample.labels["version"]
            if adapter and sample.name.endswith(suffix):
                sums[f"{adapter}@{version}" if version else adapter] += sample.value
    return sums
