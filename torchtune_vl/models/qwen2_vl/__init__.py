"""What Qwen2-VL (arXiv 2409.12191) is: its geometry, tensors, dimensions, transform and boxes."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from torchtune_vl.chat import ChatTransform, ProcessorClasses
from torchtune_vl.chat._boxes import to_original
from torchtune_vl.files._json import JsonObject
from torchtune_vl.models._config_json import VISION_DEFAULTS, common_dimensions, support_only
from torchtune_vl.models._registry import Family, geometry, tensor_names

GEOMETRY = geometry(window_size=None)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by a sigmoid (arXiv 1606.08415, section 2; transformers' ``QuickGELUActivation``)."""
    return x * torch.sigmoid(1.702 * x)


_VISION_DEFAULTS = VISION_DEFAULTS | {"embed_dim": 1280, "hidden_act": "quick_gelu", "mlp_ratio": 4}


def _dimensions(config: JsonObject) -> dict[str, Any]:
    vision = config.part("vision_config").over(_VISION_DEFAULTS)
    # The published files say in_chans, transformers' class in_channels
    channels = "in_chans" if "in_chans" in vision else "in_channels"
    keys: dict[str, Any] = {"width": "embed_dim", "out": "hidden_size", "channels": channels}
    dimensions = common_dimensions(config, vision, **keys)
    support_only(vision, hidden_act="quick_gelu", spatial_merge_size=GEOMETRY.merge_size)
    hidden = int(dimensions["vision_embed_dim"] * vision.number("mlp_ratio", 0.1, 100))
    return {**dimensions, "vision_intermediate_dim": hidden}


# What the width and the height of any image are in boxes (arXiv 2409.12191, section 2.2)
_EXTENT = 1000
_PAIR = r"\(([0-9]{1,9}),\s*([0-9]{1,9})\)"
_WRITTEN = re.compile(
    r"(?:<\|object_ref_start\|>(?P<label>.*?)<\|object_ref_end\|>)?"
    rf"<\|box_start\|>{_PAIR}(?:,\s*{_PAIR})?<\|box_end\|>",
    re.DOTALL,
)
_COORDINATES = re.compile(rf"{_PAIR}(?:,\s*{_PAIR})?")


class Qwen2VLTransform(ChatTransform):
    """The transform of conversations for Qwen2-VL: one temporal position for each step of a video.

    Arguments are those of :class:`~torchtune_vl.chat.ChatTransform`. Boxes are written in
    thousandths of the image between ``<|box_start|>`` and ``<|box_end|>``, behind their label
    between ``<|object_ref_start|>`` and ``<|object_ref_end|>`` (arXiv 2409.12191, section 2.2).
    """

    geometry = GEOMETRY
    processors = ProcessorClasses(
        "Qwen2VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"
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

        Raises ``ValueError`` if an entry has anything else, for which there is no place.
        """
        written = []
        for entry in entries:
            if other := entry.keys() - {"bbox_2d", "point_2d", "label"}:
                raise ValueError(f"Qwen2-VL's boxes have no place for {sorted(other)}: remove them")
            label = entry.get("label")
            coordinates = self.write_coordinates(entry.get("bbox_2d") or entry["point_2d"])
            ref = "" if label is None else f"<|object_ref_start|>{label}<|object_ref_end|>"
            written.append(f"{ref}<|box_start|>{coordinates}<|box_end|>")
        return "".join(written)

    def read_boxes(self, text: str) -> list[dict[str, Any]]:
        """Find the boxes and points of a text, in thousandths, with their labels."""
        return _boxes_in(text)

    def read_coordinates(self, text: str) -> list[list[float]]:
        """Find ``(x1,y1),(x2,y2)`` and ``(x,y)``, wherever they stand."""
        return [_numbers(match.groups()) for match in _COORDINATES.finditer(text)]


def boxes_in_original(text: str, original_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Find the boxes and points in a generated text, in pixels of the user's upright image.

    ``original_size`` is its height and width. Returns for each ``bbox_2d`` [x1, y1, x2, y2] or
    ``point_2d`` [x, y], float, and its ``label`` if it has one.
    """
    return to_original(_boxes_in(text), original_size, (_EXTENT, _EXTENT))


def _boxes_in(text: str) -> list[dict[str, Any]]:
    found = []
    for match in _WRITTEN.finditer(text):
        numbers = _numbers(match.groups()[1:])
        label = {} if match["label"] is None else {"label": match["label"]}
        found.append({"bbox_2d" if len(numbers) == 4 else "point_2d": numbers, **label})
    return found


def _numbers(groups: Sequence[str | None]) -> list[float]:
    return [int(number) for number in groups if number is not None]


FAMILY = Family(
    name="Qwen2-VL",
    package="qwen2_vl",
    names=tensor_names("Qwen2-VL", norm_bias=True, fc1="w1", fc2="w2"),
    geometry=GEOMETRY,
    # After transformers' Qwen2VisionTransformerPretrainedModel
    architecture={
        "max_seq_len": 32768,
        "vision_intermediate_dim": 5120,
        "vision_norm": partial(nn.LayerNorm, eps=1e-6),
        "vision_activation": _quick_gelu,
        "vision_gated": False,
    },
    # Layers, heads, of keys, width, feed-forward, vocabulary, tied, encoder's feed-forward
    sizes={
        "2b": (28, 12, 2, 1536, 8960, 151936, True, 5120),
        "7b": (28, 28, 4, 3584, 18944, 152064, False, 5120),
        "72b": (80, 64, 8, 8192, 29568, 152064, False, 5120),
    },
    dimensions=_dimensions,
    transform=Qwen2VLTransform,
)
__all__ = ["GEOMETRY", "Qwen2VLTransform", "boxes_in_original", *FAMILY.functions]
__getattr__ = FAMILY.function
__dir__ = __all__.copy
