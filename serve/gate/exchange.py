"""One HTTP request and its answer, between the client and the application behind the gate.

The application is vLLM's. It aborts a request when its ``receive`` says that the client has gone. When its task is
cancelled it does not, and the engine goes on for nobody; so a deadline is told to it as a client that leaves.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from serve.gate.refusal import Refusal
from serve.routes import App, Message, Receive, Send

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_BODY_SECONDS = 30.0
_ERROR_EVENT = b'data: {"error":'
"""How vLLM says in a stream that it failed."""


_CLOSE = ((b"connection", b"close"),)
"""After an answer to half a body, which could only be thrown away."""


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Exchange:
    """A request, and what has become of its answer."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked = self.headers.get("x-request-id", "")
        self.request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        self.extra_headers = [(b"x-request-id", self.request_id.encode())]
        """Headers that the answer gets besides its own."""
        self.trace_headers: dict[bytes, bytes] = {}
        """Those that the application gets in place of the client's."""
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the client has left."""
        self.status: int | None = None
        """Of the answer, None before it begins."""
        self.streaming = False
        self.finished = False
        self.error: str | None = None
        """What went wrong after the status was sent."""
        self.chunks = 0
        """Pieces of the body: of a stream, about its tokens."""
        self.first_byte: float | None = None
        self.last_byte: float | None = None
        self.receive, self._send = receive, send

    # ---- from the client -------------------------------------------------------------------------

    async def read(self, limit: int) -> bytes:
        """Read the body, at most ``limit`` bytes of it.

        Raises:
            Refusal: 413 as soon as there are more; 408 if it takes longer than half a minute.
            ClientGone: if it ends before its end.
        """
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        self.gone.set_result(None)
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(limit)
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            raise Refusal(408, f"the body did not come within {_BODY_SECONDS:.0f} s", headers=_CLOSE) from error

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Notice in the block when the client leaves; the body must have been read."""

        async def watch() -> None:
            while (await self.receive())["type"] != "http.disconnect":
                pass
            if not self.finished:  # when it is, the server says the same
                self.gone.set_result(None)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()

    @asynccontextmanager
    async def patience(self, seconds: float, hopeless: asyncio.Future[None]) -> AsyncIterator[None]:
        """Cancel the block after a time, when the client leaves, or when there is nothing to wait for any more.

        Raises:
            ClientGone: if the client has left.
            TimeoutError: otherwise.
        """
        over = False
        try:
            async with asyncio.timeout(seconds) as timeout:

                def leave(_: object) -> None:
                    if not over:
                        timeout.reschedule(0)

                for reason in (self.gone, hopeless):
                    reason.add_done_callback(leave)
                try:
                    yield
                finally:
                    over = True
                    hopeless.remove_done_callback(leave)
        except TimeoutError:
            if self.gone.done():
                raise ClientGone from None
            raise

    # ---- to the client ---------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Send a part of the answer, and note what it says."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ())]
            self.streaming = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
            ours = {name for name, _ in self.extra_headers}
            kept = [(name, value) for name, value in headers if name.lower() not in ours]
            message = {**message, "headers": kept + self.extra_headers}
        elif message.get("body"):
            self.chunks += 1
            self.last_byte = asyncio.get_running_loop().time()
            self.first_byte = self.first_byte or self.last_byte
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.finished = True
        await self._send(message)

    async def answer(self, body: bytes) -> None:
        """Answer with JSON."""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error; in a stream that has begun, end it with one."""
        if self.finished:
            return
        if self.status is None:
            await self.send({"type": "http.response.start", "status": refusal.status, "headers": refusal.headers})
            await self.send({"type": "http.response.body", "body": refusal.body})
        elif self.streaming:
            self.error = str(refusal)
            await self.send({"type": "http.response.body", "body": refusal.event})
        else:
            raise refusal  # half of an answer is sent: all that is left is to break the connection

    # ---- through the application -----------------------------------------------------------------

    async def forward(
        self,
        app: App,
        body: bytes,
        *,
        seconds: float,
        broken: Callable[[], Refusal | None],
        heard: Callable[[bytes], object] | None = None,
    ) -> Any:
        """Let the application answer ``body``, and return its ``state`` of the request.

        Args:
            seconds: to the end of the answer.
            broken: says why no answer can be right, if so, when the application has failed.
            heard: gets every piece of the answer.

        Raises:
            Refusal: in place of an answer that has not begun.
            ClientGone: if nobody waits for it any more.
        """
        call = _Call(self, body, broken, heard)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, call.hang_up)
        self.gone.add_done_callback(call.hang_up)
        own = {b"content-length": str(len(body)).encode(), b"x-request-id": self.request_id.encode()}
        ours = own | self.trace_headers
        kept = [header for header in self.scope["headers"] if header[0] not in ours]
        scope = {**self.scope, "headers": [*kept, *ours.items()], "state": {**self.scope.get("state", {})}}
        try:
            await app(scope, call.receive, call.send)
        except Exception as error:
            if refusal := broken():
                raise refusal from error
            if self.status is None:
                raise  # vLLM has an answer for that
            raise Refusal(503, "the answer broke off, ask again", retry_after=1) from error
        finally:
            timer.cancel()
            self.gone.remove_done_callback(call.hang_up)
        if self.gone.done():
            raise ClientGone
        if call.hung_up.is_set() and not self.finished:
            raise too_late()
        if not self.finished:
            raise broken() or Refusal(503, "the answer broke off, ask again", retry_after=1)
        return scope["state"]


def too_late() -> Refusal:
    """Where an answer has met its deadline."""
    return Refusal(504, "the deadline passed before the answer was there")


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than {limit} bytes", headers=_CLOSE)


class _Call:
    """The application's side of an exchange."""

    def __init__(
        self,
        exchange: Exchange,
        body: bytes,
        broken: Callable[[], Refusal | None],
        heard: Callable[[bytes], object] | None,
    ) -> None:
        self.hung_up = asyncio.Event()
        self._exchange, self._body, self._broken, self._heard = exchange, body, broken, heard
        self._asked = False
        self._failed: Message | None = None  # the start of an answer with status 5xx, until its body is there

    def hang_up(self, _: object = None) -> None:
        """Let the application believe that the client has left, and hear no more of it."""
        self.hung_up.set()

    async def receive(self) -> Message:
        """Give the body, then wait for the end."""
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on; what a broken application says of itself is put in our words."""
        if self.hung_up.is_set():
            return
        if message["type"] == "http.response.start" and message["status"] >= 500:
            self._failed = message
            return
        if self._failed is not None:
            if refusal := self._broken():
                return await self._exchange.refuse(refusal)
            start, self._failed = self._failed, None
            await self._exchange.send(start)
        body = message.get("body", b"")
        if self._exchange.streaming and body.startswith(_ERROR_EVENT):
            self._exchange.error = body.decode(errors="replace").strip()
            if refusal := self._broken():
                return await self._exchange.refuse(refusal)
        if body and self._heard:
            self._heard(bytes(body))
        if not self._exchange.finished:
            await self._exchange.send(message)
