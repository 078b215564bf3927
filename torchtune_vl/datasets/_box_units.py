"""What the numbers of a dataset's boxes tell of their unit, whatever the records say it is."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torchtune_vl.media._patches import Size

# Fewer say nothing: a few objects may all lie in one corner
LEAST_BOXES = 10
# Of the boxes, that fit a reading which is right, but for some that are wrong
_MOST = 0.9
# How far the boxes of a dataset reach across its images at least, in a reading which is right, and
# in one that is to be preferred to it
_LEAST_REACH, _FULL_REACH = 0.6, 0.8
_SWAPPED, _EXTENTS = "pixels as [y1, x1, y2, x2]", "pixels as [x, y, width, height]"
READINGS = ("pixels", "0..1", "0..1000", _SWAPPED, _EXTENTS)


class UnitEvidence(NamedTuple):
    """How boxes and points fit each reading of their numbers, :data:`READINGS`.

    Args:
        boxes: how many there are.
        fits: how many of them are boxes in their image in each reading.
        reach: how far at most those that fit reach to the right or down, as a part of the image.
    """

    boxes: int
    fits: tuple[int, ...]
    reach: tuple[float, ...]

    @classmethod
    def of(cls, numbers: Sequence[float], image_size: Size) -> "UnitEvidence":
        """That of one box or point in an image of a height and a width in pixels."""
        reach = [_reach(reading, numbers, image_size) for reading in READINGS]
        return cls(1, tuple(r is not None for r in reach), tuple(r or 0.0 for r in reach))

    @classmethod
    def joined(cls, parts: Iterable["UnitEvidence"]) -> "UnitEvidence":
        """That of all boxes of some parts, of which there is at least one."""
        counts, fits, reach = zip(*parts, strict=True)
        columns = zip(*fits, strict=True), zip(*reach, strict=True)
        return cls(sum(counts), tuple(map(sum, columns[0])), tuple(map(max, columns[1])))

    def other_than(self, unit: str) -> str | None:
        """Which reading is more plausible than the unit that the boxes are said to have."""
        if self.boxes < LEAST_BOXES:
            return None
        said = READINGS.index(unit)
        if self.fits[said] >= _MOST * self.boxes and self.reach[said] >= _LEAST_REACH:
            return None
        fitting = [
            (fits, reach, reading)
            for fits, reach, reading in zip(self.fits, self.reach, READINGS, strict=True)
            if fits >= max(_MOST * self.boxes, self.fits[said]) and reach >= _FULL_REACH
        ]
        *_, best = max(fitting, default=(0, 0.0, unit))
        return None if best == unit else best


def _reach(reading: str, numbers: Sequence[float], image_size: Size) -> float | None:
    """How far a box reaches across its image, None if it is no box in it."""
    height, width = image_size
    x1, y1, x2, y2 = numbers if len(numbers) == 4 else (*numbers, *numbers)
    if reading in ("0..1", "0..1000"):
        height = width = 1 if reading == "0..1" else 1000
    elif reading == _SWAPPED:
        x1, y1, x2, y2 = y1, x1, y2, x2
    elif reading == _EXTENTS and len(numbers) == 4:
        x2, y2 = x1 + x2, y1 + y2
    is_box = 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height
    return max(x2 / width, y2 / height) if is_box else None
