"""What the registry knows: versions, which never change, and aliases, which point at them.

An id, ``support@3f2a91c04b7d``, is a name and the first digits of the digest. It is what the engine knows the adapter
by, and what clients send to reach exactly this one; ``support`` alone reaches what the alias points at.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import random

from serve.registry.errors import RegistryError

DIGITS = 12
"""Of the digest in an id."""

# What clients send as ``model``. No '/', which reads as a path, and no '@', which stands before a digest.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME_RULE = "1 to 128 letters, digits, '.', '_' and '-', a letter or digit first"


@dataclass(frozen=True, slots=True)
class Version:
    """One adapter under one name. Its files never change."""

    name: str
    digest: str
    """SHA-256, in hexadecimal, of tensors and settings (see `serve.registry.checks`)."""
    path: Path
    """Directory of its files, which the registry owns; there for as long as the registry lists the version, or longer
    while `Registry.hold` keeps it. Empty if they are on another machine."""
    rank: int
    """The largest of any module."""
    size: int
    """Bytes of its files."""
    base: str
    """Fingerprint of the base that it fits."""
    added: float
    """When, in seconds since 1970."""
    by: str
    """Who added it."""
    pinned: bool
    """Whether it stays in the engine."""
    unservable: str | None = None
    """Why requests for it are refused, if they are: a server's slots can be smaller than they were when it came."""

    @property
    def id(self) -> str:
        """``NAME@DIGEST``, as the engine and clients know it."""
        return f"{self.name}@{self.digest[:DIGITS]}"


@dataclass(frozen=True, slots=True)
class Alias:
    """Which versions answer to a plain name."""

    name: str
    live: Version
    since: float
    """When it was promoted, in seconds since 1970."""
    by: str
    """Who promoted it."""
    canaries: Mapping[Version, float] = field(default_factory=dict)
    """Per cent of the users, or of the requests that name none, that other versions answer."""
    shadow: Version | None = None
    """The version that gets copies of requests, and whose answers nobody is given."""

    def choose(self, sticky: str | None) -> Version:
        """The version for one request; always the same one for the same ``sticky``, such as a user or a session.

        Who is on a canary stays there while its share grows.
        """
        if not self.canaries:
            return self.live
        point = 100 * (random() if sticky is None else _fraction(f"{self.name}\0{sticky}"))
        for version, percent in self.canaries.items():
            if point < percent:
                return version
            point -= percent
        return self.live


def require_name(name: str) -> None:
    """Refuse a name that clients could not send."""
    if not NAME.fullmatch(name):
        raise RegistryError(f"the name {name!r} is not {NAME_RULE}", 400)


def _fraction(text: str) -> float:
    """A number from 0 up to 1 that is as good as drawn, and the same in every process."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=7).digest()) / (1 << 56)
