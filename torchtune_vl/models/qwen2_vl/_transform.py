"""Conversations as Qwen2-VL reads them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchtune_vl.chat import ChatTransform, ProcessorClasses
from torchtune_vl.media import Geometry

# Of every published checkpoint
GEOMETRY = Geometry(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    window_size=None,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    min_pixels=3136,
    max_pixels=12845056,
)
# What the width and the height of any image are in boxes (arXiv 2409.12191, section 2.2)
_EXTENT = 1000
_PAIR = r"\((\d+),\s*(\d+)\)"
_WRITTEN = re.compile(
    r"(?:<\|object_ref_start\|>(?P<label>.*?)<\|object_ref_end\|>)?"
    rf"<\|box_start\|>{_PAIR}(?:,\s*{_PAIR})?<\|box_end\|>",
    re.DOTALL,
)


class Qwen2VLTransform(ChatTransform):
    """The transform of conversations for Qwen2-VL: one temporal position for each step of a video.

    Arguments are those of :class:`~torchtune_vl.chat.ChatTransform`. Boxes are written in
    thousandths of the image between ``<|box_start|>`` and ``<|box_end|>``, behind their label
    between ``<|object_ref_start|>`` and ``<|object_ref_end|>`` (arXiv 2409.12191, section 2.2).
    """

    geometry = GEOMETRY
    processors = ProcessorClasses(
        processor="Qwen2VLProcessor",
        images="Qwen2VLImageProcessor",
        videos="Qwen2VLVideoProcessor",
    )

    def box_extent(self, height: int, width: int) -> tuple[int, int]:
        """Return 1,000 for both sides of any image."""
        return _EXTENT, _EXTENT

    def write_coordinates(self, coordinates: Sequence[int]) -> str:
        """Write ``(x1,y1),(x2,y2)`` of a box, or ``(x,y)`` of a point."""
        pairs = zip(coordinates[::2], coordinates[1::2], strict=True)
        return ",".join(f"({x},{y})" for x, y in pairs)

    def write_boxes(self, entries: Sequence[Mapping[str, Any]]) -> str:
        """Write boxes and points one after another, each behind its ``label`` if it has one.

        Raises:
            ValueError: if an entry has anything else, for which there is no place.
        """
        written = []
        for entry in entries:
            other = entry.keys() - {"bbox_2d", "point_2d", "label"}
            if other:
                raise ValueError(f"Qwen2-VL's boxes have no place for {sorted(other)}: remove them")
            label = entry.get("label")
            coordinates = self.write_coordinates(entry.get("bbox_2d") or entry["point_2d"])
            ref = "" if label is None else f"<|object_ref_start|>{label}<|object_ref_end|>"
            written.append(f"{ref}<|box_start|>{coordinates}<|box_end|>")
        return "".join(written)


def boxes_in_original(text: str, original_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Find the boxes and points in a generated text, in pixels of the user's image.

    Args:
        text: what the model wrote.
        original_size: height and width of the user's upright image in pixels.

    Returns:
        For each ``bbox_2d`` [x1, y1, x2, y2] or ``point_2d`` [x, y], float, and its ``label`` if
        it has one.
    """
    height, width = original_size
    found = []
    for match in _WRITTEN.finditer(text):
        numbers = [int(n) for n in match.groups()[1:] if n is not None]
        values = [n * (height if i % 2 else width) / _EXTENT for i, n in enumerate(numbers)]
        label = {} if match["label"] is None else {"label": match["label"]}
        found.append({"bbox_2d" if len(values) == 4 else "point_2d": values, **label})
    return found
