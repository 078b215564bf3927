"""The records that source, files and split of a config name."""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Union

import datasets
from datasets.config import HF_DATASETS_CACHE
from datasets.data_files import resolve_pattern
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.json.json import Json
from torch.utils.data import ConcatDataset, Subset

from torchtune_vl.datasets._file_groups import FolderRecords, TarRecords
from torchtune_vl.datasets._json_records import JsonRecords
from torchtune_vl.datasets._remote import is_store, local_copy
from torchtune_vl.media._errors import reason_of, refusing

# Each a record and where it is, if that is known
Records = Union["ConcatDataset[tuple[Any, str]]", "Table"]

# Or each table that is read, of local files too, is reported to the makers of datasets, and a
# machine without a network waits for that
if "HF_UPDATE_DOWNLOAD_COUNTS" not in os.environ:
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

# Arguments of load_dataset, not of its builder: they say how to make a table, and JSON has none
_OF_TABLES = {"verification_mode", "keep_in_memory", "save_infos", "num_proc"}


class Table:
    """The rows of a table of ``datasets``, perhaps a stream, as records.

    A table gives every dict the keys of all: what is null there is absent here. Media are as files
    hold them, not decoded, and so the transform honours their EXIF orientation.
    """

    def __init__(self, rows: datasets.Dataset | datasets.IterableDataset) -> None:
        if rows.features is not None:  # cast() would copy them
            features = json.dumps(rows.features.to_dict())
            encoded = json.loads(features, object_hook=_encoded)
            rows.info.features = datasets.Features.from_dict(encoded)
        self._rows = rows
        self.column_names = rows.column_names
        self.is_stream = isinstance(rows, datasets.IterableDataset)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], str]:
        return _without_nulls(self._rows[index], self._rows.features), ""

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str]]:
        # Iterated over by itself, a stream would share its rows out among data workers
        for batch in self._rows.iter(batch_size=1):
            row = {key: value for key, (value,) in batch.items()}
            yield _without_nulls(row, self._rows.features), ""

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        """Tell rows from those of other tables by the table's fingerprint and their number."""
        return [f"{self._rows._fingerprint} {index}".encode() for index in indices]

    def part(self, number: int, of: int) -> "Table":
        """One of so many parts: of a stream whole files if these can be shared out equally."""
        if of == 1:
            return self
        if self._rows.num_shards % of == 0:
            return Table(self._rows.shard(of, number, contiguous=False))
        is_own = partial(_is_of_part, number, of)
        return Table(self._rows.filter(is_own, with_indices=True, input_columns=[]))

    def skip(self, count: int) -> "Table":
        """Leave out rows at the beginning."""
        return Table(self._rows.skip(count))


def _is_of_part(number: int, of: int, index: int) -> bool:
    return index % of == number


def digests_of(records: Any, indices: Sequence[int]) -> list[bytes]:
    """The ``digests`` of some records, whatever they are put together from."""
    return [digest for table, own in _by_table(records, indices) for digest in table.digests(own)]


def lines_of(records: Any, indices: Sequence[int]) -> list[bytes] | None:
    """What JSON files say of some records, each in one line; None if others hold any of them."""
    parts = [*_by_table(records, indices)]
    if not all(isinstance(table, JsonRecords) for table, _ in parts):
        return None
    return [line for table, own in parts for line in table.lines(own)]


def _by_table(records: Any, indices: Sequence[int]) -> Iterator[tuple[Any, Sequence[int]]]:
    """The tables that records are put together from, each with the indices that it has of some."""
    if isinstance(records, Subset):
        yield from _by_table(records.dataset, [records.indices[index] for index in indices])
    elif isinstance(records, ConcatDataset):
        ends = [0, *records.cumulative_sizes]
        for part, of_part in groupby(indices, key=partial(bisect_right, records.cumulative_sizes)):
            within = [index - ends[part] for index in of_part]
            yield from _by_table(records.datasets[part], within)
    else:
        yield records, indices


def _encoded(feature: dict[str, Any]) -> dict[str, Any]:
    return feature | ({"decode": False} if feature.get("_type") in ("Image", "Video") else {})


def _without_nulls(value: Any, feature: Any) -> Any:
    if isinstance(feature, datasets.Json):  # kept as text, and so what it was
        return value
    if isinstance(value, Mapping):
        of_keys = feature if isinstance(feature, Mapping) else {}
        present = {key: entry for key, entry in value.items() if entry is not None}
        return {key: _without_nulls(entry, of_keys.get(key)) for key, entry in present.items()}
    if isinstance(value, list):
        return [_without_nulls(entry, getattr(feature, "feature", None)) for entry in value]
    return value


def is_saved(directory: str) -> bool:
    """Whether ``save_to_disk`` wrote a directory."""
    names = ("state.json", "dataset_dict.json")
    return any(os.path.isfile(os.path.join(directory, name)) for name in names)


