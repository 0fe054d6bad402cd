"""The registry of one base's adapters: a directory that outlives every process that uses it.

::

    REGISTRY/registry.sqlite   versions, aliases, canaries, shadows (`serve.registry.database`)
    REGISTRY/store, incoming   adapter files (`serve.registry.files`)

Order is what makes it safe: an adapter is copied, then checked as copied, then renamed into the store, and only then
listed, in one transaction with the alias that points at it. Whatever is killed in between, and when, what is listed is
whole and what is not listed is swept. Nothing that is listed ever changes, so an answer cannot mix two versions.

Several processes may use one registry, such as a server and the command line. Each polls `Registry.generation`.
"""

import json
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qpack.adapters.record import Base
from qpack.checkpoint import Checkpoint
from qpack.loading.base import require_packed
from serve.registry.database import Bound, Database
from serve.registry.errors import RegistryError
from serve.registry.files import Files
from serve.registry.limits import Limits
from serve.registry.validation import validate
from serve.registry.version import Alias, Version, require_name

DATABASE_NAME = "registry.sqlite"

_LEAST_DIGITS = 4
"""Of a digest that is given by its beginning."""


@dataclass(frozen=True, slots=True)
class _State:
    """What the database held at one moment."""

    generation: int
    versions: Mapping[str, Version]
    """By id, oldest first."""
    aliases: Mapping[str, Alias]
    """By name."""


