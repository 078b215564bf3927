"""Rows about videos: grids and pixels of the frames that our side chooses."""

from collections.abc import Mapping

from torchtune_vl.validation._compare import compare_sequences
from torchtune_vl.validation._images import compare_pixels, grid_of
from torchtune_vl.validation._ours import Ours
from torchtune_vl.validation._reference import Reference
from torchtune_vl.validation._report import KEPT_EVIDENCE, Row, Track, attempt


def video_rows(
    ours: Ours, reference: Reference, videos: Mapping[str, str], track: Track
) -> list[Row]:
    """Compare videos.

    Args:
        ours: our side.
        reference: transformers' side.
        videos: paths by name.
        track: shows progress.

    Returns:
        The rows.
    """
    grids = Row(
        "video grids",
        "Patches along time, height and width that the frames of each video are cut into.",
        "numbers",
        timed_in="pixels",
    )
    pixels = Row(
        "video pixels",
        "From the file to normalized patches, beside transformers' video processor, given the "
        "frames that our side chooses by the rules of qwen-vl-utils; PyAV decodes them for it from "
        "the start of the file.",
        "values",
        numeric=True,
    )
    if reference.no_torchvision:
        grids.skipped = pixels.skipped = reference.no_torchvision
    elif ours.video_transform.error or reference.video_processor.error:
        grids.skipped = pixels.skipped = "unreadable: see image settings"
    else:
        # Load codecs before the time is taken
        first = next(path for path in videos.values() if attempt(ours.video, path).error is None)
        attempt(reference.video, first, ours.frames(first))
        for name, path in track([*videos.items()], "videos"):
            a = attempt(ours.video, path)
            b = attempt(reference.video, path, ours.frames(path))
            if a.error is None and b.error is None:
                grids.add(compare_sequences(name, a.map(grid_of), b.map(grid_of)))
            pixels.add(
                compare_pixels(
                    name, a, b, ours.family.geometry, draw=len(pixels.cases) < KEPT_EVIDENCE
                )
            )
    return [grids, pixels]
