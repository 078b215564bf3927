"""Attention within the segments of a packed sequence."""

# Shape suffixes: N rows of the packed sequence, G segments of equal length, L rows of a segment,
# H heads of queries, K heads of keys and values, D dimension of a head

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from torchtune_vl.modules.layout import Segments

# Whether its heads of keys and values may be shared by several of queries: not in early releases
_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return permute_rows(grad, inverse, order), None, None


def permute_rows(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return ``x[order]`` for a permutation [N] and its inverse, with a gather for its gradient.

    The gradient of plain indexing adds row after row, since rows may repeat in general.
    """
    return _PermuteRows.apply(x, order, inverse)


@torch.compiler.disable  # its loop depends on the data: traced, it would recompile for each batch
def attend_within_segments(
    q_NHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    segments: Segments,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention in which each row sees the rows of its own segment.

    If it is causal, only itself and those before it. Time and memory grow with the sum of squared
    segment lengths; no mask is built. In half precision on CUDA it is one variable-length kernel,
    elsewhere one call of ``scaled_dot_product_attention`` for each length that occurs. Keys and
    values may have fewer heads than queries, which then share them. Returns [N, H, D].
    """
    if q_NHD.is_cuda and q_NHD.dtype in (torch.float16, torch.bfloat16):
        return _attend_by_one_kernel(q_NHD, k_NKD, v_NKD, segments, is_causal)
    runs, order = segments.by_length
    rows: tuple[torch.Tensor, ...] = (q_NHD, k_NKD, v_NKD)
    if order is not None:
        rows = tuple(permute_rows(x, *order) for x in rows)
    groups = [x.split([length * count for length, count in runs]) for x in rows]
    attended = [
        _attend_within_equal_segments(q, k, v, length, is_causal)
        for (length, _), q, k, v in zip(runs, *groups, strict=True)
    ]
    out_NHD = torch.cat(attended) if len(attended) > 1 else attended[0]
    return out_NHD if order is None else permute_rows(out_NHD, *reversed(order))


def _attend_by_one_kernel(
    q_NHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    segments: Segments,
    is_causal: bool,
) -> torch.Tensor:
    options: dict[str, Any] = {"window_size": (-1, 0)} if is_causal else {}
    groups = q_NHD.shape[1] // k_NKD.shape[1]
    if groups > 1 and _SHARES_HEADS:
        options["enable_gqa"] = True
    elif groups > 1:
        k_NKD, v_NKD = (x.repeat_interleave(groups, dim=1) for x in (k_NKD, v_NKD))
    ends, longest = segments.boundaries, max(segments.lengths)
    out = varlen_attn(q_NHD, k_NKD, v_NKD, ends, ends, longest, longest, **options)
    return cast(torch.Tensor, out)  # a pair only where the log-sum-exp is asked for


def _attend_within_equal_segments(
    q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, length: int, is_causal: bool
) -> torch.Tensor:
    q_GHLD, k_GKLD, v_GKLD = (
        x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD)
    )
    out_GHLD = F.scaled_dot_product_attention(
        q_GHLD, k_GKLD, v_GKLD, is_causal=is_causal, enable_gqa=True
    )
    return out_GHLD.transpose(1, 2).flatten(0, 1)
