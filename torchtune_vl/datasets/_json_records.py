"""Records of JSON and JSON Lines files: exact, of any shape, and read when they are asked for."""

import bz2
import gzip
import hashlib
import json
import lzma
import math
import mmap
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import numba
import numpy as np
from datasets.config import HF_DATASETS_CACHE

_BOM = b"\xef\xbb\xbf"
# What no file in UTF-8 begins with, but those in UTF-16, and archives
_NO_TEXT = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\xf5-\xff]")
_LINE = re.compile(rb"[^ \t\r\n](?:[^\n]*[^ \t\r\n])?")
_KEY = re.compile(rb'("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*', re.DOTALL)
_OPENERS: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_PLACE = np.dtype([("file", "u4"), ("line", "u4"), ("start", "u8"), ("length", "u4")])
_LINE_BREAK, _QUOTE, _BACKSLASH, _COMMA = b'\n"\\,'
_BRACKET, _BRACKET_END, _BRACE, _BRACE_END = b"[]{}"


class JsonRecords(Sequence[Any]):
    """The records of JSON files, one after another, each what the file says.

    A file is an array, whose values are records; JSON Lines, where every line that is not blank is
    one; a single object; or with ``field`` an object that has the array under this key. It is in
    UTF-8, perhaps with a byte order mark, perhaps compressed by gzip, bzip2 or xz. ``datasets``
    would infer types from the beginning, and change or refuse what does not fit them.

    Only places are in memory, 20 bytes for each record, which data workers share. What is wrong is
    a ValueError that tells file, line and column.
    """

    def __init__(
        self, files: Sequence[str], field: str | None = None, cache_dir: str = HF_DATASETS_CACHE
    ) -> None:
        self._files: list[_File] = []
        tables = []
        for number, name in enumerate(files):
            try:
                path = _unpacked(name, cache_dir)
                self._files.append(_File(name, path, _state(os.stat(path))))
                places = _places(self._files[-1], field)
            except OSError as error:
                raise ValueError(f"{name} cannot be read ({error.strerror})") from error
            if not len(places):
                raise ValueError(f"{name} has no records: write it again, or leave it out")
            start, stop, line = places.T
            columns = [np.full(len(places), number), line, start, stop - start]
            tables.append(np.rec.fromarrays(columns, _PLACE))
        self._table = np.concatenate(tables)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        """Read a record, or choose the records of a slice without reading them."""
        if isinstance(index, slice):
            part = copy(self)
            part._table = self._table[index]
            return part
        number, line, start, length = self._table[index].tolist()
        file = self._files[number]
        with open(file.path, "rb", buffering=0) as opened:
            if _state(os.fstat(opened.fileno())) != file.state:
                raise ValueError(f"{file.name} has changed since it was opened: start anew")
            # Not mapped: a file that someone shortens would end the process by a signal
            return file.parse(os.pread(opened.fileno(), length, start), start, line)

    def __add__(self, other: "JsonRecords") -> "JsonRecords":
        table = other._table.copy()
        table["file"] += len(self._files)
        both = copy(self)
        both._table = np.concatenate([self._table, table])
        both._files = self._files + other._files
        return both

    def skip(self, count: int) -> "JsonRecords":
        return self[count:]

    def place(self, index: int) -> str:
        """File and line of a record, such as ``data/train.jsonl, line 7``."""
        number, line, _, _ = self._table[index].tolist()
        return f"{self._files[number].name}, line {line}"


class _File(NamedTuple):
    name: str
    path: str  # of its content, perhaps unpacked
    state: tuple[int, int]

    def parse(self, data: bytes, start: int, line: int) -> Any:
        """Parse a record that starts at a place."""
        offset = 0
        try:
            return _DECODER.decode(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            offset = error.start
            problem = f"the byte 0x{data[offset]:02x} is no UTF-8: save the file as UTF-8"
        except json.JSONDecodeError as error:
            offset = len(error.doc[: error.pos].encode("utf-8"))
            problem = f"this is no JSON ({error.msg}): correct it, each record an object on a line "
            problem += "of its own or in one array"
        except RecursionError:
            problem = "this is nested too deeply: make it flatter"
        except ValueError as error:  # of the functions below, or an integer's thousands of digits
            problem = str(error)
        raise self.error(problem, start, line, start + offset)

    def error(self, problem: str, start: int, line: int, stop: int) -> ValueError:
        """Tell line and column of what is behind a place whose line is known."""
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        line += data[start:stop].count(b"\n")
        begin = data.rfind(b"\n", 0, stop) + 1
        column = len(data[begin:stop].decode("utf-8-sig", "replace")) + 1
        return ValueError(f"{self.name}, line {line}, column {column}: {problem}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key {twice[:200]!r} twice: remove one of them")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large for a float: write a smaller one")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite)


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _unpacked(name: str, cache_dir: str) -> str:
    """The file itself, or where its content lies unpacked."""
    if os.path.exists(name) and not os.path.isfile(name):
        raise ValueError(f"{name} is no file: name the files that it has, such as {name}/*.jsonl")
    with open(name, "rb") as file:
        head = file.read(8)
        key = repr((os.path.realpath(name), *_state(os.fstat(file.fileno()))))
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
    if opener is None:
        return name
    target = Path(cache_dir, f"unpacked-{hashlib.sha256(key.encode()).hexdigest()}.json")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=cache_dir, delete=False) as partial:
            try:
                with opener(name) as source:
                    shutil.copyfileobj(source, partial)
                partial.close()
                os.replace(partial.name, target)  # perhaps another process's, of the same content
            except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
                os.unlink(partial.name)
                raise ValueError(f"{name} cannot be unpacked ({error}): write it again") from error
    return str(target)


