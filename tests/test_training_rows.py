"""Rows of training: each sample once, the same for all ranks and workers, resumed exactly."""

import json
import pickle
from collections import Counter
from collections.abc import Mapping
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from benchmarks.packing import sizes as mixed_sizes
from torchtune_vl.data import Draws, PackedRows, PaddedRows, Plan, Planner, Row, Size, TrainingRows
from torchtune_vl.data._data_workers import loading


def sample(number: int, size: Size) -> dict[str, Any]:
    """A sample whose tokens all are its number."""
    made: dict[str, Any] = {
        "tokens": [number] * size.tokens,
        "labels": [-100] * (size.tokens - size.targets) + [number] * size.targets,
        "input_pos": torch.zeros(size.tokens, 3, dtype=torch.int64),
    }
    if size.patches:
        vision = {
            "patches": torch.full((size.patches, 3), float(number)),
            "grid_thw": torch.tensor([[1, 1, size.patches]]),
        }
        made["encoder_input"] = {"vision": vision}
    return made


_directories = TemporaryDirectory(prefix="plans-")
_numbers = count()


def new_directory() -> Path:
    return Path(_directories.name, str(next(_numbers)))


class Samples:
    def __init__(self, sizes: list[Size]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(index, self.sizes[index])

    def measure(self, index: int) -> tuple[int, int, int]:
        return tuple(self.sizes[index])


def training_rows(
    dataset: Any, planner: Planner, *, sizes: np.ndarray | None = None, **settings: Any
) -> TrainingRows:
    """The rows of a plan of these settings."""
    names = ("rank", "world_size", "skips_bad")
    own = {name: settings.pop(name) for name in names if name in settings}
    if sizes is None:
        measured = [dataset.measure(index) for index in range(len(dataset))]
        sizes = np.array(measured, np.int32).reshape(-1, 3)
    settings = {"epochs": None if "max_steps" in settings else 1, **settings}
    return TrainingRows(
        dataset, planner, Plan.make(new_directory(), planner, sizes, **settings), **own
    )


def random_sizes(count: int, seed: int = 0) -> list[Size]:
    random = np.random.default_rng(seed)
    tokens = random.integers(2, 60, count).tolist()
    return [Size(n, 4 * (n // 2) * int(random.integers(2)), n // 2) for n in tokens]


def work_of(planner: Planner, row: Row) -> float:
    tokens, patches, _ = np.array(row.sizes).reshape(-1, 3).T
    return planner.work(tokens, patches)


SIZES = random_sizes(200)
PACKED = PackedRows(64, 120, lookahead=16)
PLANNERS = pytest.mark.parametrize("planner", [PACKED, PaddedRows(3)], ids=["packed", "padded"])
Steps = list[tuple[int, Any, Any]]


def steps_of(dataset: Any, planner: Planner, *, world_size: int = 1, **settings: Any) -> Steps:
    """Number, rows (as samples) without regard to ranks, and position of each step."""
    ranks = [
        list(training_rows(dataset, planner, rank=rank, world_size=world_size, **settings))
        for rank in range(world_size)
    ]
    steps: dict[int, list[Row]] = {}
    for row in (row for rows in ranks for row in rows):
        steps.setdefault(row.position["step"], []).append(row)
    for rows in steps.values():
        assert all(row.position == rows[0].position for row in rows)
    return [
        (step, sorted(row.samples for row in rows), rows[0].position)
        for step, rows in steps.items()
    ]


@PLANNERS
@pytest.mark.parametrize("rows_per_rank", [1, 2])
def test_each_sample_once_per_epoch_and_ranks_balanced(
    planner: Planner, rows_per_rank: int
) -> None:
    work = Counter[tuple[int, int]]()
    seen = Counter[tuple[int, int]]()
    counts = []
    for rank in range(3):
        rows = training_rows(
            Samples(SIZES),
            planner,
            rows_per_step=3 * rows_per_rank,
            rank=rank,
            world_size=3,
            epochs=2,
        )
        first = training_rows(Samples(SIZES), planner, rows_per_step=3 * rows_per_rank, epochs=1)
        counts.append(Counter(row.position["step"] for row in rows))
        for row in rows:
            epoch = int(row.position["step"] > first.plan.last_step)
            work[epoch, rank] += work_of(planner, row)
            seen.update((epoch, number) for number in row.samples)
            assert row.sizes == [SIZES[number] for number in row.samples]
    assert seen == Counter((epoch, number) for epoch in range(2) for number in range(200))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] == Counter(dict.fromkeys(range(1, rows.plan.last_step + 1), rows_per_rank))
    for epoch in range(2):
        loads = [work[epoch, rank] for rank in range(3)]
        assert max(loads) / min(loads) <= 1.1


def test_rows_hold_what_they_say() -> None:
    for row in training_rows(Samples(SIZES), PACKED, rows_per_step=1, epochs=1):
        expected = [number for number in row.samples for _ in range(SIZES[number].tokens)]
        assert row.batch["tokens"].tolist() == [expected]
        assert row.batch["mask"].lengths == tuple(size.tokens for size in row.sizes)
        vision = row.batch.get("encoder_input", {"vision": {"patches": ()}})["vision"]
        assert len(vision["patches"]) == sum(size.patches for size in row.sizes)
        assert len(row.batch["targets"]) == sum(size.targets for size in row.sizes)


@PLANNERS
def test_orders_depend_on_seed_and_epoch(planner: Planner) -> None:
    def order(**settings: Any) -> list[int]:
        rows = training_rows(Samples(SIZES), planner, rows_per_step=2, **settings)
        return [number for row in rows for number in row.samples]

    two = order(epochs=2)
    assert two[:200] == order(epochs=1)
    orders = [two[:200], two[200:], order(seed=1, epochs=1), order(shuffle=False, epochs=1)]
    assert len({tuple(numbers) for numbers in orders}) == 4
    assert all(sorted(numbers) == list(range(200)) for numbers in orders)


@PLANNERS
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(planner: Planner, workers: int) -> None:
    rows = training_rows(
        Samples(SIZES), planner, rows_per_step=4, rank=1, world_size=2, seed=3, epochs=2
    )
    expected = list(rows)
    received = list(DataLoader(rows, batch_size=None, num_workers=workers))
    assert [row[1:] for row in received] == [row[1:] for row in expected]
    for ours, theirs in zip(received, expected, strict=True):
        assert isinstance(ours, Row)
        assert ours.batch.keys() == theirs.batch.keys()
        assert torch.equal(ours.batch["tokens"], theirs.batch["tokens"])
        assert torch.equal(ours.batch["targets"], theirs.batch["targets"])


@PLANNERS
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_the_same_steps(planner: Planner, world_size: int) -> None:
    settings: dict[str, Any] = {"rows_per_step": 24, "epochs": 2}
    alone = steps_of(Samples(SIZES), planner, **settings)
    assert steps_of(Samples(SIZES), planner, world_size=world_size, **settings) == alone
    counts = Counter(number for _, rows, _ in alone for row in rows for number in row)
    assert counts == dict.fromkeys(range(200), 2)


def test_rows_of_a_rank_come_heaviest_first() -> None:
    rows = training_rows(Samples(SIZES), PACKED, rows_per_step=8, world_size=2, epochs=1)
    steps: dict[int, list[float]] = {}
    for row in rows:
        steps.setdefault(row.position["step"], []).append(work_of(PACKED, row))
    assert all(works == sorted(works, reverse=True) for works in steps.values())


def test_ranks_share_the_work_of_a_step() -> None:
    sizes = [Size(50, 0, 49), Size(20, 0, 19), Size(40, 0, 39), Size(30, 0, 29)]
    settings: dict[str, Any] = {"rows_per_step": 4, "world_size": 2, "epochs": 1}
    hands = [
        [
            row.sizes[0].tokens
            for row in training_rows(Samples(sizes), PaddedRows(1), rank=rank, **settings)
        ]
        for rank in range(2)
    ]
    assert sorted(hands) == [[40, 30], [50, 20]]


RUNS = st.fixed_dictionaries(
    {
        "sizes": st.builds(random_sizes, st.integers(1, 60), st.integers(0, 9)),
        "planner": st.one_of(
            st.builds(PackedRows, st.integers(60, 180), st.integers(120, 300), st.integers(1, 12)),
            st.builds(PaddedRows, st.integers(1, 4)),
        ),
        "seed": st.integers(0, 2**40),
        "at": st.integers(0, 60),
        "shuffle": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(RUNS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_resumed_runs_go_on_as_if_undisturbed(
    run: Mapping[str, Any], before: int, after: int
) -> None:
    sizes, planner = run["sizes"], run["planner"]
    dataset = Samples(sizes)
    common = {"rows_per_step": 4, "seed": run["seed"], "shuffle": run["shuffle"], "epochs": 2}
    whole = steps_of(dataset, planner, world_size=before, **common)
    done = whole[: run["at"] % len(whole) + 1]
    position = json.loads(json.dumps(done[-1][2]))
    rest = steps_of(dataset, planner, world_size=after, position=position, **common)
    assert rest == whole[len(done) :]
    assert [step for step, *_ in whole] == list(range(1, len(whole) + 1))
    seen = Counter(number for _, rows, _ in whole for row in rows for number in row)
    assert seen == Counter(dict.fromkeys(range(len(sizes)), 2))
    assert all(len(rows) == 4 for _, rows, _ in whole)


def correlations(dataset: Any, given: np.ndarray, planner: Planner, **settings: Any) -> np.ndarray:
    """Of a sample's step in an epoch with its tokens and its patches."""
    rows = training_rows(dataset, planner, rows_per_step=2, **settings)
    steps = np.empty(len(given))
    for step in range(1, rows.plan.last_step + 1):
        for row in rows.plan.rows(step):
            steps[row["sample"]] = step
    return np.array([np.corrcoef(steps, column)[0, 1] for column in given.T[:2]])


@pytest.mark.parametrize(("count", "repeats"), [(300, 40), (1000, 10), (10_000, 2)])
@pytest.mark.parametrize("patches_per_token", [4.0, 3.0])
def test_sizes_do_not_tell_the_place_in_an_epoch(
    count: int, repeats: int, patches_per_token: float
) -> None:
    given = np.array(mixed_sizes(count), np.int32)
    planner = PackedRows(16_384, int(patches_per_token * 16_384))
    found = [
        correlations(Planned(given), given, planner, seed=seed, sizes=given)
        for seed in range(repeats)
    ]
    assert np.abs(found).max() < 0.1
    assert np.abs(np.mean(found, axis=0)).max() < 0.03


@pytest.mark.parametrize(("count", "repeats"), [(300, 20), (1500, 10), (10_000, 2)])
def test_without_shuffling_neither(count: int, repeats: int) -> None:
    found = []
    for seed in range(repeats):
        given = mixed_sizes(count, seed)
        found.append(
            correlations(Samples(given), np.array(given), PackedRows(16_384), shuffle=False)
        )
    assert np.abs(np.mean(found, axis=0)).max() < 0.1


class Planned(Samples):
    """Of which only the sizes count."""

    def __init__(self, sizes: np.ndarray) -> None:
        self.sizes = sizes


BUDGETS = st.one_of(
    st.builds(PackedRows, st.integers(60, 180), st.integers(120, 300), st.integers(1, 12)),
    st.builds(PaddedRows, st.integers(1, 4)),
)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.lists(st.tuples(BUDGETS, st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=4),
    st.booleans(),
)
def test_a_run_goes_on_with_other_settings(
    count: int, parts: list[tuple[Planner, int, int]], shuffle: bool
) -> None:
    sizes = random_sizes(count)
    dataset = Samples(sizes)
    seen: list[int] = []
    position: dict[str, Any] | None = None
    step = 0
    for planner, rows_per_step, steps in parts:
        if position and position["epoch"]:
            break
        rows = training_rows(
            dataset,
            planner,
            rows_per_step=rows_per_step,
            shuffle=shuffle,
            epochs=1,
            position=position,
        )
        last = rows.plan.last_step
        taken = list(islice(rows, steps * rows_per_step))
        for row in taken:
            seen += row.samples
            assert sum(size.tokens for size in row.sizes) <= getattr(planner, "max_tokens", 10**9)
        assert max(len(row.samples) for row in taken) <= getattr(planner, "batch_size", 10**9)
        position = json.loads(json.dumps(taken[-1].position))
        step = min(step + steps, last)
        assert position["step"] == step
        assert (position["epoch"] == 1) == (step == last)
    if position and not position["epoch"]:
        rest = list(
            training_rows(
                dataset,
                PACKED,
                rows_per_step=2,
                shuffle=shuffle,
                epochs=1,
                position=position,
            )
        )
        seen += [number for row in rest for number in row.samples]
    assert sorted(seen) == list(range(count))


def test_the_last_step_divides_rows_and_then_adds_empty_ones() -> None:
    sizes = [Size(10, 0, 9), Size(20, 0, 19), Size(30, 0, 29)]
    (step,) = steps_of(Samples(sizes), PACKED, rows_per_step=2, epochs=1, shuffle=False)
    assert step[1] == [[0, 1], [2]]
    (step,) = steps_of(Samples(sizes), PACKED, rows_per_step=4, epochs=1, shuffle=False)
    assert step[1] == [[], [0], [1], [2]]
    rows = training_rows(Samples(sizes), PACKED, rows_per_step=4, epochs=1)
    *_, empty = rows
    assert empty.sizes == []
    assert empty.batch["tokens"].tolist() == [[0]]
    assert empty.batch["targets"].shape == (0,)


def test_the_epoch_of_the_last_step_is_planned_whole() -> None:
    rows = training_rows(Samples(SIZES[:5]), PACKED, rows_per_step=1, max_steps=50)
    assert rows.plan.last_step >= 50
    *_, last = rows
    assert last.position["epoch"] > 10
    assert not last.position["has_begun"]


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"4 ranks cannot share the 6 rows.*a multiple of 4"):
        list(training_rows(Samples(SIZES), PACKED, rows_per_step=6, world_size=4))
    for shuffle in (True, False):
        with pytest.raises(ValueError, match="the dataset has no samples"):
            training_rows(Samples([]), PACKED, rows_per_step=6, shuffle=shuffle)
    with pytest.raises(ValueError, match="give epochs or max_steps"):
        training_rows(Samples(SIZES), PACKED, rows_per_step=6, epochs=None)


def test_a_position_behind_the_last_epoch_is_refused() -> None:
    rows = list(training_rows(Samples(SIZES), PACKED, rows_per_step=2, epochs=2))
    position = rows[-3].position
    with pytest.raises(ValueError, match="in epoch 2, but was told to end after 1: set epochs"):
        training_rows(Samples(SIZES), PACKED, rows_per_step=2, epochs=1, position=position)
    end = training_rows(
        Samples(SIZES), PACKED, rows_per_step=2, epochs=2, position=rows[-1].position
    )
    assert end.plan.last_step == rows[-1].position["step"]
    assert list(end) == []


def test_all_ranks_know_which_steps_have_media() -> None:
    sizes = [Size(30, 8 if number in (3, 4, 17) else 0, 15) for number in range(20)]
    settings: dict[str, Any] = {"rows_per_step": 2, "world_size": 2, "shuffle": False, "epochs": 1}
    dataset = Samples(sizes)
    for rank in range(2):
        rows = training_rows(dataset, PaddedRows(1), rank=rank, **settings)
        assert [row.step_has_media for row in rows] == [step in (1, 2, 8) for step in range(10)]
        assert [row.position["had_media"] for row in rows] == [step >= 1 for step in range(10)]
        assert rows.plan.has_media(2)
        assert not rows.plan.has_media(1)
    position = list(rows)[2].position
    assert training_rows(dataset, PaddedRows(1), position=position, **settings).plan.has_media(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0, this one has 1"),
        ({"shuffle": False}, "shuffle True, this one has False"),
        ({"dataset": Samples(SIZES[:-1])}, "samples 200, this one has 199"),
    ],
)
def test_positions_of_other_runs_are_refused(change: dict[str, Any], message: str) -> None:
    run: dict[str, Any] = {"dataset": Samples(SIZES), "planner": PACKED, "rows_per_step": 2}
    position = next(iter(training_rows(**run))).position
    with pytest.raises(ValueError, match=message):
        training_rows(**{**run, **change}, position=position)


def test_a_sample_too_large_is_refused_at_once_if_sizes_are_known() -> None:
    sizes = [*SIZES, Size(65, 0, 64)]
    message = r"sample 200: it has 65 tokens.*raise max_tokens"
    with pytest.raises(ValueError, match=message):
        training_rows(Samples(sizes), PACKED, rows_per_step=1, sizes=np.array(sizes))
    with pytest.raises(ValueError, match=message):
        list(training_rows(Samples(sizes), PACKED, rows_per_step=1, epochs=1))


def test_a_sample_without_targets_is_refused() -> None:
    sizes = [*SIZES[:3], Size(9, 0, 0)]
    message = r"sample 3: it has no supervised token"
    with pytest.raises(ValueError, match=message):
        training_rows(Samples(sizes), PaddedRows(1), rows_per_step=1, sizes=np.array(sizes))


class Unreadable(Samples):
    def __getitem__(self, index: int) -> dict[str, Any]:
        raise OSError("no such file: cat.jpg")


class Changed(Samples):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(index, Size(9, 4, 8))


class Unsupervised(Samples):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(index, self.sizes[index]._replace(targets=0))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Unreadable, "sample 0: OSError: no such file: cat.jpg"),
        (
            Changed,
            r"sample 0 has 9 tokens, 4 patches and 8 supervised.*had 9 tokens, 8",
        ),
        (Unsupervised, "8 patches and 0 supervised.*8 patches and 8 supervised"),
    ],
)
def test_errors_name_the_sample(dataset: type[Samples], message: str, workers: int) -> None:
    rows = training_rows(dataset([Size(9, 8, 8)]), PACKED, rows_per_step=1)
    with (
        pytest.raises(ValueError, match=message),
        loading(rows, workers, batch_size=None) as loaded,
    ):
        next(loaded)


class Partly(Samples):
    """Of which some samples cannot be made."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index % 10 == 3:
            raise OSError(f"{index}.jpg is truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("planner", [PACKED, PaddedRows(1)], ids=["packed", "padded"])
def test_bad_samples_leave_their_place_empty(planner: Planner, workers: int) -> None:
    rows = training_rows(Partly(SIZES), planner, rows_per_step=2, skips_bad=True)
    whole = list(training_rows(Samples(SIZES), planner, rows_per_step=2))
    loaded = DataLoader(rows, batch_size=None, num_workers=workers)
    for row, of_all in zip(loaded, whole, strict=True):
        assert row.samples == [number for number in of_all.samples if number % 10 != 3]
        left_out = [number for number in of_all.samples if number % 10 == 3]
        reasons = [f"sample {n}: OSError: {n}.jpg is truncated" for n in left_out]
        assert [tuple(bad) for bad in row.bad] == [*zip(left_out, reasons, strict=True)]
        assert row.sizes == [SIZES[number] for number in row.samples]
        assert len(row.batch["targets"]) == sum(size.targets for size in row.sizes)
        assert row.position == of_all.position


def test_samples_of_no_tokens_are_not_drawn() -> None:
    sizes = np.array(SIZES, np.int32)
    sizes[[0, 7, 199]] = 0
    rows = training_rows(Samples(SIZES), PACKED, rows_per_step=2, sizes=sizes, epochs=2)
    seen = Counter(number for row in rows for number in row.samples)
    assert seen == Counter(dict.fromkeys({*range(200)} - {0, 7, 199}, 2))


def test_the_plan_is_as_another_process_reads_it() -> None:
    plan = training_rows(Samples(SIZES), PACKED, rows_per_step=2, epochs=2).plan
    again = pickle.loads(pickle.dumps(plan))
    assert vars(again) == {"directory": plan.directory}
    for step in range(1, plan.last_step + 1):
        assert again.position(step) == plan.position(step)
        for ours, theirs in zip(again.rows(step), plan.rows(step), strict=True):
            assert ours.tolist() == theirs.tolist()
            assert [(n, *SIZES[n]) for n in ours["sample"]] == ours.tolist()


def test_a_plan_that_others_do_not_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plan.json.*not there: set output_dir to one that all"):
        Plan(tmp_path).wait(seconds=0.1)
    training_rows(Samples(SIZES), PACKED, rows_per_step=2).plan.wait(seconds=0)


@pytest.mark.parametrize("shuffle", [True, False])
def test_mixtures_keep_their_shares(shuffle: bool) -> None:
    """Over an epoch to the sample, over a run each sample of a source equally often."""
    lengths, repeats, epochs = [30, 50, 120], [2.5, 1.0, 0.3], 7
    draws = Draws(lengths, repeats)
    settings = {"draws": draws, "epochs": epochs, "shuffle": shuffle, "rows_per_step": 1}
    rows = training_rows(Samples(SIZES), PaddedRows(1), **settings)
    counts = np.zeros((epochs, 200), int)
    for row in rows:
        (number,) = row.samples
        source = int(number >= 30) + (number >= 80)
        assert row.sources == [source]
        counts[row.position["epoch"] - (not row.position["has_begun"]), number] += 1
    for part, repeat in zip(np.split(counts, [30, 80], axis=1), repeats, strict=True):
        assert np.abs(part.sum(axis=1) - repeat * part.shape[1]).max() <= 0.5
        assert part.sum(axis=0).max() - part.sum(axis=0).min() <= 1
    if shuffle:  # the sources lie anywhere in an epoch
        first = [row.sources[0] for row in rows if not row.position["epoch"]]
        places = [np.mean([i for i, s in enumerate(first) if s == source]) for source in range(3)]
        assert np.ptp(places) / len(first) < 0.3
