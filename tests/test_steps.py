"""Which saved steps a run has, and keeps."""

from pathlib import Path

from torchtune_vl.training._steps import Steps


def save(steps: Steps, number: int, best: int | None) -> None:
    steps.begin(number, {"step": number})
    steps.finish(number, best)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "steps", keep_last=2)
    assert steps.newest() is None
    for number in (2, 4, 9, 10, 100):
        save(steps, number, best=4 if number > 2 else None)
    assert names(tmp_path / "steps") == {"step_4", "step_10", "step_100"}
    newest = steps.newest()
    assert newest is not None
    assert steps.progress(newest) == {"step": 100}
    save(steps, 101, best=101)
    assert names(tmp_path / "steps") == {"step_100", "step_101"}


def test_what_a_crash_left_does_not_count_and_goes(tmp_path: Path) -> None:
    steps = Steps(tmp_path, keep_last=1)
    save(steps, 3, best=None)
    steps.begin(5, {"step": 5})
    (tmp_path / "step_1.old").mkdir()
    assert steps.newest() == tmp_path / "step_3"
    steps.tidy()
    assert names(tmp_path) == {"step_3"}
