"""The table before the first step."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from torchtune_vl.data import PaddedRows, Plan
from torchtune_vl.datasets import Measurements
from torchtune_vl.training._overview import Overview


def test_the_table_has_what_the_run_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = np.array([[10, 8, 3], [20, 0, 5], [0, 0, 0], [1500, 0, 700]], np.int32)
    plan = Plan.make(tmp_path, PaddedRows(1), sizes, rows_per_step=2, epochs=3)
    counts = Counter({"media": 1, "truncated": 2})
    overview = Overview()
    overview.add_dataset("dataset", Measurements(sizes, [], counts), 1, plan)
    overview.show(6, 0)
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines()]
    told = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    assert told == {
        "samples": "3",
        "bad, left out": "1",
        "truncated": "2",
        "images and videos": "1",
        "tokens": "1,530",
        "supervised tokens": "708",
        "rows": "12",
    }
    assert lines[-1] == ["6 steps to go"]
    overview.show(1000, 12_340_000_000)
    said = capsys.readouterr().out
    assert "1,000 steps to go, in about 12.3 GB of each device, computed" in said
