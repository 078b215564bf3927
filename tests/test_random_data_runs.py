"""One of the runs of ``python -m tests.random_data_runs``, and others with ``-m slow``."""

from pathlib import Path

import pytest

from quickstart.checkpoint import write_tiny_checkpoint
from tests.finetune_runs import NARROW
from tests.random_data_runs import check, draws

DRAWN = draws(30, seed=0)
QUICK = (4,)


@pytest.mark.parametrize(
    "number",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in range(len(DRAWN))],
)
def test_runs(number: int, vocabulary: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "base", vocabulary, config=NARROW)
    print(DRAWN[number])
    print(check(DRAWN[number], tmp_path, tmp_path / "run"))
