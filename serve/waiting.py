"""What clients are told while there is no engine: 503, when to come again, and ``loading`` for probes of health.

The parent process answers so on the listening socket, until the serving process accepts on the same one; a connection
is never refused in between. One request a connection, whatever it is: nothing of it is read but the first line.
"""

import asyncio
import json
import socket
from contextlib import suppress

RETRY_SECONDS = 5

_HEAD_BYTES = 64 << 10
_READ_SECONDS = 5.0
# A client that is still sending when the connection closes may lose the answer: so much is read and thrown away.
_DISCARD_BYTES = 1 << 20
_DISCARD_SECONDS = 1.0


class Waiting:
    """Answers on a socket from `start` to `stop`."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Accept connections; nothing changes if that is so already."""
        if self._server is None:
            self._server = await asyncio.start_server(
                _answer, sock=self._listener.dup(), limit=_HEAD_BYTES, backlog=2048
            )

    def stop(self) -> None:
        """Leave all connections that come from now on to others."""
        if self._server is not None:
            self._server.close()
            self._server = None


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with asyncio.timeout(_READ_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
        writer.write(response(head.split(b" ", 2)[1]))
        await writer.drain()
        writer.write_eof()
        async with asyncio.timeout(_DISCARD_SECONDS):
            left = _DISCARD_BYTES
            while left > 0 and (data := await reader.read(left)):
                left -= len(data)
    writer.close()


def response(path: bytes) -> bytes:
    """The whole answer to a request for ``path``."""
    error = {
        "message": "the engine is loading, ask again",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    content = {"status": "loading"} if path == b"/health" else {"error": error}
    body = json.dumps(content).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: %d\r\n"
        b"Retry-After: %d\r\n"
        b"Connection: close\r\n\r\n"
        b"%s" % (len(body), RETRY_SECONDS, body)
    )
