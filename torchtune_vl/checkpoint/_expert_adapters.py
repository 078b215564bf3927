"""Adapters of experts as peft has them: those of parameters (``target_parameters``).

peft wraps the module of both parameters twice, and writes all experts' matrices as one: A is
[N x r, I] and B [O, r x N], of N experts, rank r, and I inputs and O outputs of each (peft's
``ParamWrapper``). Ours are [N, I, r] and [N, r, O].
"""

import re
from collections.abc import Collection, Mapping

import torch

from torchtune_vl.files._json import JsonObject
from torchtune_vl.files._safetensors import Stored

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
# peft has the one that the module has first innermost, or the single one without a base_layer
_IN_PEFT = re.compile(r"(.+\.mlp\.experts)(\.base_layer)?\.(lora_[AB]\.weight)")
_BY_PARAMETER = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)\.(lora_[AB]\.weight)")


def is_of_experts(name: str) -> bool:
    """Whether a tensor of this name, one of ours, is of experts."""
    return ".mlp.experts." in name


def by_parameter(stored: Mapping[str, Stored], config: JsonObject) -> dict[str, Stored]:
    """Give adapters of experts names that tell the parameter, which peft's do not.

    Where both are adapted, their shapes tell: what goes into the first comes out of the second.
    """
    named: dict[str, Stored] = {}
    targets = config.content.get("target_parameters") or []
    for name, place in stored.items():
        match = _IN_PEFT.fullmatch(name)
        if match is None:
            named[name] = place
            continue
        experts, layer, matrix = match[1], match[2] or "", match[3]
        other = f"{experts}{'' if layer else '.base_layer'}"
        pairs = [
            [stored.get(f"{prefix}.lora_{kind}.weight") for kind in "AB"]
            for prefix in (f"{experts}{layer}", other)
        ]
        targeted = [
            parameter
            for parameter in (_GATE_UP, _DOWN)
            if any(f"{experts}.{parameter}".endswith(f".{target}") for target in targets)
        ]
        named[f"{experts}.{_which(pairs, targeted, place)}.{matrix}"] = place
    return named


def _which(pairs: list[list[Stored | None]], targeted: list[str], place: Stored) -> str:
    (a, b), (other_a, other_b) = pairs
    if a and b and other_a and other_b:
        own, other = (a.shape[1], b.shape[0]), (other_a.shape[1], other_b.shape[0])
        if _are_gate_up_and_down(own, other):
            return _GATE_UP
        if _are_gate_up_and_down(other, own):
            return _DOWN
    elif not (other_a or other_b) and len(targeted) == 1:
        return targeted[0]
    told = "one of gate_up_proj and down_proj by target_parameters, or both by their shapes"
    remedy = "of peft before 0.19.1, or beside transformers 4, merge it by peft's merge_and_unload"
    raise ValueError(f"{place.path}: {place.name} is of experts, but not {told}: {remedy}")


def _are_gate_up_and_down(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether these can be inputs and outputs of gate_up_proj and of down_proj."""
    return one == (other[1], 2 * other[0])


def in_peft(names: Collection[str]) -> dict[str, str]:
    """Return peft's names of tensors by such names as :func:`by_parameter` gives."""
    renamed = {}
    for name in names:
        match = _BY_PARAMETER.fullmatch(name)
        if match is None:
            renamed[name] = name
            continue
        experts, parameter, matrix = match.groups()
        has_both = f"{experts}.{_DOWN}.{matrix}" in names
        layer = ".base_layer" if parameter == _GATE_UP and has_both else ""
        renamed[name] = f"{experts}{layer}.{matrix}"
    return renamed


def to_ours(matrix: torch.Tensor, rank: int, is_a: bool) -> torch.Tensor:
    """Turn peft's A [N x r, I] or B [O, r x N] into ours; ``ValueError`` if r does not fit."""
    count, rest = divmod(len(matrix) if is_a else matrix.shape[1], rank)
    if rest:
        raise ValueError(f"{[*matrix.shape]} is not of experts with adapters of rank {rank}")
    if is_a:
        return matrix.view(count, rank, -1).transpose(1, 2)
    return matrix.view(-1, rank, count).permute(2, 1, 0)


def to_peft(matrix: torch.Tensor, is_a: bool) -> torch.Tensor:
    """Turn our A [N, I, r] or B [N, r, O] into peft's."""
    if is_a:
        return matrix.transpose(1, 2).flatten(0, 1).contiguous()
    return matrix.permute(2, 1, 0).flatten(1).contiguous()
