"""Files, URLs and bytes to pixels, and pixels to patches; knows no model."""

from torchtune_vl.media._geometry import CHANNELS, Geometry
from torchtune_vl.media._image_transform import ImageTransform
from torchtune_vl.media._sources import RemoteLimits
from torchtune_vl.media._video_transform import VideoTransform

__all__ = ["CHANNELS", "Geometry", "ImageTransform", "RemoteLimits", "VideoTransform"]
