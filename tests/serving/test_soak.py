"""A short soak of the session's server: thousands of requests while its adapters change, every answer right.

`python -m soak` is the long one, which also judges memory and what is left behind.
"""

import asyncio
from pathlib import Path

import httpx
import pytest
from served import ServerProcess
from soak.contents import Content
from soak.ledger import Ledger
from soak.load import Load
from soak.swaps import Swaps, together
from taught import ANSWERS, PROMPTS

pytestmark = pytest.mark.vllm

# The least of each.
REQUESTS, CHANGES = 2000, 40


def test_every_answer_is_its_versions_own(server: ServerProcess, adapters: dict[str, Path]) -> None:
    """Two slots, three places in memory, six names, and versions that come and go all the time."""
    contents = [Content.read(path, ANSWERS[name]) for name, path in adapters.items()]

    async def enough(load: Load, swaps: Swaps, over: asyncio.Event) -> None:
        while (load.outcomes.total() < REQUESTS or swaps.changes.total() < CHANGES) and not load.faults + swaps.faults:
            await asyncio.sleep(0.1)
        over.set()

    async def soak() -> tuple[Load, Swaps]:
        url = f"{server.url}/v1"
        ledger = Ledger("packed", dict(zip(PROMPTS, ANSWERS["packed"], strict=True)))
        load = Load(url, ledger, rate=200, at_once=64, seed=0)
        swaps = Swaps(url, ledger, contents, [f"soak{number}" for number in range(6)], seed=0)
        await swaps.begin()
        over = asyncio.Event()
        await asyncio.gather(together(load, swaps, over), enough(load, swaps, over))
        await swaps.end()
        await load.close()
        return load, swaps

    load, swaps = asyncio.run(soak())
    assert load.faults + swaps.faults == []
    metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
    series = [line for line in metrics.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert len(series) <= 1, "one more for each list of adapters that ever ran together"
