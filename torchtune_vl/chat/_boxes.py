"""Boxes and points between the user's image and the resized one that the model sees.

Qwen2.5-VL's coordinates are absolute pixels of the resized image ("Qwen2.5-VL Technical Report",
arXiv 2502.13923, section 2.2), whose size depends on the limits of the image transform.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, get_args

Unit = Literal["pixels", "0..1", "0..1000"]
_COORDINATES = {"bbox_2d": 4, "point_2d": 2}
# Words of keys whose numbers are places or lengths in an image
_GEOMETRY = re.compile(
    r"(?<![a-z])(b?box(es)?|(key)?points?|kpts|landmarks?|joints|skeleton|poly(gon|line)?s?|quad|"
    r"obb|rbox|rect(angle)?|contours?|segmentation|corners?|cent(er|re|roid)|coord(inate)?s?|"
    r"trajectory|[xy](min|max|\d)?|xyxy|xywh|c[xy]|[wh]|width|height|left|top|right|bottom|radius|"
    r"angle)(?![a-z])",
    re.IGNORECASE,
)


def rescaled(
    entry: Mapping[str, Any],
    unit: Unit,
    original_size: tuple[int, int],
    extent: tuple[int, int],
) -> dict[str, Any]:
    """Take a box or point from the user's image to what the model is to read or write.

    Args:
        entry: ``bbox_2d`` [x1, y1, x2, y2] or ``point_2d`` [x, y], and anything else beside.
        unit: of its coordinates: "pixels" of the upright image, or its width and height as 1 or
            1000.
        original_size: height and width of the upright image in pixels.
        extent: the numbers that the lower and the right edge of the image have for the model, such
            as pixels of the resized image.

    Returns:
        The entry with whole numbers in these.

    Raises:
        ValueError: if the coordinates are no numbers, out of order or outside of the image, or
            the entry has other coordinates.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unknown unit {unit!r} of coordinates: use one of {get_args(Unit)}")
    for key, value in entry.items():
        if key not in _COORDINATES and (is_geometry(key, value) or _has_list_of_numbers(value)):
            raise ValueError(
                f"the numbers of {key!r} would stay those of the original image: only bbox_2d and "
                "point_2d are taken to the resized one, each also as a field of a text; remove it "
                "or write it so"
            )
    given = original_size if unit == "pixels" else (1, 1) if unit == "0..1" else (1000, 1000)
    return {
        key: _rescale(key, value, given, extent) if key in _COORDINATES else value
        for key, value in entry.items()
    }


def _rescale(
    key: str, coordinates: Any, given: tuple[int, int], extent: tuple[int, int]
) -> list[int]:
    _check(key, coordinates, given)
    # Half up, not to even: neighbours stay in order
    return [
        math.floor(value / given[1 - i % 2] * extent[1 - i % 2] + 0.5)
        for i, value in enumerate(coordinates)
    ]


def _check(key: str, coordinates: Any, extent: tuple[int, int]) -> None:
    count = _COORDINATES[key]
    is_list = isinstance(coordinates, Sequence) and not isinstance(coordinates, str)
    if not is_list or len(coordinates) != count or not all(map(_is_number, coordinates)):
        raise ValueError(f"{key} is {coordinates!r}, expected {count} numbers")
    height, width = extent
    xs, ys = coordinates[::2], coordinates[1::2]
    if min(*coordinates) < 0 or max(xs) > width or max(ys) > height:
        raise ValueError(
            f"{key} {list(coordinates)} is outside of the image, whose width is {width} and "
            f"height {height} in its unit: correct it, clip it or give the right 'unit'"
        )
    if list(xs) != sorted(xs) or list(ys) != sorted(ys):
        raise ValueError(
            f"{key} {list(coordinates)} is no [x1, y1, x2, y2] with x1 <= x2, y1 <= y2"
        )


def is_geometry(key: str, value: Any) -> bool:
    """Tell whether a key of a message, item or box says where in an image something is.

    Args:
        key: the key.
        value: its value.

    Returns:
        Whether its name is one of geometry, and numbers are in its value.
    """
    return _GEOMETRY.search(str(key)) is not None and _has_number(value)


def _has_number(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_number, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_number, value))
    return _is_number(value)


def _has_list_of_numbers(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_list_of_numbers, value.values()))
    return isinstance(value, list | tuple) and _has_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def to_json(entries: Sequence[Mapping[str, Any]]) -> str:
    """Write boxes and points as a fenced JSON list, one entry a line.

    Args:
        entries: what :func:`rescaled` returns.

    Returns:
        The text.

    Raises:
        ValueError: if an entry holds what JSON cannot express.
    """
    try:
        lines = [f"\t{json.dumps(entry, ensure_ascii=False)}" for entry in entries]
    except TypeError as error:
        raise ValueError(f"an entry of its boxes cannot be written as JSON: {error}") from error
    return "```json\n[\n" + ",\n".join(lines) + "\n]\n```"


def boxes_in_original(
    text: str, original_size: tuple[int, int], extent: tuple[int, int]
) -> list[dict[str, Any]]:
    """Find the boxes and points in a generated text, in pixels of the user's image.

    The text may have words around its JSON and may end in the middle of an entry, which is then
    left out.

    Args:
        text: what the model wrote.
        original_size: height and width of the user's upright image in pixels.
        extent: the numbers of the image's lower and right edge in the text, such as pixels of the
            image that the model saw.

    Returns:
        Each entry that has ``bbox_2d`` or ``point_2d``, with these as float pixels.
    """
    scales = [original / edge for original, edge in zip(original_size, extent, strict=True)]
    return [
        {
            key: [float(v) * scales[1 - i % 2] for i, v in enumerate(value)]
            if _is_coordinates(key, value)
            else value
            for key, value in entry.items()
        }
        for entry in _json_objects(text)
        if any(_is_coordinates(key, value) for key, value in entry.items())
    ]


def _is_coordinates(key: str, value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == _COORDINATES.get(key)
        and all(map(_is_number, value))
    )


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