def _places(file: _File, field: str | None) -> np.ndarray:
    """Start, stop and line of each record of a file."""
    if not file.state[0]:  # which cannot be mapped
        return np.empty((0, 3), np.int64)
    with open(file.path, "rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if _NO_TEXT.search(data[:6]):
        raise ValueError(
            f"{file.name} is no text in UTF-8, plain or compressed by gzip, bzip2 or xz: unpack "
            "it, or save it as UTF-8"
        )
    start, stop_of_line, line = next(_lines(data), (0, 0, 0))
    values, end = np.empty((0, 3), np.int64), -1
    if data[start] in (_BRACKET, _BRACE):
        values, end = _values(np.frombuffer(data, np.uint8), start + 1, line)
    is_whole = end > 0 and not _LINE.search(data, end)
    if field is not None:
        return _of_field(data, values if is_whole else values[:0], file.name, field)
    is_array = data[start] == _BRACKET
    if is_array and is_whole:
        return values
    if is_whole and end > stop_of_line:
        return np.array([[start, end, line]])
    if not is_array or end == stop_of_line:  # or each line is an array
        return np.fromiter(_lines(data), np.dtype((np.int64, 3)))
    for start_of_value, stop, line_of_value in values.tolist():
        file.parse(data[start_of_value:stop], start_of_value, line_of_value)
    problem = "the array ends here, but the file goes on: remove the rest"
    if end < 0:
        problem = "the file ends within its array: it is cut off; write it again"
    raise file.error(problem, start, line, end if end > 0 else len(data))


def _of_field(data: mmap.mmap, entries: np.ndarray, name: str, field: str) -> np.ndarray:
    """The records that an object, of which these are the entries, has under a key."""
    keys, found = [], []
    for start, stop, line in entries.tolist():
        if entry := _KEY.match(data, start, stop):
            with suppress(ValueError):  # of another key
                keys.append(json.loads(entry[1]))
                if keys[-1] == field:
                    found.append((entry.end() + 1, line + entry[0].count(b"\n")))
    if len(found) != 1 or data[found[0][0] - 1] != _BRACKET:
        raise ValueError(
            f"{name} is no object that has a list of records under {field!r}, once; its keys are "
            f"{keys[:20]}: name another field, or none"
        )
    return _values(np.frombuffer(data, np.uint8), *found[0])[0]


def _lines(data: mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """Start, stop and number of each line that is not blank."""
    line, seen = 1, 0
    for found in _LINE.finditer(data, len(_BOM) if data[:3] == _BOM else 0):
        start, stop = found.span()
        line += data[seen:start].count(b"\n")
        yield start, stop, line
        seen = stop


@numba.njit(nogil=True, cache=True)
def _values(data, begin, line):  # type: ignore[no-untyped-def]
    """Start, stop and line of the values behind a bracket, and where this ends, -1 if nowhere.

    Only strings, brackets and commas are looked at: a value may turn out to be none.
    """
    places, count = np.empty((1024, 3), np.int64), 0
    depth, is_string, is_escaped = 0, False, False
    start = stop = start_line = -1
    for i in range(begin, len(data) + 1):
        at_end = i == len(data)
        byte = 0 if at_end else data[i]
        is_closing = byte in (_BRACKET_END, _BRACE_END)
        if at_end or (depth == 0 and not is_string and (byte == _COMMA or is_closing)):
            if start < 0 and not (at_end or (is_closing and count == 0)):
                start, stop, start_line = i, i, line  # no value: an error when it is read
            if start >= 0:
                if count == len(places):
                    places = np.concatenate((places, np.empty_like(places)))
                places[count, 0], places[count, 1], places[count, 2] = start, stop, start_line
                count += 1
            start = -1
            if is_closing:
                return places[:count], i + 1 if byte == data[begin - 1] + 2 else -1  # in ASCII
        elif is_string:
            stop = i + 1
            is_string = is_escaped or byte != _QUOTE
            is_escaped = byte == _BACKSLASH and not is_escaped
        elif not (byte == 32 or 9 <= byte <= 10 or byte == 13):
            if start < 0:
                start, start_line = i, line
            stop = i + 1
            is_string = byte == _QUOTE
            depth += byte in (_BRACKET, _BRACE)
            depth -= is_closing
        if byte == _LINE_BREAK:
            line += 1
    return places[:count], -1
