"""Warnings that are given once, whichever data worker comes first to what they tell."""

from mmap import mmap
from typing import Any


class Said:
    """Which of a few kinds of warnings were given, by this process or any that it forks."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds
        self._given = mmap(-1, len(kinds))  # without a file, shared with forks

    def __contains__(self, kind: str) -> bool:
        return bool(self._given[self._kinds.index(kind)])

    def add(self, kind: str) -> None:
        """Note that a warning was given."""
        self._given[self._kinds.index(kind)] = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Said, self._kinds
