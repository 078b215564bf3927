"""How Qwen2.5-VL sees images and videos."""

from torchtune_vl.media import Geometry

# Of every published checkpoint; transformers' class default for max_pixels is smaller (1,003,520)
GEOMETRY = Geometry(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    window_size=4,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    min_pixels=3136,
    max_pixels=12845056,
)
