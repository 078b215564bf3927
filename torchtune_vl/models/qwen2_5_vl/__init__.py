"""Qwen2.5-VL (arXiv 2502.13923)."""

from typing import Any

from torchtune_vl.chat import QwenTokenizer as Qwen2_5_VLTokenizer
from torchtune_vl.models._names import builder_names
from torchtune_vl.models.qwen2_5_vl._geometry import GEOMETRY
from torchtune_vl.models.qwen2_5_vl._transform import (
    Qwen2_5_VLImageTransform,
    Qwen2_5_VLTransform,
    Qwen2_5_VLVideoTransform,
)
from torchtune_vl.models.qwen2_5_vl._transform import boxes_of_answer as boxes_in_original

qwen2_5_vl_transform = Qwen2_5_VLTransform

__all__ = [
    "GEOMETRY",
    "Qwen2_5_VLImageTransform",
    "Qwen2_5_VLTokenizer",
    "Qwen2_5_VLTransform",
    "Qwen2_5_VLVideoTransform",
    "boxes_in_original",
    "qwen2_5_vl_transform",
    *builder_names("qwen2_5_vl", ("3b", "7b", "32b", "72b")),
]


def __getattr__(name: str) -> Any:
    """Import builders when they are asked for: torchtune, on which they stand, takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchtune_vl.models.qwen2_5_vl._family import BUILDERS

    return BUILDERS[name]


def __dir__() -> list[str]:
    return __all__
