"""Files and directories of checkpoints that are complete or not there, with checksums."""

import fcntl
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash
from safetensors import SafetensorError

from torchtune_vl.files._json import JsonObject, read_json_object

MANIFEST = "checksums.json"
_RECIPE_STATE = "recipe_state"
_EPOCH = re.compile(r"epoch_(\d+)")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file beside its place, and move it there when it is on the disk.

    What is at the place stays until then, and goes on to exist for whoever has it mapped: nothing
    is ever written over.

    Args:
        path: the place.

    Yields:
        The path to write to.

    Raises:
        OSError: if the file cannot be written; there is no rest of it then.
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
    """Write a JSON file as :func:`new_file` does.

    Args:
        path: the file.
        content: what JSON can hold.

    Raises:
        OSError: if the file cannot be written.
    """
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Write a directory, ``epoch_N``, as ``epoch_N.partial``, and rename it when it is on the disk.

    An older directory of this name is ``epoch_N.old`` between two renames, where :func:`survivor`
    finds it after a crash. What crashes left of it, and of an epoch all others beside it, is put
    right before and after. A lock keeps this from what another process is writing: one writes
    epochs into a directory at a time.

    Args:
        target: the place.

    Yields:
        The directory to write to.

    Raises:
        OSError: if something cannot be written, or another process is writing there; all is as
            before then.
    """
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _tidy(target)
            partial.mkdir()
            try:
                yield partial
                if target.exists():
                    target.rename(_old(target))
                partial.rename(target)
                flush(target.parent)
            finally:
                _tidy(target)
    except OSError as error:
        raise OSError(
            f"{target} cannot be written ({error}): make room, or name another output_dir; "
            "earlier checkpoints are as they were"
        ) from error


def survivor(target: Path) -> Path:
    """Where a directory is, though a crash came while it was replaced.

    Args:
        target: its place.

    Returns:
        ``target``, or ``{target}.old`` if only that is there.
    """
    old = _old(target)
    return old if old.is_dir() and not target.exists() else target


def epochs(output_dir: Path) -> list[Path]:
    """All complete ``epoch_N``.

    Args:
        output_dir: where they lie.

    Returns:
        The directories, from the highest number down.
    """
    matches = [re.fullmatch(r"epoch_(\d+)(\.old)?", path.name) for path in output_dir.glob("*")]
    numbers = {int(match[1]) for match in matches if match}
    return [survivor(output_dir / f"epoch_{number}") for number in sorted(numbers, reverse=True)]


def write_manifest(directory: Path, recipe_state: Path | None = None) -> None:
    """Write ``checksums.json``: size in bytes and checksum of each file.

    Args:
        directory: has all its other files, also in directories of its own.
        recipe_state: file elsewhere that belongs to this directory, see :func:`belongs`.

    Raises:
        OSError: if the file cannot be written.
    """
    own = directory / MANIFEST
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != own)
    with ThreadPoolExecutor() as pool:
        entries = pool.map(_entry, paths)
        names = [path.relative_to(directory).as_posix() for path in paths]
        manifest = {"files": dict(zip(names, entries, strict=True))}
    if recipe_state:
        manifest[_RECIPE_STATE] = _entry(recipe_state)
    write_json(own, manifest)


def check_manifest(directory: Path) -> None:
    """Compare the files of a directory with its ``checksums.json``, if it has one.

    Args:
        directory: as :func:`write_manifest` left it, or as published, without that file.

    Raises:
        ValueError: if files are missing, or of another size or checksum; it names all of them. If
            the list has files of other directories.
    """
    problems = damages(directory)
    if problems:
        raise ValueError(
            "\n".join(problems) + "\ncopy these files again, or take another checkpoint; if you "
            f"changed them yourself, remove them from {directory / MANIFEST}"
        )


def damages(directory: Path, required: Iterable[str] = ()) -> list[str]:
    """Compare the files of a directory with its ``checksums.json``, if it has one.

    Args:
        directory: the directory.
        required: names of files that ``checksums.json`` must have.

    Returns:
        What is wrong, a sentence for each file.

    Raises:
        ValueError: if ``checksums.json`` itself is damaged, or has files of other directories.
    """
    files = _manifest(directory).part("files")
    for name in files.content:
        if not is_inside(name):
            raise files.error(name, f"a file inside of {directory}: remove the entry")
    unknown = [f"{directory / MANIFEST} has no {name}" for name in required if name not in files]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _damage(directory / name, files.part(name)), files.content)
        return unknown + [damage for damage in found if damage]


def is_inside(name: str) -> bool:
    """Whether a name that a file lists is that of something in the file's own directory.

    Args:
        name: a relative path, perhaps. Where symbolic links lead is not looked at: downloads from
            the hub consist of them.

    Returns:
        Whether it is relative, not empty and nowhere leads up.
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def belongs(recipe_state: Path, directory: Path) -> bool:
    """Whether a file was named as state of the recipe when a directory was written.

    Args:
        recipe_state: the file.
        directory: the directory.

    Returns:
        Whether size and checksum are those in the directory's ``checksums.json``.

    Raises:
        ValueError: if ``checksums.json`` is damaged.
    """
    manifest = _manifest(directory)
    return _RECIPE_STATE in manifest and not _damage(recipe_state, manifest.part(_RECIPE_STATE))


