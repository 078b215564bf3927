"""Names of adapters: peft's, on transformers' modules, and ours. Shapes and values are the same.

The vision encoder's queries, keys and values are one linear layer here as in transformers, so that
an adapter on them is one pair of matrices in both.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from torchtune_vl.models.qwen2_5_vl._convert_weights import (
    hub_from_tune,
    published_name,
    rename,
    tune_from_hub,
)

T = TypeVar("T")

_PREFIX = "base_model.model."
# What follows the name of an adapted layer
_PEFT_FROM_OURS = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
_OURS_FROM_PEFT = {peft: ours for ours, peft in _PEFT_FROM_OURS.items()}


def qwen2_5_vl_tune_to_peft(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename adapters, and parameters trained in full beside them, as peft saves them.

    Args:
        state_dict: from our names to values of any kind.

    Returns:
        The same values by the names of peft's ``adapter_model.safetensors`` for transformers'
        ``Qwen2_5_VLForConditionalGeneration``.

    Raises:
        ValueError: if a name is of no tensor of our model; it lists all of these.
    """
    return rename(state_dict, _peft_name)


def qwen2_5_vl_peft_to_tune(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename the tensors of peft's ``adapter_model.safetensors`` to the names of our model.

    Args:
        state_dict: from peft's names, with modules as in transformers >= 4.52 or before, to values
            of any kind.

    Returns:
        The same values by our names.

    Raises:
        ValueError: if a name is of no layer of Qwen2.5-VL; it lists all of these.
    """
    return rename(state_dict, _tune_name)


def peft_module(name: str) -> str:
    """Return transformers' name of the module whose tensor has this name in peft's file."""
    layer, suffix = _split(name.removeprefix(_PREFIX), _OURS_FROM_PEFT)
    return layer if suffix else layer.rpartition(".")[0]


def _peft_name(name: str) -> str | None:
    layer, suffix = _split(name, _PEFT_FROM_OURS)
    hub = hub_from_tune(f"{layer}.weight" if suffix else layer)
    if hub is None:
        return None
    in_memory = re.sub(r"^(?=visual\.)|^model(?=\.)", _in_memory_prefix, hub)
    if not suffix:
        return f"{_PREFIX}{in_memory}"
    return f"{_PREFIX}{in_memory.removesuffix('weight')}{_PEFT_FROM_OURS[suffix]}"


def _tune_name(name: str) -> str | None:
    # peft writes the weight of an adapted output layer too, by the name that it has in memory
    in_base = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
    layer, suffix = _split(published_name(in_base), _OURS_FROM_PEFT)
    ours = tune_from_hub(f"{layer}.weight" if suffix else layer)
    if ours is None or not suffix:
        return ours
    return f"{ours.removesuffix('weight')}{_OURS_FROM_PEFT[suffix]}"


def _in_memory_prefix(match: re.Match[str]) -> str:
    return "model.language_model" if match[0] else "model."


def _split(name: str, suffixes: Mapping[str, str]) -> tuple[str, str]:
    """The adapted layer and what follows it, or a tensor's name and nothing."""
    for suffix in suffixes:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
    return name, ""
