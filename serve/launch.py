"""From a checked config to a running server, until a signal ends it.

The port is taken first and kept, the environment that vLLM reads is set next, and only then a process is started that
imports vLLM: whatever can be refused is refused before the minutes that this import and the engine take. This process
stays beside it (`serve.supervisor`).

All is logged to ``qpack.serve`` at INFO; to see it, give the logger ``qpack`` a handler and a level.
"""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata

from qpack.errors import ServeError
from serve.config import ServeConfig
from serve.stock import Stock, stocked
from serve.supervisor import Supervisor

logger = logging.getLogger("qpack.serve")

# Entry points of ``vllm.general_plugins`` without which the base cannot be loaded or answers wrongly.
_PLUGINS = {"bitsandbytes": "vllm-bnb-plugin", "qpack": "qpack"}


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM, then return. For the main thread of a process that does nothing else.

    Raises:
        ServeError: if the port is taken, a plugin is missing, the engine does not load, or keeps dying.
    """
    environment = engine_environment(os.environ, verbose=config.verbose)
    require_plugins()
    with listen(config.host, config.port) as listener, stocked(config) as stock:
        os.environ.update(environment)
        logger.info("loading engine for %s", config.base)
        asyncio.run(_supervise(config, stock, listener))
    logger.info("stopped")


async def _supervise(config: ServeConfig, stock: Stock, listener: socket.socket) -> None:
    following = asyncio.create_task(stock.follow())
    await Supervisor(
        [sys.executable, "-m", "serve.child"],
        (config, stock.registry.directory, logger.getEffectiveLevel()),
        listener,
        drain_timeout=config.drain_timeout,
        on_ready=lambda: _announce(listener, stock),
    ).run()
    following.cancel()


def _announce(listener: socket.socket, stock: Stock) -> None:
    host, port = listener.getsockname()[:2]
    names = [name for name, alias in stock.registry.aliases().items() if not alias.live.unservable]
    logger.info("ready at %s with %d adapters: %s", api_url(host, port), len(names), ", ".join(names) or "none")


def api_url(host: str, port: int | str) -> str:
    """Return what OpenAI's clients want to know of a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


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
    # A list of all that may load; plugins that add routes are not loaded unless they are on one.
    allowed = [name for name in current.get("VLLM_PLUGINS", "").split(",") if name]
    environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*allowed, *_PLUGINS]))
    return environment


def require_plugins() -> None:
    """Refuse an environment without the plugins that vLLM needs for a packed base.

    Raises:
        ServeError: naming the package to install.
    """
    present = {entry.name for entry in metadata.entry_points(group="vllm.general_plugins")}
    for name, package in _PLUGINS.items():
        if name not in present:
            raise ServeError(f"vllm plugin {name!r} not found: install {package} into this environment")


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port, without listening on it.

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
