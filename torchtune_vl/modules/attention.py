"""Attention within the segments of a packed sequence, and rotary position embeddings."""

# Shape suffixes: N rows of the packed sequence, M rows that are looked at where they are others, G
# segments of equal length, L rows of a segment, H heads of queries, K heads of keys and values, D
# dimension of a head

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from torchtune_vl.modules.layout import Segments

# Whether its heads of keys and values may be shared by several of queries: not in early releases
_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def inverse_frequencies(dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Return the frequencies of rotary embeddings of a dimension, float32 [dim/2].

    Computed in each forward: a buffer would lose its precision in ``model.to(torch.bfloat16)``.
    """
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def angles_by_sections(
    positions: torch.Tensor, frequencies: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return angles, float32 [..., D/2], of positions [..., axes] that turn frequencies each.

    Of several axes (M-RoPE, arXiv 2409.12191, section 2.1), side by side, as transformers'
    ``Qwen2VLRotaryEmbedding`` and ``VisionRotaryEmbedding`` have them.
    """
    axes = zip(positions.unbind(-1), frequencies, strict=True)
    return torch.cat([position[..., None].float() * part for position, part in axes], dim=-1)


def angles_in_turns(
    positions: torch.Tensor, frequencies: torch.Tensor, sections: Sequence[int]
) -> torch.Tensor:
    """Return angles, float32 [..., D/2], of positions [..., axes] that turn frequencies in turns.

    The first axis has those that are left (interleaved M-RoPE, arXiv 2511.21631, section 2;
    transformers' ``Qwen3VLTextRotaryEmbedding``).
    """
    first, *others = (position[..., None].float() for position in positions.unbind(-1))
    angles, axes = first * frequencies, len(sections)
    for axis, position in enumerate(others, 1):
        own = slice(axis, axes * sections[axis], axes)
        angles[..., own] = position * frequencies[own]
    return angles


def rotary_table(angles: torch.Tensor) -> torch.Tensor:
    """Make cosines and sines, float32 [..., 2, D], of angles [..., D/2], for all layers.

    Rotary embeddings (RoFormer, arXiv 2104.09864). The sines of the first half are negative, as
    :func:`rotate` takes them.
    """
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos, -sin, sin], dim=-1).unflatten(-1, (2, -1))


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of heads [..., H, D] by its angle, in float32.

    The pairing of transformers' ``rotate_half``, in as few passes as there are: in a step of
    decoding each takes as long as its call does. Returns the dtype of ``x``.
    """
    cos, sin = table.unsqueeze(-3).unbind(-2)
    x_float = x.float()
    swapped = x_float.roll(x.shape[-1] // 2, dims=-1)
    return (x_float * cos).add_(swapped.mul_(sin)).to(x.dtype)


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        order, back = ctx.saved_tensors
        return permute_rows(grad, back, order), None, None


# Of rows, a permutation of them and its inverse: x[order], but its gradient gathers too, where that
# of indexing adds row after row, since rows may repeat in general
permute_rows: Callable[..., torch.Tensor] = _PermuteRows.apply


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
    if _has_kernel(q_NHD):
        return _by_kernel(q_NHD, k_NKD, v_NKD, segments, segments, is_causal)
    runs, order = segments.by_length
    rows: tuple[torch.Tensor, ...] = (q_NHD, k_NKD, v_NKD)
    if order is not None:
        rows = tuple(permute_rows(x, *order) for x in rows)
    of_lengths = [x.split([length * count for length, count in runs]) for x in rows]
    attended = []
    for (length, _), *qkv in zip(runs, *of_lengths, strict=True):
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in qkv)  # [G, H, L, D]
        out_GHLD = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        attended.append(out_GHLD.transpose(1, 2).flatten(0, 1))
    joined_NHD = torch.cat(attended) if len(attended) > 1 else attended[0]
    return joined_NHD if order is None else permute_rows(joined_NHD, *reversed(order))


def attend_to_ends(
    q_NHD: torch.Tensor,
    k_MKD: torch.Tensor,
    v_MKD: torch.Tensor,
    queries: Segments,
    keys: Segments,
) -> torch.Tensor:
    """Causal attention of segments of queries, each of which is the end of one of keys.

    Otherwise as :func:`attend_within_segments`. Returns [N, H, D].
    """
    if _has_kernel(q_NHD):
        return _by_kernel(q_NHD, k_MKD, v_MKD, queries, keys, True)
    pieces = (q_NHD.split(queries.lengths), *(x.split(keys.lengths) for x in (k_MKD, v_MKD)))
    attended = []
    for piece in zip(*pieces, strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in piece)
        mask = causal_lower_right(q.shape[2], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        attended.append(out[0].transpose(0, 1))
    return torch.cat(attended)


def use_flash_attention(name: str, device: torch.device) -> None:
    """Let attention on a GPU be by an implementation of FlashAttention that is installed.

    That is ``FA3`` (arXiv 2407.08608) or ``FA4``, by which this process replaces torch's own. They
    have to give gradients of queries that share keys, with heads as wide as the decoder's and the
    encoder's: a ``ValueError`` says why one cannot.
    """
    remedy = "install what it asks for, or set flash_attention=null"
    try:
        activate_flash_attention_impl(name)
        for width, is_causal in ((128, True), (80, False)):
            ends = torch.tensor([0, 8], dtype=torch.int32, device=device)
            options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
            q, k, v = (torch.ones(8, n, width, **options).requires_grad_() for n in (4, 2, 2))
            out = attend_within_segments(q, k, v, Segments((8,), ends), is_causal=is_causal)
            out.sum().backward()
    except (ImportError, RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"flash_attention={name} is not to be had ({error}): {remedy}") from error


def _has_kernel(q_NHD: torch.Tensor) -> bool:
    """Whether there is a kernel for segments of any length: on the meta device as on CUDA."""
    is_half = q_NHD.dtype in (torch.float16, torch.bfloat16)
    is_ours = q_NHD.is_cuda and is_half and _runs_flash_attention(q_NHD.device)
    return is_ours or q_NHD.is_meta


@lru_cache
def _runs_flash_attention(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _by_kernel(
    q_NHD: torch.Tensor,
    k_MKD: torch.Tensor,
    v_MKD: torch.Tensor,
    queries: Segments,
    keys: Segments,
    is_causal: bool,
) -> torch.Tensor:
    longest = (max(queries.lengths), max(keys.lengths))
    # Where segments have fewer queries than keys, both are taken to end together. A window of all
    # is none to FlashAttention; without it torch 2.14 takes cuDNN on Hopper, which builds its graph
    # anew for each geometry
    window = (-1, 0) if is_causal else (max(longest), max(longest))
    options: dict[str, Any] = {"window_size": window}
    groups = q_NHD.shape[1] // k_MKD.shape[1]
    if groups > 1 and _SHARES_HEADS:
        options["enable_gqa"] = True
    elif groups > 1:
        k_MKD, v_MKD = (x.repeat_interleave(groups, dim=1) for x in (k_MKD, v_MKD))
    ends = (queries.boundaries, keys.boundaries)
    # A pair only where the log-sum-exp is asked for
    return cast(torch.Tensor, varlen_attn(q_NHD, k_MKD, v_MKD, *ends, *longest, **options))