class Registry:
    """An open registry, for all threads of a process.

    A digest may be given by its first digits, four or more, where they tell one version.

    Raises:
        RegistryError: from every method, for what is refused; nothing was changed then.
    """

    def __init__(self, directory: Path, database: Database, bound: Bound) -> None:
        self.directory = directory
        self.bound = bound
        self._database = database
        self._files = Files(directory)
        self._base_is_known = False
        self._state = _State(-1, {}, {})
        self._loading = threading.Lock()

    @classmethod
    def open(cls, directory: Path, *, base: Path | None = None, limits: Limits | None = None) -> "Registry":
        """Open the registry in ``directory``, and sweep what killed processes have left.

        With ``base``, the directory of a packed model, a new one is made where there is none. A base without qpack.json
        is read whole for its fingerprint. ``limits`` are kept for whoever opens it next without.

        Raises:
            RegistryError: if there is none, or it is for another base.
            CheckpointError: if ``base`` is not packed.
        """
        path = directory / DATABASE_NAME
        if base is None and not path.is_file():
            raise _no_registry(directory)
        found = Base.of(require_packed(base)) if base else None
        directory.mkdir(parents=True, exist_ok=True)
        database = Database(path)
        try:
            bound = _bind(database, directory, base, found, limits)
            registry = cls(directory.resolve(), database, bound)
            registry._base_is_known = base is not None
            registry._sweep()
        except BaseException:
            database.close()
            raise
        return registry

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @property
    def limits(self) -> Limits:
        """What every new adapter is checked against."""
        return Limits(**json.loads(self.bound.limits))

    def require(self, base: Base) -> None:
        """Refuse another base than the one that this registry is for."""
        _require_same(self.directory, self.bound, base)

    # ---- reading ---------------------------------------------------------------------------------

    def generation(self) -> int:
        """A number that grows with every change, of any process. Cheap enough for every request."""
        return self._database.generation

    def versions(self, name: str | None = None) -> tuple[Version, ...]:
        """All versions, or those of one name, oldest first."""
        found = self._current().versions.values()
        return tuple(version for version in found if name in (None, version.name))

    def aliases(self) -> Mapping[str, Alias]:
        """What each name points at, by name in alphabetical order."""
        return self._current().aliases

    def alias(self, name: str) -> Alias:
        """What one name points at."""
        if name not in self.aliases():
            raise RegistryError(f"no adapter {name!r}", 404)
        return self.aliases()[name]

    def find(self, name: str, digest: str) -> Version:
        """The version of ``name`` whose digest begins so."""
        of_name = self.versions(name)
        found = [version for version in of_name if version.digest.startswith(digest.lower())]
        if len(digest) < _LEAST_DIGITS or not found:
            raise RegistryError(f"no version {name}@{digest}", 404)
        if len(found) > 1:
            raise RegistryError(f"{name}@{digest} is the beginning of {len(found)} versions", 409)
        return found[0]

    def resolve(self, model: str, sticky: str | None = None) -> Version | None:
        """The version that answers a request for ``model``, an alias or an id; None if that is neither.

        ``sticky`` tells users or sessions apart: each stays on one version of a canary.
        """
        state = self._current()
        if alias := state.aliases.get(model):
            return alias.choose(sticky)
        return state.versions.get(model)

    def hold(self, version: Version) -> AbstractContextManager[Path]:
        """Keep the files of ``version`` until the block ends, also if it is removed meanwhile."""
        return self._files.hold(version.digest)

    def refusals(self) -> Mapping[str, int]:
        """How many adapters were refused since there is this registry, by any process, by `RegistryError.kind`."""
        return dict(self._database.rows("SELECT kind, number FROM refusals ORDER BY kind"))

    # ---- changing --------------------------------------------------------------------------------

    def add(self, name: str, source: Path, *, by: str, promote: bool = True) -> Version:
        """Copy the adapter in the directory ``source``, check it and list it; by default let its name point at it.

        Without ``promote`` it is reached by its id alone.

        What is listed already under this name, with the same digest, is returned as it is.

        Raises:
            RegistryError: for a bad name, and with the reason why this adapter cannot be served.
            CheckpointError: if the base cannot be read.
        """
        try:
            return self._add(name, source, by, promote)
        except RegistryError as error:
            with suppress(RegistryError), self._database.alone():
                self._database.run(
                    "INSERT INTO refusals VALUES (?, 1) ON CONFLICT (kind) DO UPDATE SET number = number + 1",
                    error.kind,
                )
            raise

    def _add(self, name: str, source: Path, by: str, promote: bool) -> Version:
        require_name(name)
        if name == Path(self.bound.base).name:
            raise RegistryError(f"the name {name!r} is the base's own", 409)
        base = self._require_base()
        with self._database.alone():  # so that no sweep finds the directory before its lock is on it
            staged = self._files.begin()
        try:
            staged.copy(source, self.limits)
            checked = validate(staged.directory, base, self.bound.fingerprint, self.limits, shown=source)
            size = staged.finish(checked.config)
            with self._database.change():
                self._files.publish(staged, checked.digest)
                self._database.run(
                    "INSERT INTO versions (name, digest, rank, size, added, by) VALUES (?, ?, ?, ?, ?, ?)"
                    " ON CONFLICT (name, digest) DO NOTHING",
                    *(name, checked.digest, checked.rank, size, time.time(), by),
                )
                if promote:
                    self._promote(name, checked.digest, by)
        finally:
            staged.close()
        return self.find(name, checked.digest)

    def promote(self, name: str, digest: str, *, by: str) -> Alias:
        """Let ``name`` point at one version, for all; this ends a canary."""
        with self._database.change():
            self._promote(name, self._servable(name, digest).digest, by)
        return self.alias(name)

    def rollback(self, name: str) -> Alias:
        """Let ``name`` point at what it pointed at before; this ends a canary. Once more goes back further."""
        with self._database.change():
            live = self.alias(name).live
            before = self._database.rows(
                "SELECT number, digest FROM promotions WHERE name = ? AND digest <> ? ORDER BY number DESC LIMIT 1",
                *(name, live.digest),
            )
            if not before:
                raise RegistryError(f"{name}: no version was live before {live.id}", 409)
            [(number, digest)] = before
            self._servable(name, digest)
            self._database.run("DELETE FROM promotions WHERE name = ? AND number > ?", name, number)
            self._end_trials(name)
        return self.alias(name)

    def remove(self, model: str) -> tuple[Version, ...]:
        """Take a name with all its versions out, or one version by its id; return what was removed.

        Files that are held stay until they are not.
        """
        name, at, digest = model.partition("@")
        with self._database.change():
            removed = (self.find(name, digest),) if at else self.versions(name)
            if not removed:
                raise RegistryError(f"no adapter {model!r}", 404)
            alias = self.aliases().get(name)
            if at and alias and alias.live in removed:
                raise RegistryError(
                    f"{alias.live.id} is live; promote another version first, or remove {name} with all versions", 409
                )
            for version in removed:
                self._database.run("DELETE FROM versions WHERE name = ? AND digest = ?", name, version.digest)
        self._sweep()
        return removed

    def pin(self, name: str, digest: str, pinned: bool) -> Version:
        """Say whether a version is to stay in the engine, however long nobody asks for it."""
        with self._database.change():
            version = self.find(name, digest)
            self._database.run(
                "UPDATE versions SET pinned = ? WHERE name = ? AND digest = ?", pinned, name, version.digest
            )
        return self.find(name, digest)

    def canary(self, name: str, percents: Mapping[str, float]) -> Alias:
        """Give other versions than the live one, by digest, their per cent of the users; none ends a canary."""
        with self._database.change():
            live = self.alias(name).live
            found = {self._servable(name, digest): percent for digest, percent in percents.items()}
            if live in found:
                raise RegistryError(f"{live.id} is live and gets what the others leave", 400)
            if any(not 0 < percent <= 100 for percent in found.values()) or sum(found.values()) > 100:
                raise RegistryError(f"{name}: expected shares over 0, together at most 100 per cent", 400)
            self._database.run("DELETE FROM canaries WHERE name = ?", name)
            for version, percent in found.items():
                self._database.run("INSERT INTO canaries VALUES (?, ?, ?)", name, version.digest, percent)
        return self.alias(name)

    def shadow(self, name: str, digest: str | None) -> Alias:
        """Let a version that is not live get copies of the requests to ``name``; None ends that."""
        with self._database.change():
            live = self.alias(name).live
            version = self._servable(name, digest) if digest else None
            if version == live:
                raise RegistryError(f"{live.id} is live and gets all requests already", 400)
            self._database.run("DELETE FROM shadows WHERE name = ?", name)
            if version:
                self._database.run("INSERT INTO shadows VALUES (?, ?)", name, version.digest)
        return self.alias(name)

    # ---- parts of a change -----------------------------------------------------------------------

    def _servable(self, name: str, digest: str) -> Version:
        """A version that may answer requests."""
        version = self.find(name, digest)
        if version.unservable:
            raise RegistryError(f"{version.id}: {version.unservable}", 409)
        return version

    def _promote(self, name: str, digest: str, by: str) -> None:
        live = self._database.rows("SELECT digest FROM promotions WHERE name = ? ORDER BY number DESC LIMIT 1", name)
        if live != [(digest,)]:
            self._database.run(
                "INSERT INTO promotions (name, digest, at, by) VALUES (?, ?, ?, ?)", name, digest, time.time(), by
            )
        self._end_trials(name)

    def _end_trials(self, name: str) -> None:
        for table in ("canaries", "shadows"):
            self._database.run(f"DELETE FROM {table} WHERE name = ?", name)

    def _sweep(self) -> None:
        with self._database.alone():
            self._files.sweep({digest for (digest,) in self._database.rows("SELECT digest FROM versions")})

    def _require_base(self) -> Path:
        """The base, which is what it was when the registry was made."""
        base = Path(self.bound.base)
        if not self._base_is_known:
            _require_same(self.directory, self.bound, Base.of(Checkpoint.open(base)))
            self._base_is_known = True
        return base

    # ---- the state, kept until it changes --------------------------------------------------------

    def _current(self) -> _State:
        with self._loading:
            if self._state.generation != self.generation():
                with self._database.reading():
                    self._state = self._load()
            return self._state

    def _load(self) -> _State:
        rows = self._database.rows
        bound = self._database.bound or self.bound  # a server that was started since may have set other limits
        limit = Limits(**json.loads(bound.limits)).max_rank
        versions = {}
        for name, digest, rank, size, added, by, pinned in rows(
            "SELECT name, digest, rank, size, added, by, pinned FROM versions ORDER BY rowid"
        ):
            versions[name, digest] = Version(
                name=name,
                digest=digest,
                path=self._files.path(digest),
                rank=rank,
                size=size,
                base=bound.fingerprint,
                added=added,
                by=by,
                pinned=bool(pinned),
                unservable=f"rank {rank} is over the server's --max-lora-rank {limit}" if rank > limit else None,
            )
        canaries: dict[str, dict[Version, float]] = {}
        for name, digest, percent in rows("SELECT name, digest, percent FROM canaries ORDER BY rowid"):
            canaries.setdefault(name, {})[versions[name, digest]] = percent
        shadows = {name: versions[name, digest] for name, digest in rows("SELECT name, digest FROM shadows")}
        live = rows(
            "SELECT name, digest, at, by FROM promotions"
            " WHERE number IN (SELECT max(number) FROM promotions GROUP BY name) ORDER BY name"
        )
        aliases = {
            name: Alias(name, versions[name, digest], at, by, canaries.get(name, {}), shadows.get(name))
            for name, digest, at, by in live
        }
        return _State(self.generation(), {version.id: version for version in versions.values()}, aliases)


def _bind(database: Database, directory: Path, base: Path | None, found: Base | None, limits: Limits | None) -> Bound:
    """Bring what the database says of base and limits up to date, and return it."""
    with database.alone():
        before = database.bound
        if base is not None and found is not None:
            if before is not None:
                _require_same(directory, before, found)
            kept = before.limits if before else json.dumps(asdict(Limits()))
            bound = Bound(str(base.resolve()), found.fingerprint, kept)
        elif before is not None:
            bound = before
        else:
            raise _no_registry(directory)
        if limits is not None:
            bound = replace(bound, limits=json.dumps(asdict(limits)))
        if bound != before:
            database.bind(bound)
    return bound


def _no_registry(directory: Path) -> RegistryError:
    return RegistryError(f"{directory}: no registry of adapters; one is made for a base", 404)


def _require_same(directory: Path, bound: Bound, found: Base) -> None:
    if bound.fingerprint != found.fingerprint:
        raise RegistryError(
            f"{directory}: is for the base {bound.base} with fingerprint {bound.fingerprint[:12]}, not for {found}", 409
        )
