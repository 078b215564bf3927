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
    pictures: dict[int, list[dict[str, Any]]] = {}
    for sample in tqdm(samples, "pictures", unit="sample", leave=False):
        if "error" in sample:
            continue
        asked = dataset.read(sample["sample"])
        turns = read_conversation(asked["messages"], asked.get("images"), asked.get("videos"))
        media = [part for turn in turns for part in turn.content if isinstance(part, Medium)]
        own = [picture_of(_shown(m), len(samples), kind=m.kind, alpha=alpha) for m in media]
        pictures[sample["sample"]] = own
    return pictures


def _shown(medium: Medium) -> Any:
    if medium.kind == "image":
        return medium.source
    if not isinstance(medium.source, str | bytes | Path):
        return medium.source[0]  # its frames
    with open_video(medium.source) as video:
        return next(iter(video.frames([0])))
