"""What to serve, checked completely before the engine is loaded.

Refused: a base that is not packed as NF4; adapters beside packed experts; an adapter that is malformed, of another
base, or larger than the rank asked for; a name that is illegal, used twice, or the base's own; a registry of another
base; an address that others can reach, without API keys; an option of vLLM that would break what is promised. An
adapter whose record names another base is refused too, unless ``force`` is set.
"""

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from qpack.adapters.adapter import CONFIG_NAME, Adapter
from qpack.adapters.record import check_base
from qpack.adapters.trained import changes
from qpack.checkpoint import Checkpoint
from qpack.errors import ServeError
from qpack.loading.base import require_packed
from qpack.policy.skipping import EXPERT
from serve.gate.access import is_loopback
from serve.gate.keys import FILE_NAME as KEYS_NAME
from serve.gate.keys import Keys
from serve.gate.limits import RequestLimits
from serve.passed_on import passed_on
from serve.registry import Registry
from serve.registry.registry import DATABASE_NAME
from serve.registry.version import NAME, NAME_RULE

# The ranks that vLLM can allocate slots for: MaxLoRARanks in vllm/config/lora.py.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

TRACING_PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp")
"""What vLLM sends traces with."""
_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"

# By default: adapters that come later find so many slots at least, of so large a rank; nobody pays for more unasked.
_LEAST_SLOTS, _MOST_SLOTS = 4, 16
_LEAST_RANK = 16
_LEAST_RESIDENT = 16


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """A packed base, the adapters served beside it, and where to listen.

    Raises:
        CheckpointError: if the base is not a packed model directory.
        AdapterError: if an adapter is malformed or of another base.
        RegistryError: if the registry is of another base.
        ServeError: for a name, address or number that cannot be served.
    """

    base: Path
    """Directory of the packed base; clients reach it as ``model`` under the directory's name."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Directory of each adapter by its name; `collect_adapters` makes it from command line options."""
    watch: Path | None = None
    """Directory whose subdirectories are adapters, those too that come and go while it is served."""
    registry: Path | None = None
    """Directory of the registry, made if it isn't there: its adapters are served, and new ones kept in it. By default
    one that ends with the server."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port; the line that says `ready` names it."""
    without_keys: bool = False
    """Let other machines in, though there are no API keys."""
    max_loras: int | None = None
    """Adapters that one batch can mix. By default all that there are at the start, from 4 to 16."""
    max_cpu_loras: int | None = None
    """Versions in the engine's memory; others are loaded when asked for. By default 16, or all at the start."""
    max_lora_rank: int | None = None
    """Rank that a slot has room for, one of `LORA_RANKS`. By default the smallest that the adapters fit in, and 16 at
    least where more of them may come."""
    max_model_len: int | None = None
    """Tokens in a prompt and its answer. By default what the model and the memory for the KV cache allow."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    """What is let in."""
    vllm_options: tuple[str, ...] = ()
    """Options of vLLM's own, NAME or NAME=VALUE; see `serve.passed_on`."""
    otlp_traces_endpoint: str | None = None
    """URL of an OpenTelemetry collector that traces are sent to, by gRPC, or by HTTP if the environment variable
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is ``http/protobuf``."""
    drain_timeout: float = 30.0
    """Seconds that streams may take to end after SIGTERM."""
    force: bool = False
    """Serve adapters although their records name another base."""
    verbose: bool = False
    """Show vLLM's own log."""

    def __post_init__(self) -> None:
        base = self.base.resolve()
        adapters = {name: path.resolve() for name, path in self.adapters.items()}
        given = adapters | _subdirectories(self.watch, adapters)
        _check_names(base, given)
        _check_numbers(self)
        _check_address(self)
        _check_tracing(self.otlp_traces_endpoint)
        for option in self.vllm_options:
            passed_on(option)
        checkpoint = require_packed(base)
        ranks = _registered(self.registry, base) | _checked_ranks(given, checkpoint, force=self.force)

        fill = object.__setattr__  # the way of a frozen dataclass to hold what its checks have worked out
        fill(self, "base", base)
        fill(self, "adapters", adapters)
        fill(self, "watch", self.watch and self.watch.resolve())
        fill(self, "registry", self.registry and self.registry.resolve())
        if not (ranks or self.registry or self.watch):
            if self.max_loras or self.max_cpu_loras or self.max_lora_rank:
                raise ServeError("max_loras, max_cpu_loras and max_lora_rank need an adapter, or a registry for some")
            return
        _require_slots(base, checkpoint)
        slots = self.max_loras or min(max(len(ranks), _LEAST_SLOTS), _MOST_SLOTS)
        resident = self.max_cpu_loras or max(len(ranks), slots, _LEAST_RESIDENT)
        if resident < slots:
            raise ServeError(f"max_cpu_loras {resident}: expected at least max_loras, {slots}")
        fill(self, "max_loras", slots)
        fill(self, "max_cpu_loras", resident)
        fill(self, "max_lora_rank", _slot_rank(given, ranks, self.max_lora_rank))

    @property
    def name(self) -> str:
        """What clients send as ``model`` to reach the base."""
        return self.base.name


