"""Attention within segments, against attention with a mask."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtune_vl.modules import (
    Segments,
    attend_within_segments,
    concatenate_window_indices,
    permute_rows,
    segment_index,
    window_encoder_index,
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12).map(sorted))
def test_equals_attention_with_a_mask(lengths: list[int]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, sum(lengths), 2, 8, dtype=torch.float64).requires_grad_().unbind(0)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = segment[:, None] == segment
    masked = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask
    ).transpose(0, 1)
    ours = attend_within_segments(q, k, v, Segments(**segment_index(torch.tensor(lengths))))
    torch.testing.assert_close(ours, masked)

    weight = torch.randn_like(ours)
    expected = torch.autograd.grad((masked * weight).sum(), (q, k, v))
    actual = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    torch.testing.assert_close(actual, expected)


def test_segments_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 12, 2, 8).unbind(0)
    segments = Segments(**segment_index(torch.tensor([2, 2, 4, 4])))
    before = attend_within_segments(q, k, v, segments)
    k[2:4], v[2:4] = 100.0, -100.0
    after = attend_within_segments(q, k, v, segments)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False] * 2 + [True] * 2 + [False] * 8


def test_segment_index() -> None:
    index = segment_index(torch.tensor([2, 2, 3]))
    assert {length: starts.tolist() for length, starts in index["starts"].items()} == {
        2: [0, 2],
        3: [4],
    }


def test_permute_rows_has_the_gradient_of_indexing() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(7)
    assert torch.equal(permute_rows(x, order, order.argsort()), x[order])
    assert torch.autograd.gradcheck(lambda x: permute_rows(x, order, order.argsort()), x)


def test_window_indices_are_joined_with_offsets() -> None:
    def index(order: list[int], lengths: list[int]) -> dict[str, torch.Tensor]:
        return {
            "window_order": torch.tensor(order),
            "unit_positions": torch.zeros(len(order), 2, dtype=torch.int32),
            "window_lengths": torch.tensor(lengths),
            "frame_lengths": torch.tensor([sum(lengths)]),
            "patches": torch.zeros(3),  # as in a sample: not part of the index
        }

    joined = concatenate_window_indices(
        [index([1, 0], [8]), index([0], [4]), index([2, 1, 0], [12])]
    )
    assert joined["window_order"].tolist() == [1, 0, 2, 5, 4, 3]
    assert set(joined) == {"window_order", "unit_positions", "window_lengths", "frame_lengths"}


def test_window_encoder_index() -> None:
    """Two frames of 3 and 2 units of 4 rows, whose windows have 2 and 1, and 1 and 1 units."""
    index = {
        "window_order": torch.tensor([0, 2, 1, 4, 3]),
        "unit_positions": torch.arange(10, dtype=torch.int32).view(5, 2),
        "window_lengths": torch.tensor([8, 4, 4, 4]),
        "frame_lengths": torch.tensor([12, 8]),
    }
    batch = window_encoder_index(index)
    assert batch["window_order"].tolist() == [1, 4, 3, 0, 2]
    assert batch["unit_positions"][:, 0].tolist() == [4, 6, 8, 0, 2]
    windows = {n: starts.tolist() for n, starts in batch["window_segments"]["starts"].items()}
    assert windows == {4: [0, 4, 8], 8: [12]}
    frames = {n: starts.tolist() for n, starts in batch["frame_segments"]["starts"].items()}
    assert frames == {8: [0], 12: [8]}
    # The second frame, the shorter one, has units 3 and 4; the first 0, 1 and 2
    assert batch["window_order"][batch["frame_order"]].tolist() == [3, 4, 0, 1, 2]


@pytest.mark.parametrize("length", [1, 64])
def test_one_length_only(length: int) -> None:
    q, k, v = torch.randn(3, 2 * length, 1, 4).unbind(0)
    segments = Segments(**segment_index(torch.tensor([length, length])))
    assert attend_within_segments(q, k, v, segments).shape == q.shape
