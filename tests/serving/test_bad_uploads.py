"""Bad adapters sent to the running engine: each is refused with its reason, and nobody else notices."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import factors
import httpx
import pytest
from served import ServerProcess
from soak.ledger import Ledger
from soak.load import Load
from spoilt import BAD
from taught import ANSWERS, PROMPTS

pytestmark = pytest.mark.vllm

# What only a directory can be.
NOT_SENT = {
    "no directory",
    "weights linked from outside",
    "settings linked from outside",
    "a pipe for weights",
    "20 GB of nothing",
}

# What plain vLLM takes or stumbles over, and every other kind; `registry/test_bad_adapters.py` has them all.
SENT = {"NaN", "another hidden size", "a layer that the base lacks", "no lora_B", "truncated data", "an empty file"}
SENT |= {*[*BAD][::2]} - NOT_SENT


def test_bad_uploads_are_refused_and_nobody_notices(server: ServerProcess, packed: Path, tmp_path: Path) -> None:
    """Plain vLLM takes many of these, and one with NaN silences it for good."""
    url = f"{server.url}/v1"
    good = factors.write(tmp_path / "good", factors.draw(packed))

    def spoilt(kind: str) -> list[tuple[str, tuple[str, bytes]]]:
        adapter = Path(shutil.copytree(good, tmp_path / kind / "adapter"))
        BAD[kind][0](adapter)
        return [("file", (file.name, file.read_bytes())) for file in adapter.iterdir()]

    async def listed(client: httpx.AsyncClient) -> tuple[list[dict[str, Any]], list[str]]:
        answer = (await client.get("/adapters")).json()
        return answer["aliases"], [version["id"] for version in answer["versions"]]

    async def send_all() -> Load:
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            before = await listed(client)
            ledger = Ledger("packed", dict(zip(PROMPTS, ANSWERS["packed"], strict=True)))
            for alias in before[0]:
                ledger.learn(alias["live"], dict(zip(PROMPTS, ANSWERS[alias["name"]], strict=True)))
                ledger.becomes(alias["name"], alias["live"])
            load = Load(url, ledger, rate=10, at_once=32, seed=0)
            over = asyncio.Event()
            loading = asyncio.create_task(load.run(over))
            assert len(SENT) >= 30
            for kind in sorted(SENT):
                _, status, reason = BAD[kind]
                answer = await client.post("/adapters/adapter", files=spoilt(kind))
                assert answer.status_code == status, (kind, answer.text)
                assert reason in answer.json()["error"]["message"], kind
            assert await listed(client) == before
            over.set()
            await loading
            await load.close()
            return load

    load = asyncio.run(send_all())
    assert load.faults == []
    assert load.answers > 20
