"""The report as one HTML page that needs nothing else."""

from base64 import b64encode
from collections import Counter
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from torchtune_vl._shown import shown
from torchtune_vl.validation._report import COLUMNS, Report, Row, cells

# Cases of a row that the page lists; the worst come first
_CASES = 40
_WORST_FIRST = ("fail", "not compared", "pass")


def to_html(report: Report) -> str:
    """Write a report as an HTML page.

    Args:
        report: the report.

    Returns:
        The page, with pictures inside and without scripts.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters["data_url"] = _data_url
    environment.filters["visible"] = _visible
    template = files("torchtune_vl.validation").joinpath("report.html.j2")
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        report=report,
        counts=Counter(row.status for row in report.rows),
        rows=sorted(report.rows, key=_rank),
        columns=COLUMNS,
        cells=cells,
        max_cases=_CASES,
    )


def _rank(row: Row) -> int:
    return _WORST_FIRST.index(row.status)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _finalize(value: Any) -> Any:
    """Show text of names and data; what macros made of it is done."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _visible(text: str) -> str:
    """Make white space visible."""
    return shown(text).replace(" ", "␣").replace("\n", "\\n")
