"""API keys, in an SQLite file that the server and ``qpack keys`` both have open.

A key is ``qp-`` and 8 hexadecimal digits, which name it and are shown in lists, then ``-`` and 256 random bits. Only
its SHA-256 is kept: a password needs a slow hash because it can be guessed, 256 random bits can't be. Digests are
compared in constant time.

Every request looks its key up in the file, 20 microseconds, so that a key that is revoked is refused from then on. Once
there has been a key, there is no access without one: to revoke the last key closes the server.
"""

import hashlib
import hmac
import json
import math
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from qpack.errors import ServeError

FILE_NAME = "keys.sqlite"

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    sha256 BLOB NOT NULL,
    role TEXT NOT NULL,
    models TEXT,
    requests_per_minute INTEGER,
    tokens_per_minute INTEGER,
    concurrency INTEGER,
    weight REAL NOT NULL,
    created REAL NOT NULL,
    last_used REAL,
    revoked REAL
) STRICT;
CREATE UNIQUE INDEX live ON keys (name) WHERE revoked IS NULL;
"""

_TOKEN = re.compile(r"qp-([0-9a-f]{8})-[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
_COLUMNS = (
    "id, name, role, models, requests_per_minute, tokens_per_minute, concurrency, weight, created, last_used, revoked"
)
_USE_SECONDS = 60.0


class Role(StrEnum):
    """What a key opens."""

    INFERENCE = "inference"
    """Completions and the list of models."""
    MONITOR = "monitor"
    """Metrics and the version, for a collector that should be able to do nothing else."""
    ADMIN = "admin"
    """Everything."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key; not the key itself. Times are seconds since 1970."""

    id: str
    name: str
    role: Role
    models: frozenset[str] | None
    """Adapters, and the base by its name, that it may use; None is all of them, those of the future too."""
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrency: int | None
    """Requests at a time, waiting ones too."""
    weight: float
    """Its share of an adapter, against other keys'."""
    created: float
    last_used: float | None
    """To the minute."""
    revoked: float | None

    def may_use(self, model: str) -> bool:
        """Whether it opens an adapter, or the base, of this name."""
        return self.models is None or model in self.models


class Keys:
    """The keys of one server. Use it from one thread; `note_use` from any.

    Raises:
        ServeError: wherever the file is not one of keys, or is locked for more than five seconds.
    """

    def __init__(self, directory: Path) -> None:
        """Open the keys in a directory; the file is made if it isn't there, readable by its owner only."""
        if not directory.is_dir():
            raise ServeError(f"{directory}: not a directory")
        self.path = directory / FILE_NAME
        with self._translated():
            self.path.touch(mode=0o600)
            self._database = self._connect()
            self._create()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @property
    def required(self) -> bool:
        """Whether access needs a key: there is one, or was one."""
        with self._translated():
            return bool(self._database.execute("SELECT EXISTS (SELECT 1 FROM keys)").fetchone()[0])

    def add(
        self,
        name: str,
        role: Role = Role.INFERENCE,
        *,
        models: Sequence[str] | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        concurrency: int | None = None,
        weight: float = 1.0,
    ) -> tuple[Key, str]:
        """Make a key, and return what is known of it and the key itself, which can't be had again.

        Raises:
            ServeError: for a name that is illegal or that a live key has, or a limit below 1.
        """
        if not _NAME.fullmatch(name):
            raise ServeError(
                f"key {name!r}: the name is not 1 to 128 letters, digits, '.', '_', '@' and '-', a letter or digit"
                " first"
            )
        limits = (
            ("requests_per_minute", requests_per_minute),
            ("tokens_per_minute", tokens_per_minute),
            ("concurrency", concurrency),
        )
        for option, limit in limits:
            if limit is not None and limit < 1:
                raise ServeError(f"key {name!r}: {option} {limit}: expected at least 1")
        if not 0 < weight < math.inf:
            raise ServeError(f"key {name!r}: weight {weight}: expected more than 0")
        key_id = secrets.token_hex(4)
        token = f"qp-{key_id}-{secrets.token_urlsafe(32)}"
        chosen = None if models is None else json.dumps(sorted(set(models)))
        numbers = (requests_per_minute, tokens_per_minute, concurrency, weight, time.time())
        with self._translated():
            try:
                self._database.execute(
                    "INSERT INTO keys (id, name, sha256, role, models, requests_per_minute, tokens_per_minute,"
                    " concurrency, weight, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (key_id, name, _digest(token), role.value, chosen, *numbers),
                )
            except sqlite3.IntegrityError as error:
                raise ServeError(f"key {name!r}: there is a key of this name (revoke it first)") from error
            return self._one(key_id), token

    def list(self) -> list[Key]:
        """All keys, revoked ones too, the oldest first."""
        with self._translated():
            rows = self._database.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created, id").fetchall()
        return [_key(row) for row in rows]

    def revoke(self, name: str) -> Key:
        """Refuse a live key, given by its name or id, from now on.

        Raises:
            ServeError: if there is no such key.
        """
        with self._translated():
            found = self._database.execute(
                "UPDATE keys SET revoked = ? WHERE revoked IS NULL AND (name = ? OR id = ?) RETURNING id",
                (time.time(), name, name.removeprefix("qp-")),
            ).fetchall()
            if not found:
                raise ServeError(f"key {name!r}: no live key has this name or id")
            return self._one(found[0][0])

    def find(self, token: str) -> Key | None:
        """Return the live key that a client has sent, None if it is none."""
        if not (form := _TOKEN.fullmatch(token)):
            return None
        with self._translated():
            query = f"SELECT sha256, {_COLUMNS} FROM keys WHERE id = ? AND revoked IS NULL"
            row = self._database.execute(query, (form[1],)).fetchone()
        if row is None or not hmac.compare_digest(row[0], _digest(token)):
            return None
        return _key(row[1:])

    def note_use(self, key_id: str) -> None:
        """Write down that a key is used; does nothing if that was written less than a minute ago."""
        now = time.time()
        with self._translated(), closing(self._connect()) as database:
            database.execute(
                "UPDATE keys SET last_used = ? WHERE id = ? AND (last_used IS NULL OR last_used < ?)",
                (now, key_id, now - _USE_SECONDS),
            )

    def _one(self, key_id: str) -> Key:
        return _key(self._database.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (key_id,)).fetchone())

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=5.0, isolation_level=None)
        database.execute("PRAGMA synchronous = FULL")  # what was revoked stays so
        return database

    def _create(self) -> None:
        try:
            self._database.execute("PRAGMA journal_mode = WAL")  # whose readers don't wait for writers
            self._database.execute("BEGIN IMMEDIATE")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise ServeError(
                    f"{self.path}: expected version {_SCHEMA_VERSION} of the file of keys, found {version}"
                )
            self._database.execute("COMMIT")
        except BaseException:
            self._database.close()  # which rolls back
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ServeError(f"{self.path}: {error}") from error


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _key(row: Sequence[Any]) -> Key:
    key_id, name, role, models, *numbers = row
    return Key(key_id, name, Role(role), None if models is None else frozenset(json.loads(models)), *numbers)
