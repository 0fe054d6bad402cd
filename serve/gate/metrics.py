"""Figures by adapter for Prometheus, beside those of vLLM, which know only requests.

The labels are ``adapter``, a name, and ``version``, the digits of its digest; for the base the version is empty. A name
that a client has made up is never a label: who asks for what isn't there is counted under no adapter.
"""

from collections.abc import Iterator, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.gate.queue import FairQueue

_LABELS = ("adapter", "version")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)


class Metrics:
    """What the gate counts. One a process, but for tests, which give registries of their own.

    Args:
        queue: whose state is told at each scrape.
        base: the name of the base.
        registry: where it can be scraped.
    """

    def __init__(self, queue: FairQueue, base: str, registry: CollectorRegistry = REGISTRY) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, (*_LABELS, *labels), buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*_LABELS, *labels), registry=registry)

        self.requests = counter("qpack_requests", "Completion requests by the status of their answer", "status")
        self.prompt_tokens = counter("qpack_prompt_tokens", "Tokens of prompts")
        self.output_tokens = counter("qpack_output_tokens", "Tokens of answers")
        self.queue_seconds = histogram("qpack_queue_seconds", "From a request to its turn", _SECONDS)
        self.load_seconds = histogram("qpack_adapter_wait_seconds", "From a turn until its adapter is there", _SECONDS)
        self.first_token_seconds = histogram(
            "qpack_time_to_first_token_seconds", "From a streamed request to its first token", _SECONDS
        )
        self.token_seconds = histogram(
            "qpack_time_per_output_token_seconds",
            "Mean time between the tokens of a stream; of whole answers, time in the engine over tokens",
            _TOKEN_SECONDS,
            "streamed",
        )
        self.shadows = counter("qpack_shadow_answers", "Answers of shadows against those that clients got", "result")
        self._queue = queue
        registry.register(_Queue(queue, base))

    def forget(self, adapter: str, version: str) -> None:
        """Drop the series of a version that is gone for good."""
        for family in (
            self.requests,
            self.prompt_tokens,
            self.output_tokens,
            self.queue_seconds,
            self.load_seconds,
            self.first_token_seconds,
            self.token_seconds,
            self.shadows,
        ):
            family.remove_by_labels({"adapter": adapter, "version": version})
        self._queue.swaps.pop(f"{adapter}@{version}", None)


class _Queue(Collector):
    """What the queue says of itself when it is asked."""

    def __init__(self, queue: FairQueue, base: str) -> None:
        self._queue, self._base = queue, base

    def collect(self) -> Iterator[Metric]:
        """Tell who is where."""
        waiting = GaugeMetricFamily("qpack_requests_waiting", "Requests before the engine", labels=_LABELS)
        running = GaugeMetricFamily("qpack_requests_running", "Requests in the engine", labels=_LABELS)
        holding = GaugeMetricFamily("qpack_adapters_running", "1 for each adapter that has a slot", labels=_LABELS)
        swaps = CounterMetricFamily(
            "qpack_adapter_swaps", "Slots that were given to an adapter which was not in them", labels=_LABELS
        )
        for one in self._queue.present():
            labels = self._labels(one.adapter)
            waiting.add_metric(labels, one.waiting)
            running.add_metric(labels, one.inside)
            if one.has_slot:
                holding.add_metric(labels, 1)
        for adapter, count in [*self._queue.swaps.items()]:
            swaps.add_metric(self._labels(adapter), count)
        yield from (waiting, running, holding, swaps)
        yield GaugeMetricFamily("qpack_adapter_slots", "Slots for adapters", self._queue.slots)

    def _labels(self, adapter: object) -> Sequence[str]:
        name, _, version = (self._base if adapter is None else str(adapter)).partition("@")
        return name, version
