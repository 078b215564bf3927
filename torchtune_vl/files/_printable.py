"""Text of users' names and data, as terminals and reports may show it."""


def shown(text: str) -> str:
    r"""Return a text whose characters that are none on a screen are escapes, such as ``\x1b``.

    They are control characters, which can move a terminal's cursor or hide a line, bytes of file
    names that are not UTF-8, and characters without an outline. Lines stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
