"""Adapters in peft's files, and merged into the weights that they adapt."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from torchtune_vl._torchtune import LoRALinear
from torchtune_vl.checkpoint._peft_targets import targeted_modules
from torchtune_vl.files._directory import (
    check_manifest,
    new_file,
    write_json,
    write_manifest,
)
from torchtune_vl.files._json import JsonObject, read_json_object
from torchtune_vl.files._names import TensorNames, peft_module
from torchtune_vl.files._safetensors import read_tensors, stored_tensors
from torchtune_vl.models._families import families
from torchtune_vl.modules.adapters import ADAPTER_SUFFIXES, DoRA, is_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_A, _B, _MAGNITUDE = ADAPTER_SUFFIXES

# Settings of peft that do not change what a trained adapter computes, whatever their values
_HARMLESS = {
    *("peft_type", "r", "lora_alpha", "use_dora", "modules_to_save", "ensure_weight_tying"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "lora_dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "eva_config"),
    "qalora_group_size",
}
# ... and those that do with other values than these; any further key, unless it is switched off
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # The others change the base, or train one of the two matrices alone
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_OFF: tuple[Any, ...] = (None, False, {}, [])
_WITHOUT_WEIGHTS = ("alora_invocation_tokens", "arrow_config")
_MERGE_BY_PEFT = (
    "merge it by peft's merge_and_unload, save the model, and start from that as checkpoint_dir"
)
_EMBEDDING = "decoder.tok_embeddings.weight"
_OUTPUT = "decoder.output.weight"
_LISTED = 3  # names in an error
# How the tensors of adapters begin that were trained with these releases of transformers
_NAMES_BEFORE_4_52 = ("base_model.model.visual.", "base_model.model.model.layers.")


class Adapter(NamedTuple):
    """Adapters of a model, and parameters trained in full beside them.

    Args:
        tensors: both, by our names.
        rank: rank of the adapters.
        alpha: their products are scaled by alpha / rank.
        base: name or directory of the model that they adapt.
        names: of the tensors of its family.
        copies: parameters of the base that peft wrote beside them though they are not trained.
    """

    tensors: dict[str, torch.Tensor]
    rank: int
    alpha: float
    base: str
    names: TensorNames
    copies: Mapping[str, torch.Tensor] = MappingProxyType({})


def load_adapter(directory: Path) -> Adapter:
    """Read an adapter that peft or this project wrote.

    Args:
        directory: has ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The adapter, its tensors mapped from the file.

    Raises:
        ValueError: if a file is missing or damaged, it is another kind of adapter or of another
            model, or its tensors are not those of its config, or not finite.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} has no {CONFIG}: it is no directory of an adapter")
    check_manifest(directory)
    config = read_json_object(path)
    _refuse_other_kinds(config)
    try:
        found = stored_tensors([directory / WEIGHTS])
        names = _names_of(found)
        stored = names.from_peft(found)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}; {_MERGE_BY_PEFT}") from None
    tensors = read_tensors(stored)
    rank = config.whole("r")
    use_dora = config.over({"use_dora": False}).flag("use_dora")
    _check_layers(tensors, rank, use_dora, path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{directory / WEIGHTS}: {stored[name].name} is not finite")
    trained = [f".{module}." for module in _modules_to_save(config)]
    copies = {
        name: tensor
        for name, tensor in tensors.items()
        if not is_adapter(name)
        and not any(module in f".{peft_module(stored[name].name)}." for module in trained)
    }
    return Adapter(
        {name: tensor for name, tensor in tensors.items() if name not in copies},
        rank,
        config.number("lora_alpha", 1e-6, 1e6),
        config.text("base_model_name_or_path") if "base_model_name_or_path" in config else "",
        names,
        copies,
    )


def _names_of(stored: Iterable[str]) -> TensorNames:
    """The names of the family that an adapter is of, which its file does not tell."""
    names = {name: name for name in stored}
    errors = []
    for family in families():
        try:
            family.names.from_peft(names)
        except ValueError as error:
            errors.append(error)
        else:
            return family.names
    raise errors[0]


def _refuse_other_kinds(config: JsonObject) -> None:
    if config.content.get("peft_type") != "LORA":
        raise config.over({"peft_type": None}).error("peft_type", f"'LORA': {_MERGE_BY_PEFT}")
    for key, value in config.content.items():
        # 0 and 1 are no numbers of a setting here, but equal to False and True
        if key in _HARMLESS or any(value == ok for ok in _PLAIN.get(key, _OFF)):
            continue
        remedy = "no weights compute the same" if key in _WITHOUT_WEIGHTS else _MERGE_BY_PEFT
        raise config.error(key, f"plain LoRA or DoRA on the weights of the base: {remedy}")


def _modules_to_save(config: JsonObject) -> list[str]:
    if "modules_to_save" not in config:
        return []
    modules = config.each("modules_to_save")
    return [modules.text(place) for place in modules.content]


def _check_layers(
    tensors: Mapping[str, torch.Tensor], rank: int, use_dora: bool, path: Path
) -> None:
    """Compare the tensors of adapters with each other and with their config."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        for suffix in ADAPTER_SUFFIXES:
            if name.endswith(suffix):
                layers.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    if not layers:
        raise ValueError(f"{path.parent / WEIGHTS} has no adapters")
    for layer, parts in layers.items():
        missing = [suffix for suffix in (_A, _B) if suffix not in parts]
        if missing:
            raise ValueError(f"{path.parent / WEIGHTS} has an adapter of {layer} without {missing}")
        shapes = [tuple(parts[suffix].shape) for suffix in (_A, _B)]
        if any(len(shape) < 2 or 0 in shape for shape in shapes):
            raise ValueError(
                f"{path.parent / WEIGHTS}: the adapter of {layer} is empty, with shapes {shapes}: "
                "DeepSpeed ZeRO-3 saves so what it has not gathered; gather it, and save it again"
            )
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(
                f"{path.parent / WEIGHTS}: the adapter of {layer} is of a convolution, with shapes "
                f"{shapes}: {_MERGE_BY_PEFT}"
            )
        if not shapes[0][0] == shapes[1][1] == rank:
            raise ValueError(
                f"{path}: r is {rank}, but {WEIGHTS} has an adapter of {layer} with matrices of "
                f"{shapes[0]} and {shapes[1]}: state the rank it was trained with"
            )
        if (_MAGNITUDE in parts) != use_dora:
            raise ValueError(
                f"{path}: use_dora is {use_dora}, but {WEIGHTS} has "
                f"{'a' if _MAGNITUDE in parts else 'no'} magnitude of {layer}: state what it was "
                "trained with"
            )
        if use_dora and parts[_MAGNITUDE].shape != shapes[1][:1]:
            raise ValueError(f"{path.parent / WEIGHTS}: the magnitude of {layer} has another size")


def fit_adapter(adapter: Adapter, weights: Mapping[str, torch.Tensor], directory: Path) -> Adapter:
    """Compare an adapter with the weights that it is to adapt.

    Args:
        adapter: as read from ``directory``.
        weights: of the base model, by our names; without an output layer if it is the embedding.
        directory: of the adapter, for errors.

    Returns:
        The adapter, without an output layer where it is the token embedding, and without copies.

    Raises:
        ValueError: if it is of another model, makes of a tied embedding two layers, or lacks layers
            that its config names.
    """
    tensors, copies = dict(adapter.tensors), dict(adapter.copies)
    if _OUTPUT not in weights:
        embedding = tensors.get(_EMBEDDING)
        output = tensors.pop(_OUTPUT, None)
        if output is None and embedding is not None:  # peft does not list it, but writes it
            output = copies.pop(_OUTPUT, None)
        if f"{_OUTPUT.removesuffix('.weight')}{_A}" in tensors:
            raise ValueError(
                f"{directory}: it adapts lm_head, which is the token embedding of this base, and "
                "not even peft merges that rightly: train one without it"
            )
        if (output is None) != (embedding is None) or (
            output is not None and embedding is not None and not torch.equal(output, embedding)
        ):
            raise ValueError(
                f"{directory}: of the token embedding and the output layer, which are one in this "
                f"base, it has one alone, or two different ones: {_MERGE_BY_PEFT}"
            )
    for name, tensor in {**tensors, **copies}.items():
        weight = weights.get(_adapted(name))
        if name.endswith(_A) and _adapted(name) in tensors:
            raise ValueError(f"{directory}: it has {_adapted(name)} in full and an adapter of it")
        if weight is None and name == _OUTPUT:
            weight = weights[_EMBEDDING]
        if weight is None or _sides(name, tensor) != _sides(name, weight):
            raise ValueError(
                f"{directory}: {name} of shape {tuple(tensor.shape)} does not fit the model, "
                f"which has {'no such layer' if weight is None else tuple(weight.shape)} there: it "
                "is of another model"
            )
        if name in copies and not _same(tensor, weight):
            raise ValueError(
                f"{directory}: it has weights of its base, and {name} is not as in checkpoint_dir: "
                "name the base that it was trained on"
            )
    _refuse_missing_layers(tensors, weights, adapter.names, directory)
    return adapter._replace(tensors=tensors, copies={})


def _refuse_missing_layers(
    tensors: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    names: TensorNames,
    directory: Path,
) -> None:
    """Compare the adapted layers with those that peft would adapt by the adapter's config.

    peft takes a layer without its adapter as it is in the base, with no more than a warning.
    """
    # A pattern is of the names that modules had when the adapter was trained
    before_4_52 = any(
        name.startswith(_NAMES_BEFORE_4_52) for name in stored_tensors([directory / WEIGHTS])
    )
    linear = {n: n for n, weight in weights.items() if weight.ndim == 2 and n != _EMBEDDING}
    renamed = (names.to_published if before_4_52 else names.to_peft)(linear)
    modules = {peft_module(theirs): ours for theirs, ours in renamed.items()}
    missing = [
        module
        for module in targeted_modules(read_json_object(directory / CONFIG), modules)
        if f"{modules[module].removesuffix('.weight')}{_A}" not in tensors
    ]
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise ValueError(
            f"{directory}: by its {CONFIG} it adapts {', '.join(missing[:_LISTED])}{more}, but "
            f"{WEIGHTS} has nothing of these: save it again, or state in target_modules what it "
            "adapts"
        )


def check_continues(
    model: nn.Module, trained: Iterable[str], config: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Raise ``ValueError`` unless a model goes on training what an adapter trained.

    Args:
        model: the model, perhaps on the meta device.
        trained: names of all of its trained parameters.
        config: ``r`` and ``lora_alpha`` of the adapter.
        names: of all of its tensors, adapters or not.
    """
    layer = next((m for m in model.modules() if isinstance(m, LoRALinear | DoRA)), None)
    problems = []
    if layer is not None and (layer.rank, layer.alpha) != (config["r"], config["lora_alpha"]):
        problems.append(
            f"the model has lora_rank {layer.rank} and lora_alpha {layer.alpha}, it has "
            f"{config['r']} and {config['lora_alpha']}"
        )
    for who, others in (
        ("the adapter alone has", sorted({*names} - {*trained})),
        ("the model alone trains", sorted({*trained} - {*names})),
    ):
        if others:
            more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
            problems.append(f"{who} {', '.join(others[:_LISTED])}{more}")
    if problems:
        raise ValueError(
            f"the adapter of adapter_dir does not go on in this model: {'; '.join(problems)}: give "
            "the model what the adapter has, or merge the adapter first (tune-vl merge)"
        )


def _adapted(name: str) -> str:
    """The name of the weight that a tensor adapts, or replaces."""
    for suffix in ADAPTER_SUFFIXES:
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix)}.weight"
    return name


