"""Rows about images: grids, and pixels as each of transformers' backends has them."""

from collections.abc import Mapping

from torchtune_vl.media import Geometry
from torchtune_vl.validation._compare import compare_sequences, compare_tensors
from torchtune_vl.validation._ours import Ours
from torchtune_vl.validation._pictures import pictures_of
from torchtune_vl.validation._reference import BACKENDS, Backend, Processed, Reference
from torchtune_vl.validation._report import (
    KEPT_EVIDENCE,
    Case,
    Outcome,
    Row,
    Track,
    attempt,
)


def image_rows(
    ours: Ours, reference: Reference, images: Mapping[str, str], track: Track
) -> list[Row]:
    """Compare images.

    Args:
        ours: our side.
        reference: transformers' side.
        images: paths or data URLs by name.
        track: shows progress.

    Returns:
        The rows.
    """
    grids = Row(
        "image grids",
        "Patches along time, height and width that each image is cut into, by both backends.",
        "numbers",
        timed_in="pixels",
    )
    rows = [grids]
    for backend in BACKENDS:
        pixels = Row(
            f"pixels, {_NAMES[backend]}",
            "From the file to normalized patches, beside transformers' load_image and its image "
            f"processor's {_NAMES[backend]} backend.",
            "values",
            numeric=True,
        )
        rows.append(pixels)
        pixels.skipped = _obstacle(ours, reference, backend)
        if not pixels.skipped:
            _compare_images(ours, reference, backend, images, track, grids, pixels)
    if not grids.cases:
        grids.skipped = rows[1].skipped
    return rows


_NAMES: dict[Backend, str] = {"torchvision": "torchvision", "pil": "PIL"}


def _obstacle(ours: Ours, reference: Reference, backend: Backend) -> str:
    if backend == "torchvision" and reference.no_torchvision:
        return reference.no_torchvision
    if ours.image_settings.error or reference.image_processors[backend].error:
        return "unreadable: see image settings"
    return ""


def _compare_images(
    ours: Ours,
    reference: Reference,
    backend: Backend,
    images: Mapping[str, str],
    track: Track,
    grids: Row,
    pixels: Row,
) -> None:
    transform = ours.image_transform(backend=backend)

    def process(path: str) -> Processed:
        processed = transform({"image": path})
        return Processed(processed["pixel_values"], processed["image_grid_thw"])

    # Compile and load codecs before the time is taken
    first = next(path for path in images.values() if attempt(process, path).error is None)
    attempt(reference.image, first, backend)
    for name, path in track([*images.items()], f"images, {backend}"):
        a, b = attempt(process, path), attempt(reference.image, path, backend)
        if a.error is None and b.error is None:
            grids.add(compare_sequences(f"{name}, {backend}", a.map(grid_of), b.map(grid_of)))
        pixels.add(
            compare_pixels(name, a, b, ours.family.geometry, draw=len(pixels.cases) < KEPT_EVIDENCE)
        )


def grid_of(processed: Processed) -> list[int]:
    """Patches along time, height and width."""
    return processed.grid_thw[0].tolist()


def compare_pixels(
    name: str,
    ours: Outcome[Processed],
    reference: Outcome[Processed],
    geometry: Geometry,
    draw: bool,
) -> Case:
    """Compare patches of an image or video.

    Args:
        name: the input.
        ours: outcome of our side.
        reference: outcome of transformers.
        geometry: sizes of patches.
        draw: whether to draw it even if both are equal.

    Returns:
        The case.
    """
    case = compare_tensors(name, ours.map(lambda p: p.patches), reference.map(lambda p: p.patches))
    if draw or case.failed:
        case.pictures = pictures_of(ours, reference, geometry)
    return case
