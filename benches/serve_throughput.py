"""Tokens a second with the base alone and 1 to 16 adapters in the mix: `qpack serve` beside plain vLLM.

    python -m benches.serve_throughput [--slots 8] [--rounds 3] [--rate 1.5] [--dir DIR]

Both servers have the same arguments, run at the same time, and are asked in turns. The model is SmolLM2-135M-Instruct
in NF4, the adapters are of rank 16 on all its packed layers. Every mix gets the same load: ``--requests`` prompts of
``--prompt-tokens`` random tokens, dealt out to the adapters in turns, and ``--answer-tokens`` tokens each, streamed.

- Closed loop: ``--at-once`` requests are always running. Tokens a second, and tokens a second of the processors that
  the server's processes took.
- Open loop (with ``--rate``): requests come at random moments, the same for every mix, so many a second. Time to the
  first token and time for each one after it.

Every figure is the median over rounds. Exit status 1 if 8 adapters mixed get less than 0.85 of the tokens a second that
one adapter gets, from `qpack serve`.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median, quantiles

import aiohttp

from benches.servers import Server, qpack_command, running, vllm_command, write_adapters, write_models

MIXES = (0, 1, 2, 4, 8, 16)
GOAL = 0.85

# Tokens of words, in any vocabulary of the size of a real one.
_FIRST_TOKEN, _LAST_TOKEN = 1000, 20000


@dataclass(frozen=True, slots=True)
class Load:
    """What a mix is asked."""

    requests: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """When its first and its last token came, in seconds from when it was due."""

    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Run:
    """One mix on one server, once."""

    seconds: float
    cpu: float
    answers: list[Answer]


async def ask(session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], tokens: int) -> Answer:
    """Ask for exactly so many tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began = time.monotonic()
    first = last = usage = None
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"{model}: {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            usage = event.get("usage") or usage
            if event.get("choices"):
                last = time.monotonic() - began
                first = first or last
    if first is None or last is None or usage is None or usage["completion_tokens"] != tokens:
        raise SystemExit(f"{model}: expected {tokens} tokens, found {usage}")
    return Answer(first, last)


async def measure(server: Server, models: list[str], load: Load, seed: str, at_once: int, rate: float | None) -> Run:
    """Ask a server for all of a load, ``at_once`` at a time, or at moments of ``rate`` a second."""
    draw = Random(seed)  # other prompts for every run: none may be in a cache
    prompts = [draw.choices(range(_FIRST_TOKEN, _LAST_TOKEN), k=load.prompt_tokens) for _ in range(load.requests)]
    moments = Random(0)
    due = [0.0]
    while len(due) < load.requests:
        due.append(due[-1] + (moments.expovariate(rate) if rate else 0.0))
    places = asyncio.Semaphore(load.requests if rate else at_once)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one(number: int) -> Answer:
            await asyncio.sleep(due[number])
            async with places:
                model = models[number % len(models)]
                return await ask(session, server.url, model, prompts[number], load.answer_tokens)

        began, taken = time.monotonic(), server.taken().cpu
        answers = await asyncio.gather(*map(one, range(load.requests)))
        return Run(time.monotonic() - began, server.taken().cpu - taken, list(answers))


def percentile(values: list[float], percent: int) -> float:
    """Interpolated."""
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def show(runs: list[Run], load: Load) -> str:
    """Medians over rounds: tokens a second, tokens a processor-second, first token at 50 and 95 %, time per token."""
    tokens = load.requests * load.answer_tokens
    firsts = [[answer.first for answer in run.answers] for run in runs]
    each = [[(one.last - one.first) / (load.answer_tokens - 1) for one in run.answers] for run in runs]
    cells = [f"{median(tokens / run.seconds for run in runs):.0f}", f"{median(tokens / run.cpu for run in runs):.0f}"]
    cells += [f"{1e3 * median(percentile(round_, percent) for round_ in firsts):.0f}" for percent in (50, 95)]
    cells += [f"{1e3 * median(median(round_) for round_ in each):.1f}"]
    return " | ".join(cells)


def main() -> int:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--rate", type=float, help="requests a second, open loop too")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--mixes", type=int, nargs="+", default=MIXES)
    parser.add_argument("--without-vllm", action="store_true", help="qpack serve alone")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "qpack-bench-serve")
    options = parser.parse_args()
    load = Load(options.requests, options.prompt_tokens, options.answer_tokens)
    _, base = write_models(options.dir)
    adapters = write_adapters(options.dir, base, max(options.mixes))
    slots = [f"--max-loras={options.slots}", f"--max-cpu-loras={max(len(adapters), options.slots)}"]
    commands = {"qpack serve": qpack_command(base, adapters, *slots, "--quiet")}
    if not options.without_vllm:
        commands["vLLM"] = vllm_command(base, adapters, options.slots)
    with ExitStack() as stack:
        servers = {}
        for name, command in commands.items():
            servers[name] = server = stack.enter_context(running(command))
            print(f"{name}: ready after {server.seconds_to_ready:.0f} s, {server.taken()}", file=sys.stderr, flush=True)
        loops = [None, options.rate] if options.rate else [None]
        kinds = [(name, mix, rate) for rate in loops for mix in options.mixes for name in servers]
        runs: dict[tuple[str, int, float | None], list[Run]] = {kind: [] for kind in kinds}
        for round_ in range(-1, options.rounds):  # the first one warms up
            for name, mix, rate in kinds:
                models = list(adapters)[:mix] or [base.name]
                seed = f"{name} {mix} {rate} {round_}"
                run = asyncio.run(measure(servers[name], models, load, seed, options.at_once, rate))
                print(f"round {round_}, {name}, {mix}: {run.seconds:.1f} s", file=sys.stderr, flush=True)
                if round_ >= 0:
                    runs[name, mix, rate].append(run)
    print(f"{options.slots} slots, {load}, {options.at_once} at once, medians of {options.rounds} rounds")
    for rate in loops:
        print(f"\n{f'{rate} requests a second' if rate else 'closed loop'}\n")
        print("| server | adapters | tokens/s | tokens/cpu-s | first token ms, 50 % | 95 % | token ms |")
        print("|---|---|---|---|---|---|---|")
        for name in servers:
            for mix in options.mixes:
                print(f"| {name} | {mix} | {show(runs[name, mix, rate], load)} |")
    if not {1, 8} <= set(options.mixes):
        return 0
    ratio = median(
        one.seconds / eight.seconds
        for one, eight in zip(runs["qpack serve", 1, None], runs["qpack serve", 8, None], strict=True)
    )
    print(f"\n8 adapters mixed: {ratio:.2f} of one")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
