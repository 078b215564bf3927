"""Files of COCO's object detection, by image."""

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import xxhash

from torchtune_vl.media._errors import refusing

_KEYS = ("images", "annotations", "categories")
_log = logging.getLogger(__name__)


class CocoRecords(Sequence[tuple[Any, str]]):
    """A record for each image of COCO's files, in their order.

    It has the ``id`` of the image, its file's name as ``images``, and as ``annotations`` the boxes
    in pixels, in the order of the file, each with the name of its category as ``label``. Boxes of
    crowds are left out, and how many is logged.

    In memory is the JSON text of the records, which data workers share.

    Args:
        files: what each file says, an object with images, annotations and categories, and where.

    Raises:
        ValueError: if something is missing in a file, or refers to what it does not have.
    """

    def __init__(self, files: Sequence[tuple[Any, str]]) -> None:
        records, self._places, numbers = [], [], []
        for number, (file, place) in enumerate(files):
            of_file, crowds = _by_image(file, place)
            _log.info(f"{place}: {len(of_file):,} images, {crowds:,} boxes of crowds left out")
            records += [json.dumps(record).encode() for record in of_file]
            numbers += [number] * len(of_file)
            self._places.append(place)
        self._numbers = np.array(numbers, np.uint32)
        self._ends = np.array([0, *accumulate(map(len, records))], np.uint64)
        self._text = b"".join(records)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Any, str]:  # type: ignore[override]
        return json.loads(self._bytes(index)), self._places[self._numbers[index]]

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        """Digest what the file says of each image."""
        return [xxhash.xxh3_128_digest(self._bytes(index)) for index in indices]

    def _bytes(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self._text[int(self._ends[index]) : int(self._ends[index + 1])]


def _by_image(file: Any, place: str) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and how many boxes of crowds it has."""
    if not isinstance(file, Mapping) or not all(isinstance(file.get(k), list) for k in _KEYS):
        raise ValueError(f"{place}: it has no lists {', '.join(_KEYS)}, as COCO's detection does")
    wrong, remedy, crowds = (KeyError, TypeError, ValueError), "correct it or remove it", 0
    with refusing(f"{place}: an image or a category is not COCO's", remedy, wrong):
        labels = {category["id"]: category["name"] for category in file["categories"]}
        names = {image["id"]: image["file_name"] for image in file["images"]}
    if len(names) < len(file["images"]):
        raise ValueError(f"{place}: several images have the same id: {remedy}")
    boxes: dict[Any, list[dict[str, Any]]] = {image: [] for image in names}
    for number, annotation in enumerate(file["annotations"]):
        with refusing(f"{place}: annotation {number} is not COCO's", remedy, wrong):
            for key, known in (("image_id", boxes), ("category_id", labels)):
                if annotation[key] not in known:
                    raise ValueError(f"its {key} {annotation[key]!r} is not in the file")
            if annotation.get("iscrowd"):
                crowds += 1
                continue
            x, y, width, height = annotation["bbox"]
            corners = [x, y, x + width, y + height]
            label = labels[annotation["category_id"]]
            boxes[annotation["image_id"]].append({"bbox_2d": corners, "label": label})
    images = names.items()
    return [{"id": i, "images": [name], "annotations": boxes[i]} for i, name in images], crowds
