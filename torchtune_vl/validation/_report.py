"""The parity report: rows of cases, and how it is shown in a terminal, as Markdown and as HTML."""

import json
from base64 import b64encode
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchtune_vl._shown import shown

COLUMNS = ("Compared", "Inputs", "Values", "Difference", "Result", "Ours", "transformers")
NUMBERS = ("Inputs", "Values", "Ours", "transformers")
# Cases of a row whose pictures and tokens are kept: with thousands of images all would not fit
KEPT_EVIDENCE = 8
# The worst first
_COLOURS = {"fail": "bold red", "not compared": "yellow", "pass": "green"}


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
        refused: who refuses the input; empty if nobody does.
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

    def count(self, compared: int, differing: int) -> None:
        """Enter values that are equal or not, and so differ by their number alone."""
        self.compared, self.differing, self.failed = compared, differing, differing > 0
        self.largest = self.total = float(differing)

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

    # Over all cases
    failed = property(lambda self: [case for case in self.cases if case.failed])
    compared = property(lambda self: sum(case.compared for case in self.cases))
    ours_seconds = property(lambda self: sum(case.ours_seconds for case in self.cases))
    reference_seconds = property(lambda self: sum(case.reference_seconds for case in self.cases))

    @property
    def status(self) -> str:
        return "not compared" if not self.cases else "fail" if self.failed else "pass"

    @property
    def figure(self) -> str:
        """The difference in words."""
        if not self.cases:
            return self.skipped
        cases = [case for case in self.cases if not case.refused]
        both = sum(case.refused == "both" for case in self.cases)
        one_side = len(self.cases) - len(cases) - both
        figure = f"{sum(case.differing for case in cases):,} {self.unit} differ"
        if self.numeric:
            mean = sum(case.total for case in cases) / max(self.compared, 1)
            worst = max((case.largest for case in cases), default=0.0)
            figure = f"max {number(worst)}, mean {number(mean)}"
        refused = f"{one_side:,} refused by one side", f"{both:,} refused by both"
        parts = zip((figure, *refused), (cases, one_side, both), strict=True)
        return ", ".join(text for text, applies in parts if applies)

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


def number(value: float) -> str:
    """A difference as the reports write it."""
    return "0.0" if value == 0 else f"{value:.3g}"


def package_file(name: str) -> str:
    """Read a file of this package."""
    return (files(__package__) / name).read_text("utf-8")


def empty_rows() -> dict[str, Row]:
    """Make the rows of a report by their names, in its order, without cases."""
    return {row["name"]: Row(**row) for row in json.loads(package_file("rows.json"))}


def print_report(report: Report, console: Console) -> None:
    """Print a report."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        right = column in NUMBERS
        table.add_column(column, justify="right" if right else "left", no_wrap=right)
    for row in report.rows:
        texts = [escape(shown(cell)) for cell in row.cells]
        texts[4] = f"[{_COLOURS[row.status]}]{texts[4]}[/]"
        table.add_row(*texts)
    console.print(table)
    for row in report.rows:
        if row.note:
            console.print(f"\n[bold]{row.name}[/]: {escape(shown(row.note))}.", highlight=False)
    for row in report.rows:
        failing = {case.name: case.summary for case in row.failed}
        _print_cases(f"[bold red]{row.name}[/]: {len(failing):,} fail", failing, console)
    # Each image would be there once for every backend
    cases = [case for row in report.rows for case in row.cases if not row.timed_in]
    refused = {c.name: c.summary for c in cases if c.refused == "both" and not c.failed}
    _print_cases(f"[bold]Refused by both sides[/]: {len(refused):,}", refused, console)
    colour = _COLOURS["pass" if report.passed else "fail"]
    console.print(f"\n[{colour}]{report.verdict}[/]", highlight=False)


def _print_cases(title: str, cases: Mapping[str, str], console: Console) -> None:
    if not cases:
        return
    lines = [escape(shown(f"  {name}: {summary}")) for name, summary in cases.items()]
    lines[5:] = [f"  and {len(lines) - 5:,} more"] if len(lines) > 5 else []
    console.print("\n".join([f"\n{title}", *lines]), highlight=False)


def to_markdown(report: Report) -> str:
    """Write a report as Markdown."""

    def show(text: str) -> str:
        text = "".join(f"\\{c}" if c in "\\|<>*_`[]" else c for c in shown(text))
        return Markup(" ".join(text.split()))

    return _rendered("report.md.j2", report, 20, show)


def to_html(report: Report) -> str:
    """Write a report as an HTML page, with pictures inside and without scripts."""
    return _rendered("report.html.j2", report, 40, shown)


def _rendered(name: str, report: Report, listed: int, show: Callable[[str], str]) -> str:
    def finalize(value: Any) -> Any:
        """Show text of names and data; what macros made of it is done."""
        return show(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    settings: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "autoescape": True}
    environment = Environment(undefined=StrictUndefined, finalize=finalize, **settings)
    environment.filters |= {
        "data_url": lambda png: f"data:image/png;base64,{b64encode(png).decode()}",
        "visible": lambda text: shown(text).replace(" ", "␣").replace("\n", "\\n"),
    }
    worst_first = sorted(report.rows, key=lambda row: [*_COLOURS].index(row.status))
    return environment.from_string(package_file(name)).render(
        report=report, rows=worst_first, columns=COLUMNS, numbers=NUMBERS, max_cases=listed
    )
