"""Attention within segments, against attention with a mask."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from torchtune_vl.models.qwen2_5_vl import GEOMETRY
from torchtune_vl.modules import (
    Segments,
    attention,
    encoder_index,
    join_vision_indices,
    vision_index,
)
from torchtune_vl.modules.attention import (
    attend_within_segments,
    permute_rows,
    use_flash_attention,
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_equals_attention_with_a_mask(lengths: list[int]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, sum(lengths), 2, 8, dtype=torch.float64).requires_grad_().unbind(0)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = segment[:, None] == segment
    masked = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask
    ).transpose(0, 1)
    ours = attend_within_segments(q, k, v, Segments.of(lengths))
    torch.testing.assert_close(ours, masked)

    weight = torch.randn_like(ours)
    expected = torch.autograd.grad((masked * weight).sum(), (q, k, v))
    actual = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    torch.testing.assert_close(actual, expected)


def test_an_implementation_of_flash_attention_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"FA3 is not to be had \(No module.*install what it asks"):
        use_flash_attention("FA3", cpu)
    tried: list[tuple[int, bool]] = []

    def fail(q: torch.Tensor, *others: Any, is_causal: bool) -> torch.Tensor:
        tried.append((q.shape[-1], is_causal))
        if not is_causal:
            raise RuntimeError("FA3 requires compute capability 9.0")
        return q

    monkeypatch.setattr(attention, "activate_flash_attention_impl", lambda name: None)
    use_flash_attention("FA3", cpu)
    monkeypatch.setattr(attention, "attend_within_segments", fail)
    with pytest.raises(ValueError, match=r"\(FA3 requires compute.*flash_attention=null"):
        use_flash_attention("FA3", cpu)
    assert tried == [(128, True), (80, False)]


def test_segments_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 12, 2, 8).unbind(0)
    segments = Segments.of([2, 2, 4, 4])
    before = attend_within_segments(q, k, v, segments)
    k[2:4], v[2:4] = 100.0, -100.0
    after = attend_within_segments(q, k, v, segments)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False] * 2 + [True] * 2 + [False] * 8


def test_permute_rows_has_the_gradient_of_indexing() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(7)
    assert torch.equal(permute_rows(x, order, order.argsort()), x[order])
    assert torch.autograd.gradcheck(lambda x: permute_rows(x, order, order.argsort()), x)


def test_indices_are_joined_with_offsets() -> None:
    def index(order: list[int], lengths: list[int]) -> dict[str, torch.Tensor]:
        return {
            "unit_order": torch.tensor(order),
            "unit_positions": torch.zeros(len(order), 2, dtype=torch.int32),
            "window_lengths": torch.tensor(lengths),
            "frame_lengths": torch.tensor([sum(lengths)]),
            "patches": torch.zeros(3),  # as in a sample: not part of the index
        }

    joined = join_vision_indices([index([1, 0], [8]), index([0], [4]), index([2, 1, 0], [12])])
    assert joined["unit_order"].tolist() == [1, 0, 2, 5, 4, 3]
    assert set(joined) == {"unit_order", "unit_positions", "window_lengths", "frame_lengths"}


def test_encoder_index() -> None:
    """Two frames of 5 x 3 units, whose windows have 4 x 3 and 1 x 3 of them."""
    index = vision_index(torch.tensor([[2, 10, 6]]), GEOMETRY)
    batch = encoder_index(index)
    assert batch["unit_order"].tolist() == [*range(30)]
    assert batch["unit_positions"].tolist() == 2 * [[y, x] for y in range(5) for x in range(3)]
    (windows,), (frames,) = batch["windows"].items(), batch["frames"].items()
    assert (windows[0], windows[1].tolist()) == ((48, 12, 48, 12), [0, 48, 60, 108, 120])
    assert (frames[0], frames[1].tolist()) == ((60, 60), [0, 60, 120])
    assert frames[1].dtype == torch.int32
    # 5 x 5: the window of the right edge comes before the second row of windows
    order = vision_index(torch.tensor([[1, 10, 10]]), GEOMETRY)["unit_order"].tolist()
    assert order[16:25] == [4, 9, 14, 19, 20, 21, 22, 23, 24]


def test_without_windows_frames_are_windows() -> None:
    index = vision_index(torch.tensor([[2, 10, 6]]), replace(GEOMETRY, window_size=None))
    assert index["unit_order"].tolist() == [*range(30)]
    assert index["window_lengths"].tolist() == index["frame_lengths"].tolist() == [60, 60]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.booleans())
def test_heads_are_shared(lengths: list[int], is_causal: bool) -> None:
    """Six heads of queries share two of keys and values, and the kernel sees two."""
    torch.manual_seed(0)
    n = sum(lengths)
    q = torch.randn(n, 6, 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, n, 2, 8, dtype=torch.float64).requires_grad_().unbind(0)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = segment[:, None] == segment
    if is_causal:
        mask = mask.tril()
    repeated = (x.repeat_interleave(3, dim=1) for x in (k, v))
    masked = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, *repeated)), attn_mask=mask
    ).transpose(0, 1)
    with Kernels() as kernels:
        ours = attend_within_segments(q, k, v, Segments.of(lengths), is_causal=is_causal)
    torch.testing.assert_close(ours, masked)
    assert kernels.heads == {(6, 2, 2)}
    weight = torch.randn_like(ours)
    expected = torch.autograd.grad((masked * weight).sum(), (q, k, v))
    actual = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    torch.testing.assert_close(actual, expected)


class Kernels(TorchDispatchMode):
    """Notes the heads of queries, keys and values that attention kernels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_scaled_dot_product" in func.__name__ and "backward" not in func.__name__:
            self.heads.add(tuple(x.shape[1] for x in args[:3]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [1, 64])
def test_one_length_only(length: int) -> None:
    q, k, v = torch.randn(3, 2 * length, 1, 4).unbind(0)
    segments = Segments.of([length, length])
    assert attend_within_segments(q, k, v, segments).shape == q.shape
