"""What a run may not change when it goes on: its data, its model and its settings."""

import json
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils._pytree import tree_leaves

from torchtune_vl.files._directory import MANIFEST, checksum
from torchtune_vl.files._safetensors import INDEX

# What may change is all the rest: how long, how fast, on what devices, what is written
FIXED = (
    *("tokenizer", "model", "dataset", "dataset_val", "sampling_temperature", "seed", "shuffle"),
    *("optimizer", "learning_rates", "lr_scheduler", "clip_grad_norm", "dtype", "compute_dtype"),
    "best_by",
)
# Compared by what is there, so that directories may move
_PLACES = ("checkpoint_dir", "data_files", "media_dir", "directory")
# Files beside the weights that neither the model nor the data depend on
_OTHERS = ("generation_config.json", MANIFEST, INDEX)
_BYTES_OF_EACH_TENSOR = 4096


def settings(cfg: DictConfig) -> dict[str, Any]:
    """List the settings of a run that may not change, as JSON has them, by keys with dots."""
    fixed = {key: value for key, value in cfg.items() if key in FIXED}
    content = OmegaConf.to_container(OmegaConf.create(fixed, parent=cfg), resolve=True)
    return _flat(json.loads(json.dumps(content, default=str)), "")


def _flat(node: Any, key: str) -> dict[str, Any]:
    if isinstance(node, list) and any(isinstance(entry, dict) for entry in node):
        node = {str(number): entry for number, entry in enumerate(node)}  # datasets of a mixture
    if not isinstance(node, dict) or not node:
        return {key: node}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if name not in _PLACES:
            flat |= _flat(value, f"{key}.{name}".removeprefix("."))
    return flat


def model_fingerprint(weights: Mapping[str, torch.Tensor], checkpoint_dir: Path) -> dict[str, str]:
    """Tell a model from others by checksums of its JSON and text files, and of parts of tensors."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(weights.items()):
        start = tensor.detach().flatten()[: _BYTES_OF_EACH_TENSOR // tensor.element_size()]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(start.view(torch.uint8).numpy().tobytes())
    files = {
        f"{path.name} of checkpoint_dir": checksum(path)
        for path in sorted(checkpoint_dir.iterdir())
        if path.suffix in (".json", ".jinja", ".txt") and path.name not in _OTHERS
    }
    return {**files, "what the checkpointer loads": digest.hexdigest()}


def data_fingerprint(dataset: DictConfig | ListConfig, sizes: np.ndarray) -> dict[str, str]:
    """Tell a dataset from others by checksums of its local ``data_files`` and of samples' sizes."""
    content: Any = OmegaConf.to_container(dataset, resolve=True)
    entries = content if isinstance(content, list) else [content]
    patterns = tree_leaves([entry.get("data_files") or [] for entry in entries])
    files: dict[str, str] = {}
    found = sorted({path for pattern in patterns for path in glob(pattern, recursive=True)})
    for path in map(Path, found):
        if path.is_file():  # there may be others of its name
            files[path.name] = files.get(path.name, "") + checksum(path)
    digest = xxhash.xxh3_128_hexdigest(sizes.tobytes())
    return {**files, "the number or the sizes of samples": digest}


def refuse_changes(kind: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` with what a run was begun with and does not go on with, by name."""
    # Of all but settings these are checksums
    told = "{} was {!r} and is {!r}" if kind == "settings" else "{} has changed"
    values = ((name, before.get(name), now.get(name)) for name in {**before, **now})
    changes = [told.format(name, was, value) for name, was, value in values if was != value]
    if changes:
        begun = f"a run goes on with the {kind} that it began with, but {', '.join(changes)}"
        raise ValueError(f"{begun}: restore what it was, or start anew in another output_dir")
