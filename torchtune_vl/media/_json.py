"""JSON text in the place of what it says."""

import json
from typing import Any


def from_json_text(value: Any, what: str) -> Any:
    """Parse a value if it is a text.

    Args:
        value: JSON text, or anything else.
        what: what errors call it.

    Returns:
        What the text says, or the value as it is.

    Raises:
        ValueError: if the text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: no JSON ({error})") from error
