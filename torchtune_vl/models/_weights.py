"""Weights of a checkpoint, and their way into a model."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchtune_vl._torchao import NF4Tensor
from torchtune_vl._torchtune import DoRALinear, LoRALinear
from torchtune_vl.files._directory import check_manifest
from torchtune_vl.files._safetensors import Stored, read_tensors, stored_tensors, weight_files
from torchtune_vl.files._tensor_names import flat_name
from torchtune_vl.files._together import Part
from torchtune_vl.models._builders import vision_language_model
from torchtune_vl.models._registry import family_of
from torchtune_vl.modules.grouped import GroupedLoRALinear
from torchtune_vl.modules.nf4 import NF4Layout, nf4_layout
from torchtune_vl.modules.vision import VisionLanguageModel

_OUTPUT_LAYER = "lm_head.weight"
_TOKEN_EMBEDDING = "model.embed_tokens.weight"
_CONTIGUOUS = torch.contiguous_format  # also where a weight is read transposed
_LISTED = 60  # tensors in an error
Tensors = dict[str, torch.Tensor]


def model_of(
    directory: str | Path, build: Callable[..., VisionLanguageModel], weights: bool, **settings: Any
) -> VisionLanguageModel:
    """Build the model of a checkpoint, plain or with adapters, with its weights or with fresh ones.

    Raises ``ValueError`` as :func:`family_of` and :func:`load_weights` do.
    """
    dimensions = family_of(directory).all_dimensions(directory)
    # A setting that is a dimension too has two values, which Python refuses
    if not weights:
        return build(**dimensions, **settings)
    with torch.device("meta"):
        model = build(**dimensions, **settings)
    loaded = load_weights(Path(directory), weight_files(Path(directory)))
    adapters = initial_adapters(model, loaded, torch.initial_seed())
    load_weights_into(model, {**loaded, **adapters}, torch.device("cpu"))
    return model


def load_weights(directory: Path, files: Sequence[Path]) -> Tensors:
    """Read the weights of a checkpoint and compare them with its config and its checksums.

    Returns the tensors by our names, as stored, on the CPU and mapped from the files. Raises
    ``ValueError`` if files are missing or damaged, or tensors are unknown, missing or of another
    shape than the config says; it lists them.
    """
    check_manifest(directory)
    family = family_of(directory)
    with torch.device("meta"):
        model = vision_language_model(**family.all_dimensions(directory))
    published = family.names.to_published(model.state_dict())
    expected = {flat_name(name): tensor.shape for name, tensor in published.items()}
    stored = stored_tensors(files, flat_name)
    if _OUTPUT_LAYER not in expected and {_OUTPUT_LAYER, _TOKEN_EMBEDDING} <= stored.keys():
        # Some trainers write an output layer beside tied embeddings
        pair = read_tensors({name: stored[name] for name in (_OUTPUT_LAYER, _TOKEN_EMBEDDING)})
        output = stored.pop(_OUTPUT_LAYER)
        if not torch.equal(*pair.values()):
            raise ValueError(
                f"{output.path}: {output.name} differs from the token embedding, but config.json "
                "says tie_word_embeddings: set it to false if the output layer was trained alone"
            )
    for name, place in stored.items():
        # transformers 5 writes experts' matrices the other way round than they are published
        if len(place.shape) == 3 and place.transposed().shape == expected.get(name):
            stored[name] = place.transposed()
    _refuse_differences(stored, expected, directory)
    return family.names.from_published(read_tensors(stored))


def load_weights_into(model: nn.Module, weights: Tensors, device: torch.device) -> None:
    """Give a model on the meta device its weights, all of which are on the CPU, and whole.

    Each process cuts its own part of them on the host, and quantizes it there if need be, and takes
    that alone to ``device``, the CPU if they are offloaded.
    """
    placed: Tensors = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            part = _part(model, weights, name, Part.of(parameter).slices)
            own = part.to(device, parameter.dtype, copy=True, memory_format=_CONTIGUOUS)
            # Not by from_local, which sends it to the device of the mesh
            placed[name] = DTensor(own, parameter._spec, requires_grad=False)
        else:
            nf4 = parameter.data
            if isinstance(nf4, NF4Tensor):
                placed[name] = NF4Layout.of(nf4).quantize(weights[name]).to(device)
            else:
                placed[name] = weights[name].to(
                    device, parameter.dtype, copy=True, memory_format=_CONTIGUOUS
                )
    model.load_state_dict(placed, assign=True)


def _part(model: nn.Module, weights: Tensors, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
    """Cut a part of a weight, or of the bytes that it is kept as."""
    layer_name, _, own_name = name.rpartition(".")
    layer: Any = model.get_submodule(layer_name)
    if own_name == "nf4_codes":
        rows = slices[0]
        return layer.layout.codes(weights[f"{layer_name}.weight"], rows.start, rows.stop)
    if own_name == "nf4_scales":
        return layer.layout.scales(weights[f"{layer_name}.weight"])[slices]
    return weights[name][slices]


def initial_adapters(model: nn.Module, weights: Tensors, seed: int) -> Tensors:
    """Make a model's adapters that change nothing yet, the same for any number of devices.

    The model may be on the meta device; ``weights`` are those of its base. Returns the adapters'
    parameters, float32 on the CPU, but for those that ``weights`` has.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters: Tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupedLoRALinear):
            count, in_dim, rank = module.lora_a.weight.shape
            a = torch.empty(count, in_dim, rank)
            bound = in_dim**-0.5  # as below
            adapters[f"{name}.lora_a.weight"] = a.uniform_(-bound, bound, generator=generator)
            adapters[f"{name}.lora_b.weight"] = torch.zeros(module.lora_b.weight.shape)
        if not isinstance(module, LoRALinear | DoRALinear):
            continue
        a = torch.empty(module.lora_a.weight.shape)
        # As torchtune and peft do, after the paper's code
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        adapters[f"{name}.lora_a.weight"] = a
        adapters[f"{name}.lora_b.weight"] = torch.zeros(module.lora_b.weight.shape)
        if isinstance(module, DoRALinear):
            base = weights[f"{name}.weight"]
            if layout := nf4_layout(module):
                base = layout.quantize(base).get_original_weight()
            adapters[f"{name}.magnitude"] = torch.linalg.norm(base.float(), dim=1)
    return {name: tensor for name, tensor in adapters.items() if name not in weights}


def _refuse_differences(
    stored: Mapping[str, Stored], expected: Mapping[str, torch.Size], directory: Path
) -> None:
    shapes = {name: place.shape for name, place in stored.items()}
    # By name, so that a wrong name stands beside the right one
    names = sorted(n for n in {**shapes, **expected} if shapes.get(n) != expected.get(n))
    lines = [f"{len(names)} tensors do not fit {directory / 'config.json'}:"]
    for name in names[:_LISTED]:
        place, shape = stored.get(name), expected.get(name)
        found = f"{name} is missing"
        if place is not None:
            found = f"{place.name} is {list(place.shape)} in {place.path.name}"
        lines.append(f"{found}, expected {'none' if shape is None else list(shape)}")
    if names:
        raise ValueError("\n  ".join(lines))
