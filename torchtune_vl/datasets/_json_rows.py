"""Rows of JSON and JSON Lines files: exact, of any shape, and read when they are asked for.

``datasets`` infers a type for each column from the beginning of the first file, and changes or
refuses what does not fit it. Here a row is what the file says.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numba
import numpy as np
from datasets.config import HF_DATASETS_CACHE

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_DECOMPRESS: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf": "7z",
}
# Of a row: which file it is in, where there and in which line it begins, its length in bytes
_PLACE = np.dtype([("file", "u4"), ("line", "u4"), ("start", "u8"), ("length", "u4")])
_LINE_BREAK, _QUOTE, _BACKSLASH, _COMMA = b'\n"\\,'
_BRACKET, _BRACKET_END, _BRACE, _BRACE_END = b"[]{}"


class JsonRows(Sequence[Any]):
    """The rows of JSON files, one after another.

    A file is an array, whose values are rows; JSON Lines, where every line that is not blank is
    one; or a single object. A row is read and parsed each time that it is asked for, so that only
    places are in memory, 20 bytes for each row, and it does not take longer for the last one than
    for the first. It can be pickled, and data workers share it.

    Args:
        files: in UTF-8, with or without byte order mark, perhaps compressed by gzip, bzip2 or xz;
            at least one.
        field: key of the array of rows, in files that are an object which has it.
        cache_dir: where compressed files are unpacked.

    Raises:
        ValueError: if a file cannot be read, has no rows, or its array does not end. From reading a
            row, if it is no JSON, has a key twice or a number that no float can hold, or if the
            file has changed. It tells file, line and column.
    """

    def __init__(
        self, files: Sequence[str], field: str | None = None, cache_dir: str = HF_DATASETS_CACHE
    ) -> None:
        self._names = list(files)
        self._paths: list[str] = []
        self._states: list[tuple[int, int]] = []
        tables = []
        for number, name in enumerate(self._names):
            try:
                path = _unpacked(name, cache_dir)
                self._states.append(_state(os.stat(path)))
                tables.append(_index(path, name, number, field))
            except OSError as error:
                raise ValueError(f"{name} cannot be read ({error.strerror})") from error
            self._paths.append(path)
        self._table = np.concatenate(tables)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        """Read a row."""
        number, line, start, length = self._table[index].tolist()
        name, path = self._names[number], self._paths[number]
        try:
            with open(path, "rb", buffering=0) as file:
                if _state(os.fstat(file.fileno())) != self._states[number]:
                    raise ValueError(f"{name} has changed since it was opened: start anew")
                # Not mapped: a file that someone shortens would end the process by a signal
                data = os.pread(file.fileno(), length, start)
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from error
        try:
            return _parsed(data)
        except _DamageError as damage:
            where = _where(path, name, start, line, start + damage.offset)
            raise ValueError(f"{where}: {damage}") from damage

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: "JsonRows") -> "JsonRows":
        """The rows of both."""
        table = other._table.copy()
        table["file"] += len(self._names)
        return self._with(
            _names=self._names + other._names,
            _paths=self._paths + other._paths,
            _states=self._states + other._states,
            _table=np.concatenate([self._table, table]),
        )

    def select(self, indices: Sequence[int]) -> "JsonRows":
        """Choose rows, without reading them."""
        return self._with(_table=self._table[np.asarray(indices, np.int64)])

    def skip(self, count: int) -> "JsonRows":
        """Leave out rows at the beginning, without reading them."""
        return self._with(_table=self._table[count:])

    def _with(self, **attributes: Any) -> "JsonRows":
        rows = object.__new__(JsonRows)
        rows.__dict__ = {**self.__dict__, **attributes}
        return rows

    def place(self, index: int) -> str:
        """File and line of a row, such as ``data/train.jsonl, line 7``."""
        number, line, _, _ = self._table[index].tolist()
        return f"{self._names[number]}, line {line}"


class _DamageError(ValueError):
    """Why bytes are no row, and after how many of them that shows."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def _parsed(data: bytes) -> Any:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"the byte 0x{data[error.start]:02x} is no UTF-8: save the file as UTF-8"
        raise _DamageError(problem, error.start) from error
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _DamageError(
            f"this is no JSON ({error.msg}): correct it, each row an object on a line of its own "
            "or in one array",
            len(text[: error.pos].encode("utf-8")),
        ) from error
    except RecursionError as error:
        raise _DamageError("this is nested too deeply: make it flatter", 0) from error
    except ValueError as error:  # of the functions below, or of an integer's thousands of digits
        raise _DamageError(str(error), 0) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice[:200]!r} twice: remove one of them")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large for a float: write a smaller one")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite)


