"""The picture of a run's losses."""

from collections.abc import Sequence
from math import isqrt

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter


def draw_losses(losses: Sequence[float], validation_losses: Sequence[tuple[int, float]]) -> Figure:
    """Draw the loss of each step, smoothed too, and (step, validation loss) pairs."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    style = ".-" if len(losses) < 50 else "-"  # a single step is no line
    axes.plot(steps, losses, style, color="C0", alpha=0.35, lw=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color="C0", label="training, smoothed")
    if validation_losses:
        axes.plot(*zip(*validation_losses, strict=True), "o-", color="C1", label="validation")
    title = "Training and validation loss" if validation_losses else "Training loss"
    axes.set(title=title, xlabel="step", ylabel="cross-entropy per supervised token")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.ticklabel_format(style="plain", useOffset=False)
    shown = [*losses, *(loss for _, loss in validation_losses)]
    if max(shown) > 10 * min(shown) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(
            lambda value, _: np.format_float_positional(value, 6, fractional=False, trim="-")
        )
        axes.yaxis.set_minor_formatter(NullFormatter())
    return figure


def smoothed(losses: Sequence[float]) -> list[float]:
    """Average over neighbours: as many on both sides but at the ends, about the root of all."""
    window = np.ones(2 * (isqrt(len(losses)) // 2) + 1)
    sums, counts = (np.convolve(each, window, "same") for each in (losses, np.ones(len(losses))))
    return (sums / counts).tolist()
