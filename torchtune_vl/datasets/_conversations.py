"""Datasets of conversations with images and videos."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import count, takewhile
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import ConcatDataset, Dataset

from torchtune_vl.chat import ChatTransform
from torchtune_vl.chat._boxes import Unit
from torchtune_vl.chat._transform import Examined, Turns
from torchtune_vl.datasets._coco import CocoRecords
from torchtune_vl.datasets._formats import (
    ASKED,
    COCO,
    COLUMNS,
    FORMATS,
    names_of_columns,
    recognised,
)
from torchtune_vl.datasets._record_cache import state_of
from torchtune_vl.datasets._record_formats import (
    FileRecord,
    MediaDirectory,
    RecordReader,
    files_of,
)
from torchtune_vl.datasets._remote import RemoteMedia, is_store
from torchtune_vl.datasets._sample_sizes import Measured, counts_of
from torchtune_vl.datasets._tables import Records, Table, digests_of, lines_of, load_records
from torchtune_vl.media import Augmentation
from torchtune_vl.media._errors import naming_sample
from torchtune_vl.modules import IGNORE_INDEX

_log = logging.getLogger(__name__)


def vision_chat_dataset(
    tokenizer: ChatTransform,
    *,
    source: str,
    data_files: Any = None,
    split: str = "train",
    media_dir: str | None = None,
    column_map: Mapping[str, str] | None = None,
    format: str | None = None,
    prompt: str | None = None,
    train_on: Turns | None = None,
    box_unit: Unit | None = None,
    streaming: bool = False,
    augmentation: Mapping[str, Any] | None = None,
    **settings: Any,
) -> "VisionChatDataset | StreamedVisionChat":
    """Build a dataset of conversations with images and videos.

    A record is one sample: a line or value of JSON, the row of a table, files of a folder or tar
    that have one name. Its columns are those of a format of docs/datasets.md, which is logged.

    Args:
        tokenizer: the model's transform, as recipes pass it.
        source: what ``datasets.load_dataset`` takes: "json" (also for JSON Lines), "parquet", a
            directory of files, or the name of a dataset on the hub; what ``save_to_disk`` wrote;
            "folder", of files beside their media; or "webdataset", of tars.
        data_files: files of the source: one or a list, patterns too, perhaps by split. They are
            local, or what fsspec reads, such as ``s3://bucket/train.jsonl``.
        split: split of the source, also a part such as ``"train[:1%]"``.
        media_dir: directory of media whose path is relative, and outside of which nothing is read,
            local or of fsspec. By default that of the data files, and local paths may lead
            anywhere. Tars have none.
        column_map: names of columns that differ, by the names of the format.
        format: of the records, if their columns do not tell; "coco" for files of COCO's detection.
        prompt: the question about every medium, for the formats "caption" and "coco".
        train_on: which answers carry loss, instead of the transform's setting.
        box_unit: unit of boxes and points that do not say theirs: "pixels", "0..1" or "0..1000".
        streaming: whether to give a stream of samples, in the order of records.
        augmentation: settings of :class:`~torchtune_vl.media.Augmentation`, which ``augmented`` of
            the dataset applies; nothing else does.
        **settings: further arguments of ``datasets.load_dataset``.

    Raises:
        ValueError: if source, files or split are not there or cannot be read; the columns fit no
            format or several, or ``prompt`` does not fit the format; ``column_map`` names an
            unknown or absent column; data files of several directories lack ``media_dir``; or
            ``augmentation`` has a setting that is unknown or out of its range.
    """
    if source == "webdataset" and media_dir is not None:
        raise ValueError("media of tars are files in them: leave media_dir out")
    records, files = load_records(source, data_files, split=split, streaming=streaming, **settings)
    column_map = dict(column_map or {})
    _check_columns(column_map, records)
    if format is None:
        format = _recognised_format(records, column_map, _shown(source, data_files))
    _check_format(format, prompt, column_map)
    if format == COCO:
        records = _coco_records(records, split, column_map)
    media = _media(media_dir, files, settings.get("storage_options") or {})
    read = RecordReader(media, column_map, format, prompt, box_unit)
    transform = tokenizer if train_on is None else tokenizer.training_on(train_on)
    kind = StreamedVisionChat if streaming else VisionChatDataset
    return kind(transform, records, read, _read_augmentation(augmentation))


def _shown(source: str, data_files: Any) -> str:
    """Name the data in one line."""
    groups = data_files.values() if isinstance(data_files, Mapping) else [data_files or source]
    files = [file for each in groups for file in ([each] if isinstance(each, str) else each)]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return os.path.basename(os.path.normpath(files[0])) + more


def _recognised_format(records: Records, column_map: Mapping[str, str], shown: str) -> str:
    """The format of a table, or of the first record that can be read; which is logged."""
    columns = _first_columns(records)
    try:
        # What is wrong with each record is told when its sample is measured or made
        format = recognised(columns, column_map) if columns else "messages"
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error
    names = names_of_columns(FORMATS[format].columns, column_map).values()
    read = ", ".join(name for name in names if name in columns)
    others = ", ".join(name for name in columns if name not in names)
    unread = f"; not read: {others}" if others else ""
    is_stream = isinstance(records, Table) and records.is_stream
    count = "a stream of" if is_stream else f"{len(records):,}"
    _log.info(f"{shown}: {count} records in the format {format!r} ({read}){unread}")
    return format


def _first_columns(records: Records) -> list[str]:
    if isinstance(records, Table):
        return records.column_names or [*next((record for record, _ in records), {})]
    for index in range(len(records)):
        with suppress(ValueError):
            record, _ = records[index]
            beside = record.beside if isinstance(record, FileRecord) else {}
            values = {"messages": record} if isinstance(record, list) else {**record, **beside}
            return [column for column, value in values.items() if value is not None]
    return []


def _check_format(format: str, prompt: str | None, column_map: Mapping[str, str]) -> None:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}: make it one of {', '.join(FORMATS)}, or none")
    if format in ASKED and not prompt:
        problem = f"the format {format!r} has no questions"
        raise ValueError(f"{problem}: set prompt, such as prompt='Describe the image.'")
    if format not in ASKED and prompt is not None:
        raise ValueError(f"the format {format!r} has questions of its own: leave prompt out")
    columns = FORMATS[format].columns
    if unread := column_map.keys() - {*columns}:
        problem = f"column_map has {sorted(unread)}, which the format {format!r} does not read"
        raise ValueError(f"{problem}: it reads {', '.join(columns)}")


def _coco_records(records: Records, split: str, column_map: Mapping[str, str]) -> Records:
    if isinstance(records, Table) or column_map or "[" in split:
        raise ValueError(
            "the format 'coco' is of whole JSON files, whose keys are COCO's: set source to json, "
            "and leave column_map and parts of a split out"
        )
    of_images: Any = CocoRecords([records[number] for number in range(len(records))])
    return ConcatDataset([of_images])


def _media(
    media_dir: str | None, files: Sequence[str], storage_options: Mapping[str, Any]
) -> MediaDirectory:
    """Where media of data files are."""
    directories = {os.path.dirname(file) for file in files}
    if media_dir is None and len(directories) > 1:
        problem = f"the data files lie in several directories, {sorted(directories)}"
        raise ValueError(f"{problem}: give media_dir, the one that paths of media are relative to")
    directory = "".join(directories) if media_dir is None else media_dir
    if is_store(directory):
        return RemoteMedia(directory, storage_options)
    return MediaDirectory(directory, is_confining=media_dir is not None)


def _check_columns(column_map: Mapping[str, str], records: Records) -> None:
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
                record, _ = records[index]
                columns.update(record if isinstance(record, Mapping) else ())
    if missing := wanted - columns:
        raise ValueError(f"column_map names {sorted(missing)}; the columns are {sorted(columns)}")


def _read_augmentation(settings: Mapping[str, Any] | None) -> Augmentation | None:
    if settings is None:
        return None
    known = [field.name for field in fields(Augmentation)]
    if unknown := settings.keys() - {*known}:
        raise ValueError(f"augmentation has {sorted(unknown)}; known are {', '.join(known)}")
    return Augmentation(**settings)


# A record's number, and what gives it with its place
RawRecord = tuple[int, Callable[[], tuple[Any, str]]]


@dataclass(eq=False)
class _Conversations:
    """Conversations as samples for a transform, which ``read`` makes of a record and its number."""

    _transform: ChatTransform
    _records: Records
    _read: RecordReader
    _augmentation: Augmentation | None = None

    def transform(self, sample: Mapping[str, Any], epoch: int | None = None) -> dict[str, Any]:
        """Transform a sample, and add ``labels``, list[int]: -100 where the loss ignores a token.

        With an epoch, from 0, as it is augmented in that epoch, if the dataset has augmentation. A
        ValueError names a sample whose media cannot be read, or in which nothing carries loss.
        """
        if self._augmentation is None or epoch is None:
            transformed = self._transform(sample)
        else:
            number = sample["number"]
            transformed = self._transform.augmented(sample, self._augmentation, epoch, number)
        tokens, mask = transformed["tokens"], transformed["mask"]
        with naming_sample(sample["id"]):
            self._transform.check_supervised(tokens, mask)
        return {**transformed, "labels": np.where(mask, IGNORE_INDEX, tokens).tolist()}

    @property
    def augments(self) -> bool:
        """Whether images are augmented in training, by which a sample may get smaller."""
        return self._augmentation is not None

    def _examine(self, sample: Mapping[str, Any]) -> Examined:
        return self._transform.examine(sample, **self._measuring)

    @property
    def _measuring(self) -> dict[str, bool]:
        moves = self._augmentation is not None and bool(self._augmentation.moving)
        return {"augmented": True} if moves else {}


def _as_it_is(row: tuple[Any, str]) -> tuple[Any, str]:
    return row


class VisionChatDataset(_Conversations, Dataset):
    """A table of conversations; see :func:`vision_chat_dataset`."""

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a sample, and :meth:`transform` it; a ValueError names its file and line too."""
        return self._apply(self.transform, index)

    def augmented(self, index: int, epoch: int) -> dict[str, Any]:
        """Read and :meth:`transform` a sample as it is augmented in an epoch, from 0."""
        return self._apply(partial(self.transform, epoch=epoch), index)

    def measure(self, index: int) -> tuple[int, int, int]:
        """Count tokens, patches and supervised tokens of a sample without decoding its media.

        If augmentation moves boxes, as many as the sample may have in any epoch.
        """
        return self.examine(index).size

    def examine(self, index: int) -> Examined:
        """Measure a sample, and tell what of it is cut."""
        return self._apply(self._examine, index)

    @cached_property
    def fingerprint(self) -> str | None:
        """Tells it from datasets whose samples of the same records may have other sizes."""
        own = getattr(self._transform, "fingerprint", None)
        if own is None or self._read.fingerprint is None:
            return None
        return xxhash.xxh3_128_hexdigest(
            f"{own} {self._read.fingerprint} {self._measuring}".encode()
        )

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        """Tell samples' records from others, without parsing them."""
        return digests_of(self._records, indices)

    def lines(self, indices: Sequence[int]) -> list[bytes] | None:
        """Records as their JSON files have them, each in one line; None if they are of others."""
        return lines_of(self._records, indices)

    def read(self, index: int) -> dict[str, Any]:
        """Read a sample as the transform takes it; a ValueError names its file and line too."""
        return self._apply(lambda sample: sample, index)

    def column(self, index: int, name: str) -> Any:
        """Return what a record has in a column, None if it has none of that name."""
        record, _ = self._records[index]
        return record.get(name) if isinstance(record, Mapping) else None

    def measure_to_keep(self, index: int) -> Measured:
        """Measure a sample for a cache, with what its size depends on."""
        return self._apply(self._measure_to_keep, index)

    def _measure_to_keep(self, sample: dict[str, Any]) -> Measured:
        files = files_of(sample)
        state = None if files is None else state_of(files)  # before they are read
        return Measured(counts_of(self._examine(sample)), files or [], state)

    def origin(self, index: int) -> tuple[Any, str]:
        """Return a sample's id, by default its index, and the file and line that it is from."""
        record, place = self._records[index]
        return self._read(record, index)["id"], place

    def _apply(self, function: Callable[[dict[str, Any]], Any], index: int) -> Any:
        with naming_sample(index):
            record, place = self._records[index]
        with naming_sample(index, place):
            return function(self._read(record, index))


