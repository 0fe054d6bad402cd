"""The registry's SQLite file: which versions there are, and what each name points at.

In WAL mode readers never wait, and several processes may write in turns; so the file must be on a disk of this machine,
not on a network. A commit is on disk when it returns. A counter grows with every change, of any process.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.registry.errors import RegistryError

_FORMAT = 1

_BUSY_SECONDS = 30.0
"""How long a writer waits for another one."""

_SCHEMA = """
CREATE TABLE registry (
    generation INTEGER NOT NULL,
    base TEXT NOT NULL,         -- directory
    fingerprint TEXT NOT NULL,  -- of the base
    limits TEXT NOT NULL        -- JSON
) STRICT;
CREATE TABLE versions (
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    rank INTEGER NOT NULL,
    size INTEGER NOT NULL,
    added REAL NOT NULL,
    by TEXT NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (name, digest)
) STRICT;
CREATE UNIQUE INDEX ids ON versions (name, substr(digest, 1, 12));
-- What a name has pointed at: the last row is live, and a rollback takes it away.
CREATE TABLE promotions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    at REAL NOT NULL,
    by TEXT NOT NULL,
    FOREIGN KEY (name, digest) REFERENCES versions ON DELETE CASCADE
) STRICT;
CREATE INDEX promotions_of ON promotions (name, digest);
CREATE TABLE canaries (
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    percent REAL NOT NULL,
    PRIMARY KEY (name, digest),
    FOREIGN KEY (name, digest) REFERENCES versions ON DELETE CASCADE
) STRICT;
CREATE TABLE shadows (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    FOREIGN KEY (name, digest) REFERENCES versions ON DELETE CASCADE
) STRICT;
"""

# Came later; what knows nothing of it leaves it alone.
_REFUSALS = """
CREATE TABLE IF NOT EXISTS refusals (
    kind TEXT PRIMARY KEY,
    number INTEGER NOT NULL
) STRICT
"""


@dataclass(frozen=True, slots=True)
class Bound:
    """The base that a registry's adapters are for, and the limits that they are checked against."""

    base: str
    fingerprint: str
    limits: str


class Database:
    """Two connections, for all threads of a process: so that nobody who reads waits for one who writes.

    Not to be carried over a fork. What `rows` finds is what was committed last, also in a block that changes something.

    Raises:
        RegistryError: if the file is none of ours, or SQLite cannot do what is asked.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reading, self._writing = threading.RLock(), threading.Lock()
        with self._own_errors():
            self._writer = _connect(path)
            try:
                self._set_up()
                self._reader = _connect(path)
            except BaseException:
                self._writer.close()
                raise

    def close(self) -> None:
        """Close the connections."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()

    @property
    def generation(self) -> int:
        """Grows with every change; 0 for a new registry."""
        rows = self.rows("SELECT generation FROM registry")
        return int(rows[0][0]) if rows else 0

    @property
    def bound(self) -> Bound | None:
        """What the registry is for; None for a new one."""
        rows = self.rows("SELECT base, fingerprint, limits FROM registry")
        return Bound(*rows[0]) if rows else None

    def bind(self, bound: Bound) -> None:
        """Write down what the registry is for; in a block."""
        values = (bound.base, bound.fingerprint, bound.limits)
        if not self.run(
            "UPDATE registry SET generation = generation + 1, base = ?, fingerprint = ?, limits = ?", *values
        ):
            self.run("INSERT INTO registry VALUES (1, ?, ?, ?)", *values)

    def rows(self, query: str, *values: object) -> list[Any]:
        """What a query finds."""
        with self._reading, self._own_errors():
            return self._reader.execute(query, values).fetchall()

    def run(self, statement: str, *values: object) -> int:
        """Run one statement of a block of `alone` or `change` and return how many rows it changed."""
        return self._writer.execute(statement, values).rowcount

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A block whose queries all see the same state."""
        with self._reading, self._own_errors(), _transaction(self._reader, "BEGIN"):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A block that keeps all other writers out; an exception takes back what it has changed."""
        with self._writing, self._own_errors(), _transaction(self._writer, "BEGIN IMMEDIATE"):
            yield

    @contextmanager
    def change(self) -> Iterator[None]:
        """As `alone`, and the generation grows."""
        with self.alone():
            yield
            self.run("UPDATE registry SET generation = generation + 1")

    def _set_up(self) -> None:
        self._writer.execute("PRAGMA journal_mode = WAL")
        with self.alone():
            [[found]] = self._writer.execute("PRAGMA user_version")
            if not found and not self._writer.execute("SELECT * FROM sqlite_schema").fetchall():
                for statement in _SCHEMA.split(";"):
                    self.run(statement)
                self.run(f"PRAGMA user_version = {_FORMAT}")
            elif found != _FORMAT:
                raise RegistryError(f"{self._path}: format is {found}, expected {_FORMAT}", 409)
            self.run(_REFUSALS)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RegistryError(f"{self._path}: {error}", 409) from None


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
