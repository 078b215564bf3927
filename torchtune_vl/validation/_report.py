"""A parity report: rows of cases, and how what two sides give becomes a case."""

import json
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch

# Shows progress: takes a sequence and what is in it, and returns the items one after another
Track = Callable[[Sequence[Any], str], Iterable[Any]]
COLUMNS = ("Compared", "Inputs", "Values", "Difference", "Result", "Ours", "transformers")
NUMBERS = ("Inputs", "Values", "Ours", "transformers")
# Cases of a row whose pictures and tokens are kept: with thousands of images all would not fit
KEPT_EVIDENCE = 8
INFINITE = float("inf")


def data(name: str) -> Any:
    """Read a JSON file of this package."""
    return json.loads((files("torchtune_vl.validation") / name).read_text("utf-8"))


class Picture(NamedTuple):
    """A PNG file with its caption."""

    caption: str
    png: bytes


class TokenPair(NamedTuple):
    """The ids that both sides have at one place of a sequence, with text; None beyond its end."""

    place: int
    ours: tuple[int, str] | None
    reference: tuple[int, str] | None


@dataclass
class Case:
    """One input, given to both sides.

    Args:
        largest: largest difference; infinite where values cannot be subtracted.
        total: sum of all differences.
        failed: whether the difference is beyond what the row allows.
        refused: who refuses the input, "both", "ours" or "transformers"; empty if nobody does.
    """

    name: str
    compared: int = 0
    differing: int = 0
    largest: float = 0.0
    total: float = 0.0
    failed: bool = False
    refused: Literal["", "both", "ours", "transformers"] = ""
    detail: str = ""
    ours_seconds: float = 0.0
    reference_seconds: float = 0.0
    pictures: list[Picture] = field(default_factory=list)
    tokens: list[TokenPair] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """What differs, in words."""
        size = f" by at most {number(self.largest)}" if self.total != self.differing else ""
        differs = f"{self.differing:,} of {self.compared:,} differ{size}" if self.differing else ""
        return "; ".join(filter(None, (differs, self.detail)))


def _goodness(case: Case) -> tuple[bool, float, int]:
    return not case.failed, -case.largest, -case.differing


@dataclass
class Row:
    """One kind of comparison over all inputs.

    Args:
        unit: what is counted, such as "ids".
        numeric: whether the size of differences means something, or only their number.
        timed_in: the row whose time holds that of this one, "-" for one that takes none; empty
            for a row with times of its own.
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
        place = bisect(self.cases, _goodness(case), key=_goodness)
        self.cases.insert(place, case)
        for other in self.cases[max(place, KEPT_EVIDENCE) :][:1]:
            other.pictures, other.tokens = [], []

    @property
    def failed(self) -> list[Case]:
        """The cases that fail, worst first."""
        return [case for case in self.cases if case.failed]

    @property
    def status(self) -> str:
        return "not compared" if not self.cases else "fail" if self.failed else "pass"

    # Over all cases
    compared = property(lambda self: sum(case.compared for case in self.cases))
    ours_seconds = property(lambda self: sum(case.ours_seconds for case in self.cases))
    reference_seconds = property(lambda self: sum(case.reference_seconds for case in self.cases))

    @property
    def figure(self) -> str:
        """The difference in words."""
        if not self.cases:
            return self.skipped
        cases = [case for case in self.cases if not case.refused]
        both = sum(case.refused == "both" for case in self.cases)
        one_side = len(self.cases) - len(cases) - both
        mean = sum(case.total for case in cases) / max(self.compared, 1)
        size = f"max {number(max((c.largest for c in cases), default=0))}, mean {number(mean)}"
        count = f"{sum(case.differing for case in cases):,} {self.unit} differ"
        parts = {
            size if self.numeric else count: len(cases),
            f"{one_side:,} refused by one side": one_side,
            f"{both:,} refused by both": both,
        }
        return ", ".join(part for part, applies in parts.items() if applies)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the reports' table, in the order of :data:`COLUMNS`."""
        if not self.cases:
            return self.name, "", "", self.figure, self.status, "", ""
        seconds = self.ours_seconds, self.reference_seconds
        times = [f"{s:.3f} s" if s < 10 else f"{s:.0f} s" for s in seconds]
        if self.timed_in:
            times = 2 * ["-" if self.timed_in == "-" else f"in {self.timed_in}"]
        counts = f"{len(self.cases):,}", f"{self.compared:,}"
        return self.name, *counts, self.figure, self.status, *times


def row(name: str, skipped: str = "") -> Row:
    """Make one of the rows of a report, without cases."""
    return Row(**next(row for row in data("rows.json") if row["name"] == name), skipped=skipped)


