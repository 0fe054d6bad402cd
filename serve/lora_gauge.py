"""vLLM's gauge ``vllm:lora_requests_info``, held to one series: the last.

vLLM 0.32 gives it a series for each list of adapters that were ever in the engine together, by their names, in the
order in which they came. With versions that come and go there is always a new one: the API server would grow, and so
would what ``/metrics`` says, without end. Routers that go by the gauge (the Gateway API's inference extension) read the
youngest series alone.
"""

from typing import Any


class LastSeries:
    """A gauge of ``prometheus_client`` that forgets its series when another one is asked for."""

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge
        self._labels: dict[str, str] | None = None

    def labels(self, **labels: str) -> Any:
        """The series of these labels, from now on the only one."""
        if labels != self._labels:
            self._gauge.clear()
            self._labels = labels
        return self._gauge.labels(**labels)


def hold(engine_client: Any) -> None:
    """Hold the gauge of this engine to one series."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    manager = engine_client.logger_manager  # None with --disable-log-stats
    for logger in manager.stat_loggers if manager else ():
        if isinstance(logger, PrometheusStatLogger) and logger.gauge_lora_info is not None:
            logger.gauge_lora_info = LastSeries(logger.gauge_lora_info)  # type: ignore[assignment]  # all that is called of it
