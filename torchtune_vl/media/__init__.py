"""Files, URLs and bytes to pixels; knows no model."""

from torchtune_vl.media._sources import RemoteLimits

__all__ = ["RemoteLimits"]
