"""The runs of ``python -m tests.random_data_runs``."""

from pathlib import Path

import pytest

from quickstart.checkpoint import write_tiny_checkpoint
from tests.finetune_runs import NARROW
from tests.random_data_runs import check, draws

DRAWN = draws(30, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(DRAWN)))
def test_runs(number: int, vocabulary: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "base", vocabulary, config=NARROW)
    print(DRAWN[number])
    print(check(DRAWN[number], tmp_path, tmp_path / "run"))
