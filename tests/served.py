"""``qpack serve`` in a process of its own, and questions to it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import httpx
import openai
import psutil

from serve.registry import Registry

MAX_TOKENS = 24

Question = tuple[str, str]
"""A model and a prompt."""

# Loading vLLM takes one to three minutes on two cores.
START_SECONDS = 400.0


class ServerProcess:
    """``qpack serve`` on a free port; what it writes goes to a file in its folder."""

    def __init__(self, folder: Path, base: Path, adapters: Mapping[str, Path], *options: str, **variables: str) -> None:
        """Start it; ``variables`` are of its environment."""
        self.folder = folder
        self._log = folder / "log"
        command = [sys.executable, "-m", "qpack", "serve", str(base), "--port", "0", *options]
        for name, path in adapters.items():
            command += ["--adapter", f"{name}={path}"]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | variables  # GiB: plenty here, and seconds sooner
        environment.pop("VLLM_LOGGING_LEVEL", None)  # TRL sets it for all of a process that imports it
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)

    @property
    def pid(self) -> int:
        """Of the parent process."""
        return self._process.pid

    @property
    def output(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches; fail if the process ends without it."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None
            if match := re.search(pattern, self.output, re.MULTILINE):
                return match
            assert not ended, f"the server ended with status {self._process.returncode}:\n{self.output}"
            time.sleep(0.25)
        raise AssertionError(f"no line {pattern!r} after {START_SECONDS:.0f} s:\n{self.output}")

    @property
    def url(self) -> str:
        """The address, as the server gives it when it is ready."""
        return self.wait_for(r"^ready at (http://\S+)/v1 ").group(1)

    @property
    def staged(self) -> list[Path]:
        """The directories with copies of adapters; the server holds them open."""
        links = [
            Path(link)
            for process in psutil.Process(self._process.pid).children(recursive=True)
            for link in Path(f"/proc/{process.pid}/fd").iterdir()
        ]
        opened = {link.readlink() for link in links if link.is_symlink()}
        return sorted(path for path in opened if path.name.startswith("qpack-stage-"))

    def status(self, method: str, path: str) -> int:
        """Send a request with an empty object and return the status of the answer."""
        headers = {"Content-Type": "application/json"}
        request = Request(self.url + path, method=method, data=b"{}" if method == "POST" else None, headers=headers)
        try:
            with urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except HTTPError as error:
            with error:
                return error.code

    def processes(self) -> list[psutil.Process]:
        """All that it has started."""
        return psutil.Process(self.pid).children(recursive=True)

    def kill_engine(self) -> None:
        """Kill vLLM's engine process."""
        [engine] = [one for one in self.processes() if "Engine" in one.name()]
        engine.kill()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.send(number)
        return self.wait()

    def wait(self) -> int:
        """Return the exit status; kill the process if it doesn't end within a minute."""
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self.stop()


def upload(admin: httpx.Client, name: str, adapter: Path, lora_alpha: int | None = None) -> str:
    """Upload an adapter's files, with another alpha if one is given, and return the version's id."""
    contents = {file.name: file.read_bytes() for file in adapter.iterdir()}
    if lora_alpha is not None:
        settings = json.loads(contents["adapter_config.json"]) | {"lora_alpha": lora_alpha}
        contents["adapter_config.json"] = json.dumps(settings).encode()
    files = [("file", content) for content in contents.items()]
    answer = admin.post(f"/adapters/{name}", files=files)
    assert answer.status_code == 201, answer.text
    version: str = answer.json()["id"]
    return version


def stored(server: ServerProcess, version: str) -> Path:
    """The tensors of a version in the registry of a server that was started with one."""
    with Registry.open(server.folder / "registry") as registry:
        [found] = [one for one in registry.versions() if one.id == version]
    return found.path / "adapter_model.safetensors"


def ask(server: ServerProcess, questions: Sequence[Question]) -> list[list[int]]:
    """Ask all questions at the same time and return the tokens of the answers."""

    async def ask_all() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": prompt}],
                        max_tokens=MAX_TOKENS,
                        temperature=0,
                        extra_body={"return_token_ids": True},
                    )
                    for model, prompt in questions
                )
            )
        return [answer.choices[0].token_ids for answer in answers]  # type: ignore[attr-defined]  # vLLM's extra field

    return asyncio.run(ask_all())
