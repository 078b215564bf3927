"""The rows that source, files and split of a config name."""

import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import datasets
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.json.json import Json

from torchtune_vl.datasets._json_rows import JsonRows

# Arguments of load_dataset, not of its builder: they say how to make a table, and JSON has none
_OF_TABLES = {"verification_mode", "keep_in_memory", "save_infos", "num_proc"}


class Stream:
    """A stream of ``datasets``, with all of its rows in every data worker.

    Args:
        rows: the stream.
    """

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self._rows = rows
        self.column_names = rows.column_names
        self.features = rows.features

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Iterated over by itself, it would share its rows out among data workers
        return ({k: v[0] for k, v in batch.items()} for batch in self._rows.iter(batch_size=1))

    def skip(self, count: int) -> "Stream":
        """Leave out rows at the beginning."""
        return Stream(self._rows.skip(count))


def load_rows(
    source: str, data_files: Any, *, split: str, streaming: bool, **settings: Any
) -> tuple[Any, list[str]]:
    """Find the rows of a dataset.

    ``datasets`` finds the files, and reads all but JSON, which :class:`JsonRows` does.

    Args:
        source: as in :func:`~torchtune_vl.datasets.vision_chat_dataset`.
        data_files: likewise.
        split: likewise.
        streaming: likewise.
        **settings: likewise.

    Returns:
        The rows, :class:`JsonRows`, a table of ``datasets`` or a :class:`Stream`; and the files
        that they are in, as far as the config names files or directories.

    Raises:
        ValueError: if there is no such source, file, split or setting, or a file cannot be read.
    """
    names = ("state.json", "dataset_dict.json")
    if any(os.path.isfile(os.path.join(source, name)) for name in names):
        return _saved_rows(source, split, streaming), [os.path.join(source, "")]
    data_files = _plain(data_files)
    if data_files is not None and not all(_groups(data_files)):
        raise ValueError("data_files names no file: name one, a list or a pattern")
    of_builder = {name: value for name, value in settings.items() if name not in _OF_TABLES}
    try:
        builder = datasets.load_dataset_builder(source, data_files=data_files, **of_builder)
        if not isinstance(builder, Json):
            rows = datasets.load_dataset(
                source, data_files=data_files, split=split, streaming=streaming, **settings
            )
    # ValueError: of a split, or files of another format; TypeError: of a setting that is not known
    except (FileNotFoundError, TypeError, ValueError, DatasetGenerationError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"the source {source!r} cannot be loaded: {reason}") from error
    if isinstance(builder, Json):
        return _json_rows(builder, split, settings.get("cache_dir") or HF_DATASETS_CACHE)
    files = [file for group in _groups(data_files or []) for file in group]
    return _undecoded(rows, streaming), files


def _groups(data_files: Any) -> list[list[str]]:
    """The files of each split."""
    groups = data_files.values() if isinstance(data_files, Mapping) else [data_files]
    return [[group] if isinstance(group, str) else group for group in groups]


def _plain(value: Any) -> Any:
    """Lists and dicts of a config as such."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value if value is None or isinstance(value, str) else list(value)


def _json_rows(
    builder: datasets.DatasetBuilder, split: str, cache_dir: str
) -> tuple[JsonRows, list[str]]:
    config: Any = builder.config
    if config.features is not None or config.encoding.lower().replace("-", "") != "utf8":
        raise ValueError("JSON is read as it is and in UTF-8: leave features and encoding out")
    wanted = {part.split("[")[0].strip() for part in split.split("+")}
    groups = {str(name): list(files) for name, files in config.data_files.items()}
    if not wanted <= groups.keys():
        raise ValueError(f"the split {split!r} is not there; there are {', '.join(groups)}")
    download_config = datasets.DownloadConfig(
        token=builder.token, storage_options=builder.storage_options
    )
    download = datasets.DownloadManager(download_config=download_config).download
    tables = {
        name: JsonRows(
            [file if os.path.exists(file) else download(file) for file in groups[name]],
            config.field,
            cache_dir,
        )
        for name in wanted
    }
    files = [file for name in wanted for file in groups[name] if os.path.exists(file)]
    return reduce(operator.add, _parts(split, tables)), files


def _saved_rows(source: str, split: str, streaming: bool) -> Stream | datasets.Dataset:
    saved = datasets.load_from_disk(source)
    tables = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    rows = datasets.concatenate_datasets(_parts(split, tables))
    return _undecoded(rows.to_iterable_dataset() if streaming else rows, streaming)


def _parts(split: str, tables: Mapping[str, Any]) -> list[Any]:
    """The parts of tables that make a split, which are named as in ``datasets``."""
    lengths = {name: len(table) for name, table in tables.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise ValueError(f"the split {split!r} cannot be read: {error}") from error
    if not any(part.to > part.from_ for part in parts):
        raise ValueError(f"the split {split!r} has no rows: there are {lengths}")
    return [tables[p.splitname].select(range(p.from_, p.to)) for p in parts]


def _undecoded(rows: Any, streaming: bool) -> Stream | datasets.Dataset:
    """Rows with media as files hold them, whose EXIF orientation is then honoured."""
    if rows.features is not None:  # cast() would copy them
        rows.info.features = datasets.Features(_encoded(dict(rows.features)))
    return Stream(rows) if streaming else rows


def _encoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image | datasets.Video):
        return replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _encoded(value) for name, value in feature.items()}
    return feature
