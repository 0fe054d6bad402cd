"""What ``qpack serve --check`` prints: what would be served, where, and what the engine would take for it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qpack.reports.table import aligned
from qpack.sizes import format_size

if TYPE_CHECKING:
    from serve.preflight import Preflight


def as_lines(found: "Preflight") -> list[str]:
    """A line a fact, by its name."""
    return aligned(_facts(found))


def _facts(found: "Preflight") -> Iterator[tuple[str, str]]:
    config, base = found.config, found.base
    yield "base", f"{base.name}, {format_size(found.base_bytes)}, fingerprint {base.fingerprint[:12]}"
    yield "listens at", found.url
    opened = "all" if config.without_keys else "this machine, without a key"
    yield "open to", opened if found.keys is None else f"{found.keys} key{'s' * (found.keys != 1)}"
    for version in found.given:
        yield "adapter", f"{version.id}, rank {version.rank}, {format_size(version.size)}"
    for alias in found.aliases:
        others = ", ".join(f"{percent:g} % {version.id}" for version, percent in alias.canaries.items())
        yield "in the registry", f"{alias.live.id}, rank {alias.live.rank}{f', canary {others}' if others else ''}"
    for version in found.unservable:
        yield "not served", f"{version.id}, rank {version.rank} is over {config.max_lora_rank}"
    if config.max_loras:
        yield "slots", f"{config.max_loras} in a batch, {config.max_cpu_loras} in memory, rank {config.max_lora_rank}"
    yield "memory", str(found.need)
