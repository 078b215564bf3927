"""Pictures of the media of questions, small, for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from torchtune_vl.chat._messages import Medium, read_conversation
from torchtune_vl.evaluation._page import picture_of
from torchtune_vl.evaluation._sources import Sources
from torchtune_vl.media import ImageTransform
from torchtune_vl.media._images import to_rgb
from torchtune_vl.media._videos import open_video


def pictures_of(
    samples: Sequence[Mapping[str, Any]], dataset: Sources, transform: ImageTransform
) -> dict[int, list[dict[str, Any]]]:
    """Make pictures of the images, and of the first frame of videos, of questions, by number."""
    numbers = [sample["sample"] for sample in samples if "error" not in sample]
    # Not kept meanwhile: they may hold files
    count = sum(len(_media_of(dataset.read(number))) for number in numbers)

    def picture(medium: Medium) -> dict[str, Any]:
        pixels = _first_frame(medium, transform)
        return picture_of(pixels, count, kind=medium.kind, alpha=transform.alpha)

    shown = tqdm(numbers, "pictures", unit="sample", leave=False)
    return {number: [*map(picture, _media_of(dataset.read(number)))] for number in shown}


def _media_of(sample: Mapping[str, Any]) -> list[Medium]:
    messages, media = sample["messages"], (sample.get("images"), sample.get("videos"))
    roles = {message["role"] for message in messages}  # whether they are known was found before
    turns = read_conversation(messages, *media, roles)
    return [part for turn in turns for part in turn.content if isinstance(part, Medium)]


def _first_frame(medium: Medium, transform: ImageTransform) -> Any:
    if medium.kind == "image":
        return to_rgb(medium.source, alpha=transform.alpha, remote=transform.remote)
    if isinstance(medium.source, list | tuple | np.ndarray | torch.Tensor):
        return medium.source[0]
    with open_video(medium.source, transform.remote) as video:
        return next(iter(video.frames([0])))
