"""Pixels to the flat patches that Qwen2.5-VL's vision encoder reads.

Shapes: T frames, H height and W width in pixels, C colour channels, N patches, P pixels of a patch
along both sides, F frames of a patch that differ: 1 for an image, 2 for a video.
"""

from collections.abc import Sequence
from itertools import product

import numba
import numpy as np

from torchtune_vl.media._images import Backend
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE

# Of every published checkpoint
PATCH_SIZE = 14
TEMPORAL_PATCH_SIZE = 2
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
    _patchify(frames_THWC, patches)
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
    # transformers' PIL backend multiplies by 1 / 255 in float64 and rounds to float32: for all 256
    # levels the same number as a division by 255
    white, unit = np.float32(255), np.float32(1)
    divisor, factor = (white, unit) if backend == "pil" else (unit, white)
    per_channel = per_patch * PATCH_SIZE**2
    means, stds = (
        np.repeat(np.array(values, np.float32) * factor, per_channel) for values in (mean, std)
    )

    # A row of squares at a time stays in the processor's cache between the two steps
    square = MERGE_SIZE * PATCH_SIZE
    count = width // PATCH_SIZE * MERGE_SIZE
    row = np.empty((count, channels, per_patch, PATCH_SIZE, PATCH_SIZE), np.uint8)
    normalized = np.empty(
        (
            frames // per_patch * (height // square),
            count,
            channels * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2,
        ),
        np.float32,
    )
    starts = product(range(0, frames, per_patch), range(0, height, square))
    for (t, y), normalized_row in zip(starts, normalized, strict=True):
        _patchify(frames_THWC[t : t + per_patch, y : y + square], row)
        _normalize(row.reshape(count, -1), divisor, means, stds, normalized_row)
    return normalized.reshape(-1, normalized.shape[-1])


@numba.njit(nogil=True, cache=True)
def _patchify(frames_THWC, patches_NCFYX):  # type: ignore[no-untyped-def]
    frames, height, width, _ = frames_THWC.shape
    per_patch = patches_NCFYX.shape[2]
    rows, across = height // PATCH_SIZE, width // PATCH_SIZE
    for t in range(frames // per_patch):
        for i in range(rows):
            first = (t * rows + i // MERGE_SIZE * MERGE_SIZE) * across + i % MERGE_SIZE * MERGE_SIZE
            for f in range(per_patch):
                for y in range(PATCH_SIZE):
                    row_WC = frames_THWC[t * per_patch + f, i * PATCH_SIZE + y]
                    for j in range(across):
                        n = first + j // MERGE_SIZE * MERGE_SIZE**2 + j % MERGE_SIZE
                        for x in range(PATCH_SIZE):
                            for c in range(3):
                                patches_NCFYX[n, c, f, y, x] = row_WC[j * PATCH_SIZE + x, c]


# The operations of IEEE 754 and no check for zero, without which the loops are not vectorized
@numba.njit(nogil=True, cache=True, error_model="numpy")
def _normalize(patches, divisor, mean, std, normalized):  # type: ignore[no-untyped-def]
    width = patches.shape[1]
    per_channel = width // 3
    repeats = normalized.shape[1] // width
    row = np.empty(width, np.float32)
    for n in range(len(patches)):
        for i in range(width):
            row[i] = (np.float32(patches[n, i]) / divisor - mean[i]) / std[i]
        for c in range(3):
            for r in range(repeats):
                start = (c * repeats + r) * per_channel
                for i in range(per_channel):
                    normalized[n, start + i] = row[c * per_channel + i]
