"""Scores of answers: metrics, how sure they are, and a page of them."""

from torchtune_vl.evaluation._bootstrap import Comparison, Scores, compare, interval
from torchtune_vl.evaluation._evaluate import evaluate, metrics_of
from torchtune_vl.evaluation._metrics import METRICS, Metric
from torchtune_vl.evaluation._sources import Sources

__all__ = [
    "METRICS",
    "Comparison",
    "Metric",
    "Scores",
    "Sources",
    "compare",
    "evaluate",
    "interval",
    "metrics_of",
]
