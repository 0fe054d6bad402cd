"""The adapters of a running server, over its API (`serve.admin`), as `serve.registry.Registry` has them on disk.

What the server refuses is raised in its own words. Nothing is tried again: whoever changes something wants to know
whether it was changed.
"""

import io
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2  # what the hub's client is built on

from qpack.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from qpack.adapters.record import RECORD_NAME
from qpack.errors import ServeError
from serve.registry import Alias, Version
from serve.registry.files import require_safetensors
from serve.registry.version import require_name
from serve.routes import ADAPTERS

# A server checks an upload for a minute at most; one of the hub it has to fetch first.
_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 600.0


class RemoteAdapters:
    """The adapters of one server.

    Args:
        url: of the server, with or without the ``/v1`` that OpenAI's clients want.
        key: of an admin, if the server has keys.

    Raises:
        ServeError: from every method, for what the server refuses, and if it cannot be reached or is none of qpack's.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ServeError(f"{url}: not the address of a server, expected http://HOST:PORT")
        self._url = url.rstrip("/").removesuffix("/v1") + ADAPTERS
        self._client = httpx2.Client(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
        )

    def __enter__(self) -> "RemoteAdapters":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def versions(self) -> tuple[Version, ...]:
        """All versions, oldest first."""
        return tuple(self._state()[0].values())

    def aliases(self) -> Mapping[str, Alias]:
        """What each name points at, by name in alphabetical order."""
        return self._state()[1]

    def add(
        self,
        name: str,
        source: Path,
        *,
        by: str,
        promote: bool = True,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Version:
        """Upload the adapter in the directory ``source``. ``on_progress`` gets bytes sent and in all."""
        require_name(name)
        require_safetensors(source)
        paths = [path for file in (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME) if (path := source / file).is_file()]
        sent, total = 0, sum(path.stat().st_size for path in paths)

        def count(size: int) -> None:
            nonlocal sent
            sent += size
            if on_progress:
                on_progress(sent, total)

        with ExitStack() as stack:
            files = [("file", (path.name, stack.enter_context(_Counted(path, count)))) for path in paths]
            return self._added(name, by, promote, files=files)

    def fetch(self, name: str, source: str, *, revision: str | None, by: str, promote: bool = True) -> Version:
        """Let the server fetch an adapter of the hub by its id."""
        require_name(name)
        return self._added(name, by, promote, json={"source": source, "revision": revision})

    def promote(self, name: str, digest: str, *, by: str) -> Alias:
        """Let ``name`` point at one version."""
        return self._changed(name, "promote", version=digest, by=by)

    def rollback(self, name: str) -> Alias:
        """Let ``name`` point at what it pointed at before."""
        return self._changed(name, "rollback")

    def remove(self, model: str) -> tuple[Version, ...]:
        """Take a name with all its versions out, or one version by its id; return what was removed."""
        before = self._state()[0]
        removed = self._ask("DELETE", model)["removed"]
        return tuple(before[one] for one in removed)

    def pin(self, name: str, digest: str, pinned: bool) -> Version:
        """Say whether a version is to stay in the engine."""
        return _version(self._ask("POST", name, "pin", json={"version": digest, "pinned": pinned}))

    def canary(self, name: str, percents: Mapping[str, float]) -> Alias:
        """Give other versions than the live one, by digest, their per cent of the users; none ends a canary."""
        return self._changed(name, "canary", percents=percents)

    def shadow(self, name: str, digest: str | None) -> Alias:
        """Let a version that is not live get copies of the requests to ``name``; None ends that."""
        return self._changed(name, "shadow", version=digest)

    def _added(self, name: str, by: str, promote: bool, **content: Any) -> Version:
        params = {"promote": str(promote).lower(), "by": by}
        return _version(self._ask("POST", name, params=params, **content))

    def _changed(self, name: str, what: str, **body: object) -> Alias:
        self._ask("POST", name, what, json=body)
        return self.aliases()[name]

    def _state(self) -> tuple[dict[str, Version], dict[str, Alias]]:
        said = self._ask("GET")
        versions = {one["id"]: _version(one) for one in said["versions"]}
        aliases = {
            one["name"]: Alias(
                name=one["name"],
                live=versions[one["live"]],
                since=one["since"],
                by=one["by"],
                canaries={versions[version]: percent for version, percent in one["canaries"].items()},
                shadow=versions[one["shadow"]] if one["shadow"] else None,
            )
            for one in said["aliases"]
        }
        return versions, aliases

    def _ask(self, method: str, model: str | None = None, what: str | None = None, **content: Any) -> dict[str, Any]:
        if model is not None:
            require_name(model.partition("@")[0])
        url = "/".join([self._url, *(quote(part, safe="@") for part in (model, what) if part)])
        try:
            answer = self._client.request(method, url, **content)
        except httpx2.HTTPError as error:
            raise ServeError(f"{self._url}: {str(error).lower() or type(error).__name__}") from None
        match _json(answer):
            case {"error": {"message": str(message)}}:
                raise ServeError(message)
            case dict(said) if answer.is_success:
                return said
        raise ServeError(f"{self._url}: status {answer.status_code}, and not what a server of qpack says")


class _Counted(io.FileIO):
    """A file that tells how much of it is read."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(path)
        self._count = count

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size) or b""
        self._count(len(piece))
        return piece


def _json(answer: httpx2.Response) -> object:
    try:
        return answer.json()
    except ValueError:
        return None


def _version(said: Mapping[str, Any]) -> Version:
    """A version whose files are on another machine."""
    return Version(path=Path(), **{field.name: said[field.name] for field in fields(Version) if field.name != "path"})
