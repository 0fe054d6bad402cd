"""Servers under measurement: `qpack serve` and plain vLLM, started alike, and what their processes take."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import psutil
from safetensors.numpy import save_file

import qpack
from qpack.checkpoint import Checkpoint
from qpack.demo.model import write_model
from serve.launch import engine_environment

RANK = 16

# GiB of KV cache for all servers alike: plenty for what is measured here.
_KV_GIB = "1"

_LIMIT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Taken:
    """What a server's processes have taken so far, or hold now."""

    cpu: float
    """Seconds of processors."""
    memory: int
    """Bytes: of what processes share, each has its part (PSS)."""


class Server:
    """One that is ready."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, seconds: float) -> None:
        self._process, self.url, self.seconds_to_ready = process, f"http://127.0.0.1:{port}", seconds

    def taken(self) -> Taken:
        """What it and all that it has started have taken."""
        root = psutil.Process(self._process.pid)
        processes = [root, *root.children(recursive=True)]
        times = [process.cpu_times() for process in processes]
        cpu = sum(time.user + time.system for time in times)
        return Taken(cpu, sum(process.memory_full_info().pss for process in processes))


def qpack_command(base: Path, adapters: dict[str, Path], *options: str) -> list[str]:
    """`qpack serve`."""
    pairs = [f"--adapter={name}={path}" for name, path in adapters.items()]
    return [sys.executable, "-m", "qpack", "serve", str(base), *pairs, *options]


def vllm_command(model: Path, adapters: dict[str, Path], slots: int | None = None) -> list[str]:
    """vLLM's own server with the arguments that qpack gives it where they are about speed."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", model.name, "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "auto"]
    if adapters:
        command += ["--enable-lora", f"--max-loras={slots or len(adapters)}", f"--max-lora-rank={RANK}"]
        command += [f"--max-cpu-loras={max(len(adapters), slots or 0)}", "--lora-modules"]
        command += [f"{name}={path}" for name, path in adapters.items()]
    return command


@contextmanager
def running(command: Sequence[str]) -> Iterator[Server]:
    """Start a server on a free port, wait until it is ready, stop it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | engine_environment(os.environ, verbose=False) | {"VLLM_CPU_KVCACHE_SPACE": _KV_GIB}
    if "qpack" not in command:
        environment["VLLM_PLUGINS"] = "bitsandbytes"
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
        try:
            while not _is_ready(port):
                if process.poll() is not None or time.monotonic() - began > _LIMIT_SECONDS:
                    log.seek(0)
                    raise SystemExit(f"{command[:4]} did not get ready:\n{log.read().decode()[-4000:]}")
                time.sleep(0.05)
            yield Server(process, port, time.monotonic() - began)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def _is_ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
            return True
    except (URLError, OSError):
        return False


def write_models(directory: Path) -> tuple[Path, Path]:
    """Write SmolLM2-135M-Instruct, in 16 bits and packed, unless they are there."""
    source, base = directory / "smollm2", directory / "smollm2-nf4"
    if not source.exists():
        write_model(source, None)
    if not base.exists():
        qpack.convert(source, base)
    return source, base


def write_adapters(directory: Path, base: Path, count: int) -> dict[str, Path]:
    """Write adapters of rank 16 for all packed layers of a base, with small random factors; return them by name."""
    packed = Checkpoint.open(base).packed
    adapters = {}
    for number in range(count):
        path = directory / f"adapter-{number}"
        adapters[path.name] = path
        if path.exists():
            continue
        random = np.random.default_rng(number)
        factors = {}
        for name, weight in packed.items():
            rows, columns = weight.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = random.standard_normal((RANK, columns), np.float32) * np.float32(0.02)
            factors[f"{module}.lora_B.weight"] = random.standard_normal((rows, RANK), np.float32) * np.float32(0.01)
        targets = sorted({name.split(".")[-2] for name in packed})
        path.mkdir(parents=True)
        save_file(factors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return adapters
