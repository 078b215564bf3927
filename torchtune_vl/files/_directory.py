"""Files and directories that are complete or not there, with checksums."""

import fcntl
import json
import logging
import mmap
import os
import re
import reprlib
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from socket import gethostname
from typing import Any, TextIO

import xxhash
from safetensors import SafetensorError

from torchtune_vl.files._json import JsonObject, read_json_object

MANIFEST = "checksums.json"
_EPOCH = r"epoch_\d+"

log = logging.getLogger(__name__)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside a file's to write to, and move it there when it is on the disk.

    What is there stays until then, and for whoever has it mapped. A failure leaves nothing.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.touch()
        usual_mode = partial.stat().st_mode
        yield partial
        partial.chmod(usual_mode)  # safetensors' files are for their owner alone
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except SafetensorError as error:  # what safetensors makes of an OSError
        raise OSError(f"{path.name}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as :func:`new_file` does."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_directory(target: Path, may_exist: bool = True) -> Iterator[Path]:
    """Yield a directory, ``epoch_N.partial``, and :func:`complete` it as ``epoch_N``.

    What crashes left, of an epoch of all beside it too, is put right before and after, under a
    lock. ``OSError`` if it cannot be written or locked, or exists and may not: all is as before.
    """
    if target.exists() and not may_exist:
        raise FileExistsError(f"{target} exists: name a new directory")
    partial = target.with_name(f"{target.name}.partial")
    is_epoch = re.fullmatch(_EPOCH, target.name)
    names, kind = (_EPOCH, "epochs") if is_epoch else (re.escape(target.name), target.name)
    locked = target.with_name(f".{kind}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_locked(locked):
            try:
                tidy(target.parent, names)
                partial.mkdir()
                yield partial
                complete(partial, target)
            finally:
                tidy(target.parent, names)
                locked.unlink(missing_ok=True)
    except OSError as error:
        remedy = "make room, or name another output_dir; earlier checkpoints are as they were"
        raise OSError(f"{target} cannot be written ({error}): {remedy}") from error


def complete(partial: Path, target: Path) -> None:
    """Give a directory whose files are on the disk checksums and its name.

    What had it is ``{target}.replaced`` between two renames, where :func:`survivor` finds it.
    """
    write_manifest(partial)
    flush(partial)
    if target.exists():
        target.rename(f"{target}.replaced")
    partial.rename(target)
    flush(target.parent)


def tidy(parent: Path, pattern: str) -> None:
    """Where names match, bring back what a crash found being replaced, and remove all it left."""
    for left in (*parent.glob("*.partial"), *parent.glob("*.replaced")):
        target = left.with_suffix("")
        if re.fullmatch(pattern, target.name):
            if survivor(target) == left:
                left.rename(target)
            else:
                remove(left)


def remove(directory: Path) -> None:
    """Remove a directory, if it is there; that it cannot be removed is a warning."""
    if not directory.is_dir():
        return
    try:
        if directory.suffix != ".partial":
            # Half of a directory must not look like a whole one
            directory = directory.rename(directory.with_suffix(".partial"))
        shutil.rmtree(directory)
    except OSError as error:
        log.warning("%s cannot be removed (%s): remove it yourself", directory, error)


def open_locked(path: Path) -> TextIO:
    """Open and lock a file until it is closed; ``BlockingIOError`` if another process has it."""
    file = path.open("a+", encoding="utf-8")
    try:
        # Unlike flock's, it is not shared with data workers, which may outlive the process
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have removed the file since it was opened, and another made it anew
        if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise BlockingIOError
    except (BlockingIOError, PermissionError, FileNotFoundError):
        file.seek(0)
        holder = file.read()
        file.close()
        reason = f"another process {holder}is writing there, and holds {path}"
        remedy = "wait until it has ended, end it, or name another output_dir"
        raise BlockingIOError(f"{reason}: {remedy}") from None
    except OSError as error:  # of some file systems of clusters
        log.warning("%s cannot be locked (%s): see that nobody else writes there", path, error)
    file.truncate(0)
    file.write(f"({os.getpid()} on {gethostname()}) ")
    file.flush()
    return file


def survivor(target: Path) -> Path:
    """Return where a directory is: ``{target}.replaced`` if a crash came while it was replaced."""
    replaced = target.with_name(f"{target.name}.replaced")
    return replaced if replaced.is_dir() and not target.exists() else target


def numbered(parent: Path, kind: str) -> list[Path]:
    """List all complete ``{kind}_N``, from the highest number down."""
    name = re.compile(rf"{kind}_(0|[1-9]\d*)(\.replaced)?")
    numbers = {int(m[1]) for path in parent.glob("*_*") if (m := name.fullmatch(path.name))}
    places = (survivor(parent / f"{kind}_{number}") for number in sorted(numbers, reverse=True))
    return [place for place in places if place.is_dir()]


def write_manifest(directory: Path) -> None:
    """Write ``checksums.json``: sizes and checksums of all files."""
    own = directory / MANIFEST
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != own)
    names = [path.relative_to(directory).as_posix() for path in paths]
    with ThreadPoolExecutor() as pool:
        write_json(own, {"files": dict(zip(names, pool.map(_entry, paths), strict=True))})


def remove_file(path: Path) -> None:
    """Remove a file from a complete directory, and from its ``checksums.json``."""
    files = _manifest(path.parent).part("files").content
    if files.pop(path.name, None):
        write_json(path.with_name(MANIFEST), {"files": files})
    path.unlink()


def check_manifest(directory: Path, required: Iterable[str] = ()) -> None:
    """Raise ``ValueError`` with all files that are not as ``checksums.json`` says, if there is one.

    So it is if that is damaged, lists files of other directories, or not all ``required`` ones.
    """
    manifest, files = directory / MANIFEST, _manifest(directory).part("files")
    for name in files.content:
        if not is_inside(name):
            raise files.error(name, f"a file inside of {directory}: remove the entry")

    def damage(name: str) -> str | None:
        path, expected = directory / name, files.part(name).content
        found = _entry(path) if path.is_file() else {}
        if found and found.items() <= expected.items():
            return None
        was = reprlib.repr(expected)
        return f"{path} is {found or 'missing'}, and was {was} when it was written"

    problems = [f"{manifest} has no {name}" for name in required if name not in files]
    with ThreadPoolExecutor() as pool:
        problems += filter(None, pool.map(damage, files.content))
    if problems:
        remedy = "copy these files again, or take another checkpoint; if you changed them yourself,"
        raise ValueError(f"{'; '.join(problems)}: {remedy} remove them from {manifest}")


def is_inside(name: str) -> bool:
    """Tell whether a listed name is a relative path that nowhere leads up.

    Where symbolic links lead is not looked at: downloads from the hub consist of them.
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _manifest(directory: Path) -> JsonObject:
    path = directory / MANIFEST
    try:
        return read_json_object(path) if path.is_file() else JsonObject(path, {})
    except ValueError as error:
        raise ValueError(f"{error}: copy it again, or delete it") from None


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "xxh3_128": checksum(path)}


def checksum(path: Path) -> str:
    """Compute XXH3 of 128 bits of a file's content, in hexadecimal digits."""
    # XXH3 reads 10 GB/s here: five times as fast as CRC-32 and ten times as SHA-256, which would
    # take longer than loading. It finds damage, not forgery: no list in the same directory could
    with path.open("rb") as file:
        if not path.stat().st_size:  # cannot be mapped
            return xxhash.xxh3_128_hexdigest(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return xxhash.xxh3_128_hexdigest(content)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