def _manifest(directory: Path) -> JsonObject:
    path = directory / MANIFEST
    if not path.is_file():
        return JsonObject(path, {})
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}: copy it again, or delete it") from None


def _damage(path: Path, expected: JsonObject) -> str | None:
    expected_size, expected_sum = expected.whole("size", 0), expected.text("xxh3_128")
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected_size:
        return f"{path} has a size of {size} bytes, expected {expected_size}"
    if checksum(path) != expected_sum:
        return f"{path} has another checksum than when it was written"
    return None


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "xxh3_128": checksum(path)}


def checksum(path: Path) -> str:
    """Compute the checksum of a file's content.

    Args:
        path: of the file.

    Returns:
        XXH3 of 128 bits, in hexadecimal digits.

    Raises:
        OSError: if it cannot be read.
    """
    # XXH3, which comes with torchtune's datasets, reads 10 GB/s here: five times as fast as CRC-32
    # and ten times as SHA-256, which would take longer than loading itself. It finds damage, and
    # is no protection against forgery, which a list in the same directory could not be anyway.
    with path.open("rb") as file:
        if not path.stat().st_size:  # cannot be mapped
            return xxhash.xxh3_128_hexdigest(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return xxhash.xxh3_128_hexdigest(content)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk.

    Args:
        path: of the file or the directory.

    Raises:
        OSError: if it cannot be opened or written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other processes from writing a directory, or any epoch beside an epoch."""
    lock = target.with_name(f".{'epochs' if _EPOCH.fullmatch(target.name) else target.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is writing there, and holds {lock}") from None
        except OSError:  # a file system without locks
            yield
            return
        # Whoever held it may have removed the file since it was opened, and another made it anew
        if not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))):
            raise BlockingIOError(f"another process is writing there, and held {lock}")
        try:
            yield
        finally:
            lock.unlink()


def _tidy(target: Path) -> None:
    """Put right what a crash left: what was being replaced comes back, all else goes.

    Of a directory that was being written, or of all epochs if it is one.
    """
    names = {target.name}
    if _EPOCH.fullmatch(target.name):
        names |= {p.stem for p in target.parent.glob("epoch_*.*") if _EPOCH.fullmatch(p.stem)}
    for place in (target.with_name(name) for name in names):
        partial = place.with_name(f"{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        old = _old(place)
        if old.is_dir() and place.exists():
            # Half of an old directory must not look like a whole one
            shutil.rmtree(old.rename(partial), ignore_errors=True)
        elif old.is_dir():
            old.rename(place)
