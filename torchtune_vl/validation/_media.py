"""Rows about images and videos: grids, pixels, and pictures of where these differ."""

from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from torchtune_vl.media import CHANNELS, Geometry
from torchtune_vl.validation import _report as report
from torchtune_vl.validation._report import Outcome, Picture, Row, Track, attempt
from torchtune_vl.validation._sides import BACKENDS, Ours, Processed, Reference, obstacle

_Sides = tuple[Callable[[str], Processed], Callable[[str], Processed]]
_LONGEST_SIDE = 360
_BOX, _NEAREST = Image.Resampling.BOX, Image.Resampling.NEAREST


def image_rows(
    ours: Ours, reference: Reference, images: Mapping[str, str], track: Track
) -> list[Row]:
    """Compare images, paths or data URLs by name, with each of transformers' backends."""
    rows = [report.row("image grids")]
    for backend, title in BACKENDS.items():
        rows.append(report.row(f"pixels, {title}"))
        if backend == "torchvision" and reference.no_torchvision:
            rows[-1].skipped = reference.no_torchvision
        elif ours.settings.error or reference.image_processors[backend].error:
            rows[-1].skipped = "unreadable: see image settings"
        else:
            sides = partial(ours.image, backend=backend), partial(reference.image, backend=backend)
            _warm_up(sides, images)
            for name, path in track([*images.items()], f"images, {backend}"):
                grid_name = f"{name}, {backend}"
                _add(sides, path, (grid_name, rows[0]), (name, rows[-1]), ours.geometry)
    rows[0].skipped = rows[1].skipped
    return rows


def video_rows(
    ours: Ours, reference: Reference, videos: Mapping[str, str], track: Track
) -> list[Row]:
    """Compare videos, paths by name."""
    skipped = obstacle(ours, reference)
    grids, pixels = report.row("video grids", skipped), report.row("video pixels", skipped)
    if not skipped:
        frames = {path: ours.timing(path)[0] for path in videos.values()}
        sides = ours.video, lambda path: reference.video(path, frames[path])
        _warm_up(sides, videos)
        for name, path in track([*videos.items()], "videos"):
            _add(sides, path, (name, grids), (name, pixels), ours.geometry)
    return [grids, pixels]


def _warm_up(sides: _Sides, media: Mapping[str, str]) -> None:
    """Compile and load codecs before the time is taken."""
    readable = (path for path in media.values() if attempt(sides[0], path).error is None)
    attempt(sides[1], next(readable, None))


def _add(
    sides: _Sides, path: str, grids: tuple[str, Row], pixels: tuple[str, Row], geometry: Geometry
) -> None:
    """Compare one, and add the cases by their names to both rows."""
    a, b = (attempt(side, path) for side in sides)
    if a.error is None and b.error is None:
        grids[1].add(report.compare_sequences(grids[0], a.map(_grid), b.map(_grid)))
    case = report.compare_tensors(pixels[0], a.map(itemgetter(0)), b.map(itemgetter(0)))
    if case.failed or len(pixels[1].cases) < report.KEPT_EVIDENCE:
        case.pictures = _pictures(a, b, geometry)
    pixels[1].add(case)


def _grid(processed: Processed) -> list[int]:
    return processed.grid_thw[0].tolist()


def _pictures(ours: Outcome, reference: Outcome, geometry: Geometry) -> list[Picture]:
    """The first frame, and the difference map if there is a difference; none if both refuse."""
    seen = [side.value for side in (reference, ours) if side.error is None]
    if not seen:
        return []
    levels = (_frame(seen[0], geometry) * geometry.std + geometry.mean) * 255
    pictures = [Picture("the resized image", _png(levels.round().clip(0, 255), levels.shape))]
    if len(seen) == 2 and torch.equal(seen[0].grid_thw, seen[1].grid_thw):
        difference = (seen[1].patches.double() - seen[0].patches.double()).abs()
        if difference.any():
            pictures.append(_difference_map(Processed(difference, seen[0].grid_thw), geometry))
    return pictures


def _difference_map(difference: Processed, geometry: Geometry) -> Picture:
    steps = difference.patches.unflatten(0, (_grid(difference)[0], -1)).amax((1, 2))
    worst = int(steps.argmax())
    image = _frame(difference, geometry, worst).max(axis=-1)
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
    return Picture(caption, _png(heat, image.shape, _NEAREST))


def _frame(processed: Processed, geometry: Geometry, step: int = 0) -> np.ndarray:
    """A frame put together from its patches, [H, W, 3]."""
    t, h, w = _grid(processed)
    m, p, frames = geometry.merge_size, geometry.patch_size, geometry.temporal_patch_size
    blocks = processed.patches.reshape(t, h // m, w // m, m, m, CHANNELS, frames, p, p)
    frame = blocks[step, ..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4)
    return frame.reshape(h * p, w * p, CHANNELS).float().numpy()


def _png(levels: np.ndarray, shape: tuple[int, ...], resample: Any = _BOX) -> bytes:
    """Draw an image of a shape [H, W, ...], reduced to a thumbnail."""
    scale = min(1, _LONGEST_SIDE / max(shape[:2]))
    height, width = (max(1, round(side * scale)) for side in shape[:2])
    buffer = BytesIO()
    image = Image.fromarray(levels.astype(np.uint8)).resize((width, height), resample)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
