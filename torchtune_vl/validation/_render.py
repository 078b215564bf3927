"""The report as a table in a terminal, as Markdown, and as an HTML page that needs nothing else."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchtune_vl._shown import shown
from torchtune_vl.validation._report import COLUMNS, NUMBERS, Report, Row

_COLOURS = {"fail": "bold red", "not compared": "yellow", "pass": "green"}
_WORST_FIRST = list(_COLOURS)
# Cases of a row that are listed, the worst first
_IN_TERMINAL, _IN_MARKDOWN, _IN_PAGE = 5, 20, 40


def print_report(report: Report, console: Console) -> None:
    """Print a report.

    Args:
        report: the report.
        console: where to print.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        right = column in NUMBERS
        table.add_column(column, justify="right" if right else "left", no_wrap=right)
    for row in report.rows:
        texts = [_plain(cell) for cell in row.cells]
        texts[4] = f"[{_COLOURS[row.status]}]{texts[4]}[/]"
        table.add_row(*texts)
    console.print(table)
    for row in report.rows:
        if row.note:
            console.print(f"\n[bold]{row.name}[/]: {_plain(row.note)}.", highlight=False)
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
    colour = _COLOURS["pass" if report.passed else "fail"]
    console.print(f"\n[{colour}]{report.verdict}[/]", highlight=False)


def _plain(text: str) -> str:
    return escape(shown(text))


def _print_cases(title: str, cases: Mapping[str, str], console: Console) -> None:
    if not cases:
        return
    lines = [f"  {_plain(name)}: {_plain(summary)}" for name, summary in cases.items()]
    more = len(lines) - _IN_TERMINAL
    lines[_IN_TERMINAL:] = [f"  and {more:,} more"] if more > 0 else []
    for line in (f"\n{title}", *lines):
        console.print(line, highlight=False)


def to_markdown(report: Report) -> str:
    """Write a report as Markdown.

    Args:
        report: the report.

    Returns:
        The text.
    """
    lines = [
        f"# Parity report: {report.verdict}",
        "",
        f"- Ours reads: {_escape(report.checkpoint)}",
        f"- transformers reads: {_escape(report.reference)}",
        f"- {', '.join(f'{name} {value}' for name, value in report.facts.items())}",
        "",
        *_table(COLUMNS, [row.cells for row in report.rows]),
        "",
    ]
    notes = [f"- **{row.name}**: {_escape(row.note)}." for row in report.rows if row.note]
    lines += [*notes, ""] if notes else []
    for row in report.rows:
        if row.failed:
            lines += _failures(row)
    return "\n".join(lines)


def _failures(row: Row) -> list[str]:
    lines = [f"## {row.name}: {len(row.failed):,} of {len(row.cases):,} inputs fail", "", row.about]
    for case in row.failed[:_IN_MARKDOWN]:
        lines += ["", f"- {_escape(case.name)}: {_escape(case.summary)}"]
        pairs = [
            [str(place), *("" if side is None else f"{side[0]} {side[1]!r}" for side in sides)]
            for place, *sides in case.tokens
        ]
        lines += ["", *_table(("place", "ours", "transformers"), pairs)] if pairs else []
    if len(row.failed) > _IN_MARKDOWN:
        lines += ["", f"... and {len(row.failed) - _IN_MARKDOWN:,} more"]
    return [*lines, ""]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(map(_escape, row))} |" for row in rows]


def _escape(text: str) -> str:
    text = "".join(f"\\{c}" if c in "\\|<>*_`[]" else c for c in shown(text))
    return " ".join(text.split())


def to_html(report: Report) -> str:
    """Write a report as an HTML page.

    Args:
        report: the report.

    Returns:
        The page, with pictures inside and without scripts.
    """

    def finalize(value: Any) -> Any:
        """Show text of names and data; what macros made of it is done."""
        return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    environment.filters |= {
        "data_url": lambda png: f"data:image/png;base64,{b64encode(png).decode()}",
        # White space is made visible
        "visible": lambda text: shown(text).replace(" ", "␣").replace("\n", "\\n"),
    }
    template = files("torchtune_vl.validation").joinpath("report.html.j2")
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        report=report,
        rows=sorted(report.rows, key=lambda row: _WORST_FIRST.index(row.status)),
        columns=COLUMNS,
        numbers=NUMBERS,
        max_cases=_IN_PAGE,
    )
