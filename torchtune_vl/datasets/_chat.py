"""Rows of a table, in the formats that people have, to conversations with media."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any, Protocol

import datasets
import numpy as np
from torch.utils.data import Dataset

from torchtune_vl.datasets._formats import GroundedObjects, read_message, read_turn
from torchtune_vl.datasets._json_rows import JsonRows
from torchtune_vl.datasets._media_directory import MediaDirectory
from torchtune_vl.datasets._tables import Stream, load_rows
from torchtune_vl.files._json import from_json_text
from torchtune_vl.media._errors import reraise, shortened
from torchtune_vl.modules import IGNORE_INDEX

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
    "objects",
)
_END = object()
_SOURCE_KEYS = ("image", "image_url", "video", "video_url", "url", "path")


class Transform(Protocol):
    """A model's transform, such as ``Qwen2_5_VLTransform``."""

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]: ...

    def measure(self, sample: Mapping[str, Any]) -> tuple[int, int, int]: ...

    def examine(
        self, sample: Mapping[str, Any]
    ) -> tuple[tuple[int, int, int], dict[str, int] | None]: ...

    def check_supervised(self, tokens: Sequence[int], mask: Sequence[bool]) -> None: ...


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
    a source or the tags ``<image>`` and ``<video>`` in texts that are not the assistant's.
    ``objects`` are names and boxes in ms-swift's format, whose places are the tags ``<ref-object>``
    and ``<bbox>`` in any text. ``tools`` are JSON schemas, ``system`` is a system message, and
    ``id`` names the row in errors, its number if there is none. Other columns are left alone.

    Args:
        tokenizer: the model's transform, as recipes pass it.
        source: what ``datasets.load_dataset`` takes: "json" (also for JSON Lines), "parquet", a
            directory of files, or the name of a dataset on the hub; or a directory that
            ``save_to_disk`` wrote. JSON is read by :class:`JsonRows`, all else by ``datasets``.
        data_files: files of the source: one or a list, patterns too, perhaps by split.
        split: split of the source, also a part such as ``"train[:1%]"``.
        media_dir: directory of media whose path is relative, and outside of which nothing is read.
            By default that of the data files, and paths may lead anywhere.
        column_map: names of columns that differ, by the names above.
        streaming: whether to give a stream of rows, in their order, instead of a table.
        **load_dataset_kwargs: further arguments of ``datasets.load_dataset``.

    Returns:
        A map-style dataset, or with ``streaming`` a stream of rows.

    Raises:
        ValueError: if source, files or split are not there or cannot be read; ``column_map`` names
            a column that is not known or not there; or the data files lie in several directories
            and ``media_dir`` is not given.
    """
    rows, files = load_rows(
        source, data_files, split=split, streaming=streaming, **load_dataset_kwargs
    )
    column_map = dict(column_map or {})
    _check_columns(column_map, rows)
    media = MediaDirectory(
        _directory_of(files) if media_dir is None else media_dir, is_confining=media_dir is not None
    )
    read: Any = RowReader(media, column_map)
    if not isinstance(rows, JsonRows):
        read = partial(_read_from_table, read, rows.features)
    if streaming:
        return StreamedVisionChat(tokenizer, rows, read)
    return VisionChatDataset(tokenizer, rows, read)


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
            ValueError: if the row or its media cannot be read, or no token of an answer carries
                loss; it names the sample.
        """
        return self._apply(partial(_supervised, self._transform), index)

    def measure(self, index: int) -> tuple[int, int, int]:
        """Measure a sample without decoding its media.

        Args:
            index: its number.

        Returns:
            Number of tokens, of patches and of supervised tokens that it has when transformed.

        Raises:
            ValueError: if the row or its media cannot be read, or no token of an answer carries
                loss; it names the sample.
        """
        return self._apply(self._transform.measure, index)

    def examine(self, index: int) -> tuple[tuple[int, int, int], dict[str, int] | None]:
        """Measure a sample, and tell what it loses for being too long.

        Args:
            index: its number.

        Returns:
            What :meth:`measure` returns, and how many ``tokens``, ``images`` and ``videos`` are
            cut, None if nothing is.

        Raises:
            ValueError: as :meth:`measure` does.
        """
        return self._apply(self._transform.examine, index)

    def _apply(self, function: Callable[[dict[str, Any]], Any], index: int) -> Any:
        with _named(index):
            row = self._rows[index]
        with _placed(self._rows, index, index):
            return function(self._read(row, index))


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
        rows: JsonRows | Stream,
        read: Callable[[Mapping[str, Any], int], dict[str, Any]],
        start: int = 0,
    ) -> None:
        self._transform = transform
        self._rows = rows
        self._read = read
        self._start = start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self._rows)
        for index in count():
            number = self._start + index
            with _named(number):
                row: Any = next(rows, _END)
            if row is _END:
                return
            with _placed(self._rows, index, number):
                sample = self._read(row, number)
            yield sample

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
        return _supervised(self._transform, sample)


