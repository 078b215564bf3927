"""Two of the runs of ``python -m tests.random_runs``, and the others with ``-m slow``."""

from pathlib import Path

import pytest

from tests.random_runs import check, draws, inputs

DRAWN = [*draws(60, seed=0)]
QUICK = (3, 32)


@pytest.mark.parametrize(
    "number",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in range(len(DRAWN))],
)
def test_runs(number: int, vocabulary: Path, tmp_path: Path) -> None:
    drawn = DRAWN[number]
    print(drawn)
    print(check(drawn, inputs(tmp_path, vocabulary, drawn), tmp_path / "run"))