def collect_adapters(pairs: Iterable[str] = ()) -> dict[str, Path]:
    """Return the adapters that ``NAME=DIR`` pairs name.

    Raises:
        ServeError: for a pair of another form, or a name that comes twice.
    """
    adapters: dict[str, Path] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not path:
            raise ServeError(f"adapter {pair!r}: expected NAME=DIR")
        if name in adapters:
            raise ServeError(f"adapter {path}: the name {name!r} is already used by {adapters[name]}")
        adapters[name] = Path(path)
    return adapters


def _subdirectories(watch: Path | None, adapters: Mapping[str, Path]) -> dict[str, Path]:
    """The adapters in a watched directory, by their own names; what has no adapter_config.json is none."""
    if watch is None:
        return {}
    if not watch.is_dir():
        raise ServeError(f"{watch}: not a directory of adapters")
    found = {config.parent.name: config.parent.resolve() for config in sorted(watch.glob(f"*/{CONFIG_NAME}"))}
    for name in found.keys() & adapters.keys():
        raise ServeError(f"adapter {found[name]}: the name {name!r} is already used by {adapters[name]}")
    return found


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
    for option in ("max_loras", "max_cpu_loras", "max_model_len"):
        value = getattr(config, option)
        if value is not None and value < 1:
            raise ServeError(f"{option} {value}: expected at least 1")
    if config.max_lora_rank is not None and config.max_lora_rank not in LORA_RANKS:
        raise ServeError(f"max_lora_rank {config.max_lora_rank}: expected one of {', '.join(map(str, LORA_RANKS))}")


def _check_address(config: ServeConfig) -> None:
    if config.without_keys or is_loopback(config.host):
        return
    if config.registry and (config.registry / KEYS_NAME).is_file():
        with closing(Keys(config.registry)) as keys:
            if keys.required:
                return
    raise ServeError(
        f"host {config.host}: others could use the server without a key; make one with qpack keys add --registry DIR, "
        "or let them with --without-keys"
    )


def _require_slots(base: Path, checkpoint: Checkpoint) -> None:
    """Refuse adapters, of whatever layers, beside 4-bit experts: vLLM 0.32 would refuse to start, minutes later.

    It makes slots for every layer, and can't for these: they run in no kernel of its own that adds adapters
    (``FusedMoEWithLoRA``: "Old-style modular kernel not supported").
    """
    for name in sorted(checkpoint.packed):
        if EXPERT.fullmatch(name.removesuffix(".weight")):
            raise ServeError(
                f"{base}: {name} is a packed expert, and vLLM has no adapters beside 4-bit experts; merge the adapter "
                "into its base (`qpack merge`), pack the result, and serve that without a registry"
            )


def _check_tracing(endpoint: str | None) -> None:
    if endpoint is None:
        return
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https", "grpc") or not url.hostname:
        raise ServeError(f"otlp_traces_endpoint {endpoint}: expected a URL such as http://localhost:4317")
    protocol = os.environ.get(_PROTOCOL, "grpc")
    if protocol not in ("grpc", "http/protobuf"):
        raise ServeError(f"{_PROTOCOL} {protocol}: expected grpc or http/protobuf")
    for package in TRACING_PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ServeError(f"otlp_traces_endpoint needs the package {package}: install it") from None


def _registered(registry: Path | None, base: Path) -> dict[str, int]:
    """The ranks of the versions in a registry, by their ids."""
    if registry is None or not (registry / DATABASE_NAME).is_file():
        return {}
    with Registry.open(registry, base=base) as opened:
        return {version.id: version.rank for version in opened.versions()}


def _checked_ranks(adapters: Mapping[str, Path], checkpoint: Checkpoint, *, force: bool) -> dict[str, int]:
    """The ranks of adapters, by their names, if all of them fit the base."""
    ranks = {}
    for name, path in adapters.items():
        adapter = Adapter.open(path)
        adapter.require_plain()
        changes(adapter, checkpoint, ())
        ranks[name] = adapter.rank
    check_base(adapters.values(), checkpoint, force=force)
    return ranks


def _slot_rank(given: Mapping[str, Path], ranks: Mapping[str, int], asked: int | None) -> int:
    """Return the rank of a slot: the one asked for, else the smallest legal one; every adapter must fit in."""
    largest = max(ranks, key=ranks.__getitem__, default="")
    rank = ranks.get(largest, 1)
    limit = asked or LORA_RANKS[-1]
    if rank > limit:
        raise ServeError(f"{given.get(largest, largest)}: rank {rank} does not fit in max_lora_rank {limit}")
    return asked or next(one for one in LORA_RANKS if one >= max(rank, _LEAST_RANK))
