"""Scores of samples, and how far another choice of samples would move their total."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Draw = npt.NDArray[np.int64]  # numbers of samples, of which some may occur more than once


class SampleError(ValueError):
    """What is wrong with one of the samples, whose place in them is ``number``, from 0."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"sample {number}: {reason}")
        self.number = number
        self.reason = reason


def each(function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
    """Call a function for each sample; a ``ValueError`` of it becomes a :class:`SampleError`."""
    results = []
    for number, row in enumerate(zip(*columns, strict=True)):
        try:
            results.append(function(*row))
        except ValueError as error:
            raise SampleError(number, str(error)) from error
    return results


@dataclass(frozen=True)
class Scores:
    """What a metric says of samples.

    Args:
        samples: the score of each on its own; more is better.
        total_of: the score that samples with these numbers have together.
    """

    samples: list[float]
    total_of: Callable[[Draw], float]

    @property
    def total(self) -> float:
        """The score of all samples together."""
        return self.total_of(np.arange(len(self.samples)))

    @classmethod
    def of_each(cls, score: Callable[..., float], *columns: Sequence[Any]) -> "Scores":
        """Score each sample by itself; together they have the mean of that."""
        samples = np.array(each(score, *columns), dtype=np.float64)
        return cls(samples.tolist(), lambda draw: float(samples[draw].mean()))


@dataclass(frozen=True)
class Comparison:
    """Two lists of answers to the same questions, by one metric.

    Args:
        difference: the total of the second less that of the first.
        low: where the 95 % interval of the difference begins.
        high: where it ends.
        p_value: twice the share of resamples whose difference has not the sign of ``difference``,
            0 among them, and at most 1. Both counts are one larger, for the samples as they are:
            it is never 0. It is 1 if there is no difference.
    """

    difference: float
    low: float
    high: float
    p_value: float


def interval(scores: Scores, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Find the 95 % interval of a total, by the percentiles of the bootstrap (Efron 1979).

    Each resample has as many samples, drawn with replacement: it is as sure as samples are
    independent of each other.
    """
    totals = [scores.total_of(draw) for draw in _draws(len(scores.samples), resamples, seed)]
    return _middle(totals)


def compare(first: Scores, second: Scores, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare two lists of answers to the same questions, by the same resamples of both."""
    count = len(first.samples)
    if len(second.samples) != count:
        raise ValueError(f"{count} samples cannot be compared with {len(second.samples)}")
    difference = second.total - first.total
    drawn = [
        second.total_of(draw) - first.total_of(draw) for draw in _draws(count, resamples, seed)
    ]
    # Both signs are others than that of no difference
    others = sum(np.sign(other) != np.sign(difference) or not difference for other in drawn)
    p_value = min(1.0, 2 * (others + 1) / (resamples + 1))
    return Comparison(difference, *_middle(drawn), p_value)


def _draws(count: int, resamples: int, seed: int) -> Iterator[Draw]:
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        # In order, which is the rank of boxes
        yield np.sort(generator.integers(count, size=count))


def _middle(totals: list[float]) -> tuple[float, float]:
    low, high = np.quantile(totals, [0.025, 0.975])
    return float(low), float(high)
