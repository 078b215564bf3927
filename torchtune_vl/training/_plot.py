"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

# Weight of the past in the smoothed curve
_SMOOTHING = 0.95


def plot_losses(
    losses: Sequence[float], validation_losses: Sequence[tuple[int, float]], path: Path
) -> None:
    """Draw the loss of each step, a smoothed curve, and the validation losses.

    Args:
        losses: loss of each step, from the first.
        validation_losses: (step, loss) pairs.
        path: PNG file to write.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="C0", alpha=0.35, linewidth=1, label="training, each step")
    axes.plot(steps, _smoothed(losses), color="C0", label="training, smoothed")
    if validation_losses:
        axes.plot(*zip(*validation_losses, strict=True), "o-", color="C1", label="validation")
    axes.set(xlabel="step", ylabel="cross-entropy per supervised token", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, without the bias of its start (Adam, arXiv 1412.6980)."""
    smoothed, average = [], 0.0
    for step, loss in enumerate(losses, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smoothed.append(average / (1 - _SMOOTHING**step))
    return smoothed
