"""Tensors in safetensors files, one or several with an index."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torchtune_vl.files._directory import is_inside, new_file, write_json
from torchtune_vl.files._json import read_json_object

INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    name: str
    shape: tuple[int, ...]


def weight_files(directory: Path) -> list[Path]:
    """The files of weights in a directory: those of the index, or ``model.safetensors``.

    Args:
        directory: the directory.

    Returns:
        The files; those of an index need not exist.

    Raises:
        ValueError: if there is neither, or the index is damaged.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json_object(index).part("weight_map")
        names = {tensor: weight_map.text(tensor) for tensor in weight_map.content}
        for tensor in (tensor for tensor, name in names.items() if not is_inside(name)):
            raise weight_map.error(
                tensor, "a file inside of the directory: download the index again"
            )
        if not names:
            raise ValueError(f"{index}: weight_map is empty: download the index again")
        return [directory / name for name in sorted(set(names.values()))]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    raise ValueError(
        f"{directory} has neither {INDEX} nor model.safetensors: name the files of weights in "
        "checkpoint_files, or download the checkpoint again"
    )


def stored_tensors(files: Sequence[Path], rename: Callable[[str], str] = str) -> dict[str, Stored]:
    """Find the tensors of safetensors files, without reading their values.

    Args:
        files: the files.
        rename: from a tensor's name in a file to the name it goes by.

    Returns:
        Where each tensor lies, by the name it goes by.

    Raises:
        ValueError: if a file is missing or damaged, or two tensors go by the same name.
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
                        raise ValueError(
                            f"{name} of {path} is in {other.path} as well ({other.name})"
                        )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): download the file again") from None
    return stored


def read_tensors(
    stored: Mapping[str, Stored],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Read tensors.

    On the CPU and in the dtype of the file they are mapped: they take no memory of their own
    until they are written to, which does not change the file. Those on another device or of another
    dtype are made one by one.

    Args:
        stored: where each tensor lies.
        dtype: dtype of the result, by default as stored.
        device: device of the result, by default the CPU.

    Returns:
        The tensors by the names of ``stored``.
    """
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in {place.path for place in stored.values()}
        }
        return {
            name: files[place.path].get_tensor(place.name).to(device=device, dtype=dtype)
            for name, place in stored.items()
        }


def write_shards(
    weights: Mapping[str, torch.Tensor], directory: Path, max_shard_size: str = "5GB"
) -> None:
    """Write tensors to ``model.safetensors``, or to several files and then their index.

    Takes memory for one file at most, if tensors are on another device or not contiguous.

    Args:
        weights: tensors by name, of any shape, dtype and device.
        directory: an empty directory.
        max_shard_size: most bytes of tensors in a file, such as ``500MB``.

    Raises:
        OSError: if a file cannot be written.
    """
    plan = split_torch_state_dict_into_shards(dict(weights), max_shard_size=max_shard_size)
    for filename, names in plan.filename_to_tensors.items():
        with new_file(directory / filename) as partial:
            shard = {name: weights[name].detach().cpu().contiguous() for name in names}
            save_file(shard, partial, metadata={"format": "pt"})
            del shard  # before the next one is made
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(directory / INDEX, index)
