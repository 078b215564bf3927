"""Text of users' names and data, as terminals and reports may show it."""


def shown(text: str) -> str:
    r"""Make visible what would not be text on a screen.

    Control characters, which can move a terminal's cursor or hide a line, bytes of file names that
    are not UTF-8, and characters without an outline become their escapes, such as ``\x1b``.

    Args:
        text: any string.

    Returns:
        The text, which can be encoded. Its lines stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
