"""What both sides give for one input, and how it becomes a case of the report."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from torchtune_vl.media._errors import shortened
from torchtune_vl.validation._ours_and_reference import Ours, Reference, Track, failed
from torchtune_vl.validation._report import Case, Row, TokenPair, empty_rows


@dataclass
class Comparison:
    """A run: both sides, what shows its progress, and the rows of its report by their names."""

    ours: Ours
    reference: Reference
    track: Track = lambda sequence, description: sequence
    rows: dict[str, Row] = field(default_factory=empty_rows)

    @property
    def obstacle(self) -> str:
        """Why conversations and videos cannot be compared; empty if they can."""
        return self.reference.no_torchvision or unreadable(
            "vocabulary and image settings", self.ours.transform, self.reference.processor
        )

    def skip(self, reason: str, *names: str) -> bool:
        """Let rows say why they are not compared, if there is a reason."""
        for name in names:
            self.rows[name].skipped = reason
        return bool(reason)


def unreadable(see: str, *parts: Any) -> str:
    """Return why rows that need these parts are not compared; empty if all could be read."""
    return f"unreadable: see {see}" if failed(*parts) else ""


def compare(
    name: str,
    ours: Any,
    reference: Any,
    *,
    tolerance: float = 0.0,
    text_of: Callable[[Any], str] | None = None,
    must_read: bool = False,
    peer: str = "transformers",
) -> Case:
    """Compare tensors, settings by name (those of the reference), or sequences place by place.

    Tensors pass up to a tolerance, but not if they have other shapes or what is no number. Of
    sequences of tokens ``text_of`` gives the texts, to show those that differ. An input that both
    sides refuse, by errors, passes if ours explains that and it need not be read. ``peer`` is what
    the other side is called.
    """
    case = Case(name)
    if failed(ours, reference):
        sides = {"Ours": ours, peer: reference}
        says = [f"{side}: {brief(error)}" for side, error in sides.items() if failed(error)]
        case.refused = "both" if len(says) == 2 else "ours" if failed(ours) else "theirs"
        explained = case.refused == "both" and isinstance(ours, ValueError | OSError)
        case.failed = must_read or not explained
        case.largest = math.inf if case.failed else 0.0
        refusing = "ours" if failed(ours) else peer
        who = "Both refuse" if case.refused == "both" else f"Only {refusing} refuses"
        case.detail = f"{who} it. {'; '.join(says)}"
    elif isinstance(reference, torch.Tensor) and ours.shape != reference.shape:
        case.detail = f"ours has the shape {[*ours.shape]}, {peer} {[*reference.shape]}"
        case.compared = case.differing = reference.numel()
        case.failed, case.largest = True, math.inf
    elif isinstance(reference, torch.Tensor):
        case.compared = reference.numel()
        if not torch.equal(ours, reference):
            difference = (ours.float() - reference.float()).abs().nan_to_num(nan=math.inf)
            case.differing, case.largest = int((difference > 0).sum()), float(difference.max())
            case.total = float(difference.sum(dtype=torch.float64))
            case.failed = not case.largest <= tolerance
    elif isinstance(reference, Mapping):
        different = [key for key, value in reference.items() if ours.get(key) != value]
        words = [f"{key} is {ours.get(key)!r}, not {reference[key]!r}" for key in different]
        case.count(len(reference), len(different))
        case.detail = "; ".join(words[:8])
    else:
        pairs = [*zip_longest(ours, reference)]
        differing = [place for place, (a, b) in enumerate(pairs) if a != b]
        case.count(len(pairs), len(differing))
        if not differing:
            return case
        first, lengths = differing[0], (len(ours), len(reference))
        values = f"ours {pairs[first][0]!r}, {peer} {pairs[first][1]!r}"
        case.detail = f"first difference at {first:,}: {values}"
        if lengths[0] != lengths[1]:
            case.detail += f"; ours has {lengths[0]:,}, {peer} {lengths[1]:,}"
        if text_of is not None:
            for place in range(max(first - 3, 0), min(first + 6, len(pairs))):
                shown = [None if t is None else (t, text_of(t)) for t in pairs[place]]
                case.tokens.append(TokenPair(place, *shown))
    return case


def brief(error: Exception) -> str:
    """An error in one line."""
    text = shortened(" ".join(str(error).split()))
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
