"""What a run may not change when it goes on: its data, its model and its settings."""

import json
from collections.abc import Iterable, Mapping
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from omegaconf import DictConfig, OmegaConf

from torchtune_vl.files._directory import checksum

# What may change is all the rest: how long, how fast, on what devices, what is written
FIXED = (
    "tokenizer",
    "model",
    "dataset",
    "dataset_val",
    "seed",
    "shuffle",
    "optimizer",
    "learning_rates",
    "lr_scheduler",
    "clip_grad_norm",
    "dtype",
    "compute_dtype",
)
# Compared by what is there, so that directories may move
_PLACES = ("checkpoint_dir", "data_files", "media_dir")
# Files beside the weights that neither the model nor the data depend on
_OTHERS = ("generation_config.json", "checksums.json", "model.safetensors.index.json")
_BYTES_OF_EACH_TENSOR = 4096


def settings(cfg: DictConfig) -> dict[str, Any]:
    """List the settings of a run that may not change.

    Args:
        cfg: the config.

    Returns:
        From keys, with dots, to values that JSON can hold.
    """
    fixed = {key: value for key, value in cfg.items() if key in FIXED}
    content = OmegaConf.to_container(OmegaConf.create(fixed, parent=cfg), resolve=True)
    return _flat(json.loads(json.dumps(content, default=str)), "")


def _flat(node: Any, key: str) -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {key: node}
    prefix = f"{key}." if key else ""
    items = ((name, value) for name, value in node.items() if name not in _PLACES)
    return {k: v for name, value in items for k, v in _flat(value, f"{prefix}{name}").items()}


def model_fingerprint(weights: Mapping[str, torch.Tensor], checkpoint_dir: Path) -> dict[str, str]:
    """Tell a model from others, without reading it all.

    Args:
        weights: tensors by name, as loaded.
        checkpoint_dir: has config, tokenizer and processor files.

    Returns:
        Checksums by name: of these files; of names, shapes, dtypes and the first 4 KiB of each
        tensor.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(weights.items()):
        count = _BYTES_OF_EACH_TENSOR // tensor.element_size()
        start = tensor.detach().flatten()[:count]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(start.view(torch.uint8).numpy().tobytes())
    files = {
        f"{path.name} of checkpoint_dir": checksum(path)
        for path in sorted(checkpoint_dir.iterdir())
        if path.suffix in (".json", ".jinja", ".txt") and path.name not in _OTHERS
    }
    return {**files, "what the checkpointer loads": digest.hexdigest()}


def data_fingerprint(dataset: DictConfig, sizes: np.ndarray) -> dict[str, str]:
    """Tell a dataset from others, without reading its media.

    Args:
        dataset: its config; local files of ``data_files`` are read.
        sizes: of its samples.

    Returns:
        Checksums by name: of these files and of the sizes.
    """
    patterns = _leaves(dataset.get("data_files"))
    paths = sorted({path for pattern in patterns for path in glob(pattern, recursive=True)})
    files = {Path(path).name: checksum(Path(path)) for path in paths if Path(path).is_file()}
    digest = xxhash.xxh3_128_hexdigest(sizes.tobytes())
    return {**files, "the number or the sizes of samples": digest}


def _leaves(node: Any) -> Iterable[str]:
    if isinstance(node, Mapping):
        node = list(node.values())
    if isinstance(node, str):
        return [node]
    return [leaf for part in node or () for leaf in _leaves(part)]


def refuse_changes(kind: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a run was begun with to what it shall go on with.

    Args:
        kind: ``settings``, whose values are told, or what the checksums are of.
        before: values by name.
        now: likewise.

    Raises:
        ValueError: if they differ; it says which.
    """
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changes = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        if kind == "settings"
        else f"{name} has changed"
        for name in names
    ]
    if changes:
        raise ValueError(
            f"a run goes on with the {kind} that it began with, but {', '.join(changes)}: restore "
            "what it was, or start anew in another output_dir"
        )
