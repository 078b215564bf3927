"""Rows of streams: each rank and worker reads its own part, and a run goes on where it stopped."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_training_rows import random_sizes, sample
from torchtune_vl.data import PackedRows, PaddedRows, Planner, Size, StreamedRows
from torchtune_vl.data._data_workers import loading

PACKED = PackedRows(64, 120, lookahead=16)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
PLANNERS = pytest.mark.parametrize("planner", [PACKED, PaddedRows(3)], ids=["packed", "padded"])


@dataclass
class Numbers:
    """A stream whose raw samples are pairs of number and size; all that is read is counted."""

    sizes: list[Size]
    read: Counter[int]
    first: int = 0
    every: int = 1
    skipped: int = 0
    augments: bool = False

    def part(self, number: int, of: int) -> "Numbers":
        return replace(self, first=number, every=of)

    def skip(self, count: int) -> "Numbers":
        return replace(self, skipped=self.skipped + count)

    def raw(self) -> Iterator[tuple[int, Size]]:
        start = self.first + self.skipped * self.every
        for pair in islice(enumerate(self.sizes), start, None, self.every):
            self.read[pair[0]] += 1
            yield pair

    def measure_raw(self, raw: tuple[int, Size]) -> tuple[int, ...]:
        return tuple(raw[1])

    def make_raw(self, raw: tuple[int, Size], epoch: int) -> dict[str, Any]:
        return sample(*raw)


def stream(count: int = 400, seed: int = 0) -> Numbers:
    return Numbers(random_sizes(count, seed), Counter())


def steps_of(
    streams: list[Any], planner: Planner, steps: int, *, world_size: int = 1, **given: Any
) -> tuple[list[list[Any]], dict[str, Any]]:
    """The samples of the rows of each step, rank by rank, and the position after them."""
    rows_per_rank = given["rows_per_step"] // world_size
    states: list[dict[int, Any]] = []
    found: list[list[Any]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        rows = StreamedRows(streams, planner, rank=rank, world_size=world_size, **given)
        workers = given.get("num_workers", 0)
        states.append({})
        with loading(rows, workers, batch_size=None) as loaded:
            for number, row in enumerate(islice(loaded, steps * rows_per_rank)):
                found[number // rows_per_rank].append([*zip(row.sources, row.samples, strict=True)])
                states[-1][row.position["lane"]] = row.position["state"]
    start = (given.get("position") or {"step": 0})["step"]
    position = rows.position_after(start + steps, True, states)
    return found, json.loads(json.dumps(position))


@PLANNERS
def test_each_sample_once_in_each_pass(planner: Planner) -> None:
    found, position = steps_of([stream()], planner, 300, rows_per_step=2, num_workers=0)
    seen = Counter(number for step in found for row in step for _, number in row)
    assert {*seen} == {*range(400)}
    passes = position["epoch"]
    assert passes >= 2
    # Some of a later pass are read, and some wait
    assert min(seen.values()) >= passes - 1
    assert max(seen.values()) <= min(seen.values()) + 2


def test_what_is_only_read_was_not_gone_through() -> None:
    """A run that looks far ahead in a small stream would name its export after a later pass."""
    planner = replace(PACKED, lookahead=400)
    for steps in (1, 10, 40):
        found, position = steps_of([stream(40)], planner, steps, rows_per_step=2)
        seen = Counter(number for step in found for row in step for _, number in row)
        assert position["epoch"] == min(seen[number] for number in range(40))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_nobody_reads_the_part_of_another(world_size: int, workers: int) -> None:
    lanes: dict[int, set[int]] = {}
    for rank in range(world_size):
        settings = {"rows_per_step": 4, "rank": rank, "world_size": world_size}
        rows = StreamedRows([stream()], PACKED, num_workers=workers, **settings)
        with loading(rows, workers, batch_size=None) as loaded:
            for number, row in enumerate(islice(loaded, 120)):
                maker = rank * max(workers, 1) + number % max(workers, 1)
                lanes.setdefault(row.position["lane"], set()).add(maker)
    assert all(len(makers) == 1 for makers in lanes.values())
    # And in one process: what is read is what its lanes have
    one = stream()
    rows = StreamedRows([one], PACKED, rows_per_step=4, rank=1, world_size=2)
    list(islice(rows, 40))
    assert {number % 4 for number in one.read} == {2, 3}


@settings(max_examples=12, deadline=None)
@given(
    st.integers(30, 120),
    st.sampled_from([PACKED, PaddedRows(2)]),
    st.integers(0, 2**40),
    st.integers(1, 30),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
)
def test_resumed_runs_go_on_as_if_undisturbed(
    count: int, planner: Planner, seed: int, at: int, before: int, after: int, sources: int
) -> None:
    streams = [stream(count + 7 * i, i) for i in range(sources)]
    common: dict[str, Any] = {
        "rows_per_step": 4,
        "seed": seed,
        "weights": [1.0, 2.0, 0.5][:sources],
    }
    whole, end = steps_of(streams, planner, 40, world_size=before, **common)
    first, position = steps_of(streams, planner, at, world_size=before, **common)
    rest, end_of_rest = steps_of(
        streams, planner, 40 - at, world_size=after, position=position, **common
    )
    order = [sorted(map(str, step)) for step in whole]
    assert [sorted(map(str, step)) for step in first + rest] == order
    assert end_of_rest == end


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_and_their_number_change_no_row(workers: int) -> None:
    common: dict[str, Any] = {"rows_per_step": 4, "world_size": 2, "seed": 3}
    _, start = steps_of([stream()], PACKED, 1, num_workers=2, **common)
    assert len(start["lanes"]) == 4
    alone, end = steps_of([stream()], PACKED, 20, num_workers=0, position=start, **common)
    shared, same_end = steps_of(
        [stream()], PACKED, 20, num_workers=workers, position=start, **common
    )
    assert shared == alone
    assert same_end == end


@pytest.mark.parametrize("planner", [PackedRows(90, 200, lookahead=8), PaddedRows(2)])
def test_with_other_rows_no_sample_is_lost(planner: Planner) -> None:
    first, position = steps_of([stream()], PACKED, 5, rows_per_step=4)
    rest, _ = steps_of([stream()], planner, 70, rows_per_step=6, position=position)
    seen = Counter(number for step in first + rest for row in step for _, number in row)
    assert {*seen} == {*range(400)}
    early = Counter(number for step in first + rest[:20] for row in step for _, number in row)
    assert max(early.values()) == 1
    for row in (row for step in rest for row in step):
        assert sum(stream().sizes[number].tokens for _, number in row) <= 90 or len(row) == 2


def test_streams_are_drawn_from_by_their_weights() -> None:
    streams = [stream(50, 1), stream(500, 2), stream(90, 3)]
    given: dict[str, Any] = {"rows_per_step": 2, "weights": [5.0, 3.0, 2.0]}
    found, _ = steps_of(streams, PaddedRows(25), 400, **given)
    drawn = Counter(source for step in found for row in step for source, _ in row)
    assert sum(drawn.values()) == 20_000
    for source, share in enumerate([0.5, 0.3, 0.2]):
        assert abs(drawn[source] / 20_000 - share) < 0.015
    of_first = Counter(n for step in found for row in step for s, n in row if s == 0)
    assert max(of_first.values()) - min(of_first.values()) <= 3  # it has turned often


class Failing(Numbers):
    """Of which some samples cannot be measured and some cannot be made."""

    def measure_raw(self, raw: tuple[int, Size]) -> tuple[int, ...]:
        if raw[0] % 10 == 1:
            raise KeyError("messages")
        return super().measure_raw(raw)

    def make_raw(self, raw: tuple[int, Size], epoch: int) -> dict[str, Any]:
        if raw[0] % 10 == 2:
            raise OSError("truncated")
        return super().make_raw(raw, epoch)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_told(workers: int) -> None:
    failing = Failing(random_sizes(100), Counter())
    rows = StreamedRows([failing], PACKED, rows_per_step=2, num_workers=2, skips_bad=True)
    bad, seen = dict[int, str](), set[int]()
    with loading(rows, workers, batch_size=None) as loaded:
        for row in islice(loaded, 120):
            bad |= dict(map(tuple, row.bad))
            seen |= {*row.samples}
    assert {*bad} == {n for n in range(100) if n % 10 in (1, 2)}
    assert all(bad[n] == f"sample {n}: KeyError: 'messages'" for n in range(1, 100, 10))
    assert all(bad[n] == f"sample {n}: OSError: truncated" for n in range(2, 100, 10))
    assert seen == {*range(100)} - {*bad}
    with pytest.raises(ValueError, match="sample 1: KeyError: 'messages'"):
        next(iter(StreamedRows([failing], PACKED, rows_per_step=1)))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 ranks cannot share the 6 rows.*a multiple of 4"):
        StreamedRows([stream()], PACKED, rows_per_step=6, world_size=4)
    with pytest.raises(ValueError, match="a part of a stream has no samples: lower num_workers"):
        list(islice(StreamedRows([stream(3)], PACKED, rows_per_step=4), 4))
    _, position = steps_of([stream()], PACKED, 3, rows_per_step=2)
    with pytest.raises(ValueError, match="a run with seed 0, this one has 1"):
        StreamedRows([stream()], PACKED, rows_per_step=2, seed=1, position=position)
    with pytest.raises(ValueError, match="the stream ends before sample"):
        next(iter(StreamedRows([stream(9)], PACKED, rows_per_step=2, position=position)))
    too_large = Numbers([Size(10, 0, 9)] * 5 + [Size(65, 0, 64)], Counter())
    with pytest.raises(ValueError, match=r"sample 5: it has 65 tokens.*raise max_tokens"):
        next(iter(StreamedRows([too_large], PACKED, rows_per_step=1)))
    hopeless = Numbers([Size(65, 0, 64)] * 5, Counter())
    with pytest.raises(ValueError, match="no sample can be trained on: sample"):
        next(iter(StreamedRows([hopeless], PACKED, rows_per_step=1, skips_bad=True)))


def test_sizes_do_not_tell_the_place() -> None:
    found = []
    for seed in range(10):
        one = stream(3000, seed)
        rows = StreamedRows([one], PackedRows(640), rows_per_step=2, seed=seed)
        steps, tokens = [], []
        for row in islice(rows, 120):
            steps += [row.position["step"]] * len(row.samples)
            tokens += [size.tokens for size in row.sizes]
        found.append(np.corrcoef(steps, tokens)[0, 1])
    assert abs(np.mean(found)) < 0.1
