"""Figures by adapter for Prometheus, beside those of vLLM, which know only requests.

The labels are ``adapter``, a name, and ``version``, the digits of its digest; for the base the version is empty. A name
that a client has made up is never a label: who asks for what isn't there is counted under no adapter.
"""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from serve.gate.queue import FairQueue

_LABELS = ("adapter", "version")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)


class Metrics:
    """What the gate counts. One a process, but for tests, which give registries of their own."""

    def __init__(self, queue: FairQueue, registry: CollectorRegistry = REGISTRY) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _LABELS, buckets=buckets, registry=registry)

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
            "qpack_time_per_output_token_seconds", "Between the tokens of a streamed answer, its mean", _TOKEN_SECONDS
        )
        self.shadows = counter("qpack_shadow_answers", "Answers of shadows against those that clients got", "result")
        for name, text, value in (
            ("qpack_requests_waiting", "Requests before the engine", lambda: queue.waiting),
            ("qpack_requests_running", "Requests in the engine", lambda: queue.inside),
            ("qpack_adapters_running", "Adapters with a slot", lambda: len(queue.holders)),
            ("qpack_adapter_slots", "Slots for adapters", lambda: queue.slots),
        ):
            Gauge(name, text, registry=registry).set_function(value)

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
