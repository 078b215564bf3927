"""Planners: which samples make a row."""

import json
import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import sizes
from torchtune_vl.data import PackedRows, PaddedRows, Planner, Size
from torchtune_vl.data._packing import planner_of, settings_of


def rows_of(planner: Planner, given: list[Size]) -> list[list[int]]:
    """All rows, as lists of places in the given sizes."""
    sizes = np.array(given, np.int32)
    order, ends = planner.plan(sizes, np.arange(len(sizes), dtype=np.int32))
    assert sorted(order) == [*range(len(sizes))]
    return [row.tolist() for row in np.split(order, ends[:-1])]


SIZES = st.lists(
    st.builds(Size, st.integers(1, 100), st.integers(0, 200), st.just(1)), min_size=1, max_size=60
)


@settings(deadline=None)
@given(SIZES, st.integers(1, 20))
def test_packed_rows_keep_both_budgets_and_let_nobody_wait(
    given: list[Size], lookahead: int
) -> None:
    rows = rows_of(PackedRows(100, 200, lookahead), given)
    assert sorted(chain.from_iterable(rows)) == list(range(len(given)))
    left = list(range(len(given)))
    for row in rows:
        assert sum(given[place].tokens for place in row) <= 100
        assert sum(given[place].patches for place in row) <= 200
        assert row[0] == left[0]  # the oldest
        left = [place for place in left if place not in row]


def test_the_largest_that_fits_comes_next() -> None:
    waiting = [
        Size(40, 0, 1),
        Size(50, 9, 1),
        Size(30, 0, 1),
        Size(55, 0, 1),
        Size(10, 0, 1),
        Size(30, 1, 1),
    ]
    assert rows_of(PackedRows(100), waiting)[0] == [0, 3]
    assert rows_of(PackedRows(130), waiting)[0] == [0, 3, 2]
    assert rows_of(PackedRows(135), waiting)[0] == [0, 3, 2, 4]
    assert rows_of(PackedRows(95, max_patches=5), waiting)[0] == [0, 3]
    assert rows_of(PackedRows(94, max_patches=8), waiting)[0] == [0, 2, 4]
    assert rows_of(PackedRows(94, max_patches=9), waiting)[0] == [0, 1]


def test_rows_are_full() -> None:
    given = sizes(10_000)
    rows = rows_of(PackedRows(16_384, 4 * 16_384), given)
    assert sum(size.tokens for size in given) / len(rows) / 16_384 >= 0.99
    # Patches scarcer than tokens
    rows = rows_of(PackedRows(16_384, 3 * 16_384), given)
    assert sum(size.patches for size in given) / len(rows) / (3 * 16_384) >= 0.99


def test_a_sample_too_large_for_a_row_is_refused() -> None:
    planner = PackedRows(100, 200)
    planner.check(Size(100, 200, 1))
    with pytest.raises(ValueError, match=r"101 tokens.*max_tokens of 100: raise.*max_seq_len"):
        planner.check(Size(101, 0, 1))
    with pytest.raises(ValueError, match=r"201 patches.*max_patches of 200: raise.*max_pixels"):
        planner.check(Size(1, 201, 1))
    PackedRows(100).check(Size(1, 10**9, 1))


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_rows_count_by_whole_numbers_from_one(number: Any) -> None:
    rows: list[Any] = [PackedRows, PackedRows, PackedRows, PaddedRows]
    names = ["max_tokens", "max_patches", "lookahead", "batch_size"]
    for kind, name in zip(rows, names, strict=True):
        with pytest.raises(ValueError, match=rf"^{name} of rows must be .* from 1, not {number}"):
            kind(**{"max_tokens": 9} | {name: number} if kind is PackedRows else {name: number})


def test_padded_rows_take_samples_in_order() -> None:
    given = [Size(random.randrange(1, 100), 0, 1) for _ in range(8)]
    assert rows_of(PaddedRows(3), given) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_work() -> None:
    tokens, patches = np.array([10, 30]), np.array([0, 16])
    assert PackedRows(100).work(tokens, patches) == 10 + 30 + 16 / 8
    assert PaddedRows(2).work(tokens, patches) == 2 * 30 + 16 / 8
    assert PackedRows(100).work(tokens[:0], patches[:0]) == 0
    assert PaddedRows(2).work(tokens[:0], patches[:0]) == 0


@pytest.mark.parametrize("planner", [PackedRows(100, 200, 9), PackedRows(100), PaddedRows(3)])
def test_a_planner_can_be_made_of_its_description(planner: Planner) -> None:
    made = planner_of(**json.loads(json.dumps(settings_of(planner))))
    assert type(made) is type(planner)
    assert vars(made) == vars(planner)


def test_the_plan_of_a_planner_that_is_not_ours_cannot_be_made_again() -> None:
    class Mine(PaddedRows): ...

    with pytest.raises(ValueError, match=r"those of a Mine, .*the same settings of rows"):
        planner_of(**settings_of(Mine(3)))
