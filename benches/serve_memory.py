"""Start-up and memory with N adapters: one `qpack serve` on a packed base, N servers of vLLM with merged 16-bit models.

    python -m benches.serve_memory [--count 2] [--dir DIR]

The model is SmolLM2-135M-Instruct, the adapters are of rank 16 on all its packed layers; `qpack merge` merges each onto
the 16-bit model. Servers start one after the other, those of vLLM all stay, and every model answers a request before
memory is read: the PSS of all processes, in which a page that several share counts once. All have a KV cache of 1 GiB.
"""

import argparse
import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path

import aiohttp

import qpack
from benches.serve_throughput import ask
from benches.servers import Server, qpack_command, running, vllm_command, write_adapters, write_models

_GIB = 1 << 30


async def answer(server: Server, model: str) -> None:
    """Let it use what it needs."""
    async with aiohttp.ClientSession() as session:
        await ask(session, server.url, model, list(range(1000, 1064)), 16)


def show(name: str, servers: list[Server]) -> str:
    """A line of the table."""
    taken = [server.taken() for server in servers]
    seconds = sum(server.seconds_to_ready for server in servers)
    cpu, memory = sum(one.cpu for one in taken), sum(one.memory for one in taken) / _GIB
    return f"| {name} | {seconds:.0f} | {cpu:.0f} | {memory:.2f} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "qpack-bench-serve")
    options = parser.parse_args()
    source, base = write_models(options.dir)
    adapters = write_adapters(options.dir, base, options.count)
    merged = {name: options.dir / f"merged-{name}" for name in adapters}
    for name, path in merged.items():
        if not path.exists():
            qpack.merge(base, adapters[name], path, original=source)
    lines = []
    with running(qpack_command(base, adapters, "--quiet")) as server:
        for name in adapters:
            asyncio.run(answer(server, name))
        lines.append(show(f"qpack serve, {options.count} adapters", [server]))
    with ExitStack() as stack:
        servers = [stack.enter_context(running(vllm_command(path, {}))) for path in merged.values()]
        for server, path in zip(servers, merged.values(), strict=True):
            asyncio.run(answer(server, path.name))
        lines.append(show(f"vLLM in 16 bits, {options.count} servers", servers))
    print("| | s to ready | processor s | memory GiB |")
    print("|---|---|---|---|")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
