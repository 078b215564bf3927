"""The report as a table in a terminal, as Markdown, and as an HTML page that needs nothing else."""

from base64 import b64encode
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchtune_vl.files._printable import shown
from torchtune_vl.validation._report import COLUMNS, NUMBERS, Report

# The worst first
_COLOURS = {"fail": "bold red", "not compared": "yellow", "pass": "green"}


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
    return _rendered("report.md.j2", report, 20, lambda text: Markup(_escape(text)))


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
    template = files("torchtune_vl.validation").joinpath(name).read_text(encoding="utf-8")
    worst_first = sorted(report.rows, key=lambda row: [*_COLOURS].index(row.status))
    return environment.from_string(template).render(
        report=report, rows=worst_first, columns=COLUMNS, numbers=NUMBERS, max_cases=listed
    )


def _escape(text: str) -> str:
    text = "".join(f"\\{c}" if c in "\\|<>*_`[]" else c for c in shown(text))
    return " ".join(text.split())
