"""What to serve, checked completely before the engine is loaded.

Refused: a base that is not packed as NF4; an adapter that is malformed, of another base, or larger than the rank
asked for; a name that is illegal, used twice, or the base's own. An adapter whose record names another base is refused
too, unless ``force`` is set.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qpack.adapters.adapter import CONFIG_NAME, Adapter
from qpack.adapters.record import check_base
from qpack.adapters.trained import changes
from qpack.errors import ServeError
from qpack.loading.base import require_packed
from serve.registry.version import NAME, NAME_RULE

# The ranks that vLLM can allocate slots for: MaxLoRARanks in vllm/config/lora.py.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """A packed base, the adapters served beside it, and where to listen.

    Raises:
        CheckpointError: if the base is not a packed model directory.
        AdapterError: if an adapter is malformed or of another base.
        ServeError: for a name, port or number that cannot be served.
    """

    base: Path
    """Directory of the packed base; clients reach it as ``model`` under the directory's name."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Directory of each adapter by its name; `collect_adapters` makes it from command line options."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port; the line that says `ready` names it."""
    max_loras: int | None = None
    """Adapters that one batch can mix. By default all of them: then none is ever swapped out and in."""
    max_lora_rank: int | None = None
    """Rank that a slot has room for, one of `LORA_RANKS`. By default the smallest that the adapters fit in."""
    max_model_len: int | None = None
    """Tokens in a prompt and its answer. By default what the model and the memory for the KV cache allow."""
    drain_timeout: float = 30.0
    """Seconds that streams may take to end after SIGTERM."""
    force: bool = False
    """Serve an adapter although its record names another base."""
    verbose: bool = False
    """Show vLLM's own log and a line for each request."""

    def __post_init__(self) -> None:
        base = self.base.resolve()
        adapters = {name: path.resolve() for name, path in self.adapters.items()}
        _check_names(base, adapters)
        _check_numbers(self)
        checkpoint = require_packed(base)
        opened = [Adapter.open(path) for path in adapters.values()]
        for adapter in opened:
            adapter.require_plain()
            changes(adapter, checkpoint, ())
        check_base((adapter.path for adapter in opened), checkpoint, force=self.force)

        fill = object.__setattr__  # the way of a frozen dataclass to hold what its checks have worked out
        fill(self, "base", base)
        fill(self, "adapters", adapters)
        if opened:
            fill(self, "max_loras", self.max_loras or len(opened))
            fill(self, "max_lora_rank", _slot_rank(opened, self.max_lora_rank))

    @property
    def name(self) -> str:
        """What clients send as ``model`` to reach the base."""
        return self.base.name


def collect_adapters(pairs: Iterable[str] = (), folder: Path | None = None) -> dict[str, Path]:
    """Return the adapters that ``NAME=DIR`` pairs name, and those in a folder's subdirectories, named by themselves.

    A subdirectory without an adapter_config.json is not an adapter.

    Raises:
        ServeError: for a pair of another form, a folder without adapters, or a name that comes twice.
    """
    found: list[tuple[str, Path]] = []
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not path:
            raise ServeError(f"adapter {pair!r}: expected NAME=DIR")
        found.append((name, Path(path)))
    if folder is not None:
        if not folder.is_dir():
            raise ServeError(f"{folder}: not a directory of adapters")
        inside = sorted(config.parent for config in folder.glob(f"*/{CONFIG_NAME}"))
        if not inside:
            raise ServeError(f"{folder}: no subdirectory holds an {CONFIG_NAME}")
        found += [(directory.name, directory) for directory in inside]
    adapters: dict[str, Path] = {}
    for name, directory in found:
        if name in adapters:
            raise ServeError(f"adapter {directory}: the name {name!r} is already used by {adapters[name]}")
        adapters[name] = directory
    return adapters


def _check_names(base: Path, adapters: Mapping[str, Path]) -> None:
    for name, owner in ((base.name, f"base {base}"), *((name, f"adapter {path}") for name, path in adapters.items())):
        if not NAME.fullmatch(name):
            raise ServeError(f"{owner}: the name {name!r} is not {NAME_RULE}")
    if base.name in adapters:
        raise ServeError(f"adapter {adapters[base.name]}: the name {base.name!r} is the base's own")


def _check_numbers(config: ServeConfig) -> None:
    if not 0 <= config.port <= 65535:
        raise ServeError(f"port {config.port}: expected 0 to 65535")
    if not 0 <= config.drain_timeout < math.inf:
        raise ServeError(f"drain_timeout {config.drain_timeout}: expected 0 or more seconds")
    for option in ("max_loras", "max_model_len"):
        value = getattr(config, option)
        if value is not None and value < 1:
            raise ServeError(f"{option} {value}: expected at least 1")
    if config.max_lora_rank is not None and config.max_lora_rank not in LORA_RANKS:
        raise ServeError(f"max_lora_rank {config.max_lora_rank}: expected one of {', '.join(map(str, LORA_RANKS))}")
    if not config.adapters and (config.max_loras or config.max_lora_rank):
        raise ServeError("max_loras and max_lora_rank need at least one adapter")


def _slot_rank(adapters: Iterable[Adapter], asked: int | None) -> int:
    """Return the rank of a slot: the one asked for, else the smallest legal one; every adapter must fit in."""
    largest = max(adapters, key=lambda adapter: adapter.rank)
    limit = asked or LORA_RANKS[-1]
    if largest.rank > limit:
        raise ServeError(f"{largest.path}: rank {largest.rank} does not fit in max_lora_rank {limit}")
    return asked or next(rank for rank in LORA_RANKS if rank >= largest.rank)
