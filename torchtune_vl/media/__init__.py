"""Files, URLs and bytes to pixels, and pixels to patches; knows no model."""

from torchtune_vl.media._augment import Augmentation
from torchtune_vl.media._patches import CHANNELS, Geometry
from torchtune_vl.media._sources import RemoteLimits
from torchtune_vl.media._transforms import ImageTransform, VideoTransform

__all__ = [
    "CHANNELS",
    "Augmentation",
    "Geometry",
    "ImageTransform",
    "RemoteLimits",
    "VideoTransform",
]
