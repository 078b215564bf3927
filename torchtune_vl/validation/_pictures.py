"""What an image looks like to both sides, and where they differ, as small PNG files."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from torchtune_vl.media import CHANNELS, Geometry
from torchtune_vl.validation._reference import Processed
from torchtune_vl.validation._report import Outcome, Picture

_LONGEST_SIDE = 360
# Black, violet, red, orange, yellow, white
_HEAT = np.array(
    [(0, 0, 0), (80, 10, 110), (190, 40, 80), (240, 110, 20), (250, 210, 60), (255, 255, 255)]
)


def pictures_of(
    ours: Outcome[Processed], reference: Outcome[Processed], geometry: Geometry
) -> list[Picture]:
    """Draw the first frame, and the difference map if there is a difference.

    Args:
        ours: our patches and grid.
        reference: transformers'.
        geometry: sizes of patches.

    Returns:
        The pictures; none if both sides refuse the input.
    """
    seen = [side.value for side in (reference, ours) if side.error is None]
    if not seen:
        return []
    levels = _to_levels(_frame(*seen[0], geometry), geometry)
    size = levels.shape[1::-1]
    pictures = [Picture("the resized image", _png(levels, size, Image.Resampling.BOX))]
    if len(seen) == 2 and torch.equal(seen[0].grid_thw, seen[1].grid_thw):
        pictures += _difference_map(ours.value.patches, *reference.value, geometry)
    return pictures


def _difference_map(
    ours: torch.Tensor, reference: torch.Tensor, grid_thw: torch.Tensor, geometry: Geometry
) -> list[Picture]:
    if torch.equal(ours, reference):
        return []
    difference = (ours.double() - reference.double()).abs()
    steps = difference.unflatten(0, (int(grid_thw[0, 0]), -1)).amax((1, 2))
    worst = int(steps.argmax())
    image = _frame(difference, grid_thw, geometry, worst).max(axis=-1)
    caption = (
        f"difference: white is the largest, {image.max():.3g}; {np.mean(image > 0):.1%} of the "
        "pixels differ"
    )
    if len(steps) > 1:
        caption += f" (time step {worst + 1} of {len(steps)})"
    heat = _heat(_pool(image / image.max()))
    return [Picture(caption, _png(heat, image.shape[::-1], Image.Resampling.NEAREST))]


def _frame(
    patches: torch.Tensor, grid_thw: torch.Tensor, geometry: Geometry, step: int = 0
) -> np.ndarray:
    """A frame put together from its patches, [H, W, 3]."""
    t, h, w = grid_thw[0].tolist()
    m, p, frames = geometry.merge_size, geometry.patch_size, geometry.temporal_patch_size
    blocks = patches.reshape(t, h // m, w // m, m, m, CHANNELS, frames, p, p)
    frame = blocks[step, ..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4)
    return frame.reshape(h * p, w * p, CHANNELS).float().numpy()


def _to_levels(normalized: np.ndarray, geometry: Geometry) -> np.ndarray:
    levels = (normalized * np.array(geometry.std) + np.array(geometry.mean)) * 255
    return levels.round().clip(0, 255).astype(np.uint8)


def _pool(image: np.ndarray) -> np.ndarray:
    """Reduce to thumbnail size by the maximum, so that single pixels stay visible."""
    factor = -(-max(image.shape) // _LONGEST_SIDE)
    rows, columns = (-side % factor for side in image.shape)
    padded = np.pad(image, ((0, rows), (0, columns)))
    blocks = padded.reshape(padded.shape[0] // factor, factor, -1, factor)
    return blocks.max(axis=(1, 3))


def _heat(values: np.ndarray) -> np.ndarray:
    # The root lifts small differences out of the dark
    place = np.sqrt(values) * (len(_HEAT) - 1)
    channels = [np.interp(place, range(len(_HEAT)), _HEAT[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _png(pixels: np.ndarray, size: Sequence[int], resample: Image.Resampling) -> bytes:
    """Draw pixels of an image of a size, reduced to a thumbnail."""
    scale = min(1, _LONGEST_SIDE / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    image = Image.fromarray(pixels).resize((width, height), resample)
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
