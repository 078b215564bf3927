"""The parity report: rows of cases, and how it is shown in a terminal, as Markdown and as HTML."""

import json
from base64 import b64encode
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markdown import Markdown

from torchtune_vl.files._printable import shown

COLUMNS = ("Compared", "Inputs", "Values", "Difference", "Result")
# Cases of a row whose pictures and tokens are kept: with thousands of images all would not fit
KEPT_EVIDENCE = 8


class Picture(NamedTuple):
    """A PNG file with its caption."""

    caption: str
    png: bytes


class TokenPair(NamedTuple):
    """What both sides have at one place of a sequence, with its text; None beyond its end."""

    place: int
    ours: tuple[Any, str] | None
    reference: tuple[Any, str] | None


@dataclass
class Case:
    """One input, given to both sides, and what differs."""

    name: str
    compared: int = 0
    differing: int = 0
    largest: float = 0.0  # difference; infinite where values cannot be subtracted
    total: float = 0.0
    failed: bool = False  # if a difference is beyond what its row allows
    refused: Literal["", "both", "ours", "theirs"] = ""
    detail: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tokens: list[TokenPair] = field(default_factory=list)

    def count(self, compared: int, differing: int) -> None:
        """Enter values that are equal or not, and so differ by their number alone."""
        self.compared, self.differing, self.failed = compared, differing, differing > 0
        self.largest = self.total = float(differing)

    # By this the worst comes first
    goodness = property(lambda self: (not self.failed, -self.largest, -self.differing))

    @property
    def summary(self) -> str:
        """What differs, in words."""
        size = f" by at most {number(self.largest)}" if self.total != self.differing else ""
        differs = f"{self.differing:,} of {self.compared:,} differ{size}" if self.differing else ""
        return "; ".join(filter(None, (differs, self.detail)))


@dataclass
class Row:
    """One kind of comparison over all inputs, the worst first, or why it is skipped."""

    name: str
    about: str
    unit: str  # in which differences are counted, such as "ids"
    numeric: bool = False  # if they are those of numbers instead
    peer: str = "transformers"  # what the other side is called
    skipped: str = ""
    note: str = ""
    cases: list[Case] = field(default_factory=list)

    def add(self, case: Case) -> None:
        """Put a case in its place; only the worst ones keep their pictures and tokens."""
        place = bisect(self.cases, case.goodness, key=lambda other: other.goodness)
        self.cases.insert(place, case)
        for other in self.cases[max(place, KEPT_EVIDENCE) :][:1]:
            other.pictures, other.tokens = [], []

    # Over all cases
    failed = property(lambda self: [case for case in self.cases if case.failed])
    compared = property(lambda self: sum(case.compared for case in self.cases))

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
        parts = [f"{sum(case.differing for case in cases):,} {self.unit} differ"] if cases else []
        if self.numeric and cases:
            mean = sum(case.total for case in cases) / max(self.compared, 1)
            parts = [f"max {number(max(c.largest for c in cases))}", f"mean {number(mean)}"]
        counts = {"one side": len(self.cases) - len(cases) - both, "both": both}
        parts += [f"{count:,} refused by {side}" for side, count in counts.items() if count]
        return ", ".join(parts)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the reports' table, in the order of ``COLUMNS``."""
        counts = (f"{len(self.cases):,}", f"{self.compared:,}") if self.cases else ("", "")
        return self.name, *counts, self.figure, self.status


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
    def refused_by_both(self) -> dict[str, str]:
        """What is said of inputs, by their names, of an image once and not for every backend."""
        cases = [case for row in self.rows for case in row.cases if not case.failed]
        return {case.name: case.summary for case in cases if case.refused == "both"}

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        counts = Counter(row.status for row in self.rows)
        left = f", {counts['not compared']} not compared" if counts["not compared"] else ""
        return f"{counts['pass']} rows pass, {counts['fail']} fail{left}"


def number(value: float) -> str:
    """A difference as the reports write it."""
    return "0.0" if value == 0 else f"{value:.3g}"


def package_file(name: str) -> str:
    """Read a file of this package."""
    return (files(__package__) / name).read_text("utf-8")


def empty_rows() -> dict[str, Row]:
    """Make the rows of a report by their names, in its order, without cases."""
    return {row["name"]: Row(**row) for row in json.loads(package_file("report_rows.json"))}


def print_report(report: Report, console: Console) -> None:
    """Print a report in a terminal, with five cases of each row, and its result once more."""
    console.print(Markdown(to_markdown(report, 5)))
    colour = "green" if report.passed else "bold red"
    console.print(f"\n[{colour}]{report.verdict}[/]", highlight=False)


def to_markdown(report: Report, max_cases: int = 20) -> str:
    """Write a report as Markdown, with the worst cases of each row."""
    return _rendered("report.md.j2", report, max_cases, _escaped)


def to_html(report: Report) -> str:
    """Write a report as an HTML page, with pictures inside and without scripts."""
    return _rendered("report.html.j2", report, 40, shown)


def _escaped(text: str) -> str:
    text = "".join(f"\\{c}" if c in "\\|<>*_`[]~&#" else c for c in shown(text))
    return Markup(" ".join(text.split()))


def _rendered(name: str, report: Report, listed: int, show: Callable[[str], str]) -> str:
    environment = Environment(undefined=StrictUndefined, autoescape=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    # Names and data; what macros made of them is Markup
    environment.finalize = lambda value: value if isinstance(value, Markup) else show(str(value))
    environment.filters["data_url"] = lambda png: f"data:image/png;base64,{b64encode(png).decode()}"
    environment.filters["visible"] = lambda s: shown(s).replace(" ", "␣").replace("\n", "\\n")
    worst_first = sorted(report.rows, key=lambda row: row.status)  # fail, not compared, pass
    template = environment.from_string(package_file(name))
    return template.render(report=report, rows=worst_first, columns=COLUMNS, max_cases=listed)
