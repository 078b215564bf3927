"""Rows of a table, in the formats that people have, to conversations with media."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import datasets
import numpy as np
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

COLUMNS = (
    "id",
    "messages",
    "conversations",
    "system",
    "image",
    "images",
    "video",
    "videos",
    "tools",
)
# Names that LLaVA's, LLaMA-Factory's and Qwen's files have for those who speak
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_TAG = re.compile("<(image|video)>")
_SOURCE_KEYS = ("image", "image_url", "video", "video_url", "url", "path")
_URL = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Of a file's name, on every common system: what is longer is base64
_MAX_NAME_LENGTH = 255


class Transform(Protocol):
    """A model's transform, such as ``Qwen2_5_VLTransform``."""

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]: ...

    def measure(self, sample: Mapping[str, Any]) -> tuple[int, int, int]: ...


def vision_chat_dataset(
    tokenizer: Transform,
    *,
    source: str,
    data_files: Any = None,
    split: str = "train",
    media_dir: str | None = None,
    column_map: Mapping[str, str] | None = None,
    streaming: bool = False,
    **load_dataset_kwargs: Any,
) -> "VisionChatDataset | StreamedVisionChat":
    """Build a dataset of conversations with images and videos.

    A row has ``messages``, in the chat format of transformers or OpenAI, or ``conversations``, in
    that of ShareGPT. Their media stand in the items of messages, or in the columns ``image``,
    ``images``, ``video`` and ``videos``, a source or a list of them, whose places are items without
    a source or the tags ``<image>`` and ``<video>`` in texts. (In ``messages`` a tag is one where
    the row has such media.) ``tools`` are JSON schemas, ``system`` is a system message, and ``id``
    names the row in errors, its number if there is none. Other columns are left alone.

    Args:
        tokenizer: the model's transform, as recipes pass it.
        source: what ``datasets.load_dataset`` takes: "json" (also for JSON Lines), "parquet", or
            the name of a dataset on the hub.
        data_files: files of the source.
        split: split of the source, also a part such as ``"train[:1%]"``.
        media_dir: directory of media whose path is relative; that of the data files by default.
        column_map: names of columns that differ, by the names above.
        streaming: whether to read rows as they are needed, and not to make a table of them first.
        **load_dataset_kwargs: further arguments of ``datasets.load_dataset``.

    Returns:
        A map-style dataset, or with ``streaming`` a stream of rows.

    Raises:
        ValueError: if ``column_map`` names a column that is not known or not there, or the data
            files lie in several directories and ``media_dir`` is not given.
    """
    rows = datasets.load_dataset(
        source, data_files=data_files, split=split, streaming=streaming, **load_dataset_kwargs
    )
    column_map = dict(column_map or {})
    _check_columns(column_map, rows.column_names)
    if rows.features is not None:
        # Media as files hold them, whose EXIF orientation is then honoured; cast() would copy them
        rows.info.features = datasets.Features(_encoded(dict(rows.features)))
    directory = _directory_of(data_files) if media_dir is None else media_dir
    reader = _RowReader(directory, column_map)
    if streaming:
        return StreamedVisionChat(tokenizer, rows, reader)
    return VisionChatDataset(tokenizer, rows, reader)


class VisionChatDataset(Dataset):
    """A table of conversations; see :func:`vision_chat_dataset`.

    Args:
        transform: the model's transform.
        rows: the table.
        read: makes a sample for the transform of a row and its number.
    """

    def __init__(
        self,
        transform: Transform,
        rows: Sequence[Mapping[str, Any]],
        read: Callable[[Mapping[str, Any], int], dict[str, Any]],
    ) -> None:
        self._transform = transform
        self._rows = rows
        self._read = read

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Transform a sample.

        Args:
            index: its number.

        Returns:
            What the transform returns, and ``labels``, list[int]: tokens, and -100 where the loss
            ignores them.

        Raises:
            ValueError: if the row or its media cannot be read; it names them.
        """
        return _with_labels(self._transform(self._read(self._rows[index], index)))

    def measure(self, index: int) -> tuple[int, int, int]:
        """Measure a sample without decoding its media.

        Args:
            index: its number.

        Returns:
            Number of tokens, of patches and of supervised tokens that it has when transformed.

        Raises:
            ValueError: if the row or its media cannot be read; it names them.
        """
        return self._transform.measure(self._read(self._rows[index], index))


class StreamedVisionChat:
    """A stream of conversations; see :func:`vision_chat_dataset`.

    Iterating gives samples as the transform takes them, media still as paths, from the first row
    each time.

    Args:
        transform: the model's transform.
        rows: the rows.
        read: makes a sample for the transform of a row and its number.
        start: number of the first row.
    """

    def __init__(
        self,
        transform: Transform,
        rows: datasets.IterableDataset,
        read: Callable[[Mapping[str, Any], int], dict[str, Any]],
        start: int = 0,
    ) -> None:
        self._transform = transform
        self._rows = rows
        self._read = read
        self._start = start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Iterated over by itself, it would share its rows out among data workers
        rows = ({k: v[0] for k, v in batch.items()} for batch in self._rows.iter(batch_size=1))
        for number, row in enumerate(rows, self._start):
            yield self._read(row, number)

    def skip(self, count: int) -> "StreamedVisionChat":
        """Leave out rows at the beginning.

        Args:
            count: how many.

        Returns:
            The stream of the others, whose numbers stay.
        """
        rows = self._rows.skip(count)
        return StreamedVisionChat(self._transform, rows, self._read, self._start + count)

    def measure(self, sample: Mapping[str, Any]) -> tuple[int, int, int]:
        """Measure a sample of the stream as :meth:`VisionChatDataset.measure` does."""
        return self._transform.measure(sample)

    def transform(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Transform a sample of the stream as :meth:`VisionChatDataset.__getitem__` does."""
        return _with_labels(self._transform(sample))


