"""Time from the command to the first 200 of ``/health``: `qpack serve` beside plain vLLM, in turns.

    python -m benches.serve_start [--adapters 2] [--runs 2] [--dir DIR]

The model is SmolLM2-135M-Instruct in NF4; plain vLLM is its own server with the same arguments, adapters as
``--lora-modules``. Seconds by the clock, and those of processors that all processes of a server took, which other
programs disturb less. The least of all runs counts. Exit status 1 if qpack serve takes longer by either.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benches.servers import qpack_command, running, vllm_command, write_adapters, write_models


def main() -> int:
    """Print each run and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "qpack-bench-serve")
    options = parser.parse_args()
    _, base = write_models(options.dir)
    adapters = write_adapters(options.dir, base, options.adapters)
    commands = {
        "qpack serve": qpack_command(base, adapters, f"--max-loras={options.adapters}", "--quiet"),
        "vLLM": vllm_command(base, adapters),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            with running(command) as server:
                found[name].append((server.seconds_to_ready, server.taken().cpu))
            print(f"{name}: {found[name][-1][0]:.1f} s, {found[name][-1][1]:.1f} s of processors", flush=True)
    least = {name: tuple(map(min, zip(*runs, strict=True))) for name, runs in found.items()}
    print(f"\n| least of {options.runs} | s to ready | processor s |\n|---|---|---|")
    for name, (seconds, cpu) in least.items():
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} |")
    return 0 if all(ours <= theirs for ours, theirs in zip(*least.values(), strict=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
