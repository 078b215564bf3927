"""Adapters in peft's files, and merged into the weights that they adapt."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_peft_to_tune, qwen2_5_vl_tune_to_peft
from torchtune_vl.models.qwen2_5_vl._convert_adapters import peft_module
from torchtune_vl.modules.adapters import ADAPTER_SUFFIXES, is_adapter
from torchtune_vl.training._directory import (
    check_manifest,
    new_file,
    write_json,
    write_manifest,
)
from torchtune_vl.training._weights import read_tensors, stored_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_A, _B, _MAGNITUDE = ADAPTER_SUFFIXES

# Settings of peft under which its adapters compute something else, and their harmless values
_PLAIN = {
    "bias": ("none",),
    "use_rslora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
}


class Adapter(NamedTuple):
    """Adapters of a model, and parameters trained in full beside them.

    Args:
        tensors: both, by our names.
        rank: rank of the adapters.
        alpha: their products are scaled by alpha / rank.
        base: name or directory of the model that they adapt.
    """

    tensors: dict[str, torch.Tensor]
    rank: int
    alpha: float
    base: str


def load_adapter(directory: Path) -> Adapter:
    """Read an adapter that peft or this project wrote.

    Args:
        directory: has ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The adapter, its tensors mapped from the file.

    Raises:
        ValueError: if a file is missing or damaged, or it is another kind of adapter or of another
            model.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} has no {CONFIG}: it is no directory of an adapter")
    check_manifest(directory)
    config = json.loads(path.read_text(encoding="utf-8"))
    other = {
        key: config[key] for key, plain in _PLAIN.items() if config.get(key, plain[0]) not in plain
    }
    if config.get("peft_type") != "LORA" or other:
        raise ValueError(
            f"{path}: an adapter of type {config.get('peft_type')!r} with {other} is not "
            "supported: merge it by peft's merge_and_unload, and start from the result"
        )
    try:
        stored = qwen2_5_vl_peft_to_tune(stored_tensors([directory / WEIGHTS]))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return Adapter(
        read_tensors(stored),
        config["r"],
        config["lora_alpha"],
        config.get("base_model_name_or_path") or "",
    )


def save_adapter(adapter: Adapter, directory: Path) -> None:
    """Write an adapter as peft does, and checksums of its files.

    Modules are named one by one in ``adapter_config.json``, so that no other layer of the same
    name gets an adapter.

    Args:
        adapter: the adapter.
        directory: where to write.

    Raises:
        ValueError: if a tensor is of no layer of our model.
        OSError: if a file cannot be written.
    """
    names = qwen2_5_vl_tune_to_peft({name: name for name in adapter.tensors})
    adapted = {peft_module(peft) for peft, ours in names.items() if is_adapter(ours)}
    in_full = {peft_module(peft) for peft, ours in names.items() if not is_adapter(ours)}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "use_dora": any(name.endswith(_MAGNITUDE) for name in adapter.tensors),
        "target_modules": sorted(adapted),
        "modules_to_save": sorted(in_full) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {
        peft: adapter.tensors[ours].detach().cpu().contiguous() for peft, ours in names.items()
    }
    with new_file(directory / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    write_json(directory / CONFIG, config)
    write_manifest(directory)


@torch.no_grad()
def merge_adapter(weights: Mapping[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """Add adapters to the weights of their layers.

    Products are made in float32 and rounded once, to the dtype of the weights.

    Args:
        weights: of the base model, by our names.
        adapter: the adapter.

    Returns:
        All weights, those without an adapter as they are.

    Raises:
        ValueError: if the adapter is of layers that the weights do not have, or of other shapes.
    """
    merged = dict(weights)
    for name, tensor in adapter.tensors.items():
        layer = f"{name.removesuffix(_A)}.weight" if name.endswith(_A) else name
        if layer not in weights and not is_adapter(name):
            raise ValueError(f"the adapter has {name}, which the model does not have")
        if name.endswith(_A):
            merged[layer] = _merge(name.removesuffix(_A), weights, adapter)
        elif not is_adapter(name):
            merged[name] = tensor.to(weights[name].dtype)
    return merged


def _merge(layer: str, weights: Mapping[str, torch.Tensor], adapter: Adapter) -> torch.Tensor:
    weight = weights.get(f"{layer}.weight")
    a, b = adapter.tensors[layer + _A].float(), adapter.tensors[layer + _B].float()
    if weight is None or weight.shape != (len(b), a.shape[1]):
        raise ValueError(
            f"the adapter of {layer} fits a weight of {len(b)} x {a.shape[1]}, which the model "
            "does not have there: it is of another model"
        )
    merged = weight.float() + adapter.alpha / adapter.rank * (b @ a)
    magnitude = adapter.tensors.get(layer + _MAGNITUDE)
    if magnitude is not None:
        merged *= (magnitude.float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.to(weight.dtype)
