"""Resized frames, and the flat patches of them that a vision encoder reads.

Shapes: T frames, H height and W width in pixels, C colour channels, N patches, P pixels of a patch,
F frames of a patch that differ: 1 for an image, 2 for a video; R copies of them along time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from torchtune_vl._numba import compiled
from torchtune_vl.media._images import Backend

CHANNELS = 3  # of RGB
MAX_ASPECT_RATIO = 200

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Geometry:
    """How a family of models cuts and normalizes images and videos."""

    patch_size: int  # pixels along a side of a patch, an even number
    temporal_patch_size: int  # frames of a patch
    merge_size: int  # patches along a side of a unit, the square that becomes one token
    window_size: int | None  # units along a side of a window of attention; None: whole frames
    mean: tuple[float, ...]  # of each RGB channel, for values in [0, 1]
    std: tuple[float, ...]  # standard deviation of each, likewise
    min_pixels: int  # smallest area of an image after resizing, unless a setting says otherwise
    max_pixels: int  # largest area, likewise

    @property
    def unit(self) -> int:
        """Pixels along a side of a unit, of which sides of resized images are multiples."""
        return self.merge_size * self.patch_size

    @property
    def values_per_patch(self) -> int:
        """Numbers of a patch with all of its frames."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2


def smart_resize(
    height: int, width: int, unit: int, min_pixels: float, max_pixels: float, frames: int = 1
) -> Size:
    """Find the size that an image is resized to: transformers' ``smart_resize``.

    Both sides become multiples of ``unit``, at least one of it, the area moves between
    ``min_pixels`` and ``max_pixels``, and the aspect ratio stays as near as these allow. Of several
    frames it is the area of all of them, which an even number counts as. ``ValueError`` if one side
    is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        ratio = f"one side is more than {MAX_ASPECT_RATIO} times the other"
        raise ValueError(f"height {height} and width {width}: {ratio}; crop or pad the image")
    sides, area = (height, width), frames * height * width
    new = [round(side / unit) * unit for side in sides]
    new_area = math.prod(new) * (round(frames / 2) * 2 or 1)
    # The order of the float operations decides between two multiples of unit in close cases
    if new_area > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        new = [max(unit, math.floor(side / shrink / unit) * unit) for side in sides]
    elif new_area < min_pixels:
        grow = math.sqrt(min_pixels / area)
        new = [math.ceil(side * grow / unit) * unit for side in sides]
    return new[0], new[1]


def resize(image_CHW: torch.Tensor, height: int, width: int, backend: Backend) -> np.ndarray:
    """Resize uint8 by bicubic interpolation with antialiasing, as the transformers backend does.

    The result is [H, W, C], which is also the fastest layout of the input's memory.
    """
    image_HWC = image_CHW.permute(1, 2, 0)
    if image_HWC.shape[:2] == (height, width):
        return image_HWC.numpy()
    if backend == "pil":
        image = Image.fromarray(image_HWC.numpy())
        return np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    # Only a batch dimension that was added in front of HWC has the strides by which torch
    # recognizes channels-last memory, where it needs half the time for the same pixels
    batch_NCHW = image_HWC.unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(batch_NCHW, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


# What pixels are divided by, what is then subtracted [C], and what the rest is divided by [C]
Normalization = tuple[np.float32, np.ndarray, np.ndarray]


@lru_cache
def normalization_by(
    mean: tuple[float, ...], std: tuple[float, ...], backend: Backend = "torchvision"
) -> Normalization:
    """The float32 operations of transformers, in their order, for mean and deviation of [0, 1].

    ``TorchvisionBackend.rescale_and_normalize`` folds the factor 255 into mean and deviation,
    ``PilBackend`` multiplies pixels by 1 / 255 in float64 and rounds to float32, which for all 256
    levels is the same number as a division.
    """
    white, one = np.float32(255), np.float32(1)
    divisor, factor = (white, one) if backend == "pil" else (one, white)
    return divisor, np.array(mean, np.float32) * factor, np.array(std, np.float32) * factor


_NONE = normalization_by((0,) * CHANNELS, (1,) * CHANNELS)


def patchify(
    frames_THWC: np.ndarray,
    geometry: Geometry,
    normalization: Normalization | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Cut frames into flat patches: ``patchify`` of transformers' Qwen2-VL processors.

    The patches of a unit, which become one token, are neighbours; units follow row by row.

    Args:
        frames_THWC: uint8; T is 1 for an image or a multiple of ``temporal_patch_size`` for a
            video, H and W are multiples of ``unit``.
        geometry: sizes of patches.
        normalization: what is done to the pixels: float32 [N, C * R * F * P], an image repeated
            along time. Without it the result is uint8 [N, C * F * P], an image only once.
        out: contiguous memory for the result.
    """
    frames, height, width, _ = frames_THWC.shape
    size = geometry.patch_size
    per_patch = min(frames, geometry.temporal_patch_size)
    repeats = geometry.temporal_patch_size // per_patch if normalization else 1
    count = frames // per_patch * (height // size) * (width // size)
    values = CHANNELS * per_patch * size**2
    if out is None:
        out = np.empty((count, repeats * values), np.float32 if normalization else np.uint8)
    pixels, normalized = out, np.empty(0, np.float32)
    if normalization:  # of a row of units at a time, which stays in the processor's cache
        pixels, normalized = np.empty(geometry.merge_size * width // size * values, np.uint8), out
    _loops(size, geometry.merge_size)(
        np.ascontiguousarray(frames_THWC),
        pixels.reshape(-1, CHANNELS, per_patch, size, size),
        *(normalization or _NONE),
        normalized.reshape(-1, CHANNELS, repeats, per_patch * size**2),
    )
    return out


def unpatchify(
    patches: np.ndarray,
    grid: tuple[int, int, int],
    geometry: Geometry,
    normalization: Normalization | None = None,
) -> np.ndarray:
    """Put patches together to the frames that :func:`patchify` cut.

    Args:
        patches: of one medium, [N, C * R * F * P].
        grid: how many of them there are along time, height and width.
        geometry: sizes of patches.
        normalization: what was done to the pixels; None for uint8 patches.

    Returns:
        uint8 [T, H, W, C], an image as often as its patches hold it.
    """
    steps, rows, columns = grid
    size, merge = geometry.patch_size, geometry.merge_size
    pixels_NCP = patches.reshape(len(patches), CHANNELS, -1)
    if normalization:
        divisor, mean, std = normalization
        levels = (pixels_NCP * std[:, None] + mean[:, None]) * divisor
        pixels_NCP = np.rint(levels).astype(np.uint8)
    units = steps, rows // merge, columns // merge, merge, merge, CHANNELS, -1, size, size
    # To step, frame, and what makes a line, then a pixel of it
    frames = pixels_NCP.reshape(units).transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return frames.reshape(-1, rows * size, columns * size, CHANNELS)


@lru_cache
def _loops(patch_size: int, merge_size: int) -> Callable[..., None]:
    """Compile the loops for one size of patches.

    Sizes that the compiler knows make the innermost loops, over the pixels of a line, vector
    instructions; as arguments they would cost a third of the speed.
    """
    half = patch_size // 2

    # The inner function is a part of this one: compiled apart, it would be in its key of numba's
    # cache, by an id that is new in each process, and so nothing would be found there
    @compiled
    def cut(frames_THWC, pixels_NCFYX, divisor, means, stds, values_NCRP):  # type: ignore[no-untyped-def]
        """Cuts frames into ``pixels``, again and again the same ones if they are normalized."""
        frames, height, width, _ = frames_THWC.shape
        count = merge_size * width // patch_size
        planes_CYX = np.empty((CHANNELS, patch_size, width), np.uint8)
        # Two pixels at a time: a patch has an even number of them in a line
        pairs = planes_CYX.view(np.uint16)

        def cut_units(t, y, patches_NCFYX):  # type: ignore[no-untyped-def]
            """Cuts a row of units, which begins at frame t and line y."""
            patch_pairs = patches_NCFYX.view(np.uint16)
            for f in range(patches_NCFYX.shape[2]):
                for i in range(merge_size):
                    for line in range(patch_size):
                        row = frames_THWC[t + f, y + i * patch_size + line].reshape(-1)
                        # Unsigned indices: numba would let signed ones count from the end, and LLVM
                        # not vectorize the loop
                        for x in range(np.uintp(width)):
                            first = np.uintp(CHANNELS) * x
                            planes_CYX[0, line, x] = row[first]
                            planes_CYX[1, line, x] = row[first + np.uintp(1)]
                            planes_CYX[2, line, x] = row[first + np.uintp(2)]
                    for j in range(width // patch_size):
                        n = j // merge_size * merge_size**2 + i * merge_size + j % merge_size
                        for c in range(CHANNELS):
                            for line in range(patch_size):
                                for x in range(half):
                                    patch_pairs[n, c, f, line, x] = pairs[c, line, j * half + x]

        done = 0
        for t in range(0, frames, pixels_NCFYX.shape[2]):
            for y in range(0, height, merge_size * patch_size):
                start = done % len(pixels_NCFYX)
                units = pixels_NCFYX[start : start + count]
                cut_units(t, y, units)
                if len(values_NCRP):
                    flat_NCP = units.reshape(count, CHANNELS, -1)
                    _normalize(flat_NCP, divisor, means, stds, values_NCRP[done : done + count])
                done += count

    return cut


# The operations of IEEE 754 and no check for zero, without which the loops are not vectorized
@partial(compiled, error_model="numpy")
def _normalize(pixels_NCP, divisor, means, stds, values_NCRP):  # type: ignore[no-untyped-def]
    size = np.uintp(pixels_NCP.shape[2])
    for n in range(np.uintp(len(pixels_NCP))):
        for c in range(np.uintp(CHANNELS)):
            mean, std = means[c], stds[c]
            if divisor == 1:  # a loop of its own, in two thirds of the time
                for i in range(size):
                    values_NCRP[n, c, 0, i] = (np.float32(pixels_NCP[n, c, i]) - mean) / std
            else:
                for i in range(size):
                    level = np.float32(pixels_NCP[n, c, i]) / divisor
                    values_NCRP[n, c, 0, i] = (level - mean) / std
            for r in range(np.uintp(1), np.uintp(values_NCRP.shape[2])):
                for i in range(size):
                    values_NCRP[n, c, r, i] = values_NCRP[n, c, 0, i]
