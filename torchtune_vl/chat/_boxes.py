"""Boxes and points between the user's image and the resized one that the model sees."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from numbers import Real
from typing import Any, Literal

from torchtune_vl.media._augment import Axis
from torchtune_vl.media._patches import Size

Unit = Literal["pixels", "0..1", "0..1000"]
# What the sides of the user's image are in each unit; 0: as many pixels as it has
_UNITS = {"pixels": 0, "0..1": 1, "0..1000": 1000}
_COORDINATES = {"bbox_2d": 4, "point_2d": 2}
_NUMBER = r"\s*(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*"
_LIST = re.compile(rf"\[{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?\]")
# Words of keys whose numbers are places or lengths in an image
GEOMETRY = re.compile(
    r"(?<![a-z])(b?box(es)?|(key)?points?|kpts|landmarks?|joints|skeleton|poly(gon|line)?s?|quad|"
    r"obb|rbox|rect(angle)?|contours?|segmentation|corners?|cent(er|re|roid)|coord(inate)?s?|"
    r"trajectory|[xy](min|max|\d)?|xyxy|xywh|c[xy]|[wh]|width|height|left|top|right|bottom|radius|"
    r"angle)(?![a-z])",
    re.IGNORECASE,
)
UNMOVED: tuple[Axis, Axis] = (1.0, 0.0), (1.0, 0.0)


def rescaled(
    entry: Any,
    unit: str,
    original_size: Size,
    extent: Size,
    axes: tuple[Axis, Axis] = UNMOVED,
) -> dict[str, Any]:
    """Take a box or point from the user's image to what the model is to read or write.

    ``bbox_2d`` [x1, y1, x2, y2] or ``point_2d`` [x, y] are in a unit of the upright image of
    ``original_size``, height and width in pixels, and become whole numbers of ``extent``, those of
    its lower and its right edge for the model. ``axes`` tell where parts of the width and of the
    height are if the image was changed. What else the entry has stays, unless it is of numbers that
    would have to change as well: ``ValueError``, as for wrong coordinates.
    """
    if unit not in [*_UNITS]:
        raise ValueError(f"unknown unit {unit!r} of coordinates: use one of {', '.join(_UNITS)}")
    result = {}
    for key, value in entry.items() if isinstance(entry, Mapping) else ():
        if key in _COORDINATES and value is not None:
            sides = (_UNITS[unit],) * 2 if _UNITS[unit] else original_size
            value = _rescaled_numbers(key, value, sides, extent, axes)
        elif is_geometry(key, value) or _has_number(value, bare=False):
            raise ValueError(
                f"the numbers of {key!r} would stay those of the original image: remove it, or "
                "write it as bbox_2d or point_2d, each also as a field of a text"
            )
        if value is not None:
            result[key] = value
    if not result.keys() & _COORDINATES:
        raise ValueError(f"{entry!r} has no 'bbox_2d' and no 'point_2d'")
    return result


def corners(entry: Any, unit: Any, original_size: Size) -> Iterator[tuple[float, float]]:
    """List the corners of an entry's box, and its point, x and y in pixels of the user's image.

    Of what :func:`rescaled` raises errors for, only what can be understood.
    """
    if unit not in [*_UNITS]:
        return
    scales = [side / (_UNITS[unit] or side) for side in original_size[::-1]]
    for numbers in coordinates_of(entry):
        pixels = [n * scale for n, scale in zip(numbers, cycle(scales), strict=False)]
        yield from zip(pixels[::2], pixels[1::2], strict=True)


def coordinates_of(entry: Any) -> Iterator[list[float]]:
    """List the four numbers of an entry's box, and the two of its point, as far as it has them."""
    for key, numbers in entry.items() if isinstance(entry, Mapping) else ():
        if key in _COORDINATES and _is_coordinates(key, numbers):
            yield [float(number) for number in numbers]


