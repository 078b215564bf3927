"""Attention within the segments of a packed sequence.

Shape suffixes: N rows of the packed sequence, G segments of equal length, L rows of a segment,
H heads, D dimension of a head.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]
    _CAUSAL: dict[str, Any] = {}
else:
    # The argument has another name in torch 2.10
    _is_window = "window_size" in inspect.signature(varlen_attn).parameters
    _CAUSAL = {"window_size": (-1, 0)} if _is_window else {"is_causal": True}


class Segments:
    """The segments of a sequence.

    An object, since torch.compile would look into a dict, and compile anew for each batch.

    Args:
        starts: from each length that occurs to the first rows of the segments that have it, int32.
    """

    def __init__(self, starts: Mapping[int, torch.Tensor]) -> None:
        self.starts = starts


class Documents:
    """The documents of a packed row: what stands in for its attention mask.

    Lengths are known to the host, so that nothing waits for the device to tell them. An object for
    the reason that :class:`Segments` is one.

    Args:
        lengths: tokens of each document, in order.
        boundaries: where they start, and the end of the last, int32 [documents + 1].
    """

    def __init__(self, lengths: Sequence[int], boundaries: torch.Tensor) -> None:
        self.lengths = lengths
        self.boundaries = boundaries

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Documents":
        """Describe documents that lie end to end.

        Args:
            lengths: tokens of each.

        Returns:
            The description, on the CPU.
        """
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return cls(tuple(lengths), ends.to(torch.int32))

    def to(self, device: torch.device, non_blocking: bool = False) -> "Documents":
        """Return them with boundaries on a device, as :meth:`torch.Tensor.to` does."""
        return Documents(self.lengths, self.boundaries.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Documents":
        """Return them with boundaries in pinned memory, as data loaders ask for."""
        return Documents(self.lengths, self.boundaries.pin_memory())


def segment_index(lengths: torch.Tensor) -> dict[str, Any]:
    """Describe the segments of a sequence by tensors that hold no size the host would wait for.

    Args:
        lengths: rows of each segment, ascending, int64 [number of segments], on the CPU.

    Returns:
        ``starts``, from each length that occurs to the first rows of the segments that have it,
        int32 [G]. The length is a key and G a shape: both stay known to the host when the tensors
        move to another device.
    """
    starts = (lengths.cumsum(0) - lengths).to(torch.int32)
    values, counts = lengths.unique_consecutive(return_counts=True)
    return {"starts": dict(zip(values.tolist(), starts.split(counts.tolist()), strict=True))}


def concatenate_window_indices(indices: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Join the indices of media, or of samples, that a windowed vision encoder sees as one batch.

    Args:
        indices: one or more dicts of ``window_order``, int64 [units]; ``unit_positions``,
            [units, 2]; ``window_lengths``, int64 [windows]; and ``frame_lengths``, int64 [frames].
            Other keys are ignored.

    Returns:
        A dict of these keys for all units together.
    """
    sizes = torch.tensor([0] + [len(index["window_order"]) for index in indices[:-1]])
    orders = [
        index["window_order"] + first_unit
        for index, first_unit in zip(indices, sizes.cumsum(0), strict=True)
    ]
    other_keys = ("unit_positions", "window_lengths", "frame_lengths")
    return {
        "window_order": torch.cat(orders),
        **{key: torch.cat([index[key] for index in indices]) for key in other_keys},
    }


