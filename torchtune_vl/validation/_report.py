"""A parity report: rows of cases, and how what two sides give becomes a case."""

import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")
Status = Literal["pass", "fail", "not compared"]

# Cases of a row whose pictures and tokens are kept: with thousands of images all would not fit
KEPT_EVIDENCE = 8
# Tokens shown around the first difference
_BEFORE, _AFTER = 3, 6
_INFINITE = float("inf")


class Track(Protocol):
    """Shows progress over a sequence."""

    def __call__(self, sequence: Sequence[T], description: str) -> Iterable[T]:
        """Return the items one after another."""


class Picture(NamedTuple):
    """A PNG file with its caption."""

    caption: str
    png: bytes


class TokenPair(NamedTuple):
    """What both sides have at one place of a sequence; None beyond its end."""

    place: int
    ours: tuple[int, str] | None
    reference: tuple[int, str] | None


@dataclass
class Case:
    """One input, given to both sides.

    Args:
        name: the input.
        compared: values compared.
        differing: those that differ.
        largest: largest difference; infinite where values cannot be subtracted.
        total: sum of all differences.
        failed: whether the difference is beyond what the row allows.
        refused: who refuses the input, "both", "ours" or "transformers"; empty if nobody does.
        detail: what happened, in words.
        pictures: the image and where it differs.
        tokens: the tokens around the first difference.
        ours_seconds: time of our side.
        reference_seconds: time of transformers.
    """

    name: str
    compared: int = 0
    differing: int = 0
    largest: float = 0.0
    total: float = 0.0
    failed: bool = False
    refused: Literal["", "both", "ours", "transformers"] = ""
    detail: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tokens: list[TokenPair] = field(default_factory=list)
    ours_seconds: float = 0.0
    reference_seconds: float = 0.0

    @property
    def summary(self) -> str:
        """What differs, in words."""
        parts = [self.detail] if self.detail else []
        if self.differing:
            size = f" by at most {number(self.largest)}" if self.total != self.differing else ""
            parts.insert(0, f"{self.differing:,} of {self.compared:,} differ{size}")
        return "; ".join(parts)

    @property
    def goodness(self) -> tuple[bool, float, int]:
        """The worst case has the smallest."""
        return not self.failed, -self.largest, -self.differing


@dataclass
class Row:
    """One kind of comparison over all inputs.

    Args:
        name: what is compared.
        about: what it means, for the reader of the report.
        unit: what is counted, such as "ids".
        numeric: whether the size of differences means something, or only their number.
        timed_in: the row whose time holds that of this one, "-" for one that takes none; empty
            for a row with times of its own.
        skipped: why nothing was compared.
        note: what the reader should know about this run.
        cases: the inputs, worst first.
    """

    name: str
    about: str
    unit: str
    numeric: bool = False
    timed_in: str = ""
    skipped: str = ""
    note: str = ""
    cases: list[Case] = field(default_factory=list)

    def add(self, case: Case) -> None:
        """Put a case in its place; only the worst ones keep their pictures and tokens."""
        place = bisect(self.cases, case.goodness, key=lambda case: case.goodness)
        self.cases.insert(place, case)
        for other in self.cases[max(place, KEPT_EVIDENCE) : max(place, KEPT_EVIDENCE) + 1]:
            other.pictures, other.tokens = [], []

    @property
    def status(self) -> Status:
        """Whether the row passes."""
        if not self.cases:
            return "not compared"
        return "fail" if self.cases[0].failed else "pass"

    @property
    def failed(self) -> list[Case]:
        """The cases that fail, worst first."""
        return [case for case in self.cases if case.failed]

    @property
    def compared(self) -> int:
        """Values compared."""
        return sum(case.compared for case in self.cases)

    @property
    def figure(self) -> str:
        """The difference in words."""
        if not self.cases:
            return self.skipped
        cases = [case for case in self.cases if not case.refused]
        both = sum(case.refused == "both" for case in self.cases)
        one_side = len(self.cases) - len(cases) - both
        parts = []
        if cases and self.numeric:
            mean = sum(case.total for case in cases) / max(self.compared, 1)
            parts.append(f"max {number(max(c.largest for c in cases))}, mean {number(mean)}")
        elif cases:
            parts.append(f"{sum(case.differing for case in cases):,} {self.unit} differ")
        if one_side:
            parts.append(f"{one_side:,} refused by one side")
        if both:
            parts.append(f"{both:,} refused by both")
        return ", ".join(parts)

    @property
    def ours_seconds(self) -> float:
        """Time of our side over all cases."""
        return sum(case.ours_seconds for case in self.cases)

    @property
    def reference_seconds(self) -> float:
        """Time of transformers over all cases."""
        return sum(case.reference_seconds for case in self.cases)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the reports' table, in the order of :data:`COLUMNS`."""
        if not self.cases:
            return self.name, "", "", self.figure, self.status, "", ""
        times = [duration(self.ours_seconds), duration(self.reference_seconds)]
        if self.timed_in:
            times = 2 * ["-" if self.timed_in == "-" else f"in {self.timed_in}"]
        counts = f"{len(self.cases):,}", f"{self.compared:,}"
        return self.name, *counts, self.figure, self.status, *times


