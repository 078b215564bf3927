"""The runs of ``python -m tests.random_runs``."""

from pathlib import Path

import pytest

from tests.random_runs import check, draws, inputs

DRAWN = [*draws(60, seed=0)]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(DRAWN)))
def test_runs(number: int, vocabulary: Path, tmp_path: Path) -> None:
    drawn = DRAWN[number]
    print(drawn)
    print(check(drawn, inputs(tmp_path, vocabulary, drawn), tmp_path / "run"))
