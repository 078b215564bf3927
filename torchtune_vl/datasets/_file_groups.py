"""Records of files with one name: a medium, and beside it what is said of it."""

import logging
import os
import posixpath
import tarfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import xxhash
from fsspec.core import url_to_fs

from torchtune_vl.datasets._json_records import _parse, _state
from torchtune_vl.datasets._record_formats import FileRecord, MediaDirectory
from torchtune_vl.datasets._remote import NamedBytes
from torchtune_vl.media._errors import refusing
from torchtune_vl.media._sources import SUFFIXES

_KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
# Which Pillow reads with a plug-in
_KINDS |= {".heic": "image", ".heif": "image", ".json": "json", ".txt": "txt"}
# Of a tar, behind whose files is at least one block of zeros
_BLOCK, _LONGEST_END = 512, 2**20
_log = logging.getLogger(__name__)


class _File(NamedTuple):
    """A file in one of several directories or tars, and where its content lies in a tar."""

    root: int
    name: str
    start: int = 0
    length: int = 0


class _Names(Sequence[str]):
    """Names in one piece of memory, which data workers share."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.array([0, *accumulate(map(len, encoded))], np.int64)
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        start, end = self._ends[index : index + 2].tolist()
        return self._text[start:end].decode("utf-8", "surrogateescape")


class _FileGroups(Sequence[tuple[Any, str]]):
    """Records of files, those with one name together.

    A record is what the ``.json`` of this name says, with the text of its ``.txt`` as ``text``,
    without line breaks at its end. An image or video of this name is the record's ``image`` or
    ``video``, if it does not name its media itself. Other and hidden files are left out, and how
    many there are is logged.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = roots
        groups: dict[tuple[int, str], list[_File]] = {}
        others: Counter[str] = Counter()
        for number, root in enumerate(roots):
            before = len(groups)
            for file in self._files(number):
                suffix = posixpath.splitext(file.name)[1].lower()
                if suffix in _KINDS and "/." not in f"/{file.name}":
                    groups.setdefault((number, self._stem(file.name)), []).append(file)
                else:
                    others[suffix] += 1
            if len(groups) == before:
                raise ValueError(f"{root} has no images, videos, .json or .txt: name another")
        if others:
            told = ", ".join(f"{count:,} {suffix or 'others'}" for suffix, count in others.items())
            _log.info(f"hidden files, and other than media, .json and .txt, are left out: {told}")
        files = [file for group in groups.values() for file in group]
        self._ends = np.array([0, *accumulate(map(len, groups.values()))], np.int64)
        self._names = _Names(file.name for file in files)
        self._places = np.array([(f.root, f.start, f.length) for f in files], np.int64)

    @abstractmethod
    def _files(self, root: int) -> Iterator[_File]:
        """All files of a directory or tar, by its number."""

    @abstractmethod
    def _stem(self, name: str) -> str:
        """What the names of a record's files have in common."""

    @abstractmethod
    def _read(self, number: int) -> bytes:
        """The content of a file, by its number."""

    @abstractmethod
    def _medium(self, number: int) -> Any:
        """A file as a source of media."""

    def _media(self, number: int) -> MediaDirectory | None:
        """Where media are that the record of a file names; None: where those of the dataset are."""
        return None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Any, str]:  # type: ignore[override]
        files = self._group(index)
        name, (root, *_) = self._names[files[0]], self._places[files[0]].tolist()
        place = f"{self._roots[root]}, {self._stem(name)}"
        of_kind: dict[str, list[int]] = {"json": [], "txt": [], "image": [], "video": []}
        for file in files:
            of_kind[_kind(self._names[file])].append(file)
        jsons, texts = of_kind.pop("json"), of_kind.pop("txt")
        if len(jsons) > 1 or len(texts) > 1 or not (jsons or texts):
            found = ", ".join(self._names[file] for file in files)
            raise ValueError(f"{place}: of {found}, one has to be a .json or a .txt, or one each")
        record = self._record(jsons, texts)
        beside = {kind: [*map(self._medium, found)] for kind, found in of_kind.items() if found}
        return FileRecord(record, beside, self._media((jsons or texts)[0])), place

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        """Digest what the files say of each record, with the names of its media."""
        return [xxhash.xxh3_128_digest(b"\0".join(self._raw(index))) for index in indices]

    def _raw(self, index: int) -> Iterator[bytes]:
        for number in self._group(index):
            name = self._names[number]
            yield name.encode("utf-8", "surrogateescape")
            if _kind(name) in ("json", "txt"):
                yield self._read(number)

    def _group(self, index: int) -> range:
        index = range(len(self))[index]
        start, end = self._ends[index : index + 2].tolist()
        return range(start, end)

    def _record(self, jsons: Sequence[int], texts: Sequence[int]) -> Any:
        record: Any = {}
        for number in jsons:
            record = _parse(self._read(number), self._names[number], 1)
            if not isinstance(record, Mapping | list):
                raise ValueError(f"{self._names[number]} is no object and no list of messages")
            record = {"messages": record} if isinstance(record, list) else record
        for number in texts:
            name = self._names[number]
            with refusing(f"{name} is no text", "save it as UTF-8", UnicodeDecodeError):
                text = self._read(number).decode("utf-8-sig").rstrip("\r\n")
            if "text" in record:
                raise ValueError(f"{name} is the text of a record that has one: remove one of them")
            record = {**record, "text": text}
        return record


