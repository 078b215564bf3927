"""Where the media of samples lie."""

import os
import re
from collections.abc import Mapping
from typing import Any

from torchtune_vl.media._sources import path_of_file_url

_URL = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Of a file's name and of a path, on every common system: what is longer is base64
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4095


class MediaDirectory:
    """The directory that relative paths of media start from, and perhaps may not leave."""

    def __init__(self, directory: str, is_confining: bool) -> None:
        self._directory = directory
        self._root = os.path.realpath(directory) if is_confining else None

    def source(self, source: Any) -> Any:
        """Resolve the paths of a medium; a ValueError if one leads out of the directory.

        A record has a path, URL or base64, a list of frames, or a dict with ``bytes``, ``path`` or
        ``url``, as columns of ``datasets`` and items of OpenAI do.
        """
        if isinstance(source, list):
            return [self.source(frame) for frame in source]
        if isinstance(source, Mapping):
            found = next((k for k in ("bytes", "path", "url") if source.get(k) is not None), None)
            return source if found is None else self.source(source[found])
        if not isinstance(source, str):
            return source
        if _URL.match(source):
            if source.lower().startswith("file:"):
                self._check(source, path_of_file_url(source))
            return source
        encoded = source.encode("utf-8", "surrogatepass")
        if len(encoded) > _MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > _MAX_NAME_BYTES:
            return source
        path = os.path.join(self._directory, source)
        self._check(source, path)
        return path

    def _check(self, source: str, path: str) -> None:
        if self._root is None:
            return
        try:
            real = os.path.realpath(path)
        except ValueError:  # no file can have such a name, as the transform will say
            return
        if os.path.commonpath([self._root, real]) != self._root:
            raise ValueError(
                f"the path {source!r} leads to {real!r}, outside of media_dir "
                f"{self._directory!r}: correct it, or set media_dir to a directory that holds all "
                "media and no symbolic links out of it"
            )
