"""How large an adapter may be, and what checking it may take."""

from dataclasses import dataclass

_MIB = 1 << 20
_GIB = 1 << 30

CONFIG_BYTES = _MIB
"""Largest adapter_config.json, or record; real ones have a few kilobytes."""
HEADER_BYTES = 32 * _MIB
"""Largest header of a safetensors file. An adapter of 256 experts in 61 layers comes to 14 MiB."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one adapter may take."""

    max_rank: int = 512
    """The largest rank that the engine has room for."""
    max_bytes: int = 4 * _GIB
    """Size of its files."""
    seconds: float = 60.0
    """Time to check it, of processor and clock both."""
    memory: int = 2 * _GIB
    """Address space of the process that checks it."""
    any_base: bool = False
    """Take it although its record names another base than this one; it must still fit."""
