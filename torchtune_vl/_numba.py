"""Functions that numba compiles, and keeps for other processes."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import Any

import numba


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function when it is first called, once for all processes of a machine.

    It is kept beside its file, or in the user's cache. Where neither can be written, as for users
    of containers that have no home, each process compiles it.
    """
    try:
        dispatcher: Any = numba.njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # numba found no directory
        return numba.njit(function, nogil=True, **options)
    files = dispatcher._cache._cache_file
    files.save = partial(_save, files)
    return dispatcher


def _save(files: Any, key: Any, code: Any) -> None:
    """Save code for arguments of some types under a name of its own, and then in the index.

    numba itself takes the next free number, in the index before there is a file: of processes that
    save at the same time each would find the other's code there, and run it.
    """
    what = repr((numba.__version__, files._source_stamp, key)).encode()
    name = files._data_name(int.from_bytes(sha256(what).digest()[:8], "big"))
    with suppress(OSError):  # a disk is full
        files._save_data(name, code)
        files._save_index({**files._load_index(), key: name})
