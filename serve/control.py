"""What parent and serving process tell each other, over a pair of sockets that only they hold.

==========  ===============================================================
to child    what to serve, pickled; then ``drain``, at most once
to parent   ``{"ready": true}`` when it accepts; ``{"failed": "why"}`` at its end
==========  ===============================================================

One line a message. The end of the stream is a message too: the other process is gone. A child whose parent is gone
ends itself, so that no server is left which nobody can stop.
"""

import json
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

DRAIN = b"drain\n"


class Parent:
    """The serving process's end."""

    def __init__(self, connection: socket.socket) -> None:
        connection.set_inheritable(False)
        connection.setblocking(True)
        self._file = connection.makefile("rwb")
        self.draining = threading.Event()
        self._on_drain: Callable[[], None] = _end
        self._lock = threading.Lock()

    def receive(self) -> Any:
        """Return what the parent has told first, and listen to it from now on."""
        sent = pickle.load(self._file)
        threading.Thread(target=self._listen, name="qpack-control", daemon=True).start()
        return sent

    def on_drain(self, call: Callable[[], None]) -> None:
        """Call this, from another thread, when the parent asks for the end; until then the process just ends."""
        with self._lock:
            self._on_drain = call
            if self.draining.is_set():
                call()

    def ready(self) -> None:
        """Tell that requests are answered."""
        self._tell(ready=True)

    def failed(self, reason: str) -> None:
        """Tell why this process ends."""
        self._tell(failed=reason)

    def _tell(self, **message: object) -> None:
        with suppress(OSError):  # the parent is gone; the other thread hears of it too
            self._file.write(json.dumps(message).encode() + b"\n")
            self._file.flush()

    def _listen(self) -> None:
        with suppress(ConnectionResetError):  # how the stream ends if the parent has not read all before it died
            if self._file.readline() == DRAIN:
                with self._lock:
                    self.draining.set()
                    self._on_drain()
                self._file.readline()
        _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
