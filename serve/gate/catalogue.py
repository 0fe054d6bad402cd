"""What the gate asks of the registry, and the list of models that follows from it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from serve.gate.keys import Key
from serve.registry import Alias, Version


class Catalogue(Protocol):
    """Which adapters there are; see `serve.registry.Registry`."""

    def resolve(self, model: str, sticky: str | None = None) -> Version | None: ...
    def aliases(self) -> Mapping[str, Alias]: ...
    def versions(self) -> Sequence[Version]: ...
    def generation(self) -> int: ...


def models(
    base: str, catalogue: Catalogue, key: Key | None, started: float, said: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What ``GET /v1/models`` lists: the base, the aliases and the versions that a key may use.

    ``root`` is the version that answers, ``parent`` the base; an alias with canaries has their per cent too. No paths.
    ``said`` is what is said of each. What can't be served is not listed.
    """

    def card(name: str, created: float, root: str, parent: str | None) -> dict[str, Any]:
        names = {"id": name, "object": "model", "created": int(created), "owned_by": "qpack"}
        return {**names, "root": root, "parent": parent, **said, "permission": []}

    def may_use(name: str) -> bool:
        return key is None or key.may_use(name)

    cards = [card(base, started, base, None)] if may_use(base) else []
    for name, alias in catalogue.aliases().items():
        if may_use(name) and not alias.live.unservable:
            cards.append(card(name, alias.since, alias.live.id, base))
            if alias.canaries:
                cards[-1]["canaries"] = {version.id: percent for version, percent in alias.canaries.items()}
    versions = (one for one in catalogue.versions() if may_use(one.name) and not one.unservable)
    return cards + [card(version.id, version.added, version.id, base) for version in versions]