def load_records(
    source: str, data_files: Any, *, split: str, streaming: bool, **settings: Any
) -> tuple[Records, list[str]]:
    """Find the records of ``vision_chat_dataset``, and the files of the config that hold them.

    ``datasets`` finds the files, and reads all but JSON.
    """
    if is_store(source) or is_saved(source):
        with refusing(f"{source} cannot be loaded", "name what save_to_disk wrote"):
            options = settings.get("storage_options")
            saved = datasets.load_from_disk(source, storage_options=options)
        tables = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        parts = [table.select(range(*bounds)) for table, *bounds in _parts(split, tables)]
        return Table(datasets.concatenate_datasets(parts)), [os.path.join(source, "")]
    # Plain lists, which those of a config are not
    groups = data_files if isinstance(data_files, Mapping) else {"train": data_files or []}
    groups = {k: [v] if isinstance(v, str) else [*v] for k, v in groups.items()}
    if data_files is not None and not all(groups.values()):
        raise ValueError("data_files names no file: name one, a list or a pattern")
    named = groups if data_files is not None else None
    if named is None and source in ("folder", "webdataset"):
        raise ValueError(f"the source {source!r} lacks data_files: name what it is to read")
    of_builder = {name: value for name, value in settings.items() if name not in _OF_TABLES}
    cache_dir = os.path.expanduser(settings.get("cache_dir") or HF_DATASETS_CACHE)
    try:
        if source in ("folder", "webdataset"):
            return _file_groups(source, groups, split, **settings | {"cache_dir": cache_dir})
        builder = datasets.load_dataset_builder(source, data_files=named, **of_builder)
        if not isinstance(builder, Json):
            settings |= {"split": split, "streaming": streaming}
            rows = datasets.load_dataset(source, data_files=named, **settings)
    except PermissionError as error:
        cache, denied = Path(cache_dir), Path(str(error.filename))
        # One above it is the first of those that cannot be made
        if not cache.is_relative_to(denied) and not denied.is_relative_to(cache):
            raise
        key = "cache_dir" if settings.get("cache_dir") else "HF_DATASETS_CACHE"
        told = f"the cache of tables, {cache_dir}, cannot be written ({reason_of(error)})"
        raise ValueError(f"{told}; set {key} to another directory") from error
    # ValueError: of a split, or files of another format; TypeError: of a setting that is not known
    except (FileNotFoundError, TypeError, ValueError, DatasetGenerationError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"the source {source!r} cannot be loaded: {reason}") from error
    if isinstance(builder, Json):
        records, own = _json_records(builder, split, cache_dir)
        named_files = (file for files in groups.values() for file in files)
        return records, [*own, *filter(is_store, named_files)]
    return Table(rows), [file for files in groups.values() for file in files]


def _json_records(builder: Any, split: str, cache_dir: str) -> tuple[Records, list[str]]:
    config = builder.config
    if config.features is not None or config.encoding.lower().replace("-", "") != "utf8":
        raise ValueError("JSON is read as it is and in UTF-8: leave features and encoding out")
    tables: dict[str, Any] = {}
    own = []
    for name, found in _files_of_split(config.data_files, split).items():
        own += [file for file in found if os.path.exists(file)]
        settings = (cache_dir, builder.token, builder.storage_options or {})
        files = [_local(file, *settings) for file in found]
        tables[name] = JsonRecords(files, config.field, cache_dir)
    return _of_split(split, tables), own


def _file_groups(
    source: str,
    groups: Mapping[str, list[str]],
    split: str,
    *,
    cache_dir: str,
    token: Any = None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[Records, list[str]]:
    """Records of tars, or of directories, which media paths are relative to."""
    options = dict(storage_options or {})
    tables: dict[str, Any] = {}
    for name, files in _files_of_split(groups, split).items():
        if source == "folder":
            tables[name] = FolderRecords(files, options)
            continue
        config = datasets.DownloadConfig(token=token, storage_options=options)
        patterns = [pattern for file in files for pattern in _without_braces(file)]
        tars = [tar for each in patterns for tar in resolve_pattern(each, "", None, config)]
        settings = (cache_dir, token, options)
        tables[name] = TarRecords([_local(tar, *settings) for tar in tars])
    folders = [os.path.join(file, "") for files in groups.values() for file in files]
    return _of_split(split, tables), folders if source == "folder" else []


def _files_of_split(groups: Mapping[Any, Sequence[str]], split: str) -> dict[str, list[str]]:
    named = {str(name): list(files) for name, files in groups.items()}
    wanted = dict.fromkeys(part.split("[")[0].strip() for part in split.split("+"))
    if not wanted.keys() <= named.keys():
        raise ValueError(f"the split {split!r} is not there; there are {', '.join(named)}")
    return {name: named[name] for name in wanted}


def _local(file: str, cache_dir: str, token: Any, storage_options: Mapping[str, Any]) -> str:
    """A file itself, or the copy in a cache of one that lies elsewhere."""
    if os.path.exists(file):
        return file
    if is_store(file) and not file.startswith("hf://"):
        return local_copy(file, cache_dir, storage_options)
    config = datasets.DownloadConfig(token=token, storage_options={**storage_options})
    return datasets.DownloadManager(download_config=config).download(file)


def _without_braces(pattern: str) -> list[str]:
    """Patterns for all numbers of ``{000..009}``."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    before, behind = pattern[: found.start()], pattern[found.end() :]
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [each for number in numbers for each in _without_braces(before + number + behind)]


def _of_split(split: str, tables: Mapping[str, Any]) -> Records:
    return ConcatDataset([Subset(each, range(*bounds)) for each, *bounds in _parts(split, tables)])


def _parts(split: str, tables: Mapping[str, Any]) -> list[tuple[Any, int, int]]:
    """Tables, and where the parts of them begin and end that make a split of ``datasets``."""
    lengths = {name: len(table) for name, table in tables.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise ValueError(f"the split {split!r} cannot be read: {error}") from error
    if not any(part.to > part.from_ for part in parts):
        raise ValueError(f"the split {split!r} has no records: there are {lengths}")
    return [(tables[part.splitname], part.from_, part.to) for part in parts]
