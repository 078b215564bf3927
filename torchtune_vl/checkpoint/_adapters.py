"""Adapters in peft's files, and merged into the weights that they adapt."""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from torchtune_vl.checkpoint import _expert_adapters as of_experts
from torchtune_vl.files._directory import check_manifest, write_json, write_manifest
from torchtune_vl.files._json import JsonObject, read_json_object
from torchtune_vl.files._safetensors import (
    AnyTensors,
    LazyTensor,
    Stored,
    cast_lazily,
    read_tensors,
    save_tensors,
    stored_tensors,
)
from torchtune_vl.files._tensor_names import PREFIX_OF_PEFT, TensorNames, peft_module
from torchtune_vl.models._registry import families
from torchtune_vl.modules.adapters import ADAPTER_SUFFIXES, adapted_layers, is_adapter

Tensors = dict[str, torch.Tensor]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_A, _B, _MAGNITUDE = ADAPTER_SUFFIXES

# Settings of peft that do not change what a trained adapter computes, whatever their values
_HARMLESS = {
    *("r", "lora_alpha", "use_dora", "modules_to_save", "ensure_weight_tying"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "lora_dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "eva_config", "qalora_group_size"),
    "target_parameters",
}
# ... and those that do with other values than these; any further key, unless it is switched off
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The others change the base, or train one of the two matrices alone
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_OFF: tuple[Any, ...] = (None, False, {}, [])
_WITHOUT_WEIGHTS = ("alora_invocation_tokens", "arrow_config")
_MERGE_BY_PEFT = "merge it by peft's merge_and_unload, save that, and name it as checkpoint_dir"
_EMBEDDING = "decoder.tok_embeddings.weight"
_OUTPUT = "decoder.output.weight"
# How the tensors of adapters begin that were trained with these releases of transformers
_NAMES_BEFORE_4_52 = ("base_model.model.visual.", "base_model.model.model.layers.")


class Adapter(NamedTuple):
    """Adapters of a model, and parameters trained in full beside them."""

    tensors: Tensors  # by our names
    rank: int
    alpha: float  # products of the matrices are scaled by alpha / rank
    base: str  # name or directory of the model that they adapt
    names: TensorNames  # of its family


def load_adapter(directory: Path, weights: Tensors | None = None) -> Adapter:
    """Read an adapter that peft or this project wrote, its tensors mapped from the file.

    ``weights`` are those of the model that it is to adapt, by our names; an output layer that is
    the token embedding is in neither. Raises ``ValueError`` if a file is missing or damaged, it is
    another kind of adapter or of another model, or its tensors are not those of its config, or not
    finite. Where its config has ``layers_to_transform``, layers that the file lacks are not found.
    """
    if not (directory / CONFIG).is_file():
        raise ValueError(f"{directory} has no {CONFIG}: it is no directory of an adapter")
    check_manifest(directory)
    config = read_json_object(directory / CONFIG)
    _refuse_other_kinds(config)
    names, stored = _by_our_names(directory, config, weights or {})
    tensors = read_tensors(stored)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{directory / WEIGHTS}: {stored[name].name} is not finite")
        if of_experts.is_of_experts(name) and is_adapter(name):
            try:
                ours = of_experts.to_ours(tensor, config.whole("r"), name.endswith(_A))
            except ValueError as error:
                raise ValueError(f"{directory / WEIGHTS}: {stored[name].name}: {error}") from None
            tensors[name] = ours
    # peft writes some weights of the base beside them though they are not trained
    in_full = _texts(config, "modules_to_save")
    copies = {
        name: tensors.pop(name)
        for name, place in stored.items()
        if not is_adapter(name) and not _is_within(peft_module(place.name), in_full)
    }
    # Without an output layer this is the token embedding
    base = {_OUTPUT: weights[_EMBEDDING], **weights} if weights else {}
    _check_shapes(tensors, config, base)
    if weights:
        if _OUTPUT not in weights:
            _untie(tensors, copies, directory)
        for name, copy in copies.items():
            if not _are_equal(copy, base.get(name)):
                found = f"it has weights of its base, and {name} is not as in checkpoint_dir"
                raise ValueError(f"{directory}: {found}: name the base that it was trained on")
        # A pattern is of the names that modules had when the adapter was trained
        before_4_52 = any(place.name.startswith(_NAMES_BEFORE_4_52) for place in stored.values())
        rename = names.to_published if before_4_52 else names.to_peft
        linear = {n: n for n, weight in weights.items() if weight.ndim == 2 and n != _EMBEDDING}
        modules = {peft_module(theirs): ours for theirs, ours in rename(linear).items()}
        adapted = {weight for weight, parts in _by_weight(tensors).items() if "" not in parts}
        # peft takes a layer without its adapter as it is in the base, with no more than a warning;
        # layers_to_transform leaves some of them out, by rules of peft's own
        targeted = targeted_modules(config, modules)
        experts = {n: n for n, weight in weights.items() if weight.ndim == 3}
        parameters = {
            theirs.removeprefix(PREFIX_OF_PEFT): ours for theirs, ours in rename(experts).items()
        }
        targeted += filter(_pattern(config, "target_parameters").fullmatch, parameters)
        modules |= parameters
        missing = [m for m in targeted if modules[m] not in adapted]
        if missing and "layers_to_transform" not in config:
            found = f"it adapts {_listed(missing)}, but {WEIGHTS} has nothing of these"
            remedy = "save it again, or state in target_modules what it adapts"
            raise ValueError(f"{config.file}: {found}: {remedy}")
    key = "base_model_name_or_path"
    trained_on = config.text(key) if key in config else ""
    alpha = config.number("lora_alpha", 1e-6, 1e6)
    return Adapter(tensors, config.whole("r"), alpha, trained_on, names)


def _refuse_other_kinds(config: JsonObject) -> None:
    config = config.over({"peft_type": None})
    for key, value in config.content.items():
        # 0 and 1 are no numbers of a setting here, but equal to False and True
        if key not in _HARMLESS and value not in _PLAIN.get(key, _OFF):
            remedy = "no weights compute the same" if key in _WITHOUT_WEIGHTS else _MERGE_BY_PEFT
            raise config.error(key, f"plain LoRA or DoRA on the weights of the base: {remedy}")


def _by_our_names(
    directory: Path, config: JsonObject, weights: Tensors
) -> tuple[TensorNames, dict[str, Stored]]:
    """Find the family that an adapter is of, which its file does not tell, and rename tensors.

    Decoders have the same names in all families: it is one that the base can be of, too.
    """
    errors = []
    stored = of_experts.by_parameter(stored_tensors([directory / WEIGHTS]), config)
    for family in families():
        try:
            family.names.to_published(weights)
            return family.names, family.names.from_peft(stored)
        except ValueError as error:
            errors.append(error)
    raise ValueError(f"{directory}: {errors[0]}; {_MERGE_BY_PEFT}")


def _untie(tensors: Tensors, copies: Tensors, directory: Path) -> None:
    """Drop the output layer, which is the token embedding of the base."""
    if _EMBEDDING in tensors and _OUTPUT in copies:  # peft does not list it, but writes it
        tensors[_OUTPUT] = copies.pop(_OUTPUT)
    parts = _by_weight(tensors)
    trained = [t for name in (_EMBEDDING, _OUTPUT) for t in parts.get(name, {}).values()]
    if trained and not (len(trained) == 2 and torch.equal(*trained)):
        raise ValueError(
            f"{directory}: the token embedding and the output layer, lm_head, are one in this "
            "base, but it trains one alone, or each in its own way, and an adapter of lm_head not "
            f"even peft merges rightly: train one without that, or {_MERGE_BY_PEFT}"
        )
    tensors.pop(_OUTPUT, None)


def _are_equal(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    """Compare tensors in the smaller of their dtypes."""
    return b is not None and (torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype)))


