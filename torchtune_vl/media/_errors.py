"""What errors say about data, never whole data."""

from typing import NoReturn

_LONGEST = 1000


def shortened(text: str) -> str:
    """Shorten a message of an error, which may quote what is in the data.

    Args:
        text: the message.

    Returns:
        Its beginning and its end if it has more than 1,000 characters.
    """
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 3 // 4]} [...] {text[-_LONGEST // 4 :]}"


def reraise(error: Exception, before: str = "", behind: str = "") -> NoReturn:
    """Raise one kind of error for all that a sample can cause.

    Args:
        error: of any kind; that of one which is no ValueError is told.
        before: what comes before its message, such as the sample's name.
        behind: what comes behind it.

    Raises:
        ValueError: always; the error is its cause, if that does not quote too much.
    """
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    text = f"{before}{kind}{error}"
    cause = error if len(text) <= _LONGEST else None
    raise ValueError(shortened(text) + behind) from cause
