"""What to serve, checked completely before the engine is loaded.

Refused, and all of it at once: a base that is not packed as NF4; adapters beside packed experts; an adapter that is
malformed, of another base, or larger than the rank asked for; a name that is illegal, used twice, or the base's own; a
registry of another base; an address that others can reach, without API keys; an option of vLLM that would break what is
promised; numbers that contradict each other or the base. An adapter whose record names another base is refused too,
unless ``force`` is set.

What a registry holds is no reason not to start: a version of a rank over the one asked for is listed as not servable.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from qpack.adapters.adapter import CONFIG_NAME, Adapter
from qpack.adapters.record import Base, check_base
from qpack.adapters.trained import changes
from qpack.checkpoint import Checkpoint
from qpack.errors import ServeError
from qpack.loading.base import require_packed
from qpack.policy.skipping import EXPERT
from qpack.problems import Problems
from serve.gate.access import is_loopback
from serve.gate.keys import FILE_NAME as KEYS_NAME
from serve.gate.keys import Keys
from serve.gate.limits import RequestLimits
from serve.passed_on import passed_on
from serve.registry import Registry, RegistryError, Version
from serve.registry.version import NAME, NAME_RULE

# The ranks that vLLM can allocate slots for: MaxLoRARanks in vllm/config/lora.py.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

TRACING_PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp")
"""What vLLM sends traces with."""
_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"

# With this set vLLM takes a length that the model was not made for.
_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"

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
        SeveralErrors: for more than one of these; all that is wrong is found.
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
        problems = Problems()
        base = self.base.resolve()
        adapters = {name: path.resolve() for name, path in self.adapters.items()}
        given = dict(adapters)
        with problems.noted():
            given |= watched(self.watch) if self.watch else {}
            problems.note(_taken(given, adapters))
        problems.note(_wrong_names(base, given))
        problems.note(_wrong_numbers(self))
        with problems.noted():
            _check_address(self)
        with problems.noted():
            _check_tracing(self.otlp_traces_endpoint)
        for option in self.vllm_options:
            with problems.noted():
                passed_on(option)
        slots_wanted = bool(given or self.registry or self.watch)
        ranks: dict[str, int] = {}
        kept: list[Version] = []
        with problems.noted():
            checkpoint = require_packed(base)
            problems.note(_wrong_length(self.max_model_len, checkpoint))
            problems.note(_without_slots(base, checkpoint) if slots_wanted else ())
            with problems.noted():
                kept = _registered(self.registry, checkpoint)
            ranks = _checked_ranks(given, checkpoint, problems, force=self.force)
        problems.note(_too_large(given, ranks, self.max_lora_rank))

        fill = object.__setattr__  # the way of a frozen dataclass to hold what its checks have worked out
        fill(self, "base", base)
        fill(self, "adapters", adapters)
        fill(self, "watch", self.watch and self.watch.resolve())
        fill(self, "registry", self.registry and self.registry.resolve())
        if slots_wanted:
            ranks |= {version.id: version.rank for version in kept}
            slots = self.max_loras or min(max(len(ranks), _LEAST_SLOTS), _MOST_SLOTS)
            resident = self.max_cpu_loras or max(len(ranks), slots, _LEAST_RESIDENT)
            problems.note(_too_few_places(slots, resident, [version for version in kept if version.pinned]))
            fill(self, "max_loras", slots)
            fill(self, "max_cpu_loras", resident)
            fill(self, "max_lora_rank", self.max_lora_rank or _slot_rank(ranks.values()))
        elif self.max_loras or self.max_cpu_loras or self.max_lora_rank:
            problems.note(
                [ServeError("max_loras, max_cpu_loras and max_lora_rank need an adapter, or a registry for some")]
            )
        problems.raise_found()

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


def watched(directory: Path) -> dict[str, Path]:
    """Return the adapters in a watched directory, by their own names; what has no adapter_config.json is none.

    Raises:
        ServeError: if there is no such directory.
    """
    if not directory.is_dir():
        raise ServeError(f"{directory}: not a directory of adapters")
    return {config.parent.name: config.parent.resolve() for config in sorted(directory.glob(f"*/{CONFIG_NAME}"))}


def _taken(given: Mapping[str, Path], adapters: Mapping[str, Path]) -> Iterator[ServeError]:
    """Names in the watched directory that an option gives to another adapter."""
    for name, path in adapters.items():
        if given[name] != path:
            yield ServeError(f"adapter {given[name]}: the name {name!r} is already used by {path}")


def _wrong_names(base: Path, adapters: Mapping[str, Path]) -> Iterator[ServeError]:
    for name, owner in ((base.name, f"base {base}"), *((name, f"adapter {path}") for name, path in adapters.items())):
        if not NAME.fullmatch(name):
            yield ServeError(f"{owner}: the name {name!r} is not {NAME_RULE}")
    if base.name in adapters:
        yield ServeError(f"adapter {adapters[base.name]}: the name {base.name!r} is the base's own")


def _wrong_numbers(config: ServeConfig) -> Iterator[ServeError]:
    if not 0 <= config.port <= 65535:
        yield ServeError(f"port {config.port}: expected 0 to 65535")
    if not 0 <= config.drain_timeout < math.inf:
        yield ServeError(f"drain_timeout {config.drain_timeout}: expected 0 or more seconds")
    for option in ("max_loras", "max_cpu_loras", "max_model_len"):
        value = getattr(config, option)
        if value is not None and value < 1:
            yield ServeError(f"{option} {value}: expected at least 1")
    if config.max_lora_rank is not None and config.max_lora_rank not in LORA_RANKS:
        yield ServeError(f"max_lora_rank {config.max_lora_rank}: expected one of {', '.join(map(str, LORA_RANKS))}")


def _wrong_length(asked: int | None, checkpoint: Checkpoint) -> Iterator[ServeError]:
    """What vLLM would say of a length over the model's, after a minute (`_get_and_verify_max_len`).

    Positions that are scaled (RoPE) are left to vLLM, and so are those who have told it to go on.
    """
    text = checkpoint.config.get("text_config", checkpoint.config)
    longest = text.get("max_position_embeddings")
    scaled = "factor" in str(text.get("rope_parameters") or text.get("rope_scaling") or "")
    if asked and isinstance(longest, int) and asked > longest and not scaled and not os.environ.get(_LONG):
        yield ServeError(f"max_model_len {asked}: the model has max_position_embeddings {longest}")


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


def _without_slots(base: Path, checkpoint: Checkpoint) -> Iterator[ServeError]:
    """Adapters, of whatever layers, beside 4-bit experts: vLLM 0.32 would refuse to start, minutes later.

    It makes slots for every layer, and can't for these: they run in no kernel of its own that adds adapters
    (``FusedMoEWithLoRA``: "Old-style modular kernel not supported").
    """
    for name in sorted(checkpoint.packed):
        if EXPERT.fullmatch(name.removesuffix(".weight")):
            yield ServeError(
                f"{base}: {name} is a packed expert, and vLLM has no adapters beside 4-bit experts; merge the adapter "
                "into its base (`qpack merge`), pack the result, and serve that without a registry"
            )
            return


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


def _registered(registry: Path | None, checkpoint: Checkpoint) -> list[Version]:
    """The versions in a registry, which is left as it is.

    Raises:
        ServeError: if it is for another base, or is none.
    """
    if registry is None:
        return []
    if registry.exists() and not registry.is_dir():
        raise ServeError(f"registry {registry}: not a directory")
    try:
        opened = Registry.open(registry)
    except RegistryError as error:
        if error.status == 404:
            return []  # it will be made
        raise
    with opened:
        opened.require(Base.of(checkpoint))
        return [*opened.versions()]


def _checked_ranks(
    adapters: Mapping[str, Path], checkpoint: Checkpoint, problems: Problems, *, force: bool
) -> dict[str, int]:
    """The ranks of those adapters, by their names, that fit the base."""
    ranks = {}
    for name, path in adapters.items():
        with problems.noted():
            adapter = Adapter.open(path)
            adapter.require_plain()
            changes(adapter, checkpoint, ())
            ranks[name] = adapter.rank
    with problems.noted():
        check_base([adapters[name] for name in ranks], checkpoint, force=force)
    return ranks


def _too_large(given: Mapping[str, Path], ranks: Mapping[str, int], asked: int | None) -> Iterator[ServeError]:
    """Adapters that do not fit in a slot of the rank that was asked for."""
    limit = asked if asked in LORA_RANKS else LORA_RANKS[-1]
    for name, rank in ranks.items():
        if rank > limit:
            yield ServeError(f"{given[name]}: rank {rank} does not fit in max_lora_rank {limit}")


def _too_few_places(slots: int, resident: int, pinned: Sequence[Version]) -> Iterator[ServeError]:
    if resident < slots:
        yield ServeError(f"max_cpu_loras {resident}: expected at least max_loras, {slots}")
    elif resident < len(pinned):
        names = ", ".join(version.id for version in pinned)
        yield ServeError(f"max_cpu_loras {resident}: {len(pinned)} versions are pinned, which are to stay: {names}")


def _slot_rank(ranks: Iterable[int]) -> int:
    """The smallest rank of a slot that all of these fit in, and more that may come."""
    largest = min(max(ranks, default=0), LORA_RANKS[-1])
    return next(rank for rank in LORA_RANKS if rank >= max(largest, _LEAST_RANK))