class RowReader:
    """Makes samples of rows.

    Args:
        media: where they are.
        column_map: names of columns that differ from ours.
    """

    def __init__(self, media: MediaDirectory, column_map: Mapping[str, str]) -> None:
        self._media = media
        self._names = {column: column_map.get(column, column) for column in COLUMNS}

    def __call__(self, row: Any, number: int) -> dict[str, Any]:
        if isinstance(row, list):
            row = {"messages": row}
        if not isinstance(row, Mapping):
            raise ValueError(f"sample {number}: it is {shortened(repr(row))}, expected an object")
        values = {column: row.get(name) for column, name in self._names.items()}
        name = number if values["id"] is None else values["id"]
        with _named(name):
            return {"id": name, **self._sample(values, row)}

    def _sample(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        images = [*_as_list(values["image"]), *_as_list(values["images"])]
        videos = [*_as_list(values["video"]), *_as_list(values["videos"])]
        messages = self._messages(values, row)
        if values["system"]:
            messages.insert(0, {"role": "system", "content": values["system"]})
        media = [kind for kind, given in (("image", images), ("video", videos)) if given]
        objects = GroundedObjects(values["objects"])
        for number, message in enumerate(messages):
            try:
                messages[number] = self._located(read_message(message, media, objects))
            except ValueError as error:
                raise ValueError(f"message {number}: {error}") from error
        objects.check_all_used()
        return {
            "messages": messages,
            "images": [self._media.source(image) for image in images],
            "videos": [self._media.source(video) for video in videos],
            "tools": values["tools"] or None,
        }

    def _messages(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> list[Any]:
        key = "messages" if values["messages"] is not None else "conversations"
        if values[key] is None:
            raise ValueError(
                f"it has no {self._names['messages']!r} and no {self._names['conversations']!r}, "
                f"but {sorted(row)}: name the column by column_map"
            )
        messages = from_json_text(values[key], repr(self._names[key]))
        if not isinstance(messages, list):
            raise ValueError(
                f"{self._names[key]!r} is of type {type(messages).__name__}, expected a list"
            )
        return list(messages) if key == "messages" else [read_turn(turn) for turn in messages]

    def _located(self, message: Any) -> Any:
        """A message with the paths of its media resolved."""
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
            return message  # the transform says what is wrong with it
        return {**message, "content": [self._item(item) for item in message["content"]]}

    def _item(self, item: Any) -> Any:
        if not isinstance(item, Mapping):
            return item
        is_medium = item.get("type") in ("image", "image_url", "video", "video_url")
        keys = (*_SOURCE_KEYS, "content") if is_medium else _SOURCE_KEYS
        return {
            key: self._media.source(value) if key in keys else value for key, value in item.items()
        }


def _read_from_table(
    read: Callable[[Mapping[str, Any], int], dict[str, Any]],
    features: Any,
    row: Mapping[str, Any],
    number: int,
) -> dict[str, Any]:
    """Read a row of a table, which gives every dict the keys of all, None where it had none."""
    return read(_without_nulls(row, features), number)


def _without_nulls(value: Any, feature: Any) -> Any:
    if isinstance(feature, datasets.Json):  # kept as text, and so what it was
        return value
    if isinstance(value, Mapping):
        features = feature if isinstance(feature, Mapping) else {}
        return {
            key: _without_nulls(entry, features.get(key))
            for key, entry in value.items()
            if entry is not None
        }
    if isinstance(value, list):
        of_entries = getattr(feature, "feature", None)
        return [_without_nulls(entry, of_entries) for entry in value]
    return value


def _supervised(transform: Transform, sample: Mapping[str, Any]) -> dict[str, Any]:
    """A transformed sample with labels, of which there are some."""
    transformed = transform(sample)
    tokens, mask = transformed["tokens"], transformed["mask"]
    try:
        transform.check_supervised(tokens, mask)
    except ValueError as error:
        raise ValueError(f"sample {sample['id']!r}: {error}") from error
    labels = np.where(mask, IGNORE_INDEX, tokens).tolist()
    return {**transformed, "labels": labels}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


@contextmanager
def _named(name: Any) -> Iterator[None]:
    """Names the sample in errors, which whatever a row holds may cause."""
    try:
        yield
    except Exception as error:
        reraise(error, f"sample {name!r}: ")


@contextmanager
def _placed(rows: Any, index: int, number: int) -> Iterator[None]:
    """Adds file and line of a row to errors, and its number to those that name no sample."""
    try:
        yield
    except Exception as error:
        before = "" if isinstance(error, ValueError) else f"sample {number}: "
        behind = f" ({rows.place(index)})" if isinstance(rows, JsonRows) else ""
        reraise(error, before, behind)


def _check_columns(column_map: Mapping[str, str], rows: Any) -> None:
    for column in column_map:
        if column not in COLUMNS:
            raise ValueError(f"column_map has {column!r}; known are {', '.join(COLUMNS)}")
    names = set(column_map.values())
    columns = _keys(rows, names) if isinstance(rows, JsonRows) else rows.column_names
    for name in names if columns is not None else ():
        if name not in columns:
            raise ValueError(f"column_map names {name!r}, but the columns are {sorted(columns)}")


def _keys(rows: JsonRows, wanted: set[str]) -> set[str]:
    """The keys of rows, of as many as it takes to find the wanted ones."""
    keys: set[str] = set()
    for index in range(len(rows)):
        if wanted <= keys:
            break
        with suppress(ValueError):  # is told when the row is measured or made
            row = rows[index]
            keys.update(row if isinstance(row, Mapping) else ())
    return keys


def _directory_of(files: Sequence[str]) -> str:
    directories = {os.path.dirname(file) for file in files}
    if len(directories) > 1:
        raise ValueError(
            f"the data files lie in several directories, {sorted(directories)}: give media_dir, "
            "the one that paths of media are relative to"
        )
    return directories.pop() if directories else ""
