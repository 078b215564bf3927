"""Benchmarks: ratios against a peer, both measured in one run."""

import statistics
from collections.abc import Sequence


def spread(ratios: Sequence[float]) -> str:
    """Format median and quartiles."""
    if len(ratios) == 1:
        return f"{ratios[0]:.2f} (once)"
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.2f} ({lower:.2f} to {upper:.2f})"
