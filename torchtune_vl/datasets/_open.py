"""Datasets by the files that somebody has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtune_vl.chat import ChatTransform
from torchtune_vl.datasets._conversations import VisionChatDataset, vision_chat_dataset
from torchtune_vl.datasets._tables import is_saved

_SOURCES = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}


def open_dataset(
    transform: ChatTransform, data: Sequence[str], **settings: Any
) -> VisionChatDataset:
    """Open files, a directory, or the name of a dataset on the hub, as a dataset.

    ``settings`` are those of :func:`vision_chat_dataset`; ``source`` is found by the names of the
    files if it is not among them. ``ValueError`` if it cannot be, and as there.
    """
    if settings.get("streaming"):
        raise ValueError("a stream has no numbers of samples: leave streaming out")
    if "source" not in settings:
        settings |= _source_of(data)
    elif data:
        settings["data_files"] = [*data]
    dataset = vision_chat_dataset(transform, **settings)
    assert isinstance(dataset, VisionChatDataset)
    return dataset


def _source_of(data: Sequence[str]) -> dict[str, Any]:
    if len(data) == 1 and Path(data[0]).is_dir():
        return (
            {"source": data[0]}
            if is_saved(data[0])
            else {"source": "folder", "data_files": data[0]}
        )
    sources = {_SOURCES.get(Path(file).suffix.lower()) for file in data}
    if len(sources) == 1 and None not in sources:
        return {"source": sources.pop(), "data_files": [*data]}
    if len(data) == 1 and not Path(data[0]).suffix:
        return {"source": data[0]}  # of the hub
    known = ", ".join(_SOURCES)
    raise ValueError(
        f"{' '.join(data)} is none of {known}: set source=, as a config's dataset has it"
    )
