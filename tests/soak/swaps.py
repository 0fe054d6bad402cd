"""What people do to adapters while they are served: uploads, promotions, rollbacks, canaries, removals.

Each change is noted in the ledger, as it was answered.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx

from soak.contents import Content
from soak.ledger import Ledger
from soak.load import Load

_MOST_VERSIONS = 4
"""Of a name; more are removed."""
_PAUSE_SECONDS = 0.1


class UnexpectedError(Exception):
    """A change that was refused, or that should have been."""


class Swaps:
    """Changes one server's adapters, one change at a time.

    Args:
        url: of the server, with ``/v1``.
        ledger: where it is noted.
        contents: what uploads are versions of.
        names: under which they are uploaded.
        seed: of all that is drawn.
    """

    def __init__(
        self, url: str, ledger: Ledger, contents: Sequence[Content], names: Sequence[str], *, seed: int
    ) -> None:
        self._ledger, self._contents, self._names = ledger, contents, names
        self._draw = random.Random(seed)
        self._client = httpx.AsyncClient(base_url=f"{url}/adapters", timeout=120, trust_env=False)
        self._versions: dict[str, list[str]] = {name: [] for name in names}
        self._live: dict[str, str] = {}
        self._canaries: dict[str, set[str]] = {}
        self._number = 0
        self.changes: Counter[str] = Counter()
        """How many there were of each kind."""
        self.faults: list[str] = []

    async def begin(self) -> None:
        """Upload a version under each name."""
        for name in self._names:
            await self._upload(name)

    async def run(self, over: asyncio.Event) -> None:
        """Change something again and again, until it is over."""
        changes = (
            self._upload,
            self._promote,
            self._roll_back,
            self._canary,
            self._shadow,
            self._pin,
            self._remove_version,
            self._remove_name,
            self._upload_broken,
        )
        while not over.is_set():
            name, change = self._draw.choice(self._names), self._draw.choice(changes)
            if name not in self._live:
                change = self._upload
            elif len(self._versions[name]) > _MOST_VERSIONS:
                change = self._remove_version
            try:
                await change(name)
                self.changes[change.__name__.strip("_").replace("_", " ")] += 1
            except (UnexpectedError, httpx.HTTPError) as error:
                self.faults.append(f"{name}: {type(error).__name__}: {error}")
            await asyncio.sleep(self._draw.uniform(0, 2 * _PAUSE_SECONDS))

    async def end(self) -> None:
        """Remove all names."""
        for name in [*self._live]:
            await self._remove_name(name)
        await self._client.aclose()

    async def _upload(self, name: str) -> None:
        content = self._draw.choice(self._contents)
        promote = name not in self._live or self._draw.random() < 0.7
        self._number += 1
        files = [("file", file) for file in content.version(self._number).items()]
        with self._ledger.changing(name):
            added = await self._call("POST", name, 201, params={"promote": promote}, files=files)
            version = added["id"]
            self._ledger.learn(version, content.answers)
            self._ledger.becomes(version, version)
            self._versions[name].append(version)
            if promote:
                self._points(name, version)

    async def _upload_broken(self, name: str) -> None:
        files = self._draw.choice(self._contents).version(0)
        files["adapter_model.safetensors"] = files["adapter_model.safetensors"][:-1]
        await self._call("POST", name, 422, files=[("file", file) for file in files.items()])

    async def _promote(self, name: str) -> None:
        version = self._draw.choice(self._versions[name])
        with self._ledger.changing(name):
            self._follow(await self._call("POST", f"{name}/promote", 200, json={"version": _digest(version)}))

    async def _roll_back(self, name: str) -> None:
        with self._ledger.changing(name):
            alias = await self._call("POST", f"{name}/rollback", 200, 409)
            if "error" not in alias:
                self._follow(alias)

    async def _canary(self, name: str) -> None:
        others = self._others(name)
        percents = {_digest(version): 90 / len(others) for version in others} if self._draw.random() < 0.7 else {}
        with self._ledger.changing(name):
            self._follow(await self._call("POST", f"{name}/canary", 200, json={"percents": percents}))

    async def _shadow(self, name: str) -> None:
        version = self._draw.choice([None, *map(_digest, self._others(name))])
        await self._call("POST", f"{name}/shadow", 200, json={"version": version})

    async def _pin(self, name: str) -> None:
        asked = {"version": _digest(self._draw.choice(self._versions[name])), "pinned": self._draw.random() < 0.5}
        await self._call("POST", f"{name}/pin", 200, json=asked)

    async def _remove_version(self, name: str) -> None:
        if others := self._others(name):
            version = self._draw.choice(others)
            with self._ledger.changing(name, version):
                await self._call("DELETE", version, 200)
                self._versions[name].remove(version)
                self._ledger.becomes(version, None)
                self._points(name, self._live[name], *(self._canaries[name] - {version}))

    async def _remove_name(self, name: str) -> None:
        versions, self._versions[name] = self._versions[name], []
        with self._ledger.changing(name, *versions):
            await self._call("DELETE", name, 200)
            del self._live[name]
            for gone in (name, *versions):
                self._ledger.becomes(gone, None)

    def _others(self, name: str) -> list[str]:
        return [version for version in self._versions[name] if version != self._live[name]]

    def _follow(self, alias: dict[str, Any]) -> None:
        self._points(alias["name"], alias["live"], *alias["canaries"])

    def _points(self, name: str, live: str, *canaries: str) -> None:
        self._live[name], self._canaries[name] = live, set(canaries)
        self._ledger.becomes(name, live, *canaries)

    async def _call(self, method: str, path: str, *expected: int, **request: Any) -> dict[str, Any]:
        answer = await self._client.request(method, f"/{path}", **request)
        if answer.status_code not in expected:
            raise UnexpectedError(f"{method} {path}: status {answer.status_code}: {answer.text}")
        body: dict[str, Any] = answer.json()
        return body


async def together(load: Load, swaps: Swaps, over: asyncio.Event) -> None:
    """Load and swaps at the same time until it is over, and until all requests have their answers."""
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run(over))
        group.create_task(swaps.run(over))


def _digest(version: str) -> str:
    return version.partition("@")[2]