def _check_shapes(tensors: Tensors, config: JsonObject, base: Tensors) -> None:
    """Compare the shapes of an adapter with its config, and with the weights that it adapts."""
    rank, use_dora = config.whole("r"), config.over({"use_dora": False}).flag("use_dora")
    if not any(map(is_adapter, tensors)):
        raise ValueError(f"{config.file}: {WEIGHTS} beside it has no adapters")
    for name, parts in _by_weight(tensors).items():
        shapes = {suffix: tuple(tensor.shape) for suffix, tensor in parts.items()}
        is_of_experts = of_experts.is_of_experts(name)
        shape = shapes.get("") or shapes.get(_B, ())[:1] + shapes.get(_A, ())[-1:]
        if is_of_experts:
            shape = shapes.get(_A, ())[:2] + shapes.get(_B, ())[2:]
        expected = {_A: (rank, *shape[1:]), _B: (*shape[:1], rank)}
        expected |= {_MAGNITUDE: shape[:1]} if use_dora else {}
        if is_of_experts:
            expected = {_A: (*shape[:2], rank), _B: (*shape[:1], rank, *shape[2:])}
        if shapes not in ({"": shape}, expected) or 0 in shape:
            found = ", ".join(f"{s[1:] or 'weight'} {[*size]}" for s, size in shapes.items())
            raise ValueError(
                f"{config.file}: r is {rank} and use_dora is {use_dora}, but {WEIGHTS} has for "
                f"{name} {found}: state what it was trained with; DeepSpeed ZeRO-3 saves empty "
                f"what it has not gathered; of a convolution, {_MERGE_BY_PEFT}"
            )
        of_base = tuple(base[name].shape) if name in base else ()
        if base and shape != of_base:
            there = f"is {[*of_base]}" if of_base else "is not there"
            wrong = f"{WEIGHTS} is of a model whose {name} is {[*shape]}, and in checkpoint_dir it"
            raise ValueError(f"{config.file}: {wrong} {there}: name the base it was trained on")


