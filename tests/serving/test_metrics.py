"""What the real server's /metrics has: all that the dashboard and the guide speak of."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import ServerProcess

pytestmark = pytest.mark.vllm

BOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
GUIDE = BOARD.with_name("serve.md")

_ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


@pytest.fixture(scope="module")
def scraped(server: ServerProcess) -> Mapping[str, set[str]]:
    """The server's own metrics, as queries name them, each with the labels of its series, if it has any yet."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for model in ("packed", "alpha"):
            client.completions.create(model=model, prompt="hello", max_tokens=4)
            stream = client.completions.create(model=model, prompt="hello", max_tokens=4, stream=True)
            assert [*stream]
    with httpx.Client(base_url=server.url) as http:
        refused = http.post("/v1/adapters/bad", files=[("file", ("adapter_config.json", b"{}"))])
        assert refused.status_code == 422
        text = http.get("/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("qpack_") and not family.name.endswith("_created"):
            for ending in _ENDINGS.get(family.type, ("",)):
                name = family.name + ending
                found[name] = {label for sample in family.samples if sample.name == name for label in sample.labels}
    return found


def test_the_dashboard_asks_for_what_there_is(scraped: Mapping[str, set[str]]) -> None:
    board = json.loads(BOARD.read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    for query in queries:
        names = re.findall(r"\bqpack_\w+", query)
        assert {*names} <= scraped.keys(), query
        selected = re.findall(r"(\w+)(?:=~|=)\"", query)
        grouped = [label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")]
        for name in names:
            assert not scraped[name] or {*selected, *grouped} <= scraped[name], query


def test_the_guide_names_them_all(scraped: Mapping[str, set[str]]) -> None:
    written = set(re.findall(r"`(qpack_\w+)`", GUIDE.read_text()))
    told = {name.removesuffix("_bucket") for name in scraped if not name.endswith(("_count", "_sum"))}
    assert told <= written, told - written
    assert written <= told, written - told
