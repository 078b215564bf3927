"""Rows of training: each sample once, the same for all ranks and workers, resumed exactly."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from benchmarks.packing import sizes as mixed_sizes
from torchtune_vl.data import PackedRows, PaddedRows, Planner, Row, Size, TrainingRows


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


class Samples:
    def __init__(self, sizes: list[Size]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(index, self.sizes[index])

    def measure(self, index: int) -> tuple[int, int, int]:
        return tuple(self.sizes[index])


class Stream:
    """Raw samples are pairs of number and size."""

    def __init__(self, sizes: list[Size]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[tuple[int, Size]]:
        yield from enumerate(self.sizes)

    def measure(self, raw: tuple[int, Size]) -> tuple[int, int, int]:
        return tuple(raw[1])

    def transform(self, raw: tuple[int, Size]) -> dict[str, Any]:
        return sample(*raw)


class SkippingStream(Stream):
    skipped = 0

    def skip(self, count: int) -> Iterator[tuple[int, Size]]:
        self.skipped = count
        return islice(iter(self), count, None)


def random_sizes(count: int, seed: int = 0) -> list[Size]:
    random = np.random.default_rng(seed)
    tokens = random.integers(2, 60, count).tolist()
    return [Size(n, 4 * (n // 2) * int(random.integers(2)), n // 2) for n in tokens]


SIZES = random_sizes(200)
PACKED = PackedRows(64, 120, lookahead=16)
PLANNERS = pytest.mark.parametrize("planner", [PACKED, PaddedRows(3)], ids=["packed", "padded"])
Steps = list[tuple[int, Any, Any]]


def steps_of(dataset: Any, planner: Planner, *, world_size: int = 1, **settings: Any) -> Steps:
    """Number, rows (as samples) without regard to ranks, and position of each step."""
    ranks = [
        list(TrainingRows(dataset, planner, rank=rank, world_size=world_size, **settings))
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
        rows = TrainingRows(
            Samples(SIZES),
            planner,
            rows_per_step=3 * rows_per_rank,
            rank=rank,
            world_size=3,
            epochs=2,
        )
        first = TrainingRows(Samples(SIZES), planner, rows_per_step=3 * rows_per_rank, epochs=1)
        counts.append(Counter(row.position["step"] for row in rows))
        for row in rows:
            epoch = int(row.position["step"] > first.last_step())
            work[epoch, rank] += planner.work(row.sizes)
            seen.update((epoch, number) for number in row.samples)
            assert row.sizes == [SIZES[number] for number in row.samples]
    assert seen == Counter((epoch, number) for epoch in range(2) for number in range(200))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] == Counter(dict.fromkeys(range(1, rows.last_step() + 1), rows_per_rank))
    for epoch in range(2):
        loads = [work[epoch, rank] for rank in range(3)]
        assert max(loads) / min(loads) <= 1.1


def test_rows_hold_what_they_say() -> None:
    for row in TrainingRows(Samples(SIZES), PACKED, rows_per_step=1, epochs=1):
        expected = [number for number in row.samples for _ in range(SIZES[number].tokens)]
        assert row.batch["tokens"].tolist() == [expected]
        assert row.batch["mask"].lengths == tuple(size.tokens for size in row.sizes)
        vision = row.batch.get("encoder_input", {"vision": {"patches": ()}})["vision"]
        assert len(vision["patches"]) == sum(size.patches for size in row.sizes)
        assert len(row.batch["targets"]) == sum(size.targets for size in row.sizes)


@PLANNERS
def test_orders_depend_on_seed_and_epoch(planner: Planner) -> None:
    def order(**settings: Any) -> list[int]:
        rows = TrainingRows(Samples(SIZES), planner, rows_per_step=2, **settings)
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
    rows = TrainingRows(
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
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_steps(planner: Planner, world_size: int) -> None:
    settings: dict[str, Any] = {"rows_per_step": 4, "epochs": 2}
    alone = steps_of(Samples(SIZES), planner, **settings)
    assert steps_of(Samples(SIZES), planner, world_size=world_size, **settings) == alone


def test_rows_of_a_rank_come_heaviest_first() -> None:
    rows = TrainingRows(Samples(SIZES), PACKED, rows_per_step=8, world_size=2, epochs=1)
    steps: dict[int, list[float]] = {}
    for row in rows:
        steps.setdefault(row.position["step"], []).append(PACKED.work(row.sizes))
    assert all(works == sorted(works, reverse=True) for works in steps.values())


def test_ranks_share_the_work_of_a_step() -> None:
    sizes = [Size(50, 0, 49), Size(20, 0, 19), Size(40, 0, 39), Size(30, 0, 29)]
    settings: dict[str, Any] = {"rows_per_step": 4, "world_size": 2, "epochs": 1}
    hands = [
        [
            row.sizes[0].tokens
            for row in TrainingRows(Samples(sizes), PaddedRows(1), rank=rank, **settings)
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
        "kind": st.sampled_from(["map", "measured", "stream", "skipping stream"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(RUNS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_resumed_runs_go_on_as_if_undisturbed(
    run: Mapping[str, Any], before: int, after: int
) -> None:
    sizes, planner = run["sizes"], run["planner"]
    is_stream = "stream" in run["kind"]
    dataset = {"stream": Stream, "skipping stream": SkippingStream}.get(run["kind"], Samples)(sizes)
    common: dict[str, Any] = {
        "rows_per_step": 4,
        "seed": run["seed"],
        "shuffle": not is_stream,
        "epochs": 2,
        "sizes": np.array(sizes, np.int32) if run["kind"] == "measured" else None,
    }
    whole = steps_of(dataset, planner, world_size=before, **common)
    done = whole[: run["at"] % len(whole) + 1]
    position = json.loads(json.dumps(done[-1][2]))
    rest = steps_of(dataset, planner, world_size=after, position=position, **common)
    assert rest == whole[len(done) :]
    assert [step for step, *_ in whole] == list(range(1, len(whole) + 1))
    seen = Counter(number for _, rows, _ in whole for row in rows for number in row)
    assert seen == Counter(dict.fromkeys(range(len(sizes)), 2))
    assert all(len(rows) == 4 for _, rows, _ in whole)


@pytest.mark.parametrize("planner", [PackedRows(64, 120), PaddedRows(3)], ids=["packed", "padded"])
@pytest.mark.parametrize("stream", [Stream, SkippingStream])
def test_a_stream_gives_what_a_dataset_unshuffled_gives(planner: Planner, stream: Any) -> None:
    common: dict[str, Any] = {"rows_per_step": 2, "shuffle": False, "epochs": 2}
    expected = TrainingRows(Samples(SIZES), planner, **common)
    rows = TrainingRows(stream(SIZES), planner, **common)
    assert rows.last_step() == expected.last_step()
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours[1:3] == theirs[1:3]
        assert torch.equal(ours.batch["tokens"], theirs.batch["tokens"])


def test_a_stream_skips_to_the_oldest_sample_not_used() -> None:
    stream = SkippingStream(SIZES)
    common: dict[str, Any] = {"rows_per_step": 2, "shuffle": False, "epochs": 1}
    position = list(TrainingRows(stream, PACKED, **common))[40].position
    next(iter(TrainingRows(stream, PACKED, position=position, **common)))
    assert stream.skipped == min(chain(position["waiting"], *position["rows"]))
    assert stream.skipped > 0


def correlations(dataset: Any, given: np.ndarray, planner: Planner, **settings: Any) -> np.ndarray:
    """Of a sample's step in an epoch with its tokens and its patches."""
    rows = TrainingRows(dataset, planner, rows_per_step=2, epochs=1, **settings)
    steps = np.empty(len(given))
    for step in rows._steps():
        for row in step.rows:
            steps[[sample.number for sample in row]] = step.position["step"]
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


