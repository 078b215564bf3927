"""Qwen2-VL (arXiv 2409.12191)."""

from typing import Any

from torchtune_vl.models.qwen2_vl._qwen2_vl import (
    FAMILY,
    GEOMETRY,
    Qwen2VLTransform,
    boxes_in_original,
)

_FUNCTIONS = FAMILY.functions()

__all__ = ["GEOMETRY", "Qwen2VLTransform", "boxes_in_original", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _FUNCTIONS[name]()


def __dir__() -> list[str]:
    return __all__