def window_encoder_index(index: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Turn the lengths of an index into segments: what a windowed vision encoder takes.

    Windows are sorted by length, so that those of one length are one slice of the sequence, and
    frames, which the encoder attends over in few layers, likewise in an order of their own.

    Args:
        index: from :func:`concatenate_window_indices`.

    Returns:
        ``window_order``, int32 [units], and ``unit_positions`` in this order; ``frame_order``,
        int32 [units], from places in the window order to the order of frames; and
        ``window_segments`` and ``frame_segments``, each from :func:`segment_index`.
    """
    unit_rows = int(index["frame_lengths"].sum()) // len(index["window_order"])
    windows = _units_by_length(index["window_lengths"] // unit_rows)
    window_order = index["window_order"][windows]
    frames = _units_by_length(index["frame_lengths"] // unit_rows)
    return {
        "window_order": window_order.to(torch.int32),
        "unit_positions": index["unit_positions"][windows],
        "frame_order": window_order.argsort()[frames].to(torch.int32),
        "window_segments": segment_index(index["window_lengths"].sort().values),
        "frame_segments": segment_index(index["frame_lengths"].sort().values),
    }


def _units_by_length(lengths: torch.Tensor) -> torch.Tensor:
    """The permutation of units that sorts their segments by length, int64 [units]."""
    ordered, by_length = lengths.sort(stable=True)
    starts = lengths.cumsum(0) - lengths
    shift = starts[by_length] - (ordered.cumsum(0) - ordered)
    return shift.repeat_interleave(ordered) + torch.arange(int(lengths.sum()))


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
    """Return ``x[order]`` for a permutation, with a gather for its gradient too.

    The gradient of plain indexing adds row after row, since rows may repeat in general.

    Args:
        x: tensor of shape [N, ...].
        order: permutation of the N rows, int64 [N].
        inverse: the inverse permutation, int64 [N].

    Returns:
        Tensor of the shape of ``x``.
    """
    return _PermuteRows.apply(x, order, inverse)


@torch.compiler.disable  # its loop depends on the data: traced, it would recompile for each batch
def attend_within_segments(
    q_NHD: torch.Tensor, k_NHD: torch.Tensor, v_NHD: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Scaled dot-product attention in which each row sees the rows of its own segment.

    Time and memory grow with the sum of squared segment lengths; no mask is built. In half
    precision on CUDA it is one variable-length kernel (torch >= 2.10), elsewhere one call of
    ``scaled_dot_product_attention`` for each length that occurs.

    Args:
        q_NHD: queries [N, H, D].
        k_NHD: keys [N, H, D].
        v_NHD: values [N, H, D].
        segments: the segments of the N rows, ordered by length.

    Returns:
        Tensor of shape [N, H, D].
    """
    starts = segments.starts
    half_precision = q_NHD.dtype in (torch.float16, torch.bfloat16)
    if varlen_attn is not None and q_NHD.is_cuda and half_precision:
        cu_seqlens = F.pad(torch.cat(list(starts.values())), (0, 1), value=len(q_NHD))
        longest = max(starts)
        out = varlen_attn(q_NHD, k_NHD, v_NHD, cu_seqlens, cu_seqlens, longest, longest)
        return cast(torch.Tensor, out)  # a pair only where the log-sum-exp is asked for

    sizes = [length * len(first) for length, first in starts.items()]
    groups = [x.split(sizes) for x in (q_NHD, k_NHD, v_NHD)]
    attended = [
        _attend_within_equal_segments(q, k, v, length)
        for length, q, k, v in zip(starts, *groups, strict=True)
    ]
    return torch.cat(attended) if len(attended) > 1 else attended[0]


@torch.compiler.disable  # likewise
def attend_within_documents(
    q_NHD: torch.Tensor, k_NHD: torch.Tensor, v_NHD: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """Causal scaled dot-product attention in which each token sees its own document only.

    In half precision on CUDA it is one variable-length kernel (torch >= 2.10), elsewhere one call
    of ``scaled_dot_product_attention`` for each document, so that no document's numbers depend on
    another.

    Args:
        q_NHD: queries [N, H, D].
        k_NHD: keys [N, H, D].
        v_NHD: values [N, H, D].
        documents: the documents of the N tokens.

    Returns:
        Tensor of shape [N, H, D].
    """
    half_precision = q_NHD.dtype in (torch.float16, torch.bfloat16)
    if varlen_attn is not None and q_NHD.is_cuda and half_precision:
        ends, longest = documents.boundaries, max(documents.lengths)
        out = varlen_attn(q_NHD, k_NHD, v_NHD, ends, ends, longest, longest, **_CAUSAL)
        return cast(torch.Tensor, out)
    # As batches of one: without a batch there is no fused kernel
    q, k, v = (
        x.transpose(0, 1)[None].split(documents.lengths, dim=2) for x in (q_NHD, k_NHD, v_NHD)
    )
    attended = [
        F.scaled_dot_product_attention(*document, is_causal=True)
        for document in zip(q, k, v, strict=True)
    ]
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


def _attend_within_equal_segments(
    q_NHD: torch.Tensor, k_NHD: torch.Tensor, v_NHD: torch.Tensor, length: int
) -> torch.Tensor:
    q_GHLD, k_GHLD, v_GHLD = (
        x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_NHD, k_NHD, v_NHD)
    )
    out_GHLD = F.scaled_dot_product_attention(q_GHLD, k_GHLD, v_GHLD)
    return out_GHLD.transpose(1, 2).flatten(0, 1)
