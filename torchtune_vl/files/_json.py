"""JSON files, whose errors name file and key in one sentence, and JSON text in data."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_MANY = 2**40


@dataclass(frozen=True)
class JsonObject:
    """An object of a JSON file, whose values are asked for by kind.

    Each method takes a key, and raises ``ValueError`` if it is missing or its value is of another
    kind; ``null`` is a value of no kind.

    Args:
        file: the file, for errors.
        content: the object.
        place: what goes before its keys in errors, such as ``vision_config.``.
    """

    file: Path
    content: dict[str, Any]
    place: str = ""

    def __contains__(self, key: str) -> bool:
        """Whether there is a value other than ``null``."""
        return self.content.get(key) is not None

    def over(self, defaults: Mapping[str, Any]) -> "JsonObject":
        """Return the object with values for keys that it lacks."""
        return replace(self, content={**defaults, **self.content})

    def part(self, key: str) -> "JsonObject":
        """Return an object in this one; an empty one if the key is missing."""
        content = self.content.get(key, {})
        if not isinstance(content, dict):
            raise self.error(key, "an object")
        return JsonObject(self.file, content, f"{self.place}{key}.")

    def whole(self, key: str, least: int = 1, most: int = _MANY) -> int:
        """Return a whole number between two bounds, both included."""
        value = self._value(key)
        if type(value) is not int or not least <= value <= most:
            upper = "" if most == _MANY else f" to {most:,}"
            raise self.error(key, f"a whole number from {least}{upper}")
        return value

    def number(self, key: str, least: float, most: float) -> float:
        """Return a number between two bounds, both included."""
        value = self._value(key)
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.error(key, f"a number from {least:g} to {most:g}")
        return value

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self._value(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """Return a string."""
        value = self._value(key)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def items(self, key: str) -> list[Any]:
        """Return a list of whatever it holds."""
        value = self._value(key)
        if not isinstance(value, list | tuple):
            raise self.error(key, "a list")
        return list(value)

    def each(self, key: str) -> "JsonObject":
        """Return a list as an object from its places, to ask for its items by kind."""
        items = {str(place): item for place, item in enumerate(self.items(key))}
        return JsonObject(self.file, items, f"{self.place}{key}.")

    def error(self, key: str, expected: str) -> ValueError:
        """Return the error about a value that is not what was expected."""
        value = reprlib.repr(self._value(key))
        return ValueError(f"{self.file}: {self.place}{key} is {value}, expected {expected}")

    def _value(self, key: str) -> Any:
        if key not in self.content:
            raise ValueError(f"{self.file}: {self.place}{key} is missing")
        return self.content[key]


def read_json_object(path: Path) -> JsonObject:
    """Read a JSON file that holds an object.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    except RecursionError:
        raise ValueError(f"{path}: not a JSON file that we read: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {reprlib.repr(content)}, expected a JSON object")
    return JsonObject(path, content)


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