def targeted_modules(config: JsonObject, modules: Iterable[str]) -> list[str]:
    """Tell which linear layers of transformers peft adapts; ``ValueError`` if keys say nothing."""
    targets, excluded = _pattern(config, "target_modules"), _pattern(config, "exclude_modules")
    in_full = _texts(config, "modules_to_save")
    return [
        m
        for m in modules
        if targets.fullmatch(m) and not excluded.fullmatch(m) and not _is_within(m, in_full)
    ]


def _pattern(config: JsonObject, key: str) -> re.Pattern[str]:
    """What names of modules match as a whole: a regular expression, or how names end."""
    pattern = config.content.get(key)
    if not isinstance(pattern, str):
        pattern = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, _texts(config, key)))})"
    try:
        return re.compile(pattern)
    except re.error as error:
        raise config.error(key, f"a regular expression ({error})") from None


def _texts(config: JsonObject, key: str) -> list[str]:
    """Return a list of texts, empty where there is none."""
    if key not in config:
        return []
    items = config.each(key)
    return [items.text(place) for place in items.content]


def _is_within(module: str, names: Iterable[str]) -> bool:
    """Whether a module is one of these names, or is in one."""
    return any(f".{name}." in f".{module}." for name in names)


def check_continues(
    model: nn.Module, trained: Iterable[str], config: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Raise ``ValueError`` unless a model goes on training what an adapter trained.

    ``trained`` are the names of the model's trained parameters, ``names`` of the adapter's tensors.
    """
    ours, theirs = {*trained}, {*names}
    one_sided = {"the adapter alone has": theirs - ours, "the model alone trains": ours - theirs}
    problems = [f"{what} {_listed(sorted(found))}" for what, found in one_sided.items() if found]
    layer = next(iter(adapted_layers(model)), None)
    rank, alpha = config["r"], config["lora_alpha"]
    if layer is not None and (layer.rank, layer.alpha) != (rank, alpha):
        own = f"the model has lora_rank {layer.rank} and lora_alpha {layer.alpha}"
        problems.append(f"{own}, it has {rank} and {alpha}")
    if problems:
        remedy = "give the model what the adapter has, or merge the adapter first (tune-vl merge)"
        found = f"the adapter of adapter_dir does not go on in this model: {'; '.join(problems)}"
        raise ValueError(f"{found}: {remedy}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _by_weight(tensors: Tensors) -> dict[str, Tensors]:
    """Group tensors by what they adapt, or replace, and in that by the ends of their names."""
    groups: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in ADAPTER_SUFFIXES if name.endswith(suffix)), "")
        weight = f"{name.removesuffix(suffix)}.weight" if suffix else name
        groups.setdefault(weight, {})[suffix] = tensor
    return groups


def save_adapter(adapter: Adapter, directory: Path) -> None:
    """Write an adapter as peft does, with checksums; ``ValueError`` if a tensor is of no layer."""
    tensors = dict(adapter.tensors)
    is_tied = _EMBEDDING in tensors and _OUTPUT not in tensors
    if is_tied:  # peft would train one of both alone
        tensors[_OUTPUT] = tensors[_EMBEDDING].clone()
    names = adapter.names.to_peft({name: name for name in tensors})
    parameters = set()
    for peft, ours in names.items():
        if of_experts.is_of_experts(ours):
            parameters.add(peft_module(peft))
            tensors[ours] = of_experts.to_peft(tensors[ours], ours.endswith(_A))
    adapted = {peft_module(peft) for peft, ours in names.items() if is_adapter(ours)}
    in_full = {peft_module(peft) for peft in names} - adapted
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "use_dora": any(name.endswith(_MAGNITUDE) for name in adapter.tensors),
        # By whole names, which no other layer ends in
        "target_modules": sorted(adapted - parameters),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted(in_full) or None,
        "ensure_weight_tying": is_tied,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    in_file = of_experts.in_peft(names)
    written = {in_file[name]: tensors[ours] for name, ours in names.items()}
    save_tensors(written, directory / WEIGHTS)
    write_json(directory / CONFIG, config)
    write_manifest(directory)


def merge_adapter(weights: Tensors, adapter: Adapter, dtype: torch.dtype | None = None) -> Tensors:
    """Merge as :func:`merge_lazily`, at once."""
    merged = merge_lazily(weights, adapter, dtype)
    return {n: x.make() if isinstance(x, LazyTensor) else x for n, x in merged.items()}


def merge_lazily(
    weights: Tensors, adapter: Adapter, dtype: torch.dtype | None = None
) -> AnyTensors:
    """Add adapters to the weights of their layers, which they fit, see :func:`load_adapter`.

    Products are made in float32 and rounded once. The result has a dtype, or that of each weight.
    """
    by_weight = _by_weight(adapter.tensors)
    if unknown := by_weight.keys() - weights.keys():
        raise ValueError(f"the adapter has {_listed(sorted(unknown))}, which the model has not")
    merged: dict[str, torch.Tensor | LazyTensor] = {}
    for name, weight in weights.items():
        target, parts = dtype or weight.dtype, by_weight.get(name, {"": weight})
        if "" in parts:
            merged[name] = cast_lazily(parts[""], target)
        else:
            make = partial(_merge, weight, parts, adapter.alpha / adapter.rank, target)
            merged[name] = LazyTensor(weight.shape, target, make)
    return merged


@torch.no_grad()
def _merge(weight: torch.Tensor, parts: Tensors, scale: float, dtype: torch.dtype) -> torch.Tensor:
    matrices = [parts[_B].float(), parts[_A].float()]
    if weight.ndim == 3:  # of experts, whose rows are inputs
        matrices.reverse()
    whole = weight.float() + scale * (matrices[0] @ matrices[1])
    if _MAGNITUDE in parts:
        whole *= (parts[_MAGNITUDE].float() / torch.linalg.norm(whole, dim=1))[:, None]
    return whole.to(dtype)
