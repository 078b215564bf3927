"""Functions that numba compiles."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function when it is first called, once for all processes of a machine.

    It is kept beside its file, or in the user's cache. Where neither can be written, as for users
    of containers that have no home, each process compiles it.
    """
    try:
        return numba.njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # numba found no directory
        return numba.njit(function, nogil=True, **options)
