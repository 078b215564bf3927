"""Checkpoints and adapters written anew: merged, in another dtype, in files of another size."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from torchtune_vl.checkpoint._adapters import (
    CONFIG,
    fit_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from torchtune_vl.checkpoint._checkpointer import write_weights
from torchtune_vl.files._directory import new_directory, write_manifest
from torchtune_vl.files._safetensors import weight_files
from torchtune_vl.models._weights import load_weights

log = logging.getLogger(__name__)


def merge(
    base: Path,
    adapter_dir: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write the checkpoint that a base model and its adapter make.

    Weights do not tell whether an adapter was trained on them: a base of another name is logged.

    Args:
        base: checkpoint directory of the base model.
        adapter_dir: directory of the adapter, of ours or of peft.
        output: directory to make.
        dtype: dtype of the weights, by default that of each in the base model.
        max_shard_size: most bytes of tensors in a file, such as ``500MB``.

    Raises:
        ValueError: if a directory is damaged or they do not fit each other.
        OSError: if a file cannot be written, or the output exists.
    """
    weights = load_weights(base, weight_files(base))
    adapter = fit_adapter(load_adapter(adapter_dir), weights, adapter_dir)
    if adapter.base and Path(adapter.base).name != base.resolve().name:
        told = "The adapter of %s was trained on %s: see that %s has the same weights"
        log.warning(told, adapter_dir, adapter.base, base)
    with _new_output(output) as partial:
        write_weights(merge_adapter(weights, adapter, dtype), partial, base, max_shard_size)
        write_manifest(partial)


def export(
    source: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint in the published layout, or an adapter in peft's.

    Args:
        source: directory of a checkpoint, or of an adapter.
        output: directory to make.
        dtype: dtype of the tensors, by default as they are.
        max_shard_size: most bytes of tensors in a file of a checkpoint.

    Raises:
        ValueError: if the source is damaged, or neither of both.
        OSError: if a file cannot be written, or the output exists.
    """
    adapter = load_adapter(source) if (source / CONFIG).is_file() else None
    weights = adapter.tensors if adapter else load_weights(source, weight_files(source))
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    with _new_output(output) as partial:
        if adapter:
            save_adapter(adapter._replace(tensors=weights), partial)
        else:
            write_weights(weights, partial, source, max_shard_size)
            write_manifest(partial)


def _new_output(output: Path) -> AbstractContextManager[Path]:
    if output.exists():
        raise FileExistsError(f"{output} exists: name a new directory")
    return new_directory(output)