@dataclass(eq=False)
class StreamedVisionChat(_Conversations):
    """A stream of samples as the transform takes them; see :func:`vision_chat_dataset`.

    One of several parts has the records whose number leaves the part's when divided by how many
    parts there are, or, of a table with a multiple of so many files, whole files.
    """

    _start: int = 0
    _part: int = 0
    _parts: int = 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for raw in self.raw():
            yield self._apply(lambda sample: sample, raw)

    def skip(self, count: int) -> "StreamedVisionChat":
        """Leave out so many samples at the beginning; the numbers of the others stay."""
        return replace(self, _start=self._start + count)

    def part(self, number: int, of: int) -> "StreamedVisionChat":
        """One of so many parts of a whole stream."""
        return replace(self, _part=number, _parts=of)

    def measure(self, sample: Mapping[str, Any]) -> tuple[int, int, int]:
        """Measure a sample of the stream as :meth:`VisionChatDataset.measure` does."""
        return self._examine(sample).size

    def raw(self) -> Iterator[RawRecord]:
        """The records as they are read, with their number."""
        numbers = count(self._part + self._start * self._parts, self._parts)
        if not (isinstance(self._records, Table) and self._records.is_stream):
            end = len(self._records)
            yield from (
                (n, partial(self._records.__getitem__, n)) for n in takewhile(end.__gt__, numbers)
            )
            return
        rows = iter(self._records.part(self._part, self._parts).skip(self._start))
        for number in numbers:
            with naming_sample(number):
                row = next(rows, None)
            if row is None:
                return
            yield number, partial(_as_it_is, row)

    def measure_raw(self, raw: RawRecord) -> tuple[int, int, int]:
        """Measure the sample of a record."""
        return self._apply(self.measure, raw)

    def make_raw(self, raw: RawRecord, epoch: int) -> dict[str, Any]:
        """Make the sample of a record, as it is augmented in an epoch."""
        return self._apply(partial(self.transform, epoch=epoch), raw)

    def _apply(self, function: Callable[[dict[str, Any]], Any], raw: RawRecord) -> Any:
        number, read = raw
        with naming_sample(number):
            record, place = read()
        with naming_sample(number, place):
            return function(self._read(record, number))
