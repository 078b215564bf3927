"""Safetensors files: weights in one or several with an index."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torchtune_vl.files._directory import is_inside, new_file, write_json
from torchtune_vl.files._json import read_json_object

INDEX = "model.safetensors.index.json"
Tensors = Mapping[str, torch.Tensor]


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    name: str
    shape: tuple[int, ...]


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
    return {name: files[place.path].get_tensor(place.name) for name, place in stored.items()}


def write_shards(weights: Tensors, directory: Path, max_shard_size: str = "5GB") -> None:
    """Write tensors to ``model.safetensors``, or to several files and then their index.

    Takes memory for one file at most, if tensors are on another device or not contiguous.
    """
    plan = split_torch_state_dict_into_shards(dict(weights), max_shard_size=max_shard_size)
    for filename, names in plan.filename_to_tensors.items():
        save_tensors({name: weights[name] for name in names}, directory / filename)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(directory / INDEX, index)


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write a file of tensors as :func:`new_file` does, with the metadata transformers wants."""
    with new_file(path) as partial:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, partial, metadata={"format": "pt"})
