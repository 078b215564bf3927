"""Pixels to the flat patches that a vision encoder reads.

Shapes: T frames, H height and W width in pixels, C colour channels, N patches, P pixels of a patch
along both sides, F frames of a patch that differ: 1 for an image, 2 for a video.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np

from torchtune_vl.media._geometry import CHANNELS, Geometry
from torchtune_vl.media._images import Backend


def patchify(frames_THWC: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Cuts frames into flat patches: ``patchify`` of transformers' Qwen2-VL processors.

    The patches of a unit, which become one token, are neighbours in the result; units follow each
    other row by row.

    Args:
        frames_THWC (np.ndarray): uint8 [T, H, W, 3]; T is 1 for an image or a multiple of
            ``temporal_patch_size`` for a video, H and W are multiples of ``unit``.
        geometry (Geometry): sizes of patches.

    Returns:
        np.ndarray: uint8 [N, 3 * F * P], where an image's patches hold one frame: the copy along
        time is left out.
    """
    frames, height, width, channels = frames_THWC.shape
    size = geometry.patch_size
    per_patch = min(frames, geometry.temporal_patch_size)
    count = frames // per_patch * (height // size) * (width // size)
    patches = np.empty((count, channels, per_patch, size, size), np.uint8)
    _loops_of(geometry).patchify(np.ascontiguousarray(frames_THWC), patches)
    return patches.reshape(count, -1)


def normalized_patches(
    frames_THWC: np.ndarray,
    geometry: Geometry,
    mean: Sequence[float],
    std: Sequence[float],
    backend: Backend = "torchvision",
) -> np.ndarray:
    """Cuts frames into patches, scales them by mean and deviation and repeats an image along time.

    The float32 operations are those of transformers, in their order:
    ``TorchvisionBackend.rescale_and_normalize`` folds the factor 255 into mean and deviation,
    ``PilBackend`` divides the pixels by it.

    Args:
        frames_THWC (np.ndarray): uint8 [T, H, W, 3] as in :func:`patchify`.
        geometry (Geometry): sizes of patches.
        mean (Sequence[float]): mean of each channel, for values in [0, 1].
        std (Sequence[float]): standard deviation of each channel, likewise.
        backend (Backend): which order of operations to follow.

    Returns:
        np.ndarray: float32 [N, values_per_patch].
    """
    frames, height, width, _ = frames_THWC.shape
    per_patch = min(frames, geometry.temporal_patch_size)
    divisor, means, stds = _scale(tuple(mean), tuple(std), backend)
    count = frames // per_patch * (height // geometry.patch_size) * (width // geometry.patch_size)
    normalized = np.empty((count, geometry.values_per_patch), np.float32)
    _loops_of(geometry).normalize(
        np.ascontiguousarray(frames_THWC), divisor, means, stds, normalized
    )
    return normalized


@lru_cache
def _scale(
    mean: tuple[float, ...], std: tuple[float, ...], backend: Backend
) -> tuple[np.float32, np.ndarray, np.ndarray]:
    """What pixels are divided by, what is then subtracted, and what the rest is divided by."""
    # transformers' PIL backend multiplies by 1 / 255 in float64 and rounds to float32: for all 256
    # levels the same number as a division by 255
    white, unit = np.float32(255), np.float32(1)
    divisor, factor = (white, unit) if backend == "pil" else (unit, white)
    return divisor, np.array(mean, np.float32) * factor, np.array(std, np.float32) * factor


class _Loops(NamedTuple):
    patchify: Callable[..., None]
    normalize: Callable[..., None]


def _loops_of(geometry: Geometry) -> _Loops:
    return _compile_loops(geometry.patch_size, geometry.temporal_patch_size, geometry.merge_size)


@lru_cache
def _compile_loops(patch_size: int, temporal_patch_size: int, merge_size: int) -> Any:
    """The loops for one size of patches.

    Sizes that the compiler knows make the innermost loops, over the pixels of a line, vector
    instructions; as arguments they would cost a third of the speed.
    """
    unit = merge_size * patch_size
    half = patch_size // 2

    @numba.njit(nogil=True, cache=True)
    def cut_units(frames_THWC, t, y, patches_NCFYX):  # type: ignore[no-untyped-def]
        """Cuts a row of units, which begins at frame t and line y."""
        width = frames_THWC.shape[2]
        planes_CYX = np.empty((CHANNELS, patch_size, width), np.uint8)
        # Two pixels at a time: a patch has an even number of them in a line
        pairs, patch_pairs = planes_CYX.view(np.uint16), patches_NCFYX.view(np.uint16)
        for f in range(patches_NCFYX.shape[2]):
            for i in range(merge_size):
                for line in range(patch_size):
                    row = frames_THWC[t + f, y + i * patch_size + line].reshape(-1)
                    _separate(row, planes_CYX[0, line], planes_CYX[1, line], planes_CYX[2, line])
                for j in range(width // patch_size):
                    n = j // merge_size * merge_size**2 + i * merge_size + j % merge_size
                    for c in range(CHANNELS):
                        for line in range(patch_size):
                            for x in range(half):
                                patch_pairs[n, c, f, line, x] = pairs[c, line, j * half + x]

    @numba.njit(nogil=True, cache=True)
    def patchify(frames_THWC, patches_NCFYX):  # type: ignore[no-untyped-def]
        frames, height, width, _ = frames_THWC.shape
        count = merge_size * width // patch_size
        done = 0
        for t in range(0, frames, patches_NCFYX.shape[2]):
            for y in range(0, height, unit):
                cut_units(frames_THWC, t, y, patches_NCFYX[done : done + count])
                done += count

    # The operations of IEEE 754 and no check for zero, without which the loops are not vectorized
    @numba.njit(nogil=True, cache=True, error_model="numpy")
    def normalize(frames_THWC, divisor, means, stds, normalized):  # type: ignore[no-untyped-def]
        frames, height, width, _ = frames_THWC.shape
        per_patch = min(frames, temporal_patch_size)
        # A row of units at a time stays in the processor's cache between the two steps
        units = np.empty(
            (merge_size * width // patch_size, CHANNELS, per_patch, patch_size, patch_size),
            np.uint8,
        )
        pixels, values = units.reshape(-1), normalized.reshape(-1)
        per_channel = np.uintp(per_patch * patch_size**2)
        repeats = np.uintp(temporal_patch_size // per_patch)
        to = np.uintp(0)
        for t in range(0, frames, per_patch):
            for y in range(0, height, unit):
                cut_units(frames_THWC, t, y, units)
                start = np.uintp(0)
                for _ in range(len(units)):
                    for c in range(CHANNELS):
                        _normalize(
                            pixels,
                            start,
                            values,
                            to,
                            per_channel,
                            repeats,
                            divisor,
                            means[c],
                            stds[c],
                        )
                        start += per_channel
                        to += repeats * per_channel

    return _Loops(patchify, normalize)


# Unsigned indices: numba would let signed ones count from the end, and LLVM not vectorize the loop
@numba.njit(nogil=True, cache=True)
def _separate(row, red, green, blue):  # type: ignore[no-untyped-def]
    for x in range(np.uintp(len(red))):
        first = np.uintp(CHANNELS) * x
        red[x] = row[first]
        green[x] = row[first + np.uintp(1)]
        blue[x] = row[first + np.uintp(2)]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _normalize(pixels, start, values, to, size, repeats, divisor, mean, std):  # type: ignore[no-untyped-def]
    for i in range(size):
        values[to + i] = (np.float32(pixels[start + i]) / divisor - mean) / std
    for r in range(np.uintp(1), repeats):
        for i in range(size):
            values[to + r * size + i] = values[to + i]
