"""Rows about images and videos: grids, pixels, and pictures of where these differ."""

from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from operator import itemgetter

import numpy as np
import torch
from PIL import Image

from torchtune_vl.media import CHANNELS, Geometry
from torchtune_vl.validation._ours import Ours
from torchtune_vl.validation._reference import BACKENDS, Processed, Reference
from torchtune_vl.validation._report import (
    KEPT_EVIDENCE,
    Outcome,
    Picture,
    Row,
    Track,
    attempt,
    compare_sequences,
    compare_tensors,
)

_LONGEST_SIDE = 360
# Black, violet, red, orange, yellow, white
_HEAT = [(0, 0, 0), (80, 10, 110), (190, 40, 80), (240, 110, 20), (250, 210, 60), (255, 255, 255)]


def image_rows(
    ours: Ours, reference: Reference, images: Mapping[str, str], track: Track
) -> list[Row]:
    """Compare images, paths or data URLs by name, with each of transformers' backends."""
    about = "Patches along time, height and width that each image is cut into, by both backends."
    rows = [Row("image grids", about, "numbers", timed_in="pixels")]
    for backend, title in BACKENDS.items():
        about = (
            "From the file to normalized patches, beside transformers' load_image and its image "
            f"processor's {title} backend."
        )
        rows.append(Row(f"pixels, {title}", about, "values", numeric=True))
        if backend == "torchvision" and reference.no_torchvision:
            rows[-1].skipped = reference.no_torchvision
        elif ours.image_settings.error or reference.image_processors[backend].error:
            rows[-1].skipped = "unreadable: see image settings"
        else:
            sides = partial(ours.image, backend=backend), partial(reference.image, backend=backend)
            tracked = partial(track, description=f"images, {backend}")
            _compare(sides, images, rows[0], rows[-1], ours.geometry, tracked, f", {backend}")
    rows[0].skipped = rows[1].skipped
    return rows


def video_rows(
    ours: Ours, reference: Reference, videos: Mapping[str, str], track: Track
) -> list[Row]:
    """Compare videos, paths by name."""
    about = "Patches along time, height and width that the frames of each video are cut into."
    grids = Row("video grids", about, "numbers", timed_in="pixels")
    about = (
        "From the file to normalized patches, beside transformers' video processor, given the "
        "frames that our side chooses by the rules of qwen-vl-utils; PyAV decodes them for it from "
        "the start of the file."
    )
    pixels = Row("video pixels", about, "values", numeric=True)
    if reference.no_torchvision:
        grids.skipped = pixels.skipped = reference.no_torchvision
    elif ours.video_transform.error or reference.video_processor.error:
        grids.skipped = pixels.skipped = "unreadable: see image settings"
    else:
        sides = ours.video, lambda path: reference.video(path, ours.timing(path)[0])
        tracked = partial(track, description="videos")
        _compare(sides, videos, grids, pixels, ours.geometry, tracked)
    return [grids, pixels]


def _compare(
    sides: tuple[Callable[[str], Processed], Callable[[str], Processed]],
    media: Mapping[str, str],
    grids: Row,
    pixels: Row,
    geometry: Geometry,
    tracked: Callable,
    suffix: str = "",
) -> None:
    # Compile and load codecs before the time is taken
    first = next((path for path in media.values() if attempt(sides[0], path).error is None), "")
    attempt(sides[1], first)
    for name, path in tracked([*media.items()]):
        a, b = (attempt(side, path) for side in sides)
        if a.error is None and b.error is None:
            grids.add(compare_sequences(name + suffix, a.map(_grid), b.map(_grid)))
        case = compare_tensors(name, a.map(itemgetter(0)), b.map(itemgetter(0)))
        if case.failed or len(pixels.cases) < KEPT_EVIDENCE:
            case.pictures = _pictures(a, b, geometry)
        pixels.add(case)


def _grid(processed: Processed) -> list[int]:
    return processed.grid_thw[0].tolist()


def _pictures(ours: Outcome, reference: Outcome, geometry: Geometry) -> list[Picture]:
    """The first frame, and the difference map if there is a difference; none if both refuse."""
    seen = [side.value for side in (reference, ours) if side.error is None]
    if not seen:
        return []
    levels = (_frame(seen[0], geometry) * geometry.std + geometry.mean) * 255
    levels = levels.round().clip(0, 255).astype(np.uint8)
    pictures = [Picture("the resized image", _png(levels, levels.shape, Image.Resampling.BOX))]
    if len(seen) == 2 and torch.equal(seen[0].grid_thw, seen[1].grid_thw):
        difference = (seen[1].patches.double() - seen[0].patches.double()).abs()
        if difference.any():
            pictures.append(_difference_map(Processed(difference, seen[0].grid_thw), geometry))
    return pictures


def _difference_map(difference: Processed, geometry: Geometry) -> Picture:
    steps = difference.patches.unflatten(0, (_grid(difference)[0], -1)).amax((1, 2))
    worst = int(steps.argmax())
    image = _frame(difference, geometry, worst).max(axis=-1)
    caption = (
        f"difference: white is the largest, {image.max():.3g}; {np.mean(image > 0):.1%} of the "
        "pixels differ"
    )
    if len(steps) > 1:
        caption += f" (time step {worst + 1} of {len(steps)})"
    # Reduced to thumbnail size by the maximum, so that single pixels stay visible
    factor = -(-max(image.shape) // _LONGEST_SIDE)
    padded = np.pad(image / image.max(), [(0, -side % factor) for side in image.shape])
    pooled = padded.reshape(len(padded) // factor, factor, -1, factor).max(axis=(1, 3))
    # The root lifts small differences out of the dark
    place = np.sqrt(pooled) * (len(_HEAT) - 1)
    channels = [np.interp(place, range(len(_HEAT)), values) for values in zip(*_HEAT, strict=True)]
    heat = np.stack(channels, axis=-1).astype(np.uint8)
    return Picture(caption, _png(heat, image.shape, Image.Resampling.NEAREST))


def _frame(processed: Processed, geometry: Geometry, step: int = 0) -> np.ndarray:
    """A frame put together from its patches, [H, W, 3]."""
    t, h, w = _grid(processed)
    m, p, frames = geometry.merge_size, geometry.patch_size, geometry.temporal_patch_size
    blocks = processed.patches.reshape(t, h // m, w // m, m, m, CHANNELS, frames, p, p)
    frame = blocks[step, ..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4)
    return frame.reshape(h * p, w * p, CHANNELS).float().numpy()


def _png(pixels: np.ndarray, shape: tuple[int, ...], resample: Image.Resampling) -> bytes:
    """Draw pixels of an image of a shape [H, W, ...], reduced to a thumbnail."""
    scale = min(1, _LONGEST_SIDE / max(shape[:2]))
    height, width = (max(1, round(side * scale)) for side in shape[:2])
    buffer = BytesIO()
    Image.fromarray(pixels).resize((width, height), resample).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
