"""What Qwen3-VL (arXiv 2511.21631) is."""

from torchtune_vl.models.qwen3_vl._transform import (
    GEOMETRY,
    Qwen3_VLImageTransform,
    Qwen3_VLTransform,
    Qwen3_VLVideoTransform,
)

__all__ = [
    "GEOMETRY",
    "Qwen3_VLImageTransform",
    "Qwen3_VLTransform",
    "Qwen3_VLVideoTransform",
]
