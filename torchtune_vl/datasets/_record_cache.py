"""What was found of records, on disk, so that nobody looks for it twice."""

import os
import sqlite3
import struct
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import NamedTuple

from torchtune_vl.media._errors import refusing

_TABLE = """CREATE TABLE IF NOT EXISTS samples (record BLOB PRIMARY KEY, found BLOB, files BLOB,
state BLOB) WITHOUT ROWID"""
_SECONDS_FOR_OTHERS = 60.0


class Kept(NamedTuple):
    """What is kept of a record.

    Args:
        record: its digest.
        found: what was found, as bytes.
        files: the local files of its media.
        state: of these files, from :func:`state_of`, before they were looked at.
    """

    record: bytes
    found: bytes
    files: Sequence[str]
    state: bytes


def cache_directory() -> Path:
    """``$TORCHTUNE_VL_CACHE``, by default ``~/.cache/torchtune_vl``."""
    return _named_directory().expanduser()


def _named_directory() -> Path:
    return Path(os.environ.get("TORCHTUNE_VL_CACHE", "~/.cache/torchtune_vl"))


def state_of(files: Iterable[str]) -> bytes | None:
    """Size and time of writing of each file; None if one is not there."""
    try:
        found = [os.stat(file) for file in files]
    except (OSError, ValueError):
        return None
    return b"".join(struct.pack("<Qq", status.st_size, status.st_mtime_ns) for status in found)


class RecordCache:
    """What was found in one way, which is a directory, with the settings of one fingerprint.

    It holds as long as the files of a record's media are as they were. Several processes, also of
    other runs, may use a cache at a time. A ``ValueError`` if it cannot be used.
    """

    def __init__(self, way: str, fingerprint: str) -> None:
        with _using():
            path = cache_directory() / way / f"{fingerprint}.sqlite"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_SECONDS_FOR_OTHERS)
            with self._database as database:
                database.execute(_TABLE)

    def __enter__(self) -> "RecordCache":
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
    remedy = "set TORCHTUNE_VL_CACHE to a directory that can be written"
    # RuntimeError: there is no home
    kinds = (OSError, RuntimeError, sqlite3.Error)
    return refusing(f"the cache in {_named_directory()} cannot be used", remedy, kinds)
