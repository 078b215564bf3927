"""The picture of a run."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axis import Axis

from torchtune_vl.training._plot_losses import draw_losses, smoothed

LENGTHS = (1, 2, 3, 40, 3000)


def falling(length: int, to: float = 0.3) -> list[float]:
    noise = np.random.default_rng(0).normal(0, 0.15, length)
    return [(to + 2.5 * math.exp(-6 * i / length)) * math.exp(x) for i, x in enumerate(noise)]


def labels(axis: Axis) -> list[str]:
    """What stands at the ticks that are in the picture."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    shown = [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high]
    return [text for text in shown if text]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("scale", [1, 1e-5])
def test_ticks_are_whole_steps_and_plain_numbers(length: int, scale: float) -> None:
    losses = [loss * scale for loss in falling(length)]
    figure = draw_losses(losses, [(length, scale)])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    steps, numbers = labels(axes.xaxis), labels(axes.yaxis)
    assert steps
    assert all(step.isdigit() and 0 <= int(step) <= length for step in steps)
    assert len(numbers) >= 2
    assert all(number.replace(".", "").isdigit() for number in numbers)
    assert axes.get_title() == "Training and validation loss"
    assert axes.get_xlabel() == "step"


def test_long_runs_and_steep_ones_too(recwarn: pytest.WarningsRecorder) -> None:
    figure = draw_losses([12.3, *falling(100, 0.001)] * 6_000, [])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert "500000" in labels(axes.xaxis)
    assert {"10", "0.1", "0.005"} <= {*labels(axes.yaxis)}
    assert axes.get_title() == "Training loss"
    assert not recwarn.list


@pytest.mark.parametrize("length", LENGTHS)
def test_the_smoothed_line_lies_within_its_data(length: int) -> None:
    losses = falling(length)
    line = smoothed(losses)
    assert len(line) == length
    near = math.isqrt(length) // 2
    for step, value in enumerate(line):
        around = losses[max(0, step - near) : step + near + 1]
        assert min(around) <= value <= max(around)
        assert value == pytest.approx(sum(around) / len(around))


def test_a_file_is_written(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for losses in ([2.0], falling(40)):
        draw_losses(losses, []).savefig(tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not recwarn.list
