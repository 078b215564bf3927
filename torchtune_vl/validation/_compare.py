"""Values of both sides to one case."""

from collections.abc import Callable, Sequence
from itertools import islice, zip_longest
from typing import Any

import torch

from torchtune_vl.validation._report import Case, Outcome, TokenPair, refusal

# Tokens shown around the first difference
_BEFORE, _AFTER = 3, 6


def compare_sequences(
    name: str, ours: Outcome, reference: Outcome, piece: Callable[[int], str] | None = None
) -> Case:
    """Compare two sequences place by place.

    Args:
        name: the input.
        ours: outcome with a sequence.
        reference: outcome with the sequence that it has to be.
        piece: text of an id, to show the tokens that differ.

    Returns:
        The case; it fails if a place differs.
    """
    refused = refusal(name, ours, reference)
    if refused is not None:
        return refused
    a, b = ours.value, reference.value
    differing = [i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y]
    case = Case(
        name,
        compared=max(len(a), len(b)),
        differing=len(differing),
        largest=float(len(differing)),
        total=float(len(differing)),
        failed=bool(differing),
        ours_seconds=ours.seconds,
        reference_seconds=reference.seconds,
    )
    if differing:
        first = differing[0]
        case.detail = f"first difference at {first:,}"
        if len(a) != len(b):
            case.detail += f"; ours has {len(a):,}, transformers {len(b):,}"
        if piece is not None:
            case.tokens = _pairs(a, b, first, piece)
        elif first < min(len(a), len(b)):
            case.detail += f": ours {a[first]!r}, transformers {b[first]!r}"
    return case


def _pairs(
    ours: Sequence[int], reference: Sequence[int], first: int, piece: Callable[[int], str]
) -> list[TokenPair]:
    def at(ids: Sequence[int], place: int) -> tuple[int, str] | None:
        return (ids[place], piece(ids[place])) if place < len(ids) else None

    start = max(first - _BEFORE, 0)
    stop = min(first + _AFTER, max(len(ours), len(reference)))
    return [TokenPair(i, at(ours, i), at(reference, i)) for i in range(start, stop)]


def compare_tensors(name: str, ours: Outcome, reference: Outcome, tolerance: float = 0.0) -> Case:
    """Compare two tensors.

    Args:
        name: the input.
        ours: outcome with a tensor of any shape.
        reference: outcome with the tensor that it has to be.
        tolerance: largest difference that passes.

    Returns:
        The case; it fails if shapes differ or a difference is too large or no number.
    """
    refused = refusal(name, ours, reference)
    if refused is not None:
        return refused
    a, b = ours.value, reference.value
    case = Case(name, ours_seconds=ours.seconds, reference_seconds=reference.seconds)
    case.compared = b.numel()
    if a.shape != b.shape:
        case.detail = f"ours has the shape {list(a.shape)}, transformers {list(b.shape)}"
        case.failed, case.differing, case.largest = True, b.numel(), float("inf")
        return case
    if torch.equal(a, b):
        return case
    difference = (a.float() - b.float()).abs().nan_to_num(nan=float("inf"))
    case.differing = int((difference > 0).sum())
    case.largest = float(difference.max())
    case.total = float(difference.sum(dtype=torch.float64))
    case.failed = not case.largest <= tolerance
    return case


def compare_settings(name: str, ours: dict[str, Any], reference: dict[str, Any]) -> Case:
    """Compare values by name.

    Args:
        name: whose values these are.
        ours: the values.
        reference: what they have to be; names that are only in ``ours`` are left out.

    Returns:
        The case; it fails if a value differs, and says which.
    """
    differing = {key: value for key, value in reference.items() if ours.get(key) != value}
    words = [f"{key} is {ours.get(key)!r}, not {value!r}" for key, value in differing.items()]
    return Case(
        name,
        compared=len(reference),
        differing=len(differing),
        largest=float(len(differing)),
        total=float(len(differing)),
        failed=bool(differing),
        detail="; ".join(islice(words, 8)),
    )
