"""What Qwen2.5-VL (arXiv 2502.13923) is: its geometry, tensors, dimensions and transforms."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchtune_vl.chat import ChatTransform, ProcessorClasses
from torchtune_vl.chat import QwenTokenizer as Qwen2_5_VLTokenizer
from torchtune_vl.chat import boxes_in_original as boxes_by_sizes
from torchtune_vl.chat._processor_files import read_if_there
from torchtune_vl.files._json import JsonObject
from torchtune_vl.media import ImageTransform, VideoTransform
from torchtune_vl.models import _config_json as config_json
from torchtune_vl.models._registry import Family, geometry, tensor_names

GEOMETRY = geometry(window_size=4)
_VISION_DEFAULTS: dict[str, Any] = {
    **config_json.VISION_DEFAULTS,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}


def _dimensions(config: JsonObject) -> dict[str, Any]:
    vision = config.part("vision_config").over(_VISION_DEFAULTS)
    keys: dict[str, Any] = {"width": "hidden_size", "out": "out_hidden_size"}
    dimensions = config_json.common_dimensions(config, vision, **keys)
    size = GEOMETRY.merge_size
    window = (GEOMETRY.window_size or 1) * size * dimensions["patch_size"]
    supported = {"hidden_act": "silu", "spatial_merge_size": size, "window_size": window}
    config_json.support_only(vision, **supported)
    last = dimensions["vision_num_layers"] - 1
    layers = config_json.whole_numbers(vision, "fullatt_block_indexes", 0, last)
    width = vision.whole("intermediate_size", most=config_json.WIDEST)
    return {**dimensions, "vision_intermediate_dim": width, "full_attention_layers": layers}


class Qwen2_5_VLImageTransform(ImageTransform):
    """:class:`~torchtune_vl.media.ImageTransform` with Qwen2.5-VL's sizes of patches."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(GEOMETRY, **settings)


class Qwen2_5_VLVideoTransform(VideoTransform):
    """:class:`~torchtune_vl.media.VideoTransform` with Qwen2.5-VL's sizes of patches."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(GEOMETRY, **settings)


class Qwen2_5_VLTransform(ChatTransform):
    """The transform of conversations for Qwen2.5-VL, whose positions of videos follow the clock.

    "Qwen2.5-VL Technical Report" (arXiv 2502.13923, sections 2.1.3 and 2.2). Arguments are those of
    :class:`~torchtune_vl.chat.ChatTransform`; boxes are written in pixels of the resized image.
    """

    geometry = GEOMETRY
    processors = ProcessorClasses(
        "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"
    )
    default_tokens_per_second = 2

    @classmethod
    def settings_of(cls, directory: Path) -> dict[str, Any]:
        """Read the settings of a checkpoint directory, ``tokens_per_second`` of its config too."""
        settings = super().settings_of(directory)
        config = read_if_there(directory / "config.json")
        if config is not None:
            # transformers' default of its config is not what is published
            vision = config.part("vision_config").over({"tokens_per_second": 4})
            settings["tokens_per_second"] = vision.whole("tokens_per_second", most=1_000)
        return settings


def boxes_in_original(
    text: str, original_size: tuple[int, int], grid_thw: torch.Tensor
) -> list[dict[str, Any]]:
    """Find the boxes and points in a generated text, in pixels of the user's upright image.

    ``original_size`` is its height and width, ``grid_thw``, int64 [3], the patches that the model
    saw, from ``encoder_input``. Returns entries with ``bbox_2d`` or ``point_2d``, in float pixels.
    """
    rows, columns = (int(side) * GEOMETRY.patch_size for side in grid_thw[1:])
    return boxes_by_sizes(text, original_size, (rows, columns))


FAMILY = Family(
    name="Qwen2.5-VL",
    package="qwen2_5_vl",
    names=tensor_names("Qwen2.5-VL", norm_bias=False, gate_proj="w1", down_proj="w2", up_proj="w3"),
    geometry=GEOMETRY,
    architecture={
        "max_seq_len": 128000,
        "full_attention_layers": (7, 15, 23, 31),
        "vision_norm": partial(nn.RMSNorm, eps=1e-6),
        "vision_activation": F.silu,
        "vision_gated": True,
    },
    # Layers, heads, of keys, width, feed-forward, vocabulary, tied, encoder's feed-forward
    sizes={
        "3b": (36, 16, 2, 2048, 11008, 151936, True, 3420),
        "7b": (28, 28, 4, 3584, 18944, 152064, False, 3420),
        "32b": (64, 40, 8, 5120, 27648, 152064, False, 3456),
        "72b": (80, 64, 8, 8192, 29568, 152064, False, 3456),
    },
    dimensions=_dimensions,
    transform=Qwen2_5_VLTransform,
)
qwen2_5_vl_transform = Qwen2_5_VLTransform
__all__ = [
    "GEOMETRY",
    "Qwen2_5_VLImageTransform",
    "Qwen2_5_VLTokenizer",
    "Qwen2_5_VLTransform",
    "Qwen2_5_VLVideoTransform",
    "boxes_in_original",
    "qwen2_5_vl_transform",
    *FAMILY.functions,
]
__getattr__ = FAMILY.function
__dir__ = __all__.copy
