"""What Prometheus is told of a registry: refused adapters by kind, whichever process has refused them."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.registry.registry import Registry


class RefusalCollector(Collector):
    """Asks the registry at each scrape. No names: those of refused adapters are anybody's invention."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Tell how many there were."""
        family = CounterMetricFamily("qpack_adapter_refusals", "Adapters that were refused", labels=["kind"])
        for kind, number in self._registry.refusals().items():
            family.add_metric([kind], number)
        yield family
