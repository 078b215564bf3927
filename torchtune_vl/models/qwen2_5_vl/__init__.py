"""Qwen2.5-VL (arXiv 2502.13923)."""

from typing import Any

from torchtune_vl.chat import QwenTokenizer as Qwen2_5_VLTokenizer
from torchtune_vl.models.qwen2_5_vl._qwen2_5_vl import (
    FAMILY,
    GEOMETRY,
    Qwen2_5_VLImageTransform,
    Qwen2_5_VLTransform,
    Qwen2_5_VLVideoTransform,
    boxes_in_original,
)

qwen2_5_vl_transform = Qwen2_5_VLTransform
_FUNCTIONS = FAMILY.functions()

__all__ = [
    "GEOMETRY",
    "Qwen2_5_VLImageTransform",
    "Qwen2_5_VLTokenizer",
    "Qwen2_5_VLTransform",
    "Qwen2_5_VLVideoTransform",
    "boxes_in_original",
    "qwen2_5_vl_transform",
    *_FUNCTIONS,
]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _FUNCTIONS[name]()


def __dir__() -> list[str]:
    return __all__
