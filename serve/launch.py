"""From a checked config to a running server, in this process, until a signal ends it.

The port is taken first and kept, the environment that vLLM reads is set next, and vLLM is imported last: whatever can
be refused is refused before the minutes that this import and the engine take. Meanwhile a thread says how long.

All is logged to ``qpack.serve`` at INFO. To see it, give the logger ``qpack`` a handler and a level of its own: a
library that vLLM imports sets the root logger's level to ERROR.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from types import FrameType

from qpack.errors import ServeError
from serve.config import ServeConfig

logger = logging.getLogger("qpack.serve")

# Entry points of ``vllm.general_plugins`` without which the base cannot be loaded or answers wrongly.
_PLUGINS = {"bitsandbytes": "vllm-bnb-plugin", "qpack": "qpack"}

_PROGRESS_SECONDS = 10.0


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM, then return. For the main thread of a process that does nothing else.

    Raises:
        ServeError: if the port is taken, a plugin is missing, or the engine does not load or dies later.
    """
    environment = engine_environment(os.environ, verbose=config.verbose)
    _require_plugins()
    with listen(config.host, config.port) as listener:
        os.environ.update(environment)
        # vLLM takes both signals over once it answers; until then they must end a load in progress.
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            with _announced(config, listener):
                from serve import engine

                engine.run(config, listener.dup())
        except _Interrupted:
            pass
    logger.info("stopped")


def engine_environment(current: Mapping[str, str], *, verbose: bool) -> dict[str, str]:
    """Return the variables to set for vLLM and the processes that it starts; what the user has set stays.

    Raises:
        ServeError: if clients may load adapters at run time, which vLLM lets them do from any path.
    """
    if current.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() in ("1", "true"):
        raise ServeError("VLLM_ALLOW_RUNTIME_LORA_UPDATING is set: every client could load any path (unset it)")
    # At WARNING vLLM writes a dozen lines about its own choices (Triton, model runner, preloaded libraries).
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    defaults = {"VLLM_NO_USAGE_STATS": "1", **({} if verbose else quiet)}
    environment = {name: value for name, value in defaults.items() if name not in current}
    if "VLLM_PLUGINS" in current:  # a list of all that may load; without it, all may
        allowed = [name for name in current["VLLM_PLUGINS"].split(",") if name]
        environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*allowed, *_PLUGINS]))
    return environment


def _require_plugins() -> None:
    present = {entry.name for entry in metadata.entry_points(group="vllm.general_plugins")}
    for name, package in _PLUGINS.items():
        if name not in present:
            raise ServeError(f"vllm plugin {name!r} not found: install {package} into this environment")


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port; connections are refused until vLLM listens on it.

    Raises:
        ServeError: if the port is taken or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        # Reuse the port of a server that has just ended, then don't let a second one reuse it while this one loads.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ServeError(f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}") from error
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield listener


class _Interrupted(BaseException):
    """A signal came while the engine was loading. Not KeyboardInterrupt, which vLLM swallows while it waits."""


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise _Interrupted


@contextmanager
def _announced(config: ServeConfig, listener: socket.socket) -> Iterator[None]:
    """Log that the engine is loading, every ten seconds that it still is, and when the server answers."""
    leaving = threading.Event()
    began = time.monotonic()

    def announce() -> None:
        logger.info("loading engine for %s", config.base)
        spoke = began
        while not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            if leaving.wait(0.25):
                return
            if time.monotonic() - spoke >= _PROGRESS_SECONDS:
                spoke = time.monotonic()
                logger.info("loading engine ... %.0f s", spoke - began)
        host, port = listener.getsockname()[:2]
        logger.info(
            "ready at http://%s:%d/v1 with %d adapters: %s",
            f"[{host}]" if ":" in host else host,
            port,
            len(config.adapters),
            ", ".join(config.adapters) or "none",
        )

    thread = threading.Thread(target=announce, name="qpack-announce", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leaving.set()
        thread.join()
