"""What a parity report consists of: rows of compared inputs."""

import time
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
U = TypeVar("U")
Status = Literal["pass", "fail", "not compared"]

# Cases of a row whose pictures and tokens are kept: with thousands of images all would not fit
KEPT_EVIDENCE = 8


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
        note: what the reader should know about this run.
        skipped: why nothing was compared.
        cases: the inputs, worst first.
    """

    name: str
    about: str
    unit: str
    numeric: bool = False
    timed_in: str = ""
    note: str = ""
    skipped: str = ""
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
        parts = [self._difference(cases)] if cases else []
        one_side = sum(case.refused in ("ours", "transformers") for case in self.cases)
        both = sum(case.refused == "both" for case in self.cases)
        if one_side:
            parts.append(f"{one_side:,} refused by one side")
        if both:
            parts.append(f"{both:,} refused by both")
        return ", ".join(parts)

    def _difference(self, cases: Sequence[Case]) -> str:
        if not self.numeric:
            return f"{sum(case.differing for case in cases):,} {self.unit} differ"
        mean = sum(case.total for case in cases) / max(self.compared, 1)
        return f"max {number(max(case.largest for case in cases))}, mean {number(mean)}"

    @property
    def ours_seconds(self) -> float:
        """Time of our side over all cases."""
        return sum(case.ours_seconds for case in self.cases)

    @property
    def reference_seconds(self) -> float:
        """Time of transformers over all cases."""
        return sum(case.reference_seconds for case in self.cases)


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
        counts = {
            status: sum(row.status == status for row in self.rows)
            for status in ("pass", "fail", "not compared")
        }
        parts = [f"{counts['pass']} rows pass", f"{counts['fail']} fail"]
        if counts["not compared"]:
            parts.append(f"{counts['not compared']} not compared")
        return ", ".join(parts)


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


def attempt(function: Callable[..., T], *args: Any, **kwargs: Any) -> Outcome[T]:
    """Call one side, which may refuse its input.

    Args:
        function: what to call.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        The outcome; its value is None if there is an error.
    """
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
    if ours.error is None and reference.error is None:
        return None
    says = "; ".join(
        f"{side}: {brief(outcome.error)}"
        for side, outcome in (("Ours", ours), ("transformers", reference))
        if outcome.error is not None
    )
    case = Case(name, ours_seconds=ours.seconds, reference_seconds=reference.seconds)
    if ours.error is not None and reference.error is not None:
        case.refused, case.detail = "both", f"Both refuse it. {says}"
        case.failed = not isinstance(ours.error, ValueError | OSError)
    else:
        case.refused = "transformers" if ours.error is None else "ours"
        case.detail = f"Only {case.refused} refuses it. {says}"
        case.failed = True
    case.largest = float("inf") if case.failed else 0.0
    return case


def unreadable(ours: Outcome, reference: Outcome) -> Case | None:
    """Judge files that a side cannot read; the arguments are those of :func:`refusal`.

    Args:
        ours: outcome of our side.
        reference: outcome of transformers.

    Returns:
        A case that fails, also if both sides refuse; None if both can read them.
    """
    case = refusal("ours beside transformers", ours, reference)
    if case is not None:
        case.failed, case.largest = True, float("inf")
    return case


def brief(error: Exception, limit: int = 600) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= limit else f"{text[:limit]} ..."
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


COLUMNS = ("Compared", "Inputs", "Values", "Difference", "Result", "Ours", "transformers")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row of the reports' table, in the order of :data:`COLUMNS`."""
    times = [duration(row.ours_seconds), duration(row.reference_seconds)]
    if row.timed_in:
        times = 2 * ["-" if row.timed_in == "-" else f"in {row.timed_in}"]
    return (
        row.name,
        f"{len(row.cases):,}" if row.cases else "",
        f"{row.compared:,}" if row.cases else "",
        row.figure,
        row.status,
        *(times if row.cases else ("", "")),
    )


def number(value: float) -> str:
    """A difference as the reports write it."""
    return "0.0" if value == 0 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as the reports write them."""
    return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:.0f} s"
