"""Data in stores that fsspec reads, such as s3:// and gs://."""

import hashlib
import io
import posixpath
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.core import url_to_fs

from torchtune_vl.datasets._record_formats import MediaDirectory
from torchtune_vl.media._errors import refusing
from torchtune_vl.media._sources import CORRECT_PATH, read_bytes, scheme_of


class NamedBytes(io.BytesIO):
    """The bytes of a file, whose name errors tell."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def is_store(url: str) -> bool:
    """Whether a URL is neither a file nor an address of the web."""
    return scheme_of(url) not in ("", "file", "http", "https", "data")


class RemoteMedia(MediaDirectory):
    """A directory in a store, which no path may leave; its files are read when asked for.

    Args:
        url: of the directory, such as ``s3://bucket/images``.
        storage_options: of the store, as fsspec takes them.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        super().__init__(url.rstrip("/"), is_confining=False)
        self._options = dict(storage_options)

    def _of_url(self, url: str, scheme: str) -> Any:
        if scheme in ("http", "https", "data"):
            return url
        if not url.startswith(f"{self._directory}/"):
            raise self._outside(url)
        return self._of_path(url.removeprefix(f"{self._directory}/"))

    def _of_path(self, source: str) -> Any:
        name = posixpath.normpath(source)
        if name == ".." or name.startswith(("/", "../")):
            raise self._outside(source)
        url = f"{self._directory}/{name}"
        with refusing(f"{url} cannot be read", CORRECT_PATH):
            # Found anew, as connections do not survive the fork of a data worker
            fs, root = url_to_fs(self._directory, **self._options)
            with fs.open(posixpath.join(root, name), "rb") as file:
                return NamedBytes(read_bytes(file), url)

    @property
    def fingerprint(self) -> None:
        """None: whether a file of a store has changed takes as long to find out as to read it."""
        return None

    def _outside(self, source: str) -> ValueError:
        return ValueError(f"{source!r} is outside of media_dir {self._directory!r}: correct either")


def local_copy(url: str, cache_dir: str, storage_options: Mapping[str, Any]) -> str:
    """Find a file of a store in the cache, or fetch it if it is not there as it is now."""
    with refusing(f"{url} cannot be fetched", "correct it, or the store's options"):
        fs, path = url_to_fs(url, **storage_options)
        key = hashlib.sha256(f"{url} {fs.ukey(path)}".encode()).hexdigest()
        target = Path(cache_dir, f"fetched-{key}", posixpath.basename(path))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=target.parent) as own:
                partial = Path(own, target.name)
                fs.get_file(path, str(partial))
                partial.replace(target)
    return str(target)