@pytest.mark.parametrize("kind", ["dataset", "stream"])
@pytest.mark.parametrize(("count", "repeats"), [(300, 20), (1500, 10), (10_000, 2)])
def test_without_shuffling_neither(count: int, repeats: int, kind: str) -> None:
    found = []
    for seed in range(repeats):
        given = mixed_sizes(count, seed)
        dataset: Any = Stream(given) if kind == "stream" else Samples(given)
        found.append(correlations(dataset, np.array(given), PackedRows(16_384), shuffle=False))
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
    st.sampled_from(["shuffled", "in order", "stream"]),
)
def test_a_run_goes_on_with_other_settings(
    count: int, parts: list[tuple[Planner, int, int]], kind: str
) -> None:
    sizes = random_sizes(count)
    dataset: Any = Stream(sizes) if kind == "stream" else Samples(sizes)
    seen: list[int] = []
    position: dict[str, Any] | None = None
    step = 0
    for planner, rows_per_step, steps in parts:
        if position and position["epoch"]:
            break
        rows = TrainingRows(
            dataset,
            planner,
            rows_per_step=rows_per_step,
            shuffle=kind == "shuffled",
            epochs=1,
            position=position,
        )
        last = rows.last_step()
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
            TrainingRows(
                dataset,
                PACKED,
                rows_per_step=2,
                shuffle=kind == "shuffled",
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
    rows = TrainingRows(Samples(sizes), PACKED, rows_per_step=4, epochs=1)
    *_, empty = rows
    assert empty.sizes == []
    assert empty.batch["tokens"].tolist() == [[0]]
    assert empty.batch["targets"].shape == (0,)


def test_without_epochs_there_is_no_end() -> None:
    rows = TrainingRows(Samples(SIZES[:5]), PACKED, rows_per_step=1)
    assert list(islice(rows, 50))[-1].position["epoch"] > 10
    with pytest.raises(ValueError, match="epochs is None"):
        rows.last_step()


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"4 ranks cannot share the 6 rows.*a multiple of 4"):
        TrainingRows(Samples(SIZES), PACKED, rows_per_step=6, world_size=4)
    with pytest.raises(ValueError, match="set shuffle to False"):
        TrainingRows(Stream(SIZES), PACKED, rows_per_step=6)
    for dataset, shuffle in ((Samples([]), True), (Samples([]), False), (Stream([]), False)):
        with pytest.raises(ValueError, match="the dataset has no samples"):
            next(iter(TrainingRows(dataset, PACKED, rows_per_step=6, shuffle=shuffle)))
    settings: dict[str, Any] = {"rows_per_step": 1, "shuffle": False}
    position = next(iter(TrainingRows(Stream(SIZES), PACKED, **settings))).position
    with pytest.raises(ValueError, match="the dataset ends before sample 3"):
        next(iter(TrainingRows(Stream(SIZES[:3]), PACKED, position=position, **settings)))


