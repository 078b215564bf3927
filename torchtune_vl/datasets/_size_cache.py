"""Sizes of samples on disk, so that a second run does not measure what the first one did."""

import os
import sqlite3
import struct
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from torchtune_vl.media._errors import reason_of

_TABLE = """CREATE TABLE IF NOT EXISTS samples (record BLOB PRIMARY KEY, tokens INT, patches INT,
targets INT, media INT, lost_tokens INT, lost_images INT, lost_videos INT, files BLOB, state BLOB)
WITHOUT ROWID"""
_SECONDS_FOR_OTHERS = 60.0


class Measured(NamedTuple):
    """What was found of a sample.

    Args:
        counts: its tokens, patches, supervised tokens and media, and how many tokens, images and
            videos it loses because it is too long.
        files: the local files of its media.
        state: of these files, from :func:`state_of`; None if it must not be kept.
    """

    counts: tuple[int, ...]
    files: Sequence[str]
    state: bytes | None


def cache_directory() -> Path:
    """``$TORCHTUNE_VL_CACHE``, by default ``~/.cache/torchtune_vl``."""
    return Path(os.environ.get("TORCHTUNE_VL_CACHE", "~/.cache/torchtune_vl")).expanduser()


def state_of(files: Iterable[str]) -> bytes | None:
    """Size and time of writing of each file; None if one is not there."""
    try:
        found = [os.stat(file) for file in files]
    except (OSError, ValueError):
        return None
    return b"".join(struct.pack("<Qq", status.st_size, status.st_mtime_ns) for status in found)


class SizeCache:
    """What was measured with the settings of one fingerprint, by the digests of records.

    A sample counts as known as long as the files of its media are as they were. Several processes,
    also of other runs, may use a cache at a time. A ``ValueError`` if it cannot be used.
    """

    def __init__(self, fingerprint: str) -> None:
        path = cache_directory() / "sizes" / f"{fingerprint}.sqlite"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_SECONDS_FOR_OTHERS)
            with self._database as database:
                database.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(error) from error

    def __enter__(self) -> "SizeCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def find(self, records: Sequence[bytes]) -> dict[bytes, tuple[int, ...]]:
        """The counts of those of some records that are known and whose media are unchanged."""
        marks = ",".join("?" * len(records))
        query = f"SELECT * FROM samples WHERE record IN ({marks})"
        known = {}
        try:
            with closing(self._database.execute(query, records)) as rows:
                for record, *counts, files, state in rows:
                    paths = os.fsdecode(files).split("\0") if files else []
                    if state_of(paths) == state:
                        known[record] = tuple(counts)
        except sqlite3.Error as error:
            raise _unusable(error) from error
        return known

    def add(self, measured: Iterable[tuple[bytes, Measured]]) -> None:
        """Keep what was measured of records."""
        rows = [
            (record, *found.counts, os.fsencode("\0".join(found.files)), found.state)
            for record, found in measured
            if found.state is not None
        ]
        try:
            with self._database as database:
                marks = ",".join("?" * 10)
                database.executemany(f"INSERT OR REPLACE INTO samples VALUES ({marks})", rows)
        except sqlite3.Error as error:
            raise _unusable(error) from error


def _unusable(error: Exception) -> ValueError:
    where = f"the cache of sizes in {cache_directory()} cannot be used ({reason_of(error)})"
    return ValueError(f"{where}: set TORCHTUNE_VL_CACHE to a directory that can be written")