def _where(path: str, name: str, start: int, line: int, offset: int) -> str:
    """Line and column of an offset in a file, where that of another one before it is known."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        line += data[start:offset].count(b"\n")
        begin = data.rfind(b"\n", 0, offset) + 1
        column = len(data[begin:offset].decode("utf-8-sig", "replace")) + 1
    return f"{name}, line {line}, column {column}"


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _unpacked(name: str, cache_dir: str) -> str:
    """The file itself, or where its content lies unpacked."""
    if os.path.exists(name) and not os.path.isfile(name):
        raise ValueError(f"{name} is no file: name the files that it has, such as {name}/*.jsonl")
    with open(name, "rb") as file:
        head = file.read(8)
    for magic, kind in _ARCHIVES.items():
        if head.startswith(magic):
            raise ValueError(f"{name} is compressed as {kind}: unpack it, or compress it by gzip")
    for magic, opened in _DECOMPRESS.items():
        if head.startswith(magic):
            return _unpack(name, opened, Path(cache_dir))
    return name


def _unpack(name: str, opened: Callable[[str], Any], cache_dir: Path) -> str:
    key = repr((os.path.realpath(name), *_state(os.stat(name))))
    target = cache_dir / f"unpacked-{hashlib.sha256(key.encode()).hexdigest()}.json"
    if target.exists():
        return str(target)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=cache_dir, delete=False) as partial:
        try:
            with opened(name) as source:
                shutil.copyfileobj(source, partial)
            partial.close()
            os.replace(partial.name, target)  # perhaps after another process, by the same content
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            os.unlink(partial.name)
            raise ValueError(f"{name} cannot be unpacked ({error}): write it again") from error
    return str(target)


def _index(path: str, name: str, number: int, field: str | None) -> np.ndarray:
    """Find the places of the rows of a file."""
    if not os.stat(path).st_size:
        raise ValueError(f"{name} is empty (0 bytes): write it again, or leave it out")
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    if data[:2].tobytes() in _UTF16:
        raise ValueError(f"{name} is in UTF-16: save it as UTF-8")
    rows = _rows(data, path, name, field)
    if not len(rows):
        raise ValueError(f"{name} has no rows: write it again, or leave it out")
    table = np.empty(len(rows), _PLACE)
    table["file"] = number
    table["line"], table["start"], table["length"] = rows[:, 2], rows[:, 0], rows[:, 1] - rows[:, 0]
    return table


def _rows(data: np.ndarray, path: str, name: str, field: str | None) -> np.ndarray:
    """Start, stop and line of each row of a file."""
    lines = _lines(data, len(_BOM) if data[:3].tobytes() == _BOM else 0)
    if not len(lines) or data[lines[0, 0]] not in (_BRACKET, _BRACE):
        return lines
    start, stop, line = lines[0].tolist()
    values, end = _values(data, start, line)
    is_whole = end > 0 and _after_space(data, end) == len(data)
    if field is not None:
        return _of_field(data, values if is_whole else values[:0], name, field)
    if data[start] == _BRACE:
        is_pretty = is_whole and end > stop
        return np.array([[start, end, line]]) if is_pretty else lines
    if is_whole:
        return values
    if end == stop:
        return lines  # each of them an array
    for start, stop, line in values.tolist():
        try:
            _parsed(data[start:stop].tobytes())
        except _DamageError as damage:
            where = _where(path, name, start, line, start + damage.offset)
            raise ValueError(f"{where}: {damage}") from damage
    if end > 0:
        where = _where(path, name, start, line, _after_space(data, end))
        raise ValueError(f"{where}: the array has ended, but the file goes on: remove the rest")
    raise ValueError(f"{name} ends within its array: it is cut off; write it again")


def _of_field(data: np.ndarray, entries: np.ndarray, name: str, field: str) -> np.ndarray:
    """The rows that an object, of which these are the entries, has under a key."""
    keys, found = [], []
    for start, stop, line in entries.tolist():
        text = data[start : min(stop, start + 10_000)].tobytes().decode("utf-8", "ignore")
        try:
            key, length = _DECODER.raw_decode(text)
        except ValueError:
            continue  # the array of rows is found all the same
        keys.append(key)
        if key == field:
            colon = _after_space(data, start + len(text[:length].encode("utf-8")))
            begin = _after_space(data, colon + 1)
            found.append((begin, line + np.count_nonzero(data[start:begin] == _LINE_BREAK)))
    if len(found) != 1 or data[found[0][0]] != _BRACKET:
        raise ValueError(
            f"{name} is no object that has a list of rows under {field!r}, once; its keys are "
            f"{keys[:20]}: name another field, or none"
        )
    return _values(data, *found[0])[0]


@numba.njit(nogil=True, cache=True)
def _is_space(byte):  # type: ignore[no-untyped-def]
    return byte == 32 or 9 <= byte <= 10 or byte == 13


@numba.njit(nogil=True, cache=True)
def _after_space(data, start):  # type: ignore[no-untyped-def]
    while start < len(data) and _is_space(data[start]):
        start += 1
    return start


@numba.njit(nogil=True, cache=True)
def _appended(rows, count, start, stop, line):  # type: ignore[no-untyped-def]
    if count == len(rows):
        rows = np.concatenate((rows, np.empty_like(rows)))
    rows[count, 0], rows[count, 1], rows[count, 2] = start, stop, line
    return rows


@numba.njit(nogil=True, cache=True)
def _lines(data, begin):  # type: ignore[no-untyped-def]
    """Start, stop and number of the lines that are not blank, without space around them."""
    rows, count, line = np.empty((1024, 3), np.int64), 0, 1
    start = stop = -1
    for i in range(begin, len(data) + 1):
        if i == len(data) or data[i] == _LINE_BREAK:
            if start >= 0:
                rows = _appended(rows, count, start, stop, line)
                count += 1
            start = -1
            line += 1
        elif not _is_space(data[i]):
            if start < 0:
                start = i
            stop = i + 1
    return rows[:count]


@numba.njit(nogil=True, cache=True)
def _values(data, begin, line):  # type: ignore[no-untyped-def]
    """Start, stop and line of what an array or object holds, and where it ends, -1 if nowhere.

    Only strings, brackets and commas are looked at: a value may turn out to be none.
    """
    rows, count = np.empty((1024, 3), np.int64), 0
    depth, is_string, is_escaped = 0, False, False
    start, stop, start_line = -1, -1, line
    for i in range(begin, len(data)):
        byte = data[i]
        if byte == _LINE_BREAK:
            line += 1
        if is_string:
            stop = i + 1
            if is_escaped:
                is_escaped = False
            elif byte == _BACKSLASH:
                is_escaped = True
            elif byte == _QUOTE:
                is_string = False
            continue
        is_end = byte in (_BRACKET_END, _BRACE_END)
        if depth == 1 and (is_end or byte == _COMMA):
            is_empty = start < 0
            if is_empty:
                start, stop, start_line = i, i, line
            if not (is_end and is_empty and count == 0):
                rows = _appended(rows, count, start, stop, start_line)
                count += 1
            start = -1
            if is_end:
                is_its_own = byte == data[begin] + 2  # in ASCII
                return rows[:count], i + 1 if is_its_own else -1
            continue
        if depth > 0 and not _is_space(byte):
            if start < 0:
                start, start_line = i, line
            stop = i + 1
        if byte == _QUOTE:
            is_string = True
        elif byte in (_BRACKET, _BRACE):
            depth += 1
        elif is_end:
            depth -= 1
    if start >= 0:
        rows = _appended(rows, count, start, stop, start_line)
        count += 1
    return rows[:count], -1