def test_a_position_behind_the_last_epoch_is_refused() -> None:
    rows = list(TrainingRows(Samples(SIZES), PACKED, rows_per_step=2, epochs=2))
    position = rows[-3].position
    with pytest.raises(ValueError, match="in epoch 2, but was told to end after 1: set epochs"):
        TrainingRows(Samples(SIZES), PACKED, rows_per_step=2, epochs=1, position=position)
    end = TrainingRows(
        Samples(SIZES), PACKED, rows_per_step=2, epochs=2, position=rows[-1].position
    )
    assert end.last_step() == rows[-1].position["step"]
    assert list(end) == []


@pytest.mark.parametrize("stream", [False, True])
def test_all_ranks_know_which_steps_have_media(stream: bool) -> None:
    sizes = [Size(30, 8 if number in (3, 4, 17) else 0, 15) for number in range(20)]
    settings: dict[str, Any] = {"rows_per_step": 2, "world_size": 2, "shuffle": False, "epochs": 1}
    dataset = Stream(sizes) if stream else Samples(sizes)
    for rank in range(2):
        rows = TrainingRows(dataset, PaddedRows(1), rank=rank, **settings)
        assert [row.step_has_media for row in rows] == [step in (1, 2, 8) for step in range(10)]
        assert [row.position["had_media"] for row in rows] == [step >= 1 for step in range(10)]
        assert rows.has_media(2)
        assert not rows.has_media(1)
    position = list(rows)[2].position
    assert TrainingRows(dataset, PaddedRows(1), position=position, **settings).has_media(0)


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
    position = next(iter(TrainingRows(**run))).position
    with pytest.raises(ValueError, match=message):
        TrainingRows(**{**run, **change}, position=position)


def test_a_sample_too_large_is_refused_at_once_if_sizes_are_known() -> None:
    sizes = [*SIZES, Size(65, 0, 64)]
    message = r"sample 200: it has 65 tokens.*raise max_tokens"
    with pytest.raises(ValueError, match=message):
        TrainingRows(Samples(sizes), PACKED, rows_per_step=1, sizes=np.array(sizes))
    with pytest.raises(ValueError, match=message):
        list(TrainingRows(Samples(sizes), PACKED, rows_per_step=1, epochs=1))


def test_a_sample_without_targets_is_refused() -> None:
    sizes = [*SIZES[:3], Size(9, 0, 0)]
    message = r"sample 3: it has no supervised token"
    with pytest.raises(ValueError, match=message):
        TrainingRows(Samples(sizes), PaddedRows(1), rows_per_step=1, sizes=np.array(sizes))
    with pytest.raises(ValueError, match=message):
        list(TrainingRows(Stream(sizes), PACKED, rows_per_step=1, shuffle=False, epochs=1))


class Unreadable(Samples):
    def __getitem__(self, index: int) -> dict[str, Any]:
        raise OSError("no such file: cat.jpg")


class Unmeasurable(Samples):
    def measure(self, index: int) -> tuple[int, int, int]:
        raise ValueError("it has no messages")


class Changed(Samples):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(index, Size(9, 4, 8))


class Unsupervised(Samples):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(index, self.sizes[index]._replace(targets=0))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Unreadable, ValueError, "sample 0: OSError: no such file: cat.jpg"),
        (Unmeasurable, ValueError, "sample 0: it has no messages"),
        (
            Changed,
            ValueError,
            r"sample 0 has 9 tokens, 4 patches and 8 supervised.*had 9 tokens, 8",
        ),
        (Unsupervised, ValueError, "8 patches and 0 supervised.*8 patches and 8 supervised"),
    ],
)
def test_errors_name_the_sample(
    dataset: type[Samples], error: type[Exception], message: str, workers: int
) -> None:
    rows = TrainingRows(dataset([Size(9, 8, 8)]), PACKED, rows_per_step=1)
    with pytest.raises(error, match=message):
        next(iter(DataLoader(rows, batch_size=None, num_workers=workers)))
