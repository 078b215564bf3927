"""What both sides give for one input, and how it becomes a case of the report."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from torchtune_vl.validation._report import Case, TokenPair


class Outcome(NamedTuple):
    """What a call gave, or how it failed."""

    value: Any
    error: Exception | None = None

    def map(self, function: Callable[[Any], Any]) -> "Outcome":
        """Apply a function to the value, if there is one."""
        return self if self.error else self._replace(value=function(self.value))


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call one side, which may refuse its input: then the outcome has an error and no value."""
    try:
        return Outcome(function(*args, **kwargs))
    except Exception as error:  # decoders and tokenizers raise what they like
        return Outcome(None, error)


def attempted(read: Callable[[Any], Any]) -> Any:
    """Make a property of what is read once, when it is asked for, and may fail: its outcome."""
    return cached_property(lambda self: attempt(read, self))


def compare(
    name: str,
    ours: Outcome,
    reference: Outcome,
    *,
    tolerance: float = 0.0,
    text_of: Callable[[int], str] | None = None,
    must_read: bool = False,
) -> Case:
    """Compare tensors, settings by name (those of the reference), or sequences place by place.

    Tensors pass up to a tolerance, but not if they have other shapes or what is no number. Of
    sequences of ids ``text_of`` gives the texts, to show those that differ. An input that both
    sides refuse passes if ours explains that by a ``ValueError`` and it need not be read.
    """
    case = Case(name)
    a, b = ours.value, reference.value
    if ours.error or reference.error:
        errors = {"Ours": ours.error, "transformers": reference.error}
        says = [f"{side}: {brief(error)}" for side, error in errors.items() if error]
        case.refused = "both" if len(says) == 2 else "ours" if ours.error else "transformers"
        explained = case.refused == "both" and isinstance(ours.error, ValueError | OSError)
        case.failed = must_read or not explained
        case.largest = math.inf if case.failed else 0.0
        who = "Both refuse" if case.refused == "both" else f"Only {case.refused} refuses"
        case.detail = f"{who} it. {'; '.join(says)}"
    elif isinstance(b, torch.Tensor) and a.shape != b.shape:
        case.detail = f"ours has the shape {list(a.shape)}, transformers {list(b.shape)}"
        case.compared = case.differing = b.numel()
        case.failed, case.largest = True, math.inf
    elif isinstance(b, torch.Tensor):
        case.compared = b.numel()
        if not torch.equal(a, b):
            difference = (a.float() - b.float()).abs().nan_to_num(nan=math.inf)
            case.differing, case.largest = int((difference > 0).sum()), float(difference.max())
            case.total = float(difference.sum(dtype=torch.float64))
            case.failed = not case.largest <= tolerance
    elif isinstance(b, Mapping):
        words = [f"{k} is {a.get(k)!r}, not {v!r}" for k, v in b.items() if a.get(k) != v]
        case.count(len(b), len(words))
        case.detail = "; ".join(words[:8])
    else:
        _compare_sequences(case, a, b, text_of)
    return case


def brief(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 600 else f"{text[:600]} ..."
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _compare_sequences(
    case: Case, a: Sequence[Any], b: Sequence[Any], text_of: Callable[[int], str] | None
) -> None:
    differing = [i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y]
    case.count(max(len(a), len(b)), len(differing))
    if not differing:
        return
    first = differing[0]
    case.detail = f"first difference at {first:,}"
    if len(a) != len(b):
        case.detail += f"; ours has {len(a):,}, transformers {len(b):,}"
    if text_of is not None:
        for i in range(max(first - 3, 0), min(first + 6, case.compared)):
            pair = [(side[i], text_of(side[i])) if i < len(side) else None for side in (a, b)]
            case.tokens.append(TokenPair(i, *pair))
    elif first < min(len(a), len(b)):
        case.detail += f": ours {a[first]!r}, transformers {b[first]!r}"
