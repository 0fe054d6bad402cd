"""Load and swaps for a given time, on a server started for it; exit status 1 on one wrong answer, or on growth.

    make soak SOAK_SECONDS=600

Twelve names, each with up to five versions of six trained adapters, in four slots and room for eight versions; the
base and a name that nobody has are asked for too. Every answer is compared with what its version was taught, and its
version with those that were live between request and answer. Half-way and at the end the server rests, and its threads
and descriptors are counted; then it drains, and what it has left behind is looked for.

Growth is that of memory that no file backs, of each process, over the second half of the time, by the median slope; it
is judged where this half is two minutes long or longer.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from served import ServerProcess
from taught import ANSWERS, PROMPTS, teach_adapter, teach_base

from soak.contents import Content
from soak.footprint import Footprint, footprint, growth, processes, shared_files
from soak.ledger import Ledger
from soak.load import Load
from soak.swaps import Swaps, together

NAMES = 12
CONTENTS = 6
OPTIONS = ("--max-loras", "4", "--max-cpu-loras", "8")

_MOST_GROWTH = 8 << 20
"""Bytes in the second half."""
_JUDGED_SECONDS = 120.0
_REST_SECONDS = 5.0


def main() -> None:
    """Parse, run, print, and exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second [default: 60]")
    parser.add_argument("--at-once", type=int, default=64, help="requests that wait for answers [default: 64]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = _run(Path(folder), options)
    print(json.dumps(result, indent=1)) if options.json else _show(result)
    sys.exit(1 if result["faults"] else 0)


def _run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything from teaching to the end of the server."""
    base = teach_base(folder)
    contents = [_content(base, folder / f"content-{number}", number) for number in range(CONTENTS)]
    (scratch := folder / "scratch").mkdir()
    os.environ["TMPDIR"] = str(scratch)
    server = ServerProcess(folder, base, {}, "--registry", str(folder / "registry"), *OPTIONS)
    try:
        url = f"{server.url}/v1"
        result = asyncio.run(_soak(server, url, contents, options))
        shared = shared_files(server.pid)
        children = psutil.Process(server.pid).children(recursive=True)
        status = server.stop()
    finally:
        server.close()
    left = [str(path) for path in (*shared, *scratch.glob("qpack-*")) if path.exists()]
    left += [f"process {child.name()}" for child in children if child.is_running()]
    result["faults"] += [f"left behind: {thing}" for thing in left]
    if status:
        result["faults"].append(f"exit status {status}, expected 0")
    return result


def _content(base: Path, directory: Path, number: int) -> Content:
    """Teach an adapter words of its own."""
    draw = random.Random(number)
    answers = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=draw.randint(3, 16))).strip() for _ in PROMPTS]
    return Content.read(teach_adapter(base, answers, directory, r=(4, 8)[number % 2]), answers)


async def _soak(
    server: ServerProcess, url: str, contents: list[Content], options: argparse.Namespace
) -> dict[str, Any]:
    ledger = Ledger("packed", dict(zip(PROMPTS, ANSWERS["packed"], strict=True)))
    load = Load(url, ledger, rate=options.rate, at_once=options.at_once, seed=options.seed)
    names = [f"adapter-{number}" for number in range(NAMES)]
    swaps = Swaps(url, ledger, contents, names, seed=options.seed)
    await swaps.begin()
    samples: list[tuple[float, Mapping[str, Footprint]]] = []
    watching = asyncio.create_task(_watch(server, samples, load, swaps))
    rests = []
    for _ in range(2):
        began = len(samples)
        over = asyncio.Event()
        asyncio.get_running_loop().call_later(options.seconds / 2, over.set)
        await together(load, swaps, over)
        second_half = samples[began:]
        await asyncio.sleep(_REST_SECONDS)
        rests.append(_look(server))
    watching.cancel()
    await swaps.end()
    await load.close()
    return _result(load, swaps, second_half, rests, options.seconds)


def _look(server: ServerProcess) -> dict[str, Footprint]:
    found = {}
    for name, process in processes(server.pid).items():
        with suppress(OSError, psutil.Error):
            found[name] = footprint(process)
    return found


async def _watch(
    server: ServerProcess, samples: list[tuple[float, Mapping[str, Footprint]]], load: Load, swaps: Swaps
) -> None:
    """Look every second, and say how it goes: on a terminal each time, elsewhere every half minute."""
    began = time.monotonic()
    while True:
        seconds = time.monotonic() - began
        samples.append((seconds, _look(server)))
        memory = ", ".join(f"{name} {one.anonymous >> 20}" for name, one in samples[-1][1].items())
        line = f"{seconds:4.0f} s: {load.answers} answers, {swaps.changes.total()} changes, "
        line += f"{len(load.faults) + len(swaps.faults)} faults; MiB: {memory}"
        if sys.stderr.isatty():
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        elif len(samples) % 30 == 1:
            print(line, file=sys.stderr, flush=True)
        await asyncio.sleep(1)


def _result(
    load: Load,
    swaps: Swaps,
    second_half: list[tuple[float, Mapping[str, Footprint]]],
    rests: list[dict[str, Footprint]],
    seconds: float,
) -> dict[str, Any]:
    faults = load.faults + swaps.faults
    memory = {}
    times = [moment for moment, _ in second_half]
    for name in rests[0]:
        sizes = [look[name].anonymous if name in look else 0 for _, look in second_half]
        grown = growth(times, sizes)
        memory[name] = {"MiB": round(sizes[-1] / (1 << 20), 1), "grown MiB": round(grown / (1 << 20), 2)}
        if grown > _MOST_GROWTH and seconds / 2 >= _JUDGED_SECONDS:
            faults.append(f"{name}: {grown / (1 << 20):.1f} MiB more memory, expected at most {_MOST_GROWTH >> 20}")
        before, after = (rest.get(name) for rest in rests)
        if before is None or after is None:
            faults.append(f"{name}: ended")
            continue
        for kind in ("threads", "descriptors"):
            counts = getattr(before, kind), getattr(after, kind)
            memory[name][kind] = counts[1]
            if counts[1] > counts[0]:
                faults.append(f"{name}: {counts[1]} {kind} at rest, {counts[0]} half-way")
    quantiles = statistics.quantiles(load.seconds, n=100)
    return {
        "requests": dict(load.outcomes),
        "answers a second": round(load.answers / seconds, 1),
        "seconds to a whole answer": {"median": round(quantiles[49], 3), "99 %": round(quantiles[98], 3)},
        "changes": dict(swaps.changes),
        "processes": memory,
        "faults": faults,
    }


def _show(result: dict[str, Any]) -> None:
    table = Table("", "", box=None, show_header=False)
    for title, figures in result.items():
        if isinstance(figures, dict):
            table.add_row(title, "")
            for name, figure in figures.items():
                shown = ", ".join(f"{k} {v}" for k, v in figure.items()) if isinstance(figure, dict) else str(figure)
                table.add_row(f"  {name}", shown)
        elif title != "faults":
            table.add_row(title, str(figures))
    console = Console()
    console.print(table)
    for fault in result["faults"][:20]:
        console.print(f"fault: {fault}", markup=False, soft_wrap=True)
    console.print(f"{len(result['faults'])} faults")


if __name__ == "__main__":
    main()
