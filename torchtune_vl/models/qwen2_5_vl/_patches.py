"""Pixels to the flat patches that Qwen2.5-VL's vision encoder reads.

Shapes: T frames, H height and W width in pixels, C colour channels, N patches, P pixels of a patch
along both sides, F frames of a patch that differ: 1 for an image, 2 for a video.
"""

from collections.abc import Sequence
from functools import lru_cache

import numba
import numpy as np

from torchtune_vl.media._images import Backend
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE

# Of every published checkpoint
PATCH_SIZE = 14
TEMPORAL_PATCH_SIZE = 2
SQUARE = MERGE_SIZE * PATCH_SIZE
CHANNELS = 3
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def patchify(frames_THWC: np.ndarray) -> np.ndarray:
    """Cuts frames into flat patches: ``patchify`` of transformers' Qwen2-VL processors.

    The 2 x 2 patches that become one token are neighbours in the result; these squares follow each
    other row by row.

    Args:
        frames_THWC (np.ndarray): uint8 [T, H, W, 3]; T is 1 for an image or even for a video, H
            and W are multiples of 28.

    Returns:
        np.ndarray: uint8 [N, 3 * F * P], where a video's patches hold two frames and an image's
        one: the copy along time is left out.
    """
    frames, height, width, channels = frames_THWC.shape
    per_patch = min(frames, TEMPORAL_PATCH_SIZE)
    count = frames // per_patch * (height // PATCH_SIZE) * (width // PATCH_SIZE)
    patches = np.empty((count, channels, per_patch, PATCH_SIZE, PATCH_SIZE), np.uint8)
    _patchify(np.ascontiguousarray(frames_THWC), patches)
    return patches.reshape(count, -1)


def normalized_patches(
    frames_THWC: np.ndarray,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    backend: Backend = "torchvision",
) -> np.ndarray:
    """Cuts frames into patches, scales them by mean and deviation and repeats an image along time.

    The float32 operations are those of transformers, in their order:
    ``TorchvisionBackend.rescale_and_normalize`` folds the factor 255 into mean and deviation,
    ``PilBackend`` divides the pixels by it.

    Args:
        frames_THWC (np.ndarray): uint8 [T, H, W, 3] as in :func:`patchify`.
        mean (Sequence[float]): mean of each channel, for values in [0, 1].
        std (Sequence[float]): standard deviation of each channel, likewise.
        backend (Backend): which order of operations to follow.

    Returns:
        np.ndarray: float32 [N, 3 * 2 * P].
    """
    frames, height, width, channels = frames_THWC.shape
    per_patch = min(frames, TEMPORAL_PATCH_SIZE)
    divisor, means, stds = _scale(tuple(mean), tuple(std), backend)
    count = frames // per_patch * (height // PATCH_SIZE) * (width // PATCH_SIZE)
    normalized = np.empty((count, channels * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2), np.float32)
    _normalized_patches(np.ascontiguousarray(frames_THWC), divisor, means, stds, normalized)
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


@numba.njit(nogil=True, cache=True)
def _patchify(frames_THWC, patches_NCFYX):  # type: ignore[no-untyped-def]
    frames, height, width, _ = frames_THWC.shape
    count = MERGE_SIZE * width // PATCH_SIZE
    done = 0
    for t in range(0, frames, patches_NCFYX.shape[2]):
        for y in range(0, height, SQUARE):
            _cut_squares(frames_THWC, t, y, patches_NCFYX[done : done + count])
            done += count


# The operations of IEEE 754 and no check for zero, without which the loops are not vectorized
@numba.njit(nogil=True, cache=True, error_model="numpy")
def _normalized_patches(frames_THWC, divisor, means, stds, normalized):  # type: ignore[no-untyped-def]
    frames, height, width, _ = frames_THWC.shape
    per_patch = min(frames, TEMPORAL_PATCH_SIZE)
    # A row of squares at a time stays in the processor's cache between the two steps
    squares = np.empty(
        (MERGE_SIZE * width // PATCH_SIZE, CHANNELS, per_patch, PATCH_SIZE, PATCH_SIZE), np.uint8
    )
    pixels, values = squares.reshape(-1), normalized.reshape(-1)
    per_channel = np.uintp(per_patch * PATCH_SIZE**2)
    repeats = np.uintp(TEMPORAL_PATCH_SIZE // per_patch)
    to = np.uintp(0)
    for t in range(0, frames, per_patch):
        for y in range(0, height, SQUARE):
            _cut_squares(frames_THWC, t, y, squares)
            start = np.uintp(0)
            for _ in range(len(squares)):
                for c in range(CHANNELS):
                    _normalize(
                        pixels, start, values, to, per_channel, repeats, divisor, means[c], stds[c]
                    )
                    start += per_channel
                    to += repeats * per_channel


@numba.njit(nogil=True, cache=True)
def _cut_squares(frames_THWC, t, y, patches_NCFYX):  # type: ignore[no-untyped-def]
    """Cuts a row of squares, which begins at frame t and line y."""
    width = frames_THWC.shape[2]
    planes_CYX = np.empty((CHANNELS, PATCH_SIZE, width), np.uint8)
    # Two pixels at a time: a patch has an even number of them in a line
    pairs, patch_pairs = planes_CYX.view(np.uint16), patches_NCFYX.view(np.uint16)
    for f in range(patches_NCFYX.shape[2]):
        for i in range(MERGE_SIZE):
            for line in range(PATCH_SIZE):
                row = frames_THWC[t + f, y + i * PATCH_SIZE + line].reshape(-1)
                _separate(row, planes_CYX[0, line], planes_CYX[1, line], planes_CYX[2, line])
            for j in range(width // PATCH_SIZE):
                n = j // MERGE_SIZE * MERGE_SIZE**2 + i * MERGE_SIZE + j % MERGE_SIZE
                for c in range(CHANNELS):
                    for line in range(PATCH_SIZE):
                        for x in range(PATCH_SIZE // 2):
                            patch_pairs[n, c, f, line, x] = pairs[c, line, j * PATCH_SIZE // 2 + x]


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
