"""Files of transformed samples, of which any can be read by itself, without unpickling anything.

A shard is a file of Arrow's IPC format with a record batch of one row for each sample, whose
buffers are compressed by LZ4. docs/prepare.md describes the columns.
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import xxhash
from pyarrow import ipc

from torchtune_vl.files._directory import new_file
from torchtune_vl.media import Geometry
from torchtune_vl.modules import IGNORE_INDEX
from torchtune_vl.modules.layout import vision_index

# Columns of flat lists: positions have three numbers for each token, grids three for each medium
_LISTS: dict[str, Any] = {
    "tokens": np.int32,
    "mask": np.bool_,
    "input_pos": np.int32,
    "grid_thw": np.int32,
    "patches": np.uint8,
    "truncated": np.int32,
}
_SCHEMA = pa.schema(
    {
        **{name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in _LISTS.items()},
        "origin": pa.string(),
        "checksum": pa.uint64(),
    }
)
# What a sample may lose
LOST = ("tokens", "images", "videos")
# Each takes a file descriptor
_LARGEST_NUMBER_OPEN = 128


class Shard(NamedTuple):
    """A file of samples; one that was written anew has another checksum, XXH3 of 128 bits."""

    path: Path
    checksum: str


def write_shard(path: Path, samples: Iterable[tuple[Mapping[str, Any], tuple[Any, str]]]) -> None:
    """Write samples of :class:`~torchtune_vl.chat.ChatTransform`, each with its id and place.

    The file is there when it is whole. Patches must be uint8; labels are not stored: they are the
    ids that are not masked.
    """
    options = ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with (
        new_file(path) as partial,
        ipc.new_file(str(partial), _SCHEMA, options=options) as writer,
    ):
        for sample, origin in samples:
            writer.write_batch(_to_batch(sample, json.dumps(origin, default=str)))


def _to_batch(sample: Mapping[str, Any], origin: str) -> pa.RecordBatch:
    vision = sample["encoder_input"]["vision"] if "encoder_input" in sample else {}
    values = {**dict.fromkeys(_LISTS, ()), **sample, **vision}
    values["truncated"] = [*sample.get("truncated", {}).values()]
    arrays = [np.asarray(values[name], dtype).ravel() for name, dtype in _LISTS.items()]
    lists = [pa.ListArray.from_arrays([0, array.size], pa.array(array)) for array in arrays]
    checksum = pa.array([_checksum(arrays, origin)], pa.uint64())
    return pa.record_batch([*lists, pa.array([origin]), checksum], schema=_SCHEMA)


def _checksum(arrays: Iterable[np.ndarray], origin: str) -> int:
    digest = xxhash.xxh3_64(origin.encode())
    for array in arrays:
        digest.update(array.data)
    return digest.intdigest()


def read_sample(shard: Shard, number: int, geometry: Geometry) -> dict[str, Any]:
    """Read one sample of a shard, with ``labels``, as it was when it was written.

    Raises ``ValueError`` if the file is damaged there.
    """
    arrays, patches, _ = _read(shard, number)
    tokens, mask, positions = (arrays[name] for name in ("tokens", "mask", "input_pos"))
    sample: dict[str, Any] = {
        "tokens": tokens.tolist(),
        "mask": mask.tolist(),
        "input_pos": _threes(positions),
    }
    if len(arrays["grid_thw"]):
        grid_thw = _threes(arrays["grid_thw"])
        patches = patches.view(int(grid_thw.prod(dim=1).sum()), -1)
        vision = {"patches": patches, "grid_thw": grid_thw, **vision_index(grid_thw, geometry)}
        sample["encoder_input"] = {"vision": vision}
    if len(arrays["truncated"]):
        sample["truncated"] = dict(zip(LOST, arrays["truncated"].tolist(), strict=True))
    return {**sample, "labels": np.where(mask, IGNORE_INDEX, tokens).tolist()}


def read_origin(shard: Shard, number: int) -> tuple[Any, str]:
    """Read what a sample of a shard was made of: its id and place."""
    *_, origin = _read(shard, number)
    name, place = json.loads(origin)
    return name, place


def _threes(numbers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.int64)).view(-1, 3)


def _read(shard: Shard, number: int) -> tuple[dict[str, np.ndarray], torch.Tensor, str]:
    """The lists of a sample as arrays, its patches once more as a tensor, and its origin."""
    try:
        batch = _opened(shard).get_batch(number)
        values = {name: batch.column(name).values for name in _LISTS}
        arrays = {name: v.to_numpy(zero_copy_only=False) for name, v in values.items()}
        origin, checksum = (batch.column(name)[0].as_py() for name in ("origin", "checksum"))
        if _checksum(arrays.values(), origin) != checksum:
            raise ValueError("its checksum is another")
    except (pa.ArrowException, OSError, ValueError, LookupError, AttributeError) as error:
        problem = f"{shard.path} is damaged ({error})"
        raise ValueError(f"{problem}: copy it again, or remove it and run prepare again") from error
    # Not by way of NumPy, which calls it read-only, and so torch would warn
    return arrays, torch.from_dlpack(values["patches"]), origin


@lru_cache(_LARGEST_NUMBER_OPEN)
def _opened(shard: Shard) -> ipc.RecordBatchFileReader:
    # What does not get smaller by LZ4 is not copied: whoever changes it must not change the file
    with shard.path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    options = ipc.IpcReadOptions(use_threads=False)  # data workers are as many as the cores
    reader = ipc.open_file(pa.py_buffer(content), options=options)
    if reader.schema != _SCHEMA:
        raise ValueError("its columns are others")
    return reader
