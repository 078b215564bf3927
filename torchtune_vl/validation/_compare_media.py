"""Compares images and videos: grids, pixels, and pictures of where these differ."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from torchtune_vl.media import CHANNELS, Geometry
from torchtune_vl.validation._compare import Comparison, compare, unreadable
from torchtune_vl.validation._ours_and_reference import MEDIA_KEYS, attempt, failed
from torchtune_vl.validation._report import KEPT_EVIDENCE, Picture

_Sides = Sequence[Callable[..., Mapping[str, torch.Tensor]]]
_LONGEST_SIDE = 360


def compare_images(run: Comparison, images: Mapping[str, str]) -> None:
    """Compare images, paths or data URLs by name, with each of transformers' backends."""
    for backend, processor in run.reference.image_processors.items():
        row = f"pixels, {'PIL' if backend == 'pil' else backend}"
        reason = unreadable("image settings", run.ours.settings, processor)
        if backend == "torchvision":
            reason = run.reference.no_torchvision or reason
            run.skip(reason, "image grids")
        if not run.skip(reason, row):
            sides = [partial(side.image, backend=backend) for side in (run.ours, run.reference)]
            _compare(run, row, sides, images)


def compare_videos(run: Comparison, videos: Mapping[str, str]) -> None:
    """Compare videos, paths by name."""
    if not run.skip(run.obstacle, "video grids", "video pixels"):
        frames = {path: run.ours.frames(path) for path in videos.values()}
        sides = run.ours.video, lambda path: run.reference.video(path, frames[path])
        _compare(run, "video pixels", sides, videos)


def _compare(run: Comparison, row: str, sides: _Sides, media: Mapping[str, str]) -> None:
    kind = "video" if row == "video pixels" else "image"
    suffix = row.removeprefix("pixels") if kind == "image" else ""  # which backend
    grids, pixels, keys = run.rows[f"{kind} grids"], run.rows[row], MEDIA_KEYS[kind]
    for name, path in run.track([*media.items()], f"{kind}s{suffix}"):
        a, b = (attempt(itemgetter(*keys), attempt(side, path)) for side in sides)
        if not failed(a, b):
            grids.add(compare(name + suffix, a[1][0].tolist(), b[1][0].tolist()))
        case = compare(name, *(attempt(itemgetter(0), side) for side in (a, b)))
        if case.failed or len(pixels.cases) < KEPT_EVIDENCE:
            seen = [side for side in (b, a) if not failed(side)]
            case.pictures = _pictures(seen, run.ours.family.geometry)
        pixels.add(case)


def _pictures(seen: Sequence[Sequence[torch.Tensor]], geometry: Geometry) -> list[Picture]:
    """The first frame, and a map of the difference between what both have seen, if there is one."""
    if not seen:
        return []
    (patches, grid), (others, other_grid) = seen[0], seen[-1]
    levels = (_frame(patches, grid, geometry) * geometry.std + geometry.mean) * 255
    pictures = [Picture("the resized image", _png(levels.round().clip(0, 255), levels.shape))]
    if torch.equal(grid, other_grid) and not torch.equal(patches, others):
        difference = (others.double() - patches.double()).abs()
        pictures.append(_difference_map(difference, grid, geometry))
    return pictures


def _difference_map(difference: torch.Tensor, grid: torch.Tensor, geometry: Geometry) -> Picture:
    steps = difference.unflatten(0, (int(grid[0, 0]), -1)).amax((1, 2))
    worst = int(steps.argmax())
    image = _frame(difference, grid, geometry, worst).max(axis=-1)
    caption = f"difference: white is the largest, {image.max():.3g}; "
    caption += f"{np.mean(image > 0):.1%} of the pixels differ"
    caption += f" (time step {worst + 1} of {len(steps)})" if len(steps) > 1 else ""
    # Reduced by the maximum, so that single pixels stay visible
    factor = -(-max(image.shape) // _LONGEST_SIDE)
    scaled = torch.from_numpy(image / image.max())[None]
    pooled = torch.nn.functional.max_pool2d(scaled, factor, ceil_mode=True)[0].numpy()
    # The root lifts small differences out of the dark
    gray = Image.fromarray((np.sqrt(pooled) * 255).astype(np.uint8))
    heat = np.asarray(ImageOps.colorize(gray, "black", "white", mid="orangered"))
    return Picture(caption, _png(heat, image.shape, Image.Resampling.NEAREST))


def _frame(patches: torch.Tensor, grid: torch.Tensor, geometry: Geometry, step: int = 0) -> Any:
    """A frame put together from its patches, float32 [H, W, 3]."""
    t, h, w = grid[0].tolist()
    m, p, frames = geometry.merge_size, geometry.patch_size, geometry.temporal_patch_size
    blocks = patches.reshape(t, h // m, w // m, m, m, CHANNELS, frames, p, p)
    frame = blocks[step, ..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4)
    return frame.reshape(h * p, w * p, CHANNELS).float().numpy()


def _png(levels: np.ndarray, shape: Sequence[int], resample: Any = Image.Resampling.BOX) -> bytes:
    """Draw an image of a shape [H, W, ...], reduced to a thumbnail."""
    scale = min(1, _LONGEST_SIDE / max(shape[:2]))
    height, width = (max(1, round(side * scale)) for side in shape[:2])
    buffer = BytesIO()
    image = Image.fromarray(levels.astype(np.uint8)).resize((width, height), resample)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
