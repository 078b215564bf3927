"""What the parity tests compared, for the table at the end of a run."""

from collections.abc import Callable

_record_property: Callable[[str, object], None] | None = None


def record_into(record_property: Callable[[str, object], None]) -> None:
    """Make the figures that follow part of a test's report."""
    global _record_property
    _record_property = record_property


def record(what: str, inputs: int, difference: float) -> None:
    """Record a comparison that held: how many inputs, and the largest difference."""
    assert _record_property is not None
    _record_property("parity", (what, inputs, difference))
