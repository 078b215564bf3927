"""The report as a table in a terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchtune_vl._shown import shown
from torchtune_vl.validation._report import COLUMNS, Report, cells

_COLOURS = {"pass": "green", "fail": "bold red", "not compared": "yellow"}
_RIGHT = ("Inputs", "Values", "Ours", "transformers")
_CASES = 5


def print_report(report: Report, console: Console) -> None:
    """Print a report.

    Args:
        report: the report.
        console: where to print.
    """
    console.print(_table(report))
    for row in report.rows:
        if row.note:
            console.print(f"\n[bold]{row.name}[/]: {_text(row.note)}.", highlight=False)
    for row in report.rows:
        failing = {case.name: case.summary for case in row.failed}
        _print_cases(f"[bold red]{row.name}[/]: {len(failing):,} fail", failing, console)
    # Each image would be there once for every backend
    refused = {
        case.name: case.summary
        for row in report.rows
        for case in row.cases
        if case.refused == "both" and not row.timed_in and not case.failed
    }
    _print_cases(f"[bold]Refused by both sides[/]: {len(refused):,}", refused, console)
    colour = "green" if report.passed else "bold red"
    console.print(f"\n[{colour}]{report.verdict}[/]", highlight=False)


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        right = column in _RIGHT
        table.add_column(column, justify="right" if right else "left", no_wrap=right)
    for row in report.rows:
        texts = list(map(_text, cells(row)))
        texts[4] = f"[{_COLOURS[row.status]}]{texts[4]}[/]"
        table.add_row(*texts)
    return table


def _text(text: str) -> str:
    return escape(shown(text))


def _print_cases(title: str, cases: Mapping[str, str], console: Console) -> None:
    if not cases:
        return
    console.print(f"\n{title}", highlight=False)
    for name, summary in [*cases.items()][:_CASES]:
        console.print(f"  {_text(name)}: {_text(summary)}", highlight=False)
    if len(cases) > _CASES:
        console.print(f"  and {len(cases) - _CASES:,} more", highlight=False)
