"""What the gate costs: processor time of a request and of a streamed token, beside the same application without it.

    python benches/gate.py [--requests 2000] [--tokens 100] [--at-once 64]

The application is the least that can answer, and there is no HTTP: what is measured is the gate alone, with a key, a
registry of 32 adapters, 8 slots and as many requests at once as given. Minima of five rounds, interleaved.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from prometheus_client import CollectorRegistry

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from gated import Shelf, alias, version

from serve.gate.gate import Gate
from serve.gate.keys import Keys
from serve.gate.limits import RequestLimits
from serve.gate.metrics import Metrics
from serve.gate.queue import FairQueue
from serve.registry import Version
from serve.routes import App, Message, Receive, Send

ROUNDS = 5
ADAPTERS = 32


def application(tokens: int) -> App:
    """Streams ``tokens`` events of the size of vLLM's."""
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}
    event = f"data: {json.dumps({'id': 'cmpl-0', 'object': 'text_completion', 'choices': [choice]})}\n\n".encode()
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(tokens):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return answer


@asynccontextmanager
async def lease(_: Version) -> AsyncIterator[None]:
    """Every version is there."""
    yield


async def request(app: App, model: str, token: str) -> None:
    """Ask as a server of HTTP would."""
    body = json.dumps({"model": model, "prompt": "x" * 2000, "stream": True, "max_tokens": 100}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    over = asyncio.Event()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    headers = [(b"authorization", f"Bearer {token}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "client": ("::1", 1)}
    await app(scope, receive, send)


async def seconds(app: App, requests: int, at_once: int, token: str) -> float:
    """Processor time of a request."""
    names = iter([f"a{n % ADAPTERS}" for n in range(requests)])

    async def client() -> None:
        for name in names:
            await request(app, name, token)

    began = time.process_time()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return (time.process_time() - began) / requests


async def measure(directory: Path, requests: int, tokens: int, at_once: int) -> None:
    """Print what there is to see."""
    with closing(Keys(directory)) as keys:
        _, token = keys.add("bench")
        queue = FairQueue(64, 8, quantum=0.05)
        gate = Gate(
            base="base",
            catalogue=Shelf({f"a{n}": alias(version(f"a{n}", f"{n:012}")) for n in range(ADAPTERS)}),
            lease=lease,
            keys=keys,
            queue=queue,
            limits=RequestLimits(),
            metrics=Metrics(queue, "base", CollectorRegistry()),
            engine_died=lambda: False,
        )

        def gated(count: int) -> App:
            answer = application(count)
            return lambda scope, receive, send: gate(answer, scope, receive, send)

        kinds = {
            "one token, alone": application(1),
            "one token, gate": gated(1),
            "all tokens, alone": application(tokens),
            "all tokens, gate": gated(tokens),
        }
        best = dict.fromkeys(kinds, float("inf"))
        for _ in range(ROUNDS):
            for kind, app in kinds.items():
                best[kind] = min(best[kind], await seconds(app, requests, at_once, token))
    request_us = 1e6 * (best["one token, gate"] - best["one token, alone"])
    tokens_us = 1e6 * (best["all tokens, gate"] - best["all tokens, alone"]) - request_us
    print(f"a request  {request_us:6.0f} us")
    print(f"a token    {tokens_us / (tokens - 1):6.1f} us")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(measure(Path(directory), options.requests, options.tokens, options.at_once))


if __name__ == "__main__":
    main()
