"""The page of an evaluation: its scores, and each answer beside its question and its truths."""

import io
import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from PIL import Image

from torchtune_vl.datasets._preview import _ESCAPES
from torchtune_vl.media._images import Alpha, ImageSource, to_rgb

Picture = dict[str, Any]

_LONGEST_SIDE = 320  # of a thumbnail, in pixels
# Of the 15 MB that a page of 1,000 results is to have at most, those for pictures, in base64
_PICTURES = 11_000_000
# Of a thumbnail: enough for any to be seen well, and the least with which one is still seen
_MOST_BYTES, _LEAST_BYTES = 24_000, 2_000
_QUALITIES = (85, 70, 50, 30)  # of JPEG
_BOXES = ("boxes", "truth_boxes", "other_boxes")
_COORDINATES = ("bbox_2d", "point_2d")
_LONGEST_LABEL = 100


def to_html(report: Mapping[str, Any], pictures: Mapping[int, Sequence[Picture]]) -> str:
    """Write what :func:`~torchtune_vl.evaluation._evaluate.evaluate` returned as a page.

    Args:
        report: with ``facts`` besides, pairs of a name and a text for the head of the page. Its
            samples may have ``other_scores``, ``other_boxes``, ``other_choice_logprobs`` and
            ``other_ended``, those of the other answer.
        pictures: by the number of a sample, what :func:`picture_of` makes of the media of its
            question, in their order. Boxes are drawn on the last one that is no video.

    Returns:
        The page as one file, which asks nobody for anything, and needs JavaScript. A picture that
        several samples have is in it once.
    """
    places: dict[str, int] = {}
    shown = {
        number: [
            {**picture, "url": places.setdefault(picture["url"], len(places))} for picture in row
        ]
        for number, row in pictures.items()
    }
    samples = [_with_drawn_boxes(sample) for sample in report["samples"]]
    page = {**report, "samples": samples, "pictures": shown, "urls": [*places]}
    data = json.dumps(_as_json(page), separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
    return (files(__package__) / "evaluation.html").read_text("utf-8").replace("{{data}}", data)


def picture_of(
    image: ImageSource,
    num_pictures: int = 1000,
    *,
    kind: str = "image",
    alpha: Alpha = "reference",
) -> Picture:
    """Make a small picture of an image, or of a frame of a video.

    Args:
        image: whatever holds it, as the transform of images takes it, upright as it does. A frame
            is an array or a tensor of uint8.
        num_pictures: that the page is to have: the more they are, the fewer bytes each has.
        kind: "image" or "video".
        alpha: what becomes of transparency, the ``alpha`` of the transform.

    Returns:
        ``url``, the data URL of a JPEG of 320 pixels at most; ``width`` and ``height`` of the image
        itself, in whose pixels boxes are; and ``kind``.

    Raises:
        ValueError: if the image cannot be read.
    """
    pixels_CHW = to_rgb(image, alpha=alpha)
    height, width = pixels_CHW.shape[1:]
    thumbnail = Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())
    sides = _LONGEST_SIDE, _LONGEST_SIDE
    thumbnail.thumbnail(sides, Image.Resampling.LANCZOS, reducing_gap=3)
    content = _compressed(thumbnail, _room_of_one(num_pictures))
    url = f"data:image/jpeg;base64,{b64encode(content).decode()}"
    return {"url": url, "width": width, "height": height, "kind": kind}


def _room_of_one(num_pictures: int) -> int:
    """The bytes that each of so many pictures may have."""
    share = _PICTURES * 3 // 4 // max(num_pictures, 1)
    return min(max(share, _LEAST_BYTES), _MOST_BYTES)


def _compressed(image: Image.Image, limit: int) -> bytes:
    """JPEG of so many bytes at most: as good as they allow, and smaller where the worst is more."""
    for quality in _QUALITIES:
        content = _jpeg(image, quality)
        if len(content) <= limit:
            return content
    while len(content) > limit and max(image.size) > 1:
        scale = 0.9 * math.sqrt(limit / len(content))
        sides = [max(1, math.floor(side * scale)) for side in image.size]
        image = image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
        content = _jpeg(image, _QUALITIES[-1])
    return content


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def _with_drawn_boxes(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample whose boxes and points have no more than what is drawn of them."""
    drawn = {key: [*map(_drawn, sample[key])] for key in _BOXES if key in sample}
    return {**sample, **drawn}


def _drawn(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a box and of a point, and the label: a model writes anything beside them."""
    numbers = {key: [round(n, 1) for n in entry[key]] for key in _COORDINATES if key in entry}
    label = entry.get("label")
    return numbers if label is None else {**numbers, "label": str(label)[:_LONGEST_LABEL]}


def _as_json(value: Any) -> Any:
    """A value without numbers that JSON has not, such as a box's from 1e999: these become null."""
    if isinstance(value, Mapping):
        return {key: _as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
