"""What a vision encoder takes pixels as."""

from dataclasses import dataclass

CHANNELS = 3  # of RGB


@dataclass(frozen=True)
class Geometry:
    """How a family of models cuts and normalizes images and videos.

    Args:
        patch_size: pixels along a side of a patch, an even number.
        temporal_patch_size: frames of a patch.
        merge_size: patches along a side of a unit, the square that becomes one token.
        window_size: units along a side of a window of attention; None where all layers attend over
            whole frames.
        mean: of each RGB channel, for values in [0, 1].
        std: standard deviation of each, likewise.
        min_pixels: smallest area of an image after resizing, unless a setting says otherwise.
        max_pixels: largest area, likewise.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int

    @property
    def unit(self) -> int:
        """Pixels along a side of a unit: what sides of resized images are multiples of."""
        return self.merge_size * self.patch_size

    @property
    def values_per_patch(self) -> int:
        """Numbers of a patch with all of its frames."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2
