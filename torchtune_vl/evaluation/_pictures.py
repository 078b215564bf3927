"""Pictures of the media of questions, small, for a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchtune_vl.chat._messages import Medium, read_conversation
from torchtune_vl.evaluation._page import picture_of
from torchtune_vl.evaluation._sources import Sources
from torchtune_vl.media._images import Alpha
from torchtune_vl.media._videos import open_video


def pictures_of(
    samples: Sequence[Mapping[str, Any]], dataset: Sources, alpha: Alpha
) -> dict[int, list[dict[str, Any]]]:
    """Make pictures of the images, and of the first frame of videos, of questions, by number."""
    numbers = [sample["sample"] for sample in samples if "error" not in sample]
    media = {number: _media_of(dataset.read(number)) for number in numbers}
    count = sum(map(len, media.values()))
    return {
        number: [picture_of(_shown(m), count, kind=m.kind, alpha=alpha) for m in own]
        for number, own in tqdm(media.items(), "pictures", unit="sample", leave=False)
    }


def _media_of(sample: Mapping[str, Any]) -> list[Medium]:
    messages, media = sample["messages"], (sample.get("images"), sample.get("videos"))
    roles = {message["role"] for message in messages}  # whether they are known was found before
    turns = read_conversation(messages, *media, roles)
    return [part for turn in turns for part in turn.content if isinstance(part, Medium)]


def _shown(medium: Medium) -> Any:
    if medium.kind == "image":
        return medium.source
    if not isinstance(medium.source, str | bytes | Path):
        return medium.source[0]  # its frames
    with open_video(medium.source) as video:
        return next(iter(video.frames([0])))
