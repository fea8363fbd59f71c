"""Claims of trials, where several processes work on one search and share its storage."""

import contextlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nin.config.errors import printable


def require_postgresql(url: str) -> str:
    """Returns ``url``; raises ValueError if it is not that of a PostgreSQL database."""
    if not re.match(r"postgresql(\+\w+)?://", url):
        raise ValueError("must be postgresql://user@host/database, or null for the journal file in the search's folder")
    return url


def database_name(url: str) -> str:
    """The host and the name of a database, without the user, the password and the arguments of its ``url``."""
    return printable(url.rpartition("@")[2].rpartition("://")[2].partition("?")[0])


class FileClaims:
    """The trials that this process works on, claimed by file locks, which the system releases when the process ends."""

    def __init__(self, folder: Path):
        self._folder = folder / ".search"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._held: dict[int, FileLock] = {}
        self._lock = FileLock(self._folder / "lock")

    def lock(self) -> FileLock:
        """Held while trials are read and proposed: two processes never propose the same trial."""
        return self._lock

    def claim(self, number: int) -> bool:
        """Claims a trial for this process; False if another process has it."""
        lock = FileLock(self._folder / f"trial-{number:04d}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._held[number] = lock
        return True

    def release(self, number: int) -> None:
        self._held.pop(number).release()


class DatabaseClaims:
    """Does what `FileClaims` does by PostgreSQL's advisory locks, which end with the connection of their process."""

    def __init__(self, url: str, name: str):
        import sqlalchemy

        self._text = sqlalchemy.text
        engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 10})
        self._connection = engine.connect()
        self._study = zlib.crc32(name.encode()) - 2**31  # a signed integer of 32 bits

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        self._call("pg_advisory_lock", -1)
        try:
            yield
        finally:
            self._call("pg_advisory_unlock", -1)

    def claim(self, number: int) -> bool:
        return bool(self._call("pg_try_advisory_lock", number))

    def release(self, number: int) -> None:
        self._call("pg_advisory_unlock", number)

    def _call(self, function: str, number: int) -> Any:
        statement = self._text(f"SELECT {function}(:study, :number)")
        return self._connection.execute(statement, {"study": self._study, "number": number}).scalar()
