"""The registry that a server serves from, with the adapters of its config in it.

It belongs to the parent process: a temporary one outlives serving processes that die, and what is watched goes on
being watched while there is none. Serving processes open it themselves and see what changes.
"""

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qpack.errors import ServeError
from serve.config import ServeConfig
from serve.registry import Limits, Registry
from serve.registry.watch import Watch

logger = logging.getLogger("qpack.serve")

_WATCH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Stock:
    """An open registry, and the directory that it is kept in step with, if there is one."""

    registry: Registry
    watch: Watch | None

    async def follow(self) -> None:
        """Keep in step with the watched directory, for as long as nobody cancels this."""
        unread = False
        while self.watch is not None:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                changes = await asyncio.to_thread(self.watch.scan)
            except OSError as error:
                if not unread:
                    logger.warning("%s: %s; its adapters stay as they are", error.filename, error.strerror)
                unread = True
                continue
            unread = False
            for change in changes:
                logger.info("adapter %s %s: %s", change.name, change.kind, change.detail)


@contextmanager
def stocked(config: ServeConfig) -> Iterator[Stock]:
    """Open the config's registry, or a temporary one, and add the config's adapters.

    Raises:
        RegistryError: if one is refused.
    """
    with ExitStack() as stack:
        directory = config.registry or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="qpack-registry-", ignore_cleanup_errors=True))
        )
        limits = Limits(max_rank=config.max_lora_rank, any_base=config.force) if config.max_lora_rank else None
        registry = stack.enter_context(Registry.open(directory, base=config.base, limits=limits))
        for version in registry.versions():
            if version.unservable:
                logger.warning("adapter %s is not served: %s", version.id, version.unservable)
        for name, path in config.adapters.items():
            registry.add(name, path, by="the command line")
        watch = Watch(registry, config.watch) if config.watch else None
        if watch:
            # It takes in what two looks find the same.
            for change in (*watch.scan(), *watch.scan()):
                if change.kind == "refused":
                    raise ServeError(change.detail)
        yield Stock(registry, watch)