def _rescaled_numbers(
    key: str, coordinates: Any, sides: Size, extent: Size, axes: tuple[Axis, Axis]
) -> list[int]:
    if not _is_coordinates(key, coordinates):
        raise ValueError(f"{key} is {coordinates!r}, expected {_COORDINATES[key]} numbers")
    height, width = sides
    scaled = [*zip(coordinates, cycle((width, height)), cycle(extent[::-1]))]
    if not all(0 <= value <= side for value, side, _ in scaled):
        image = f"the image, whose width is {width} and height {height} in its unit"
        raise ValueError(f"{key} {[*coordinates]} is outside of {image}: clip it or correct 'unit'")
    if any(first > last for first, last in zip(coordinates, coordinates[2:], strict=False)):
        raise ValueError(f"{key} {[*coordinates]} is no [x1, y1, x2, y2] with x1 <= x2, y1 <= y2")
    moved = [
        (value / side * factor + offset) * new_side
        for (value, side, new_side), (factor, offset) in zip(scaled, cycle(axes))
    ]
    # Half up, not to even: neighbours stay in order
    numbers = [math.floor(value + 0.5) for value in moved]
    numbers[::2] = sorted(numbers[::2])  # a flip has exchanged them
    return numbers


def is_geometry(key: str, value: Any) -> bool:
    """Whether a key's name says where in an image something is, and its value has numbers."""
    return GEOMETRY.search(str(key)) is not None and _has_number(value, bare=True)


def _has_number(value: Any, bare: bool) -> bool:
    """Whether a value has a number in a list, or a bare one."""
    if isinstance(value, Mapping):
        return any(_has_number(entry, bare) for entry in value.values())
    if isinstance(value, list | tuple):
        return any(_has_number(entry, bare=True) for entry in value)
    return bare and _is_number(value)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def to_json(entries: Sequence[Mapping[str, Any]]) -> str:
    """Write boxes and points as a fenced JSON list, one entry a line."""
    try:
        lines = [f"\t{json.dumps(entry, ensure_ascii=False)}" for entry in entries]
    except TypeError as error:
        raise ValueError(f"an entry of its boxes cannot be written as JSON: {error}") from error
    written = "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"
    return f"```json\n{written}\n```"


def boxes_in_original(text: str, original_size: Size, extent: Size) -> list[dict[str, Any]]:
    """Find the boxes and points in a generated text, as float pixels of the user's image.

    Of the text, which may have words around its JSON and end in the middle of an entry, each whole
    entry that has ``bbox_2d`` or ``point_2d``. ``original_size`` is height and width of the user's
    upright image in pixels, and ``extent`` the numbers of its lower and right edge in the text,
    such as pixels of the image that the model saw.
    """
    return to_original(boxes_in(text), original_size, extent)


def to_original(
    entries: Sequence[Mapping[str, Any]], original_size: Size, extent: Size
) -> list[dict[str, Any]]:
    """Take entries of a text, as :func:`boxes_in_original` does, to the user's image."""
    height, width = (original / edge for original, edge in zip(original_size, extent, strict=True))
    moved = []
    for entry in entries:
        moved.append(dict(entry))
        for key in entry.keys() & _COORDINATES:
            scales = cycle((width, height))
            numbers = zip(entry[key], scales, strict=False)
            moved[-1][key] = [float(number) * scale for number, scale in numbers]
    return moved


def boxes_in(text: str) -> list[dict[str, Any]]:
    """Find the boxes and points in a text, as :func:`to_json` writes them, in its own numbers."""
    found = []
    for entry in _json_objects(text):
        absent = {key for key in _COORDINATES if not _is_coordinates(key, entry.get(key))}
        if absent != _COORDINATES.keys():
            found.append({key: value for key, value in entry.items() if key not in absent})
    return found


def coordinates_in(text: str) -> list[list[float]]:
    """Find the lists of two or four numbers in a text, wherever they stand."""
    groups = (found.groups() for found in _LIST.finditer(text))
    return [[float(number) for number in numbers if number is not None] for numbers in groups]


def _is_coordinates(key: str, value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and len(value) == _COORDINATES[key] and all(map(_is_number, value))


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a text, without those inside of others."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            entry, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield entry
        start = text.find("{", end)
