"""The soak's own judgement: what it calls wrong, and what growth."""

import asyncio
from pathlib import Path

import pytest
from gated import BASE, site
from soak.footprint import growth
from soak.ledger import Ledger
from soak.load import Load
from taught import PROMPTS


def test_a_wrong_answer_is_a_fault(tmp_path: Path) -> None:
    """The engine of the gate's tests says what it was asked."""

    async def ask(url: str) -> Load:
        load = Load(f"{url}/v1", Ledger(BASE, dict.fromkeys(PROMPTS, "right")), rate=50, at_once=8, seed=0)
        over = asyncio.Event()
        asyncio.get_running_loop().call_later(1, over.set)
        await load.run(over)
        await load.close()
        return load

    with site(tmp_path) as running:
        load = asyncio.run(ask(running.url))
    assert load.answers == 0
    assert any("expected 'right'" in fault for fault in load.faults)


def test_a_change_is_seen_from_both_sides_while_it_is_made() -> None:
    async def change() -> None:
        ledger = Ledger("base", {})
        ledger.becomes("a", "a@1")
        with ledger.watch("a") as before:
            with ledger.changing("a"):
                asked = asyncio.create_task(ledger.may("a", before, "a@2"))
                await asyncio.sleep(0)
                assert not asked.done(), "the change may yet turn out to be to this one"
                ledger.becomes("a", "a@2")
            assert await asked
            assert await ledger.may("a", before, "a@1")
            assert not await ledger.may("a", before, None)
        with ledger.watch("a") as after:
            assert not await ledger.may("a", after, "a@1")

    asyncio.run(change())


def test_growth_is_a_trend() -> None:
    times = [float(second) for second in range(120)]
    teeth = [100.0 + second % 10 for second in times]
    spikes = [50.0 * (second % 37 == 0) for second in times]
    spiked = [sum(pair) for pair in zip(teeth, spikes, strict=True)]
    rising = [tooth + second / 2 for tooth, second in zip(teeth, times, strict=True)]
    assert growth(times, spiked) == pytest.approx(0, abs=3)
    assert growth(times, rising) == pytest.approx(60, abs=3)
