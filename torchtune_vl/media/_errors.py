"""What errors say about data, never whole data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_LONGEST = 1000


def shortened(text: str) -> str:
    """Leave out the middle of a message of more than 1,000 characters, which may quote data."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 3 // 4]} [...] {text[-_LONGEST // 4 :]}"


def reraise(error: Exception, before: str = "", behind: str = "") -> NoReturn:
    """Raise ``ValueError`` for all that a sample can cause, with more text around its message.

    The kind of an error that is no ``ValueError`` is told. The error is the cause, if that does
    not quote too much.
    """
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    text = f"{before}{kind}{error}"
    cause = error if len(text) <= _LONGEST else None
    raise ValueError(shortened(text) + behind) from cause


@contextmanager
def naming_sample(name: Any, place: str = "") -> Iterator[None]:
    """Name a sample, and its place, in errors, which whatever a record holds may cause."""
    try:
        yield
    except Exception as error:
        is_named = isinstance(error, ValueError) and str(error).startswith("sample ")
        reraise(error, "" if is_named else f"sample {name!r}: ", f" ({place})" if place else "")


@contextmanager
def refusing(
    problem: str, remedy: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Raise ``ValueError`` with the problem, the reason and the remedy for errors of some kinds."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{problem} ({reason_of(error)}); {remedy}") from error


def reason_of(error: Exception) -> str:
    """The kind of an error and what it says, without a number or a path."""
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
