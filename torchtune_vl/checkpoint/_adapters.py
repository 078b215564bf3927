"""Adapters in peft's files, and merged into the weights that they adapt."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from torchtune_vl._torchtune import LoRALinear
from torchtune_vl.files._directory import check_manifest, write_json, write_manifest
from torchtune_vl.files._json import JsonObject, read_json_object
from torchtune_vl.files._names import TensorNames, peft_module
from torchtune_vl.files._safetensors import Stored, read_tensors, save_tensors, stored_tensors
from torchtune_vl.models._registry import families
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
    """Read an adapter that peft or this project wrote, its tensors mapped from the file.

    Raises ``ValueError`` if a file is missing or damaged, it is another kind of adapter or of
    another model, or its tensors are not those of its config, or not finite.
    """
    if not (directory / CONFIG).is_file():
        raise ValueError(f"{directory} has no {CONFIG}: it is no directory of an adapter")
    check_manifest(directory)
    config = read_json_object(directory / CONFIG)
    _refuse_other_kinds(config)
    try:
        names, stored = _by_our_names(stored_tensors([directory / WEIGHTS]))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}; {_MERGE_BY_PEFT}") from None
    tensors = read_tensors(stored)
    rank = config.whole("r")
    _check_layers(tensors, rank, config.over({"use_dora": False}).flag("use_dora"), directory)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{directory / WEIGHTS}: {stored[name].name} is not finite")
    in_full = [f".{module}." for module in _strings(config, "modules_to_save")]
    copies = {}
    for name, place in stored.items():
        module = f".{peft_module(place.name)}."
        if not is_adapter(name) and not any(trained in module for trained in in_full):
            copies[name] = tensors.pop(name)
    alpha = config.number("lora_alpha", 1e-6, 1e6)
    base = config.text("base_model_name_or_path") if "base_model_name_or_path" in config else ""
    return Adapter(tensors, rank, alpha, base, names, copies)


def _by_our_names(found: Mapping[str, Stored]) -> tuple[TensorNames, dict[str, Stored]]:
    """Find the family that an adapter is of, which its file does not tell, and rename tensors."""
    errors = []
    for family in families():
        try:
            return family.names, family.names.from_peft(found)
        except ValueError as error:
            errors.append(error)
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


def _check_layers(
    tensors: Mapping[str, torch.Tensor], rank: int, use_dora: bool, directory: Path
) -> None:
    """Compare the tensors of adapters with each other and with their config."""
    path = directory / WEIGHTS
    layers: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in tensors.items():
        layer, suffix = _split(name)
        if suffix:
            layers.setdefault(layer, {})[suffix] = tensor.shape
    if not layers:
        raise ValueError(f"{path} has no adapters")
    for layer, shapes in layers.items():
        missing = [suffix for suffix in (_A, _B) if suffix not in shapes]
        if missing:
            raise ValueError(f"{path} has an adapter of {layer} without {missing}")
        a, b = tuple(shapes[_A]), tuple(shapes[_B])
        if 0 in a + b or min(len(a), len(b)) < 2:
            raise ValueError(
                f"{path}: the adapter of {layer} is empty, with shapes {[a, b]}: DeepSpeed ZeRO-3 "
                "saves so what it has not gathered; gather it, and save it again"
            )
        if max(len(a), len(b)) > 2:
            raise ValueError(
                f"{path}: the adapter of {layer} is of a convolution, with shapes {[a, b]}: "
                f"{_MERGE_BY_PEFT}"
            )
        if not a[0] == b[1] == rank:
            raise ValueError(
                f"{directory / CONFIG}: r is {rank}, but {WEIGHTS} has an adapter of {layer} with "
                f"matrices of {a} and {b}: state the rank it was trained with"
            )
        if (_MAGNITUDE in shapes) != use_dora:
            raise ValueError(
                f"{directory / CONFIG}: use_dora is {use_dora}, but {WEIGHTS} has "
                f"{'a' if _MAGNITUDE in shapes else 'no'} magnitude of {layer}: state what it was "
                "trained with"
            )
        if use_dora and shapes[_MAGNITUDE] != b[:1]:
            raise ValueError(f"{path}: the magnitude of {layer} has another size")


def fit_adapter(adapter: Adapter, weights: Mapping[str, torch.Tensor], directory: Path) -> Adapter:
    """Compare an adapter, read from a directory, with the weights that it is to adapt.

    ``weights`` are those of the base model by our names, without an output layer if it is the
    token embedding. Returns the adapter without an output layer then, and without copies. Raises
    ``ValueError`` if it is of another model, makes of a tied embedding two layers, or lacks layers
    that its config names.
    """
    tensors, copies = dict(adapter.tensors), dict(adapter.copies)
    if _OUTPUT not in weights:
        _untie(tensors, copies, directory)
    for name, tensor in {**tensors, **copies}.items():
        adapted = _adapted(name)
        if name.endswith(_A) and adapted in tensors:
            raise ValueError(f"{directory}: it has {adapted} in full and an adapter of it")
        weight = weights.get(adapted)
        if weight is None and name == _OUTPUT:
            weight = weights[_EMBEDDING]
        if weight is None or _sides(name, tensor) != _sides(name, weight):
            raise ValueError(
                f"{directory}: {name} of shape {tuple(tensor.shape)} does not fit the model, "
                f"which has {'no such layer' if weight is None else tuple(weight.shape)} there: it "
                "is of another model"
            )
        # Equal in the smaller of their dtypes
        if name in copies and not (
            torch.equal(tensor.to(weight.dtype), weight)
            or torch.equal(tensor, weight.to(tensor.dtype))
        ):
            raise ValueError(
                f"{directory}: it has weights of its base, and {name} is not as in checkpoint_dir: "
                "name the base that it was trained on"
            )
    adapter = adapter._replace(tensors=tensors, copies={})
    _refuse_missing_layers(adapter, weights, directory)
    return adapter


def _untie(
    tensors: dict[str, torch.Tensor], copies: dict[str, torch.Tensor], directory: Path
) -> None:
    """Drop the output layer, which is the token embedding of the base."""
    embedding, output = tensors.get(_EMBEDDING), tensors.pop(_OUTPUT, None)
    if output is None and embedding is not None:  # peft does not list it, but writes it
        output = copies.pop(_OUTPUT, None)
    if f"{_OUTPUT.removesuffix('.weight')}{_A}" in tensors:
        raise ValueError(
            f"{directory}: it adapts lm_head, which is the token embedding of this base, and "
            "not even peft merges that rightly: train one without it"
        )
    if output is None or embedding is None:
        is_one = output is embedding
    else:
        is_one = torch.equal(output, embedding)
    if not is_one:
        raise ValueError(
            f"{directory}: of the token embedding and the output layer, which are one in this "
            f"base, it has one alone, or two different ones: {_MERGE_BY_PEFT}"
        )


def _refuse_missing_layers(
    adapter: Adapter, weights: Mapping[str, torch.Tensor], directory: Path
) -> None:
    """Compare the adapted layers with those that peft would adapt by the adapter's config.

    peft takes a layer without its adapter as it is in the base, with no more than a warning.
    """
    # A pattern is of the names that modules had when the adapter was trained
    before_4_52 = any(
        name.startswith(_NAMES_BEFORE_4_52) for name in stored_tensors([directory / WEIGHTS])
    )
    linear = {n: n for n, weight in weights.items() if weight.ndim == 2 and n != _EMBEDDING}
    renamed = (adapter.names.to_published if before_4_52 else adapter.names.to_peft)(linear)
    modules = {peft_module(theirs): ours for theirs, ours in renamed.items()}
    adapted = {_adapted(name) for name in adapter.tensors if name.endswith(_A)}
    targeted = targeted_modules(read_json_object(directory / CONFIG), modules)
    missing = [module for module in targeted if modules[module] not in adapted]
    if missing:
        raise ValueError(
            f"{directory}: by its {CONFIG} it adapts {_listed(missing)}, but {WEIGHTS} has nothing "
            "of these: save it again, or state in target_modules what it adapts"
        )


def targeted_modules(config: JsonObject, modules: Iterable[str]) -> list[str]:
    """Tell which linear layers of transformers' model peft adapts.

    They are what ``target_modules``, ``exclude_modules``, ``modules_to_save``,
    ``layers_to_transform`` and ``layers_pattern`` say together. Raises ``ValueError`` if one of
    these keys has a value that says nothing.
    """
    targets, excluded = _patterns(config, "target_modules"), _patterns(config, "exclude_modules")
    in_full = _strings(config, "modules_to_save")
    numbers = _layers(config)
    found = [m for m in modules if _is_named(m, targets) and not _is_named(m, excluded)]
    found = [m for m in found if not any(f".{name}." in f".{m}." for name in in_full)]
    if isinstance(targets, str) or not numbers:
        return found
    before = _patterns(config, "layers_pattern")
    before = [before] if isinstance(before, str) else before
    any_of = "|".join(f"(?:{name})" for name in before) or r"[^.]*"
    number = re.compile(rf"(?:.*?\.)?(?:{any_of})\.(?P<number>\d+)\.")
    return [
        m
        for m in found
        if m in targets or ((layer := number.match(m)) and int(layer["number"]) in numbers)
    ]


def _strings(config: JsonObject, key: str) -> list[str]:
    """Return a list of strings, empty where there is none."""
    items = config.each(key) if key in config else None
    return [items.text(place) for place in items.content] if items else []


def _patterns(config: JsonObject, key: str) -> str | list[str]:
    """A regular expression, or names."""
    value = config.content.get(key)
    if not isinstance(value, str):
        return _strings(config, key)
    try:
        re.compile(value)
    except re.error as error:
        raise config.error(key, f"a regular expression ({error})") from None
    return value


def _layers(config: JsonObject) -> list[int]:
    key = "layers_to_transform"
    if key not in config:
        return []
    if isinstance(config.content[key], int):
        return [config.whole(key, 0)]
    layers = config.each(key)
    return [layers.whole(place, 0) for place in layers.content]


def _is_named(module: str, names: str | list[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def check_continues(
    model: nn.Module, trained: Iterable[str], config: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Raise ``ValueError`` unless a model goes on training what an adapter trained.

    ``trained`` are the names of the model's trained parameters, which may be on the meta device.
    Of the adapter, ``config`` has ``r`` and ``lora_alpha``, and ``names`` are of all its tensors.
    """
    layer = next((m for m in model.modules() if isinstance(m, LoRALinear | DoRA)), None)
    problems = []
    if layer is not None and (layer.rank, layer.alpha) != (config["r"], config["lora_alpha"]):
        problems.append(
            f"the model has lora_rank {layer.rank} and lora_alpha {layer.alpha}, it has "
            f"{config['r']} and {config['lora_alpha']}"
        )
    ours, theirs = {*trained}, {*names}
    if theirs - ours:
        problems.append(f"the adapter alone has {_listed(sorted(theirs - ours))}")
    if ours - theirs:
        problems.append(f"the model alone trains {_listed(sorted(ours - theirs))}")
    if problems:
        raise ValueError(
            f"the adapter of adapter_dir does not go on in this model: {'; '.join(problems)}: give "
            "the model what the adapter has, or merge the adapter first (tune-vl merge)"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _split(name: str) -> tuple[str, str]:
    """The layer that a tensor adapts and what marks it, or a tensor's own name and nothing."""
    suffix = next((suffix for suffix in ADAPTER_SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix


def _adapted(name: str) -> str:
    """The name of the weight that a tensor adapts, or replaces."""
    layer, suffix = _split(name)
    return f"{layer}.weight" if suffix else name


def _sides(name: str, tensor: torch.Tensor) -> torch.Size:
    """What a tensor of an adapter and its weight have in common of their shapes."""
    if name.endswith(_A):
        return tensor.shape[1:]
    return tensor.shape[:1] if is_adapter(name) else tensor.shape


def save_adapter(adapter: Adapter, directory: Path) -> None:
    """Write an adapter as peft does, and checksums of its files.

    Modules are named one by one in ``adapter_config.json``, so that no other layer of the same
    name gets an adapter. Raises ``ValueError`` if a tensor is of no layer of our model, and
    ``OSError`` if a file cannot be written.
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
    save_tensors({peft: tensors[ours] for peft, ours in names.items()}, directory / WEIGHTS)
    write_json(directory / CONFIG, config)
    write_manifest(directory)


@torch.no_grad()
def merge_adapter(
    weights: Mapping[str, torch.Tensor], adapter: Adapter, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Add adapters to the weights of their layers, which they fit, see :func:`fit_adapter`.

    Products are made in float32 and rounded once. The result has a dtype, or that of each weight.
    """
    merged = dict(weights)
    for name, tensor in adapter.tensors.items():
        layer, suffix = _split(name)
        if suffix == _A:
            product = adapter.tensors[layer + _B].float() @ tensor.float()
            whole = weights[f"{layer}.weight"].float() + adapter.alpha / adapter.rank * product
            magnitude = adapter.tensors.get(layer + _MAGNITUDE)
            if magnitude is not None:
                whole *= (magnitude.float() / torch.linalg.norm(whole, dim=1))[:, None]
            merged[f"{layer}.weight"] = whole.to(dtype or weights[f"{layer}.weight"].dtype)
        elif not suffix:
            merged[name] = tensor.to(dtype or weights[name].dtype)
    return {name: weight.to(dtype) for name, weight in merged.items()}