def _kind(name: str) -> str:
    return _KINDS[posixpath.splitext(name)[1].lower()]


class FolderRecords(_FileGroups):
    """The records of directories, also of those in them, in the order of names.

    Files of one record differ in their suffix: ``a.b.jpg`` and ``a.b.txt``. A directory is local,
    or one of fsspec, whose options are ``storage_options``.
    """

    def __init__(self, roots: Sequence[str], storage_options: Mapping[str, Any]) -> None:
        self._options = dict(storage_options)
        super().__init__(roots)

    def _files(self, root: int) -> Iterator[_File]:
        fs, path = url_to_fs(self._roots[root], **self._options)
        if not fs.isdir(path):
            raise ValueError(f"{self._roots[root]} is no directory: name one in data_files")
        yield from sorted(_File(root, posixpath.relpath(file, path)) for file in fs.find(path))

    def _stem(self, name: str) -> str:
        return posixpath.splitext(name)[0]

    def _read(self, number: int) -> bytes:
        with refusing(f"{self._medium(number)} cannot be read", "correct or remove it"):
            fs, root = url_to_fs(self._roots[self._places[number, 0]], **self._options)
            return fs.cat_file(posixpath.join(root, self._names[number]))

    def _medium(self, number: int) -> str:
        root = self._roots[self._places[number, 0]]
        return posixpath.join(root, self._names[number])


class TarRecords(_FileGroups):
    """The records of tars as WebDataset has them, read where they lie.

    Files of one record are the same up to the first dot of their names behind the last slash,
    ``000.left.jpg`` and ``000.json``. Media that a record names are files of its tar, by their
    whole name or by the one that they have in the directory of the record.

    In memory are the names and places of the files, which data workers share. A tar that is cut off
    or compressed, or has a name twice, is a ValueError, and so is one that changes.
    """

    def __init__(self, tars: Sequence[str]) -> None:
        self._states: list[tuple[int, int]] = []
        super().__init__(tars)
        hashes = [self._hash(root, self._names[n]) for n, (root, *_) in enumerate(self._places)]
        self._by_hash = np.argsort(np.array(hashes, np.uint64))
        self._hashes = np.array(hashes, np.uint64)[self._by_hash]

    def _files(self, root: int) -> Iterator[_File]:
        path, seen, others = self._roots[root], set[str](), 0
        remedy = "write it again, and do not compress it: its media are"
        with (
            refusing(f"{path} cannot be read as a tar", remedy, (tarfile.TarError, OSError)),
            open(path, "rb") as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            self._states.append(_state(file.fileno()))
            for member in tar:
                tar.members = []  # type: ignore[attr-defined] # which it would keep
                name = posixpath.normpath(member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    others += 1
                    continue
                if name in seen:
                    raise ValueError(f"{path} has {name!r} twice: write it again without one")
                seen.add(name)
                yield _File(root, name, member.offset_data, member.size)
            end = os.pread(file.fileno(), _LONGEST_END, tar.offset)
            if len(end) < _BLOCK or any(end):
                raise ValueError(f"{path} is cut off or damaged at {tar.offset:,}: write it again")
        if others:
            _log.info(f"{path}: {others:,} links and other entries without content are left out")

    def _stem(self, name: str) -> str:
        directory, base = posixpath.split(name)
        return posixpath.join(directory, base.split(".")[0])

    def _read(self, number: int) -> bytes:
        root, start, length = self._places[number].tolist()
        path = self._roots[root]
        with open(path, "rb", buffering=0) as file:
            if _state(file.fileno()) != self._states[root]:
                raise ValueError(f"{path} has changed since it was opened: start anew")
            return os.pread(file.fileno(), length, start)

    def _medium(self, number: int) -> NamedBytes:
        return NamedBytes(self._read(number), self._names[number])

    def _media(self, number: int) -> MediaDirectory:
        root, name = int(self._places[number, 0]), self._names[number]

        def find(source: str) -> NamedBytes:
            beside = posixpath.join(posixpath.dirname(name), source)
            for candidate in (source, beside):
                found = self._find(root, posixpath.normpath(candidate))
                if found is not None:
                    return self._medium(found)
            problem = f"{self._roots[root]} has no image or video {source!r}, which {name} names"
            raise ValueError(f"{problem}: correct the name, or add the file to the tar")

        return _TarMedia(find)

    def _raw(self, index: int) -> Iterator[bytes]:
        yield from super()._raw(index)
        for number in self._group(index):
            root, start, length = self._places[number].tolist()
            yield repr((start, length, self._states[root])).encode()

    def _hash(self, root: int, name: str) -> int:
        return xxhash.xxh3_64_intdigest(f"{root}/{name}".encode("utf-8", "surrogateescape"))

    def _find(self, root: int, name: str) -> int | None:
        wanted = np.uint64(self._hash(root, name))
        first, end = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        for number in self._by_hash[first:end].tolist():
            if self._names[number] == name:
                return number
        return None


class _TarMedia(MediaDirectory):
    """The files of a tar, where paths are their names; other files are not read."""

    def __init__(self, find: Callable[[str], NamedBytes]) -> None:
        super().__init__("", is_confining=False)
        self._find = find

    def _of_path(self, source: str) -> Any:
        return self._find(source)

    def _of_url(self, url: str, scheme: str) -> Any:
        return self._find(url) if scheme == "file" else url