def _sides(name: str, tensor: torch.Tensor) -> torch.Size:
    """What a tensor of an adapter and its weight have in common of their shapes."""
    if name.endswith(_A):
        return tensor.shape[1:]
    return tensor.shape[:1] if is_adapter(name) else tensor.shape


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal in the smaller of their dtypes."""
    return torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))


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
    tensors = dict(adapter.tensors)
    is_tied = _EMBEDDING in tensors and _OUTPUT not in tensors
    if is_tied:  # peft would train one of both alone
        tensors[_OUTPUT] = tensors[_EMBEDDING].clone()
    names = adapter.names.to_peft({name: name for name in tensors})
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
        "ensure_weight_tying": is_tied,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    stored = {peft: tensors[ours].detach().cpu().contiguous() for peft, ours in names.items()}
    with new_file(directory / WEIGHTS) as partial:
        save_file(stored, partial, metadata={"format": "pt"})
    write_json(directory / CONFIG, config)
    write_manifest(directory)


@torch.no_grad()
def merge_adapter(
    weights: Mapping[str, torch.Tensor], adapter: Adapter, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Add adapters to the weights of their layers.

    Products are made in float32 and rounded once.

    Args:
        weights: of the base model, by our names.
        adapter: the adapter, which fits them, see :func:`fit_adapter`.
        dtype: of the result, by default that of each weight.

    Returns:
        All weights, those without an adapter as they are, but for the dtype.
    """
    merged = {name: weight.to(dtype or weight.dtype) for name, weight in weights.items()}
    for name, tensor in adapter.tensors.items():
        if name.endswith(_A):
            weight = weights[_adapted(name)]
            whole = _merge(name.removesuffix(_A), weight, adapter)
            merged[_adapted(name)] = whole.to(dtype or weight.dtype)
        elif not is_adapter(name):
            merged[name] = tensor.to(dtype or weights[name].dtype)
    return merged


def _merge(layer: str, weight: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """The weight of a layer with its adapter, float32."""
    a, b = adapter.tensors[layer + _A].float(), adapter.tensors[layer + _B].float()
    merged = weight.float() + adapter.alpha / adapter.rank * (b @ a)
    magnitude = adapter.tensors.get(layer + _MAGNITUDE)
    if magnitude is not None:
        merged *= (magnitude.float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged
