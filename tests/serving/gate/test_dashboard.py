"""docs/grafana.json asks for metrics and labels that the server has."""

import json
import re
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry

import serve.residency  # noqa: F401  # for its metrics
from serve.gate.metrics import Metrics
from serve.gate.queue import FairQueue

BOARD = Path(__file__).parents[3] / "docs" / "grafana.json"
GUIDE = BOARD.with_name("serve.md")


def served() -> set[str]:
    """Names of the families, as queries write them."""
    gate = CollectorRegistry()
    Metrics(FairQueue(1, 1), "base", gate)
    names = {"qpack_adapter_refusals_total"}  # which needs a registry of adapters
    for family in (*gate.collect(), *REGISTRY.collect()):
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        names |= {family.name + ending for ending in endings if family.name.startswith("qpack_")}
    return names


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    board = json.loads(BOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\bqpack_\w+", query)}
    assert asked <= served(), asked - served()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_guide_names_the_gate_s_metrics() -> None:
    registry = CollectorRegistry()
    Metrics(FairQueue(1, 1), "base", registry)
    written = set(re.findall(r"`(qpack_\w+)`", GUIDE.read_text()))
    assert {family.name + "_total" * (family.type == "counter") for family in registry.collect()} <= written
