"""Warnings that are given once, whichever data worker comes first to what they tell."""

from contextlib import AbstractContextManager, nullcontext, suppress
from mmap import mmap
from multiprocessing import get_context
from typing import Any


class Said:
    """Which of a few kinds of warnings were given, by this process or any that it forks."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds
        # Without a file, shared with forks, as the lock is
        self._given = mmap(-1, len(kinds))
        self._lock: AbstractContextManager[Any] = nullcontext()
        with suppress(OSError):  # sandboxes without semaphores have no data workers either
            self._lock = get_context("fork").Lock()

    def __contains__(self, kind: str) -> bool:
        return bool(self._given[self._kinds.index(kind)])

    def is_new(self, kind: str) -> bool:
        """Note that a warning is given, and tell whether it was not before."""
        if kind in self:
            return False
        with self._lock:
            is_new = kind not in self
            self._given[self._kinds.index(kind)] = True
        return is_new

    def __reduce__(self) -> tuple[Any, ...]:
        return Said, self._kinds
