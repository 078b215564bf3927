"""What a check found of samples, on disk, so that one that was killed goes on."""

import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, closing
from typing import NamedTuple

from torchtune_vl.datasets._size_cache import cache_directory, state_of
from torchtune_vl.media._errors import refusing

_TABLE = """CREATE TABLE IF NOT EXISTS samples (record BLOB PRIMARY KEY, found BLOB, files BLOB,
state BLOB) WITHOUT ROWID"""
_SECONDS_FOR_OTHERS = 60.0


class Kept(NamedTuple):
    """What is kept of a sample.

    Args:
        record: digest of its record.
        found: what was found, as bytes.
        files: the local files of its media.
        state: of these files, from :func:`state_of`, when they were looked at.
    """

    record: bytes
    found: bytes
    files: Sequence[str]
    state: bytes


class CheckCache:
    """What was found with the settings of one fingerprint, by the digests of records.

    It holds as long as the files of a sample's media are as they were. A ``ValueError`` if it
    cannot be used.
    """

    def __init__(self, fingerprint: str) -> None:
        path = cache_directory() / "checks" / f"{fingerprint}.sqlite"
        with _using():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_SECONDS_FOR_OTHERS)
            with self._database as database:
                database.execute(_TABLE)

    def __enter__(self) -> "CheckCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def find(self, records: Sequence[bytes]) -> dict[bytes, bytes]:
        """What was found of those of some records that are known and whose media are unchanged."""
        marks = ",".join("?" * len(records))
        query = f"SELECT * FROM samples WHERE record IN ({marks})"
        with _using(), closing(self._database.execute(query, records)) as rows:
            kept = [Kept(r, x, os.fsdecode(f).split("\0") if f else [], s) for r, x, f, s in rows]
        return {row.record: row.found for row in kept if state_of(row.files) == row.state}

    def add(self, kept: Iterable[Kept]) -> None:
        """Keep what was found of records."""
        rows = [(r, found, os.fsencode("\0".join(files)), s) for r, found, files, s in kept]
        with _using(), self._database as database:
            database.executemany("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?)", rows)


def _using() -> AbstractContextManager[None]:
    problem = f"what is checked cannot be kept in {cache_directory()}"
    remedy = "set TORCHTUNE_VL_CACHE to a directory that can be written"
    return refusing(problem, remedy, (OSError, sqlite3.Error))
