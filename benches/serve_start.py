"""Time from the command to the first answer of ``/health``: ``qpack serve`` beside plain vLLM, in turns.

    python benches/serve_start.py BASE [--adapter NAME=DIR ...] [--runs N]

Plain vLLM is its own server with the arguments that qpack gives it, adapters as ``--lora-modules``.
"""

import argparse
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from serve import ServeConfig, collect_adapters
from serve.launch import engine_environment

_LIMIT_SECONDS = 900.0


def main() -> None:
    """Print seconds to ready, each run and the least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    config = ServeConfig(asked.base, collect_adapters(asked.adapter))
    commands = {"plain vLLM": _plain(config), "qpack serve": _qpack(config)}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(asked.runs):
        for name, command in commands.items():
            seconds[name].append(_time_to_ready(command))
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    for name, runs in seconds.items():
        print(f"{name}: least of {len(runs)}: {min(runs):.1f} s")


def _qpack(config: ServeConfig) -> list[str]:
    pairs = [f"--adapter={name}={path}" for name, path in config.adapters.items()]
    return [sys.executable, "-m", "qpack", "serve", str(config.base), *pairs]


def _plain(config: ServeConfig) -> list[str]:
    # In a process of its own: to import vLLM here would warm what is to be measured.
    ask = "import sys, pickle; from serve.engine import engine_arguments; config = pickle.load(sys.stdin.buffer)"
    ask += "; print(*engine_arguments(config, 0), sep='\\n')"
    run = subprocess.run([sys.executable, "-c", ask], input=pickle.dumps(config), capture_output=True, check=True)
    own = ("--port", "--middleware", "--worker-extension-cls")
    arguments = [
        line for line in run.stdout.decode().splitlines() if line.startswith("--") and not line.startswith(own)
    ]
    modules = [f"{name}={path}" for name, path in config.adapters.items()]
    loras = ["--lora-modules", *modules] if modules else []
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *loras]


def _time_to_ready(command: list[str]) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | engine_environment(os.environ, verbose=False)
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "--port", str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and time.monotonic() - began < _LIMIT_SECONDS:
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                    return time.monotonic() - began
            except (URLError, OSError):
                time.sleep(0.1)
        raise SystemExit(f"{command[:4]} did not get ready (status {process.returncode})")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


if __name__ == "__main__":
    main()
