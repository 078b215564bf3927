"""The report as Markdown."""

from collections.abc import Sequence

from torchtune_vl._shown import shown
from torchtune_vl.validation._report import COLUMNS, Report, Row, cells

_CASES = 20


def to_markdown(report: Report) -> str:
    """Write a report as Markdown.

    Args:
        report: the report.

    Returns:
        The text.
    """
    facts = ", ".join(f"{name} {value}" for name, value in report.facts.items())
    lines = [
        f"# Parity report: {report.verdict}",
        "",
        f"- Ours reads: {_escape(report.checkpoint)}",
        f"- transformers reads: {_escape(report.reference)}",
        f"- {facts}",
        "",
        *_table(COLUMNS, [cells(row) for row in report.rows]),
        "",
    ]
    notes = [f"- **{row.name}**: {_escape(row.note)}." for row in report.rows if row.note]
    lines += [*notes, ""] if notes else []
    for row in report.rows:
        if row.status == "fail":
            lines += _failures(row)
    return "\n".join(lines)


def _failures(row: Row) -> list[str]:
    lines = [f"## {row.name}: {len(row.failed):,} of {len(row.cases):,} inputs fail", "", row.about]
    for case in row.failed[:_CASES]:
        lines += ["", f"- {_escape(case.name)}: {_escape(case.summary)}"]
        if case.tokens:
            lines += ["", *_table(("place", "ours", "transformers"), list(map(_pair, case.tokens)))]
    if len(row.failed) > _CASES:
        lines += ["", f"... and {len(row.failed) - _CASES:,} more"]
    return [*lines, ""]


def _pair(pair: tuple) -> list[str]:
    place, *sides = pair
    return [str(place), *("" if side is None else f"{side[0]} {side[1]!r}" for side in sides)]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(map(_escape, row))} |" for row in rows]


def _escape(text: str) -> str:
    text = shown(text)
    for character in "\\|<>*_`[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
