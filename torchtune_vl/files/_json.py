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
    kind, or outside of bounds, which are included; ``null`` is a value of no kind. Errors put
    ``place``, such as ``vision_config.``, before the key.
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
        content = self._checked(key, "an object", dict) if key in self.content else {}
        return JsonObject(self.file, content, f"{self.place}{key}.")

    def whole(self, key: str, least: int = 1, most: int = _MANY) -> int:
        expected = f"a whole number from {least}" + (f" to {most:,}" if most < _MANY else "")
        return self._checked(key, expected, int, least=least, most=most)

    def number(self, key: str, least: float, most: float) -> float:
        expected = f"a number from {least:g} to {most:g}"
        return self._checked(key, expected, int, float, least=least, most=most)

    def flag(self, key: str) -> bool:
        return self._checked(key, "true or false", bool)

    def text(self, key: str) -> str:
        return self._checked(key, "a string", str)

    def items(self, key: str) -> list[Any]:
        return list(self._checked(key, "a list", list, tuple))

    def each(self, key: str) -> "JsonObject":
        """Return a list as an object from its places, to ask for its items by kind."""
        items = {str(place): item for place, item in enumerate(self.items(key))}
        return JsonObject(self.file, items, f"{self.place}{key}.")

    def error(self, key: str, expected: str) -> ValueError:
        value = reprlib.repr(self._value(key))
        return ValueError(f"{self.file}: {self.place}{key} is {value}, expected {expected}")

    def _checked(self, key: str, expected: str, *kinds: type, **bounds: float) -> Any:
        value = self._value(key)
        # Not isinstance: true is no number
        is_right = type(value) in kinds
        if not is_right or (bounds and not bounds["least"] <= value <= bounds["most"]):
            raise self.error(key, expected)
        return value

    def _value(self, key: str) -> Any:
        if key not in self.content:
            raise ValueError(f"{self.file}: {self.place}{key} is missing")
        return self.content[key]


def read_json_object(path: Path) -> JsonObject:
    """Read a JSON file that holds an object; a ValueError if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file that can be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {reprlib.repr(content)}, expected a JSON object")
    return JsonObject(path, content)


def from_json_text(value: Any, what: str) -> Any:
    """Parse a value if it is a text; a ValueError, which calls it ``what``, if it is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: no JSON ({error})") from error
