"""What errors say about data, never whole data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

_LONGEST = 1000
_Kinds = type[Exception] | tuple[type[Exception], ...]


def shortened(text: str) -> str:
    """Leave out the middle of a message of more than 1,000 characters, which may quote data."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 3 // 4]} [...] {text[-_LONGEST // 4 :]}"


@contextmanager
def naming_sample(name: Any, place: str = "") -> Iterator[None]:
    """Raise ``ValueError`` for whatever a record causes, with the sample's name and its place.

    The error is the cause, if that does not quote too much.
    """
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        if not text.startswith("sample "):
            text = f"sample {name!r}: {text}"
        cause = error if len(text) <= _LONGEST else None
        raise ValueError(shortened(text) + (f" ({place})" if place else "")) from cause


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Raise ``ValueError`` if a setting has none of a ``Literal``'s values."""
    choices = get_args(kind)
    if not isinstance(value, type(choices[0])) or value not in choices:
        raise ValueError(f"{name} is {value!r}: make it one of {choices}")


@contextmanager
def refusing(problem: str, remedy: str, kinds: _Kinds = Exception) -> Iterator[None]:
    """Raise ``ValueError`` with the problem, the reason and the remedy for errors of some kinds."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{problem} ({reason_of(error)}); {remedy}") from error


def reason_of(error: Exception) -> str:
    """The kind of an error and what it says, without a number or a path."""
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
