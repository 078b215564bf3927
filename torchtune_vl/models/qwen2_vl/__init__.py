"""Qwen2-VL (arXiv 2409.12191)."""

from typing import Any

from torchtune_vl.models._names import builder_names
from torchtune_vl.models.qwen2_vl._transform import GEOMETRY, Qwen2VLTransform, boxes_in_original

__all__ = [
    "GEOMETRY",
    "Qwen2VLTransform",
    "boxes_in_original",
    *builder_names("qwen2_vl", ("2b", "7b", "72b")),
]


def __getattr__(name: str) -> Any:
    """Import builders when they are asked for: torchtune, on which they stand, takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchtune_vl.models.qwen2_vl._family import BUILDERS

    return BUILDERS[name]


def __dir__() -> list[str]:
    return __all__
