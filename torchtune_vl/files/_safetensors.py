"""Safetensors files: weights in one or several with an index."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from torchtune_vl.files._directory import is_inside, new_file, write_json
from torchtune_vl.files._json import read_json_object
from torchtune_vl.files._together import Together

INDEX = "model.safetensors.index.json"
Tensors = Mapping[str, torch.Tensor]


class LazyTensor(NamedTuple):
    """A tensor that is made when it is written."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


# Some are sharded over processes, or not made yet
AnyTensors = Mapping[str, torch.Tensor | LazyTensor]


def cast_lazily(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | LazyTensor:
    """Return a tensor that is converted when it is written, if it has another dtype.

    Of one that is sharded, the part of this process is converted at once.
    """
    if isinstance(tensor, DTensor) or tensor.dtype == dtype:
        return tensor.to(dtype)
    return LazyTensor(tensor.shape, dtype, partial(tensor.to, dtype))


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    name: str
    shape: tuple[int, ...]  # as it is read
    is_transposed: bool = False  # in the file, in its last two dimensions

    def transposed(self) -> "Stored":
        """Return it as it is read the other way round."""
        *others, rows, columns = self.shape
        return self._replace(shape=(*others, columns, rows), is_transposed=not self.is_transposed)


def weight_files(directory: Path) -> list[Path]:
    """List a directory's files of weights: those of its index, there or not, or the single one.

    Raises ``ValueError`` if there is neither, or the index is damaged.
    """
    index, single = directory / INDEX, directory / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return [single]
        remedy = "name the files of weights in checkpoint_files, or download the checkpoint again"
        raise ValueError(f"{directory} has neither {INDEX} nor {single.name}: {remedy}")
    weight_map = read_json_object(index).part("weight_map")
    for tensor in weight_map.content:
        if not is_inside(weight_map.text(tensor)):
            raise weight_map.error(tensor, "a file inside the directory: download the index again")
    if not weight_map.content:
        raise ValueError(f"{index}: weight_map is empty: download the index again")
    return [directory / name for name in sorted({*weight_map.content.values()})]


def stored_tensors(files: Sequence[Path], rename: Callable[[str], str] = str) -> dict[str, Stored]:
    """Find the tensors of safetensors files, by new names, without reading their values.

    Raises ``ValueError`` if a file is missing or damaged, or two tensors get the same name.
    """
    stored: dict[str, Stored] = {}
    for path in files:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no file, but something else: it holds no weights")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    place = Stored(path, name, tuple(file.get_slice(name).get_shape()))
                    other = stored.setdefault(rename(name), place)
                    if other is not place:
                        raise ValueError(f"{name} of {path} is in {other.path} too ({other.name})")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): download the file again") from None
    return stored


def read_tensors(stored: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    """Map tensors on the CPU: they take no memory until they are written to, files stay as is."""
    paths = {place.path for place in stored.values()}
    files = {path: safe_open(path, framework="pt") for path in paths}
    tensors = {name: files[place.path].get_tensor(place.name) for name, place in stored.items()}
    return {name: x.mT if stored[name].is_transposed else x for name, x in tensors.items()}


def write_shards(
    weights: AnyTensors,
    directory: Path,
    max_shard_size: str = "5GB",
    group: ProcessGroup | None = None,
) -> None:
    """Write tensors to ``model.safetensors``, or to several files and then their index.

    Takes memory for one file at most, if tensors are sharded, lazy, on another device or not
    contiguous. The processes of a group, to which all belong that there are, call it together, and
    write files in turn, each while others go on.
    """
    together = Together(group)
    parts = together.parts_of(weights)
    like = {n: torch.empty(x.shape, dtype=x.dtype, device="meta") for n, x in weights.items()}
    plan = split_torch_state_dict_into_shards(like, max_shard_size=max_shard_size)
    written: list[Future[None]] = []
    failed: BaseException | None = None
    with ThreadPoolExecutor(1) as pool:
        for number, (filename, names) in enumerate(plan.filename_to_tensors.items()):
            writer = number % together.world_size
            if is_own := writer == together.rank:
                failed = failed or _first_error(written)
            # Here, so that those of the file before are let go
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                found: torch.Tensor | LazyTensor | None = weights[name]
                if isinstance(found, DTensor):
                    found = together.collect(found, [each[name] for each in parts], writer)
                if is_own and not failed and found is not None:
                    try:
                        tensors[name] = _on_cpu(found)
                    except Exception as error:
                        failed = error
            if is_own and not failed:
                written.append(pool.submit(save_tensors, tensors, directory / filename))
    # Told when no other process waits for this one any more
    if failed := failed or _first_error(written):
        raise failed
    if plan.is_sharded and together.rank == 0:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(directory / INDEX, index)


def _first_error(written: Sequence[Future[None]]) -> BaseException | None:
    """Wait for files, and return the error of the first that could not be written."""
    return next(filter(None, (each.exception() for each in written)), None)


def _on_cpu(tensor: torch.Tensor | LazyTensor) -> torch.Tensor:
    made = tensor.make() if isinstance(tensor, LazyTensor) else tensor
    return made.detach().cpu().contiguous()


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write a file of tensors as :func:`new_file` does, with the metadata transformers wants."""
    with new_file(path) as partial:
        on_cpu = {name: _on_cpu(tensor) for name, tensor in tensors.items()}
        save_file(on_cpu, partial, metadata={"format": "pt"})