@dataclass
class Report:
    """The result of a run: the directories that were read, the versions of packages, the rows."""

    checkpoint: str
    reference: str
    facts: dict[str, str]
    rows: list[Row]

    @property
    def passed(self) -> bool:
        return all(row.status != "fail" for row in self.rows)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        counts = Counter(row.status for row in self.rows)
        verdict = f"{counts['pass']} rows pass, {counts['fail']} fail"
        left = counts["not compared"]
        return f"{verdict}, {left} not compared" if left else verdict


@dataclass(frozen=True)
class Outcome:
    """What a call gave, or how it failed, and how long it took."""

    value: Any
    error: Exception | None = None
    seconds: float = 0.0

    def unwrap(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value

    def map(self, function: Callable[[Any], Any]) -> "Outcome":
        """Apply a function to the value, if there is one."""
        return self if self.error else replace(self, value=function(self.value))


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call one side, which may refuse its input: then the outcome has an error and no value."""
    start = time.perf_counter()
    try:
        return Outcome(function(*args, **kwargs), None, time.perf_counter() - start)
    except Exception as error:  # decoders and tokenizers raise what they like
        return Outcome(None, error, time.perf_counter() - start)


def attempted(read: Callable[[Any], Any]) -> Any:
    """Make a property of what is read once, when it is asked for, and may fail: its outcome."""
    return cached_property(lambda self: attempt(read, self))


def refusal(name: str, ours: Outcome, reference: Outcome) -> Case | None:
    """Judge an input that a side refuses: a case that passes if both do, ours by ``ValueError``."""
    errors = {"Ours": ours.error, "transformers": reference.error}
    says = [f"{side}: {brief(error)}" for side, error in errors.items() if error is not None]
    if not says:
        return None
    refused: Any = "both" if len(says) == 2 else says[0].split(":")[0].lower()
    failed = refused != "both" or not isinstance(ours.error, ValueError | OSError)
    who = "Both refuse" if refused == "both" else f"Only {refused} refuses"
    detail = f"{who} it. {'; '.join(says)}"
    size, seconds = INFINITE if failed else 0.0, (ours.seconds, reference.seconds)
    return Case(name, 0, 0, size, 0.0, failed, refused, detail, *seconds)


def unreadable(ours: Outcome, reference: Outcome) -> Case | None:
    """Judge files that a side cannot read: as :func:`refusal`, but both may not refuse either."""
    case = refusal("ours beside transformers", ours, reference)
    return case and replace(case, failed=True, largest=INFINITE)


def brief(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 600 else f"{text[:600]} ..."
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def counted(name: str, compared: int, differing: int, detail: str = "") -> Case:
    """Make a case of values that are equal or not, and so differ by their number alone."""
    size = float(differing)
    return Case(name, compared, differing, size, size, differing > 0, detail=detail)


def compare_sequences(
    name: str, ours: Outcome, reference: Outcome, piece: Callable[[int], str] | None = None
) -> Case:
    """Compare place by place; ``piece`` gives the text of an id, to show those that differ."""
    if (refused := refusal(name, ours, reference)) is not None:
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
            places = range(max(first - 3, 0), min(first + 6, case.compared))
            at = [[(s[i], piece(s[i])) if i < len(s) else None for i in places] for s in (a, b)]
            case.tokens = [TokenPair(*pair) for pair in zip(places, *at, strict=True)]
        elif first < min(len(a), len(b)):
            case.detail += f": ours {a[first]!r}, transformers {b[first]!r}"
    return case


def compare_tensors(name: str, ours: Outcome, reference: Outcome, tolerance: float = 0.0) -> Case:
    """Compare values; other shapes fail, and differences beyond the tolerance or no numbers."""
    if (refused := refusal(name, ours, reference)) is not None:
        return refused
    a, b = ours.value, reference.value
    case = Case(name, b.numel(), ours_seconds=ours.seconds, reference_seconds=reference.seconds)
    if a.shape != b.shape:
        case.detail = f"ours has the shape {list(a.shape)}, transformers {list(b.shape)}"
        case.failed, case.differing, case.largest = True, b.numel(), INFINITE
    elif not torch.equal(a, b):
        difference = (a.float() - b.float()).abs().nan_to_num(nan=INFINITE)
        case.differing, case.largest = int((difference > 0).sum()), float(difference.max())
        case.total = float(difference.sum(dtype=torch.float64))
        case.failed = not case.largest <= tolerance
    return case


def compare_settings(name: str, ours: dict[str, Any], reference: dict[str, Any]) -> Case:
    """Compare values by name; those that are only in ``ours`` are left out."""
    differing = {key: value for key, value in reference.items() if ours.get(key) != value}
    words = [f"{key} is {ours.get(key)!r}, not {value!r}" for key, value in differing.items()]
    return counted(name, len(reference), len(words), "; ".join(words[:8]))


def number(value: float) -> str:
    """A difference as the reports write it."""
    return "0.0" if value == 0 else f"{value:.3g}"