class _RowReader:
    """Makes samples of rows.

    Args:
        directory: of media with relative paths.
        column_map: names of columns that differ from ours.
    """

    def __init__(self, directory: str, column_map: Mapping[str, str]) -> None:
        self._directory = directory
        self._names = {column: column_map.get(column, column) for column in COLUMNS}

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        values = {column: row.get(name) for column, name in self._names.items()}
        name = number if values["id"] is None else values["id"]
        try:
            return {"id": name, **self._sample(values, row)}
        except ValueError as error:
            raise ValueError(f"sample {name!r}: {error}") from error

    def _sample(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        images = [*_as_list(values["image"]), *_as_list(values["images"])]
        videos = [*_as_list(values["video"]), *_as_list(values["videos"])]
        if values["messages"] is not None:
            tags = {kind for kind, media in (("image", images), ("video", videos)) if media}
            messages = [self._message(message, tags) for message in values["messages"]]
        elif values["conversations"] is not None:
            messages = [_sharegpt_message(turn) for turn in values["conversations"]]
        else:
            raise ValueError(
                f"it has no {self._names['messages']!r} and no {self._names['conversations']!r}, "
                f"but {sorted(row)}: name the column by column_map"
            )
        if values["system"]:
            messages.insert(0, {"role": "system", "content": values["system"]})
        return {
            "messages": messages,
            "images": [self._source(image) for image in images],
            "videos": [self._source(video) for video in videos],
            "tools": values["tools"] or None,
        }

    def _message(self, message: Any, tags: set[str]) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            return {**message, "content": _split_at_tags(content, tags)}
        if isinstance(content, list):
            return {**message, "content": [self._item(item) for item in content]}
        return message  # the transform says what is wrong with it

    def _item(self, item: Any) -> Any:
        if not isinstance(item, Mapping):
            return item
        is_medium = item.get("type") in ("image", "image_url", "video", "video_url")
        keys = (*_SOURCE_KEYS, "content") if is_medium else _SOURCE_KEYS
        return {key: self._source(value) if key in keys else value for key, value in item.items()}

    def _source(self, source: Any) -> Any:
        """A medium, or a list of frames, with its path resolved."""
        if isinstance(source, list):
            return [self._source(frame) for frame in source]
        if isinstance(source, Mapping) and source.get("bytes") is not None:
            return source["bytes"]  # of datasets' features Image and Video, as is "path"
        if isinstance(source, Mapping) and source.get("path") is not None:
            return self._source(source["path"])
        if isinstance(source, Mapping) and source.get("url") is not None:
            return self._source(source["url"])
        if not isinstance(source, str) or _URL.match(source):
            return source
        if max(map(len, source.split("/"))) > _MAX_NAME_LENGTH:
            return source
        return os.path.join(self._directory, source)


def _sharegpt_message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise ValueError(f"{turn!r} is no turn such as {{'from': 'human', 'value': ...}}")
    speaker, text = turn.get("from"), turn["value"]
    if speaker not in _ROLES:
        raise ValueError(f"a turn is from {speaker!r}; known are {', '.join(_ROLES)}")
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": _tool_calls(text)}
    return {"role": _ROLES[speaker], "content": _split_at_tags(text, {"image", "video"})}


def _tool_calls(text: str) -> list[Any]:
    try:
        calls = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the function call {text!r} is no JSON ({error})") from error
    return _as_list(calls)


def _split_at_tags(text: str, kinds: set[str]) -> str | list[dict[str, str]]:
    """Puts items without a source, which take the sample's media, in the places of tags."""
    pieces = _TAG.split(text)  # text, kind, text, ...
    if not kinds.intersection(pieces[1::2]):
        return text
    items: list[dict[str, str]] = []
    for i, piece in enumerate(pieces):
        if i % 2 and piece in kinds:
            items.append({"type": piece})
        elif i % 2:
            items.append({"type": "text", "text": f"<{piece}>"})
        elif piece:
            items.append({"type": "text", "text": piece})
    return items


def _with_labels(sample: dict[str, Any]) -> dict[str, Any]:
    labels = np.where(sample["mask"], CROSS_ENTROPY_IGNORE_IDX, sample["tokens"]).tolist()
    return {**sample, "labels": labels}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _check_columns(column_map: Mapping[str, str], columns: Sequence[str] | None) -> None:
    for column, name in column_map.items():
        if column not in COLUMNS:
            raise ValueError(f"column_map has {column!r}; known are {', '.join(COLUMNS)}")
        if columns is not None and name not in columns:
            raise ValueError(f"column_map names {name!r}, but the columns are {columns}")


def _directory_of(data_files: Any) -> str:
    groups = data_files.values() if isinstance(data_files, Mapping) else [data_files or []]
    # Lists of a config are no list
    files = [file for group in groups for file in ([group] if isinstance(group, str) else group)]
    directories = {os.path.dirname(file) for file in files}
    if len(directories) > 1:
        raise ValueError(
            f"the data files lie in several directories, {sorted(directories)}: give media_dir, "
            "the one that paths of media are relative to"
        )
    return directories.pop() if directories else ""


def _encoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image | datasets.Video):
        return replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _encoded(value) for name, value in feature.items()}
    return feature
