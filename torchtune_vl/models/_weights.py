"""Weights of a checkpoint, and their way into a model."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtune_vl._torchao import NF4Tensor, to_nf4
from torchtune_vl._torchtune import DoRALinear, LoRALinear
from torchtune_vl.files._directory import check_manifest
from torchtune_vl.files._safetensors import Stored, read_tensors, stored_tensors, weight_files
from torchtune_vl.files._tensor_names import published_name
from torchtune_vl.models._config import read_config
from torchtune_vl.models._families import family_of

_OUTPUT_LAYER = "lm_head.weight"
_TOKEN_EMBEDDING = "model.embed_tokens.weight"
_LISTED = 20  # tensors in an error


def load_weights(directory: Path, files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint and compare them with its config and its checksums.

    Args:
        directory: has ``config.json``, and ``checksums.json`` perhaps.
        files: its files of weights.

    Returns:
        The tensors by our names, as stored, on the CPU and mapped from the files.

    Raises:
        ValueError: if files are missing or damaged, or tensors are unknown, missing or of another
            shape than the config says; it lists all of them.
    """
    check_manifest(directory)
    family = family_of(directory)
    with torch.device("meta"):
        model = family.build(**family.dimensions(read_config(directory)))
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in family.names.to_published(model.state_dict()).items()
    }
    stored = stored_tensors(files, published_name)
    _drop_tied_output_layer(stored, expected)
    _refuse_differences(stored, expected, directory)
    return family.names.from_published(read_tensors(stored))


def with_weights(build: Callable[[], nn.Module], directory: Path) -> Any:
    """Build a model and load the weights of a checkpoint, without making weights first.

    Args:
        build: builds it, with adapters or without.
        directory: of the checkpoint.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: as :func:`load_weights` does.
    """
    with torch.device("meta"):
        model = build()
    weights = load_weights(directory, weight_files(directory))
    weights = {**weights, **initial_adapters(model, weights, torch.initial_seed())}
    load_weights_into(model, weights, torch.device("cpu"))
    return model


def load_weights_into(
    model: nn.Module, weights: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Give a model on the meta device its weights: each process takes its own part of them.

    Args:
        model: the model, sharded or not.
        weights: all of its parameters, whole, on the CPU.
        device: where they go; the CPU if they are offloaded.
    """
    placed = {name: _like(weights[name], p, device) for name, p in model.named_parameters()}
    model.load_state_dict(placed, assign=True)


def _like(weight: torch.Tensor, parameter: nn.Parameter, device: torch.device) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        # Nothing is sent, since all processes have all weights mapped; a clone, since the part
        # would keep the whole alive
        layout = parameter.device_mesh, parameter.placements
        part = distribute_tensor(weight.to(parameter.dtype), *layout, src_data_rank=None)
        return part.clone().to(device)
    weight = weight.to(device, parameter.dtype, copy=True)
    if isinstance(parameter.data, NF4Tensor):
        return to_nf4(weight, parameter.data.block_size, parameter.data.scaler_block_size)
    return weight


def initial_adapters(
    model: nn.Module, weights: Mapping[str, torch.Tensor], seed: int
) -> dict[str, torch.Tensor]:
    """Make the adapters that change nothing yet, the same for any number of devices.

    Args:
        model: has the adapters, perhaps on the meta device.
        weights: of the base model, by the model's names.
        seed: of the random ones.

    Returns:
        The adapters' parameters, float32 on the CPU, by the model's names; those of which
        ``weights`` has some, not.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoRALinear | DoRALinear):
            continue
        a = torch.empty(module.lora_a.weight.shape)
        # As torchtune and peft do, after the paper's code
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        adapters[f"{name}.lora_a.weight"] = a
        adapters[f"{name}.lora_b.weight"] = torch.zeros(module.lora_b.weight.shape)
        if isinstance(module, DoRALinear):
            base = weights[f"{name}.weight"]
            if isinstance(module.weight.data, NF4Tensor):
                blocks = module.weight.data.block_size, module.weight.data.scaler_block_size
                base = to_nf4(base, *blocks).get_original_weight()
            adapters[f"{name}.magnitude"] = torch.linalg.norm(base.float(), dim=1)
    return {name: tensor for name, tensor in adapters.items() if name not in weights}


def _drop_tied_output_layer(
    stored: dict[str, Stored], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Accept an output layer beside tied embeddings, which some trainers write, if it is equal."""
    if _OUTPUT_LAYER in expected or _OUTPUT_LAYER not in stored or _TOKEN_EMBEDDING not in stored:
        return
    names = (_OUTPUT_LAYER, _TOKEN_EMBEDDING)
    values = read_tensors({name: stored[name] for name in names})
    output = stored.pop(_OUTPUT_LAYER)
    if not torch.equal(values[_OUTPUT_LAYER], values[_TOKEN_EMBEDDING]):
        raise ValueError(
            f"{output.path}: {output.name} differs from the token embedding, but config.json says "
            "tie_word_embeddings: set it to false if the output layer was trained on its own"
        )


def _refuse_differences(
    stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]], directory: Path
) -> None:
    unknown = [
        f"{place.name} ({place.path.name})"
        for name, place in stored.items()
        if name not in expected
    ]
    missing = [name for name in expected if name not in stored]
    misshapen = [
        f"{name} is {list(stored[name].shape)} in {stored[name].path.name}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = {"unknown": unknown, "missing": missing, "of another shape": misshapen}
    lines = [
        f"{len(found)} tensors {what}:\n  " + "\n  ".join(found[:_LISTED])
        for what, found in problems.items()
        if found
    ]
    if lines:
        raise ValueError(f"the weights do not fit {directory / 'config.json'}\n" + "\n".join(lines))
