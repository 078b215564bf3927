"""One sample as a model gets it: its pictures, boxes and tokens, as plain data.

Shapes: H height and W width in pixels, C colour channels.
"""

import io
import math
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image

from torchtune_vl.chat import ChatTransform
from torchtune_vl.data import Planner, Size
from torchtune_vl.media._errors import naming_sample
from torchtune_vl.media._patches import normalization_by, unpatchify
from torchtune_vl.modules import IGNORE_INDEX

_MOST_FRAMES = 8  # of a video
_LEAST_BYTES = 2_000  # of a picture
_LONGEST_SIDE = 16_383  # of WebP
_QUALITIES = (90, 75)  # of WebP
# Bytes for each pixel below which it is not worth the time to try without loss
_LOSSLESS = 0.3
_COORDINATES = ("bbox_2d", "point_2d")
# Places of records for media and boxes, of which nothing is left where they were filled
TAGS = ("<image>", "<video>", "<bbox>", "<ref-object>")


@dataclass
class SampleView:
    """Makes all that the page shows of a sample, by its index.

    Pictures have so many bytes for each pixel at most; what does not fit is made smaller, and says
    so. A sample that cannot be read has an ``error`` instead.
    """

    dataset: Any
    transform: ChatTransform
    planner: Planner
    bytes_per_pixel: float

    def __call__(self, index: int) -> dict[str, Any]:
        """Look at a sample."""
        view: dict[str, Any] = {"index": index, "id": index, "place": ""}
        try:
            with naming_sample(index):
                if hasattr(self.dataset, "origin"):
                    name, view["place"] = self.dataset.origin(index)
                    view["id"] = name if isinstance(name, int) else str(name)
                is_augmented = hasattr(self.dataset, "augmented")
                sample = self.dataset.augmented(index, 0) if is_augmented else self.dataset[index]
        except ValueError as error:
            return {**view, "error": str(error)}
        return {**view, **self._content(sample)}

    def _content(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        tokens = sample["tokens"]
        pads = self.transform.image_pad_id, self.transform.video_pad_id
        runs = runs_of(tokens, sample["labels"], sample["input_pos"], pads)
        vision = sample.get("encoder_input", {}).get("vision", {"patches": (), "grid_thw": ()})
        number_media(runs, vision["grid_thw"], self.transform.geometry.merge_size)
        first = {run["medium"]: tokens[run["start"]] for run in reversed(runs) if "medium" in run}
        media = [*self._media(vision, [pad for _, pad in sorted(first.items())])]
        size = Size(len(tokens), len(vision["patches"]), sum(run["targets"] for run in runs))
        return {
            **size._asdict(),
            "work": self.planner.work(*np.array([[size.tokens], [size.patches]])),
            "truncated": sample.get("truncated"),
            "augmented": [*map(_told, sample.get("augmented", ()))],
            "warnings": [*self._place_boxes(tokens, runs, media), *self._plain_tags(tokens)],
            "media": media,
            "runs": runs,
        }

    def _media(self, vision: Mapping[str, Any], pads: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Each medium, whose placeholders have these ids."""
        counts = {"image": 0, "video": 0}
        size, start = self.transform.geometry.patch_size, 0
        for grid_thw, pad in zip(vision["grid_thw"], pads, strict=True):
            kind = "image" if pad == self.transform.image_pad_id else "video"
            counts[kind] += 1
            steps, rows, columns = grid = grid_thw.tolist()
            stop = start + math.prod(grid)
            by_step = vision["patches"][start:stop].numpy().reshape(steps, rows * columns, -1)
            start = stop
            some = np.linspace(0, steps - 1, min(steps, _MOST_FRAMES)).round().astype(int).tolist()
            frames = [frame_of(by_step[step], rows, columns, self.transform) for step in some]
            yield {
                "kind": kind,
                "name": f"{kind} {counts[kind]}",
                "grid": grid,
                "height": rows * size,
                "width": columns * size,
                "steps": some,
                "pictures": [picture(frame, self.bytes_per_pixel) for frame in frames],
                "boxes": [],
            }

    def _place_boxes(
        self, tokens: Sequence[int], runs: Sequence[Mapping[str, Any]], media: Sequence[Any]
    ) -> Iterator[str]:
        """Add the boxes of each text to the image before it, or else to the first one."""
        image = next((medium for medium in media if medium["kind"] == "image"), None)
        pads = [run for run in runs if "medium" in run]
        starts = [0, *(run["start"] + run["count"] for run in pads)]
        stops = [*(run["start"] for run in pads), len(tokens)]
        before_each = [None, *(media[run["medium"]] for run in pads)]
        for before, start, stop in zip(before_each, starts, stops, strict=True):
            if before and before["kind"] == "image":
                image = before
            if image:
                yield from self._read_boxes(image, self.transform.decode(tokens[start:stop]))

    def _read_boxes(self, image: dict[str, Any], text: str) -> Iterator[str]:
        """Add the boxes of a text to its image, and tell which are outside of it.

        Numbers that stand alone may be something else: they have no label, not even an empty one,
        and are left out where they are outside.
        """
        boxes: list[tuple[list[float], str | None]] = [
            (entry[key], str(entry.get("label", "")))
            for entry in self.transform.read_boxes(text)
            for key in _COORDINATES
            if key in entry
        ]
        known = [numbers for numbers, _ in boxes]
        boxes += [(n, None) for n in self.transform.read_coordinates(text) if n not in known]
        height, width = image["height"], image["width"]
        bottom, right = self.transform.box_extent(height, width)
        for numbers, label in boxes:
            if is_within(numbers, (right, bottom)):
                scales = (width / right, height / bottom) * 2
                pixels = [n * scale for n, scale in zip(numbers, scales, strict=False)]
                image["boxes"].append({"numbers": numbers, "label": label, "pixels": pixels})
            elif label is not None:
                yield (
                    f"The box or point {numbers} is not in {image['name']}, where x goes to "
                    f"{right} and y to {bottom}, and a box is [x1, y1, x2, y2]."
                )

    def _plain_tags(self, tokens: Sequence[int]) -> Iterator[str]:
        """Tell what looks like a token or a place in a text, but is no more than letters."""
        base = self.transform.base_vocab_size
        (line_break,) = self.transform.encode("\n", add_eos=False)
        plain = self.transform.decode([t if t < base else line_break for t in tokens])
        names = (*TAGS, *self.transform.special_tokens)
        found = sorted({*re.findall("|".join(map(re.escape, names)), plain)})
        if found:
            yield f"Its text has {', '.join(found)}: letters to the model, no token and no place."


def frame_of(patches: np.ndarray, rows: int, columns: int, transform: ChatTransform) -> np.ndarray:
    """The first frame of the patches of an image, or of a step of a video, uint8 [H, W, C]."""
    of_images, normalization = transform.image_transform, None
    if patches.dtype != np.uint8:
        normalization = normalization_by(of_images.image_mean, of_images.image_std)
    return unpatchify(patches, (1, rows, columns), transform.geometry, normalization)[0]


def _told(change: Mapping[str, Any]) -> str:
    """What was done to an image."""
    told = {key: f"{x:.3g}" if isinstance(x, float) else x for key, x in change.items()}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)


def is_within(numbers: Sequence[float], limits: tuple[int, int]) -> bool:
    """Whether x, y or x1, y1, x2, y2 are within limits of x and y, and in this order."""
    is_inside = all(0 <= n <= limit for n, limit in zip(numbers, limits * 2, strict=False))
    return is_inside and all(a <= b for a, b in zip(numbers, numbers[2:], strict=False))


def runs_of(
    tokens: Sequence[int],
    labels: Sequence[int],
    positions: torch.Tensor,
    placeholder_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Divide tokens into runs: placeholders of a medium, and others that have loss or have not.

    Each run has ``start``, the number of its first token; ``position``, where that is on the three
    axes; and ``targets``, how many of its tokens the loss is taken of, all or none. Others than
    placeholders have their ``ids``, and each the position of the one before + 1. Placeholders have
    the number of their block as ``medium``, their ``count``, and ``last``, the position of the
    last.
    """
    ids, place = np.array(tokens), positions.numpy()
    is_target = np.array(labels) != IGNORE_INDEX
    is_target[0] = False  # nothing predicts the first token
    is_pad = np.isin(ids, placeholder_ids)
    is_jump = (place[1:] != place[:-1] + 1).any(axis=1)
    is_seam = (np.diff(is_pad) != 0) | (np.diff(is_target) != 0) | (is_jump & ~is_pad[1:])
    starts = [0, *(is_seam.nonzero()[0] + 1).tolist()]
    runs: list[dict[str, Any]] = []
    media = count()
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        run = {"start": start, "position": place[start].tolist()}
        run["targets"] = int(is_target[start:stop].sum())
        if is_pad[start]:
            run |= {"medium": next(media), "count": stop - start, "last": place[stop - 1].tolist()}
        else:
            run["ids"] = ids[start:stop].tolist()
        runs.append(run)
    return runs


def number_media(
    runs: Sequence[dict[str, Any]], grid_thw: Sequence[torch.Tensor], merge_size: int
) -> None:
    """Give runs of placeholders the number of their ``medium``, which may be many blocks."""
    sizes = [int(grid.prod()) // merge_size**2 for grid in grid_thw]
    number, left = -1, 0
    for run in runs:
        if "medium" in run:
            if not left:
                number += 1
                left = sizes[number]
            run["medium"] = number
            left -= run["count"]


def picture(pixels_HWC: np.ndarray, bytes_per_pixel: float) -> dict[str, Any]:
    """Write pixels as the ``url`` of a picture of so many bytes.

    ``quality`` is that of WebP, None if all pixels are as they were, and ``scale`` what is left of
    its height and its width.
    """
    image = Image.fromarray(pixels_HWC)
    area = image.width * image.height
    limit = max(_LEAST_BYTES, bytes_per_pixel * area)
    scale = min(1.0, _LONGEST_SIDE / max(image.size))
    ways: list[dict[str, Any]] = [{"quality": quality} for quality in _QUALITIES]
    if limit >= _LOSSLESS * area and scale == 1:
        ways.insert(0, {"lossless": True})
    for way in ways:
        content = _webp(image, scale, way)
        if len(content) <= limit:
            break
    while len(content) > limit:
        scale *= 0.9 * math.sqrt(limit / len(content))
        content = _webp(image, scale, way)
    url = f"data:image/webp;base64,{b64encode(content).decode()}"
    return {"url": url, "scale": scale, "quality": way.get("quality")}


def _webp(image: Image.Image, scale: float, settings: Mapping[str, Any]) -> bytes:
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", method=2, **settings)
    return file.getvalue()