COLUMNS = ("Compared", "Inputs", "Values", "Difference", "Result", "Ours", "transformers")
NUMBERS = ("Inputs", "Values", "Ours", "transformers")


@dataclass
class Report:
    """The result of a run.

    Args:
        checkpoint: directory that our side read.
        reference: directory that transformers read.
        facts: what the run was made with, from name to value.
        rows: the comparisons.
    """

    checkpoint: str
    reference: str
    facts: dict[str, str]
    rows: list[Row]

    @property
    def passed(self) -> bool:
        """Whether no row fails."""
        return all(row.status != "fail" for row in self.rows)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        counts = Counter(row.status for row in self.rows)
        open_rows = counts["not compared"]
        verdict = f"{counts['pass']} rows pass, {counts['fail']} fail"
        return f"{verdict}, {open_rows} not compared" if open_rows else verdict


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a call gave, or how it failed, and how long it took."""

    value: T
    error: Exception | None = None
    seconds: float = 0.0

    def map(self, function: Callable[[T], U]) -> "Outcome[U]":
        """Apply a function to the value, if there is one."""
        value = function(self.value) if self.error is None else None
        return replace(self, value=value)  # type: ignore[arg-type, return-value]

    def unwrap(self) -> T:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value


def attempt(function: Callable[..., T], *args: Any, **kwargs: Any) -> Outcome[T]:
    """Call one side, which may refuse its input: then the outcome has an error and no value."""
    start = time.perf_counter()
    value: Any = None
    error = None
    try:
        value = function(*args, **kwargs)
    except Exception as raised:  # decoders and tokenizers raise what they like
        error = raised
    return Outcome(value, error, time.perf_counter() - start)


def refusal(name: str, ours: Outcome, reference: Outcome) -> Case | None:
    """Judge an input that a side refuses.

    Args:
        name: the input.
        ours: outcome of our side.
        reference: outcome of transformers.

    Returns:
        A case that passes if both refuse, ours by ``ValueError``, and fails if one does; None if
        both accept.
    """
    sides = (("ours", ours), ("transformers", reference))
    refusing: list[Any] = [side for side, outcome in sides if outcome.error is not None]
    if not refusing:
        return None
    says = "; ".join(
        f"{side.replace('ours', 'Ours')}: {brief(outcome.error)}"
        for side, outcome in sides
        if outcome.error is not None
    )
    case = Case(name, ours_seconds=ours.seconds, reference_seconds=reference.seconds)
    case.refused = "both" if len(refusing) == 2 else refusing[0]
    who = "Both refuse" if len(refusing) == 2 else f"Only {refusing[0]} refuses"
    case.detail = f"{who} it. {says}"
    case.failed = len(refusing) == 1 or not isinstance(ours.error, ValueError | OSError)
    case.largest = _INFINITE if case.failed else 0.0
    return case


def unreadable(name: str, ours: Outcome, reference: Outcome) -> Case | None:
    """Judge files that a side cannot read, as :func:`refusal` does but if both sides refuse."""
    case = refusal(name, ours, reference)
    if case is not None:
        case.failed, case.largest = True, _INFINITE
    return case


def brief(error: Exception | None, limit: int = 600) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= limit else f"{text[:limit]} ..."
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def counted(name: str, compared: int, differing: int, detail: str = "") -> Case:
    """Make a case of values that are equal or not, and so differ by their number alone."""
    size = float(differing)
    return Case(name, compared, differing, size, size, failed=differing > 0, detail=detail)


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
    case = counted(name, max(len(a), len(b)), len(differing))
    case.ours_seconds, case.reference_seconds = ours.seconds, reference.seconds
    if differing:
        first = differing[0]
        case.detail = f"first difference at {first:,}"
        if len(a) != len(b):
            case.detail += f"; ours has {len(a):,}, transformers {len(b):,}"
        if piece is not None:
            places = range(max(first - _BEFORE, 0), min(first + _AFTER, case.compared))
            at = [[(s[i], piece(s[i])) if i < len(s) else None for i in places] for s in (a, b)]
            case.tokens = [TokenPair(*pair) for pair in zip(places, *at, strict=True)]
        elif first < min(len(a), len(b)):
            case.detail += f": ours {a[first]!r}, transformers {b[first]!r}"
    return case


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
        case.failed, case.differing, case.largest = True, b.numel(), _INFINITE
    elif not torch.equal(a, b):
        difference = (a.float() - b.float()).abs().nan_to_num(nan=_INFINITE)
        case.differing = int((difference > 0).sum())
        case.largest = float(difference.max())
        case.total = float(difference.sum(dtype=torch.float64))
        case.failed = not case.largest <= tolerance
    return case


def compare_settings(name: str, ours: dict[str, Any], reference: dict[str, Any]) -> Case:
    """Compare values by name; those that are only in ``ours`` are left out."""
    words = [
        f"{key} is {ours.get(key)!r}, not {value!r}"
        for key, value in reference.items()
        if ours.get(key) != value
    ]
    return counted(name, len(reference), len(words), "; ".join(words[:8]))


def number(value: float) -> str:
    """A difference as the reports write it."""
    return "0.0" if value == 0 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as the reports write them."""
    return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:.0f} s"
