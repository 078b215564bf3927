"""How the images of a conversation are augmented, as far as its texts and boxes allow."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from torchtune_vl.chat._boxes import corners
from torchtune_vl.chat._messages import Medium, Objects, Part, Turn
from torchtune_vl.chat._words import find_place, find_sides
from torchtune_vl.media import Augmentation
from torchtune_vl.media._augment import Box, Change, Draw
from torchtune_vl.media._patches import Size


def draws(
    augmentation: Augmentation, turns: Sequence[Turn[Part]], epoch: int, number: int
) -> Iterator[Draw]:
    """Draw how each image of a sample is changed, in their order.

    What is drawn depends on the seed, the epoch, and the numbers of the sample and of the image.
    """
    parts = [part for turn in turns for part in turn.content]
    kinds = [part.kind for part in parts if isinstance(part, Medium)]
    objects = [part for part in parts if isinstance(part, Objects)]
    texts = [*_texts(parts), *(_json(turn.tool_calls) for turn in turns if turn.tool_calls)]
    settings, refused = _allowed(augmentation, texts, has_video="video" in kinds)
    sequence = np.random.SeedSequence((augmentation.seed, epoch, number))
    of_sample, *of_images = map(np.random.default_rng, sequence.spawn(1 + kinds.count("image")))
    # All images of a sample or none: texts may compare them
    flip = bool(settings.flip and of_sample.random() < settings.flip)
    for image, random in enumerate(of_images):
        yield _draw(settings, random, [o for o in objects if o.image == image], flip, refused)


def _draw(
    augmentation: Augmentation,
    random: np.random.Generator,
    objects: Sequence[Objects],
    flip: bool,
    refused: str | None,
) -> Draw:
    def draw(original: Size, resized: Size) -> Change:
        change = augmentation.draw(random, original, resized, _around(objects, original))
        return change._replace(flip=flip, refused=refused)

    return draw


def _allowed(
    augmentation: Augmentation, texts: Sequence[str], has_video: bool
) -> tuple[Augmentation, str | None]:
    """What is left of an augmentation for a sample, and why not all of it."""
    if augmentation.moving and (found := find_place(texts)):
        refused = f"{', '.join(augmentation.moving)}: its texts have {found}"
        return replace(augmentation, crop=None, scale=None, flip=None), refused
    if augmentation.flip:
        found = find_sides(texts)
        reason = f"its texts speak of {found}" if found else "it has a video" if has_video else None
        if reason:
            return replace(augmentation, flip=None), f"flip: {reason}"
    return augmentation, None


def _texts(value: Any) -> Iterator[str]:
    """All texts of items, with those of labels."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Objects):
        yield value.text
        yield from _texts(value.entries)
    elif isinstance(value, Mapping):
        yield from _texts([*value.values()])
    elif isinstance(value, list | tuple) and not isinstance(value, Medium):
        for entry in value:
            yield from _texts(entry)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _around(objects: Sequence[Objects], size: Size) -> Box:
    """The smallest box around all boxes and points of an image; with x1 > x2 if there are none."""
    height, width = size
    points = [p for o in objects for entry in o.entries for p in corners(entry, o.unit, size)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x1, y1 = math.floor(min(xs, default=width)), math.floor(min(ys, default=height))
    x2, y2 = math.ceil(max(xs, default=0)), math.ceil(max(ys, default=0))
    return max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
