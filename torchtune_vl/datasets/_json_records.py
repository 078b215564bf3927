"""Records of JSON and JSON Lines files: exact, of any shape, and read when they are asked for."""

import bz2
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import xxhash
from datasets.config import HF_DATASETS_CACHE

from torchtune_vl.media._errors import refusing

_BOM = b"\xef\xbb\xbf"
# Of JSON that is known to be right, decoded as Latin-1
_ARRAY = re.compile(r"(?:\xef\xbb\xbf)?\s*\[")
_KEY = re.compile(r'(?:\xef\xbb\xbf)?\s*[{,]\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_VALUE = re.compile(r"[^\s,]")
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_PLACE = np.dtype([("file", "u4"), ("line", "u4"), ("start", "u8"), ("length", "u4")])


class JsonRecords(Sequence[tuple[Any, str]]):
    """The records of JSON files, one after another, each what the file says.

    A file is an array, whose values are records; JSON Lines, where every line that is not blank is
    one; a single object; or with ``field`` an object that has the array under this key. It is in
    UTF-8, perhaps with a byte order mark, perhaps compressed by gzip, bzip2 or xz. ``datasets``
    would infer types from the beginning, and change or refuse what does not fit them.

    Only places are in memory, 20 bytes for each record, which data workers share; to find those of
    an array takes all of it for a moment. What is wrong is a ValueError that tells file and line.
    """

    def __init__(
        self, files: Sequence[str], field: str | None = None, cache_dir: str = HF_DATASETS_CACHE
    ) -> None:
        # The name, the path of the content, perhaps unpacked, and its state
        self._files: list[tuple[str, str, tuple[int, int]]] = []
        tables = []
        for number, name in enumerate(files):
            try:
                path = _unpacked(name, cache_dir)
                with open(path, "rb") as file:
                    self._files.append((name, path, _state(file.fileno())))
                    places = ((number, *place) for place in _places(file, name, field))
                    tables.append(np.fromiter(places, _PLACE))
            except OSError as error:
                raise ValueError(f"{name} cannot be read ({error.strerror})") from error
            if not len(tables[-1]):
                raise ValueError(f"{name} has no records: write it again, or leave it out")
        self._table = np.concatenate(tables)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> tuple[Any, str]:  # type: ignore[override]
        """Read a record, and tell where it is, such as ``data/train.jsonl, line 7``."""
        (data,) = self._read([index])
        number, line, *_ = self._table[index].tolist()
        name, *_ = self._files[number]
        return _parse(data, name, line), f"{name}, line {line}"

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        """Tell records from others by 16 bytes of what the file says."""
        return [xxhash.xxh3_128_digest(data) for data in self._read(indices)]

    def lines(self, indices: Sequence[int]) -> list[bytes]:
        """What the files say of records, byte for byte but for line breaks, which are spaces."""
        whole = (data.removeprefix(_BOM) for data in self._read(indices))
        return [data.replace(b"\r", b" ").replace(b"\n", b" ") for data in whole]

    def _read(self, indices: Sequence[int]) -> Iterator[bytes]:
        places = (self._table[index].tolist() for index in indices)
        for number, of_file in groupby(places, key=itemgetter(0)):
            name, path, state = self._files[number]
            with open(path, "rb", buffering=0) as file:
                if _state(file.fileno()) != state:
                    raise ValueError(f"{name} has changed since it was opened: start anew")
                for _, _, start, length in of_file:
                    yield os.pread(file.fileno(), length, start)


def _state(fileno: int) -> tuple[int, int]:
    status = os.fstat(fileno)
    return status.st_size, status.st_mtime_ns


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
# What else is wrong with a record is told with its line when it is read
_GRAMMAR = json.JSONDecoder(parse_int=float)


def _parse(data: bytes, name: str, line: int, decoder: json.JSONDecoder = _DECODER) -> Any:
    """Parse what begins in a line of a file."""
    column = 0
    try:
        return decoder.decode(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        *lines, last = error.object[: error.start].decode("utf-8").split("\n")
        line, column = line + len(lines), len(last) + 1
        byte = error.object[error.start]
        problem = f"the byte 0x{byte:02x} is no UTF-8: save the file as UTF-8"
    except json.JSONDecodeError as error:
        line, column = line + error.lineno - 1, error.colno
        problem = f"this is no JSON ({error.msg}): write objects, one a line or all in one array"
    except RecursionError:
        problem = "this is nested too deeply: make it flatter"
    except ValueError as error:  # of the functions above, or an integer's thousands of digits
        problem = str(error)
    place = f"{name}, line {line}" + (f", column {column}" if column else "")
    raise ValueError(f"{place}: {problem}")


def _unpacked(name: str, cache_dir: str) -> str:
    """The file itself, or where its content lies unpacked."""
    if os.path.exists(name) and not os.path.isfile(name):
        raise ValueError(f"{name} is no file: name the files that it has, such as {name}/*.jsonl")
    with open(name, "rb") as file:
        head = file.read(8)
        key = repr((os.path.realpath(name), *_state(file.fileno())))
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
    if opener is None:
        return name
    target = Path(cache_dir, f"unpacked-{hashlib.sha256(key.encode()).hexdigest()}.json")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        kinds = (EOFError, lzma.LZMAError, zlib.error, OSError)
        problem = f"{name} cannot be unpacked"
        with refusing(problem, "write it again", kinds), TemporaryDirectory(dir=cache_dir) as own:
            partial = Path(own, target.name)
            with opener(name) as source, open(partial, "wb") as unpacked:
                shutil.copyfileobj(source, unpacked)
            partial.replace(target)  # perhaps another process's, of the same content
    return str(target)


def _places(file: BinaryIO, name: str, field: str | None) -> Iterator[tuple[int, int, int]]:
    """Line, start and length of each record of a file."""
    lines = [*islice(_lines(file), 2)]
    if not lines:
        return
    if field is None and len(lines) == 2:
        _, start, length = lines[0]
        with suppress(ValueError):  # or else a larger value goes on in the next line
            _parse(os.pread(file.fileno(), length, start), name, 1, _GRAMMAR)
            yield from _lines(file)
            return
    file.seek(0)
    content = file.read()
    _parse(content, name, 1, _GRAMMAR)
    text = content.decode("latin-1")  # one character for each byte; JSON's own are ASCII
    array = _ARRAY.match(text)
    if field is not None:
        stop = _begin_of_field(text, name, field)
    elif array:
        stop = array.end()
    else:
        yield 1, 0, len(content)
        return
    line, seen = 1, 0
    while (begin := _VALUE.search(text, stop)) and begin[0] != "]":
        start = begin.start()
        line += text.count("\n", seen, start)
        seen = start
        _, stop = _GRAMMAR.raw_decode(text, start)
        yield line, start, stop - start


def _begin_of_field(text: str, name: str, field: str) -> int:
    """Where the values begin of the array that an object has under a key."""
    keys, begins, stop = [], [], 0
    while entry := _KEY.match(text, stop):
        keys.append(json.loads(entry[1].encode("latin-1")))
        if keys[-1] == field:
            begins.append(entry.end())
        _, stop = _GRAMMAR.raw_decode(text, entry.end())
    if len(begins) != 1 or text[begins[0]] != "[":
        problem = f"{name} is no object that has a list of records under {field!r}, once"
        raise ValueError(f"{problem}; its keys are {keys[:20]}: name another field, or none")
    return begins[0] + 1


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """The same of each line that is not blank."""
    start = file.seek(0)
    for number, line in enumerate(file, 1):
        value = line.rstrip(b" \t\r\n")
        if value.removeprefix(_BOM):
            yield number, start, len(value)
        start += len(line)
