"""Datasets of conversations with images and videos."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from torchtune_vl.datasets._formats import COLUMNS, RecordReader, naming
from torchtune_vl.datasets._json_records import JsonRecords
from torchtune_vl.datasets._media_directory import MediaDirectory
from torchtune_vl.datasets._tables import Table, load_records
from torchtune_vl.modules import IGNORE_INDEX

_END = object()


class Transform(Protocol):
    """A model's transform, such as ``Qwen2_5_VLTransform``."""

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]: ...

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

    A record is what a file has of one sample: a line or value of JSON, or the row of a table. It
    has ``messages``, in the chat format of transformers or OpenAI, or ``conversations``, in that of
    ShareGPT. Their media stand in the items of messages, or in the columns ``image``, ``images``,
    ``video`` and ``videos``, a source or a list of them, whose places are items without a source or
    the tags ``<image>`` and ``<video>`` in texts that are not the assistant's. ``objects`` are
    names and boxes in ms-swift's format, whose places are the tags ``<ref-object>`` and ``<bbox>``
    in any text. ``tools`` are JSON schemas, ``system`` is a system message, and ``id`` names the
    sample in errors, its number if there is none. Other columns are left alone.

    Args:
        tokenizer: the model's transform, as recipes pass it.
        source: what ``datasets.load_dataset`` takes: "json" (also for JSON Lines), "parquet", a
            directory of files, or the name of a dataset on the hub; or a directory that
            ``save_to_disk`` wrote.
        data_files: files of the source: one or a list, patterns too, perhaps by split.
        split: split of the source, also a part such as ``"train[:1%]"``.
        media_dir: directory of media whose path is relative, and outside of which nothing is read.
            By default that of the data files, and paths may lead anywhere.
        column_map: names of columns that differ, by the names above.
        streaming: whether to give a stream of samples, in the order of records.
        **load_dataset_kwargs: further arguments of ``datasets.load_dataset``.

    Returns:
        A map-style dataset, or with ``streaming`` a stream.

    Raises:
        ValueError: if source, files or split are not there or cannot be read; ``column_map`` names
            a column that is not known or not there; or the data files lie in several directories
            and ``media_dir`` is not given.
    """
    records, files = load_records(
        source, data_files, split=split, streaming=streaming, **load_dataset_kwargs
    )
    column_map = dict(column_map or {})
    _check_columns(column_map, records)
    directories = {os.path.dirname(file) for file in files}
    if media_dir is None and len(directories) > 1:
        raise ValueError(
            f"the data files lie in several directories, {sorted(directories)}: give media_dir, "
            "the one that paths of media are relative to"
        )
    directory = "".join(directories) if media_dir is None else media_dir
    read = RecordReader(MediaDirectory(directory, is_confining=media_dir is not None), column_map)
    return (StreamedVisionChat if streaming else VisionChatDataset)(tokenizer, records, read)


def _check_columns(column_map: Mapping[str, str], records: JsonRecords | Table) -> None:
    if unknown := column_map.keys() - {*COLUMNS}:
        raise ValueError(f"column_map has {sorted(unknown)}; known are {', '.join(COLUMNS)}")
    wanted, columns = {*column_map.values()}, set[str]()
    if isinstance(records, Table):
        columns.update(records.column_names or wanted)
    else:
        for index in range(len(records)):  # as many as it takes to find the wanted ones
            if wanted <= columns:
                break
            with suppress(ValueError):  # is told when the sample is measured or made
                record = records[index]
                columns.update(record if isinstance(record, Mapping) else ())
    if missing := wanted - columns:
        raise ValueError(f"column_map names {sorted(missing)}; the columns are {sorted(columns)}")


class VisionChatDataset(Dataset):
    """A table of conversations; see :func:`vision_chat_dataset`.

    Args:
        transform: the model's transform.
        rows: the records.
        read: makes a sample for the transform of a record and its number.
    """

    def __init__(
        self,
        transform: Transform,
        rows: Sequence[Any] | Table,
        read: Callable[[Any, int], dict[str, Any]],
    ) -> None:
        self._transform = transform
        self._rows = rows
        self._read = read

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Transform a sample.

        The result is the transform's with ``labels``, list[int]: tokens, and -100 where the loss
        ignores them. A ValueError names the sample whose record or media cannot be read, or that
        has no token of an answer that carries loss.
        """
        return self._apply(index, lambda sample: _supervised(self._transform, sample))

    def measure(self, index: int) -> tuple[int, int, int]:
        """Count the tokens, patches and supervised tokens that a sample has when transformed.

        Its media are not decoded. What is a ValueError is one of :meth:`__getitem__` too.
        """
        return self.examine(index)[0]

    def examine(self, index: int) -> tuple[tuple[int, int, int], dict[str, int] | None]:
        """Measure a sample, and tell how many ``tokens``, ``images`` and ``videos`` are cut.

        None are told if nothing is cut.
        """
        return self._apply(index, self._transform.examine)

    def _apply(self, index: int, function: Callable[[dict[str, Any]], Any]) -> Any:
        with naming(index):
            record = self._rows[index]
        with naming(index, _place(self._rows, index)):
            return function(self._read(record, index))


class StreamedVisionChat:
    """A stream of conversations; see :func:`vision_chat_dataset`.

    Iterating gives samples as the transform takes them, media still as paths, from the first record
    each time.

    Args:
        transform: the model's transform.
        rows: the records.
        read: makes a sample for the transform of a record and its number.
        start: number of the first record.
    """

    def __init__(
        self,
        transform: Transform,
        rows: JsonRecords | Table,
        read: Callable[[Any, int], dict[str, Any]],
        start: int = 0,
    ) -> None:
        self._transform = transform
        self._rows = rows
        self._read = read
        self._start = start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        records = iter(self._rows)
        for index in count():
            number = self._start + index
            with naming(number):
                record: Any = next(records, _END)
            if record is _END:
                return
            with naming(number, _place(self._rows, index)):
                sample = self._read(record, number)
            yield sample

    def skip(self, count: int) -> "StreamedVisionChat":
        """Leave out so many samples at the beginning; the numbers of the others stay."""
        rows = self._rows.skip(count)
        return StreamedVisionChat(self._transform, rows, self._read, self._start + count)

    def measure(self, sample: Mapping[str, Any]) -> tuple[int, int, int]:
        """Measure a sample of the stream as :meth:`VisionChatDataset.measure` does."""
        return self._transform.examine(sample)[0]

    def transform(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Transform a sample of the stream as :meth:`VisionChatDataset.__getitem__` does."""
        return _supervised(self._transform, sample)


def _supervised(transform: Transform, sample: Mapping[str, Any]) -> dict[str, Any]:
    """A transformed sample with labels, of which there are some."""
    transformed = transform(sample)
    tokens, mask = transformed["tokens"], transformed["mask"]
    with naming(sample["id"]):
        transform.check_supervised(tokens, mask)
    return {**transformed, "labels": np.where(mask, IGNORE_INDEX, tokens).tolist()}


def _place(rows: Any, index: int) -> str:
    return f" ({rows.place(index)})" if isinstance(rows, JsonRecords) else ""
