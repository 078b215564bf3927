"""Integer maths that depends on the shapes of media: done once, in the data workers."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from torchtune_vl.media import Geometry
from torchtune_vl.modules.segments import Segments

# Few shapes recur in a data set, and those of the largest image take half a megabyte
_SHAPES = 64


def mrope_positions(
    tokens: Sequence[int],
    grid_thw: torch.Tensor,
    intervals: Sequence[float],
    *,
    placeholder_ids: Sequence[int],
    merge_size: int,
) -> torch.Tensor:
    """Positions of M-RoPE: equal on all axes for text, temporal, height and width for media.

    What follows a medium begins at the largest position so far + 1, as "Qwen2-VL" (arXiv
    2409.12191, section 2.1) defines it. So transformers numbered until release 4.51, and so vLLM
    and SGLang do. transformers >= 5.3 goes on at half the larger side of the medium's grid, which
    is less behind a video of many seconds.

    Args:
        tokens: token ids, placeholders expanded, of length s.
        grid_thw: patches of each medium along time, height and width, int64 [k, 3], in the order
            of the media in ``tokens``.
        intervals: for each medium the temporal positions from a step of its grid to the next.
        placeholder_ids: ids of the tokens that stand for media.
        merge_size: patches along a side of what one token stands for.

    Returns:
        int64 [s, 3].

    Raises:
        ValueError: if the placeholders do not fit the grids.
    """
    grids = grid_thw.tolist()
    placeholders = sum(tokens.count(token_id) for token_id in placeholder_ids)
    expected = sum(t * h * w for t, h, w in grids) // merge_size**2
    if placeholders != expected:
        raise ValueError(
            f"the text has {placeholders} placeholder tokens of images and videos, "
            f"but its {len(grids)} media have {expected} embeddings"
        )
    positions = np.empty((len(tokens), 3), np.int64)
    end = position = 0
    for (t, h, w), interval in zip(grids, intervals, strict=True):
        start = next(i for i in range(end, len(tokens)) if tokens[i] in placeholder_ids)
        positions[end:start] = np.arange(position, position + start - end)[:, None]
        position += start - end
        grid = _grid_positions(t, h // merge_size, w // merge_size, interval)
        end = start + len(grid)
        positions[start:end] = grid + position
        position += int(grid[-1].max()) + 1
    positions[end:] = np.arange(position, position + len(tokens) - end)[:, None]
    return torch.from_numpy(positions)


@lru_cache(_SHAPES)
def _grid_positions(t: int, h: int, w: int, interval: float) -> np.ndarray:
    """M-RoPE positions of t x h x w units from 0, int64 [t * h * w, 3]; never to be changed."""
    positions = np.empty((t, h, w, 3), np.int64)
    # float32 and truncated, as transformers has it
    steps = (np.arange(t, dtype=np.float32) * np.float32(interval)).astype(np.int64)
    positions[..., 0] = steps[:, None, None]
    positions[..., 1] = np.arange(h)[:, None]
    positions[..., 2] = np.arange(w)
    return positions.reshape(-1, 3)


def vision_index(grid_thw: torch.Tensor, geometry: Geometry) -> dict[str, torch.Tensor]:
    """Order, positions and segments of media, which a vision encoder works by.

    A unit is the square of patches that becomes one embedding. Patches come unit by unit, so that
    windows are permutations of units. After transformers' ``get_vision_window_index`` and
    ``get_vision_position_ids``.

    Args:
        grid_thw: patches of each medium along time, height and width, int64 [k, 3], on the CPU.
        geometry: sizes of units and windows.

    Returns:
        ``unit_order``, int64 [units]: the units, window after window, where there are windows, or
        as they come; ``unit_positions``, int32 [units, 2]: row and column of each unit, in that
        order; ``window_lengths``, int64 [windows], and ``frame_lengths``, int64 [frames]: patches
        of each. Without windows the frames are the windows.
    """
    merge_size = geometry.merge_size
    indices = [
        _index_of_frames(t, h // merge_size, w // merge_size, geometry)
        for t, h, w in grid_thw.tolist()
    ]
    return indices[0] if len(indices) == 1 else join_vision_indices(indices)


def _index_of_frames(t: int, h: int, w: int, geometry: Geometry) -> dict[str, torch.Tensor]:
    """The index of one medium of t frames of h x w units."""
    order, positions, window_lengths = _index_of_frame(h, w, geometry)
    index = {
        "unit_order": (order + np.arange(t)[:, None] * (h * w)).ravel(),
        "unit_positions": np.concatenate([positions] * t),
        "window_lengths": np.concatenate([window_lengths] * t),
        "frame_lengths": np.full(t, h * w * geometry.merge_size**2),
    }
    return {name: torch.from_numpy(array) for name, array in index.items()}


@lru_cache(_SHAPES)
def _index_of_frame(
    h: int, w: int, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order, positions and window lengths of h x w units; to be copied, never changed."""
    rows, columns = np.indices((h, w)).reshape(2, -1)
    size = geometry.window_size or max(h, w)
    window = rows // size * -(-w // size) + columns // size
    order = window.argsort(kind="stable")
    positions = np.stack([rows, columns], axis=1)[order].astype(np.int32)
    return order, positions, np.bincount(window) * geometry.merge_size**2


def join_vision_indices(
    indices: Sequence[Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Join the indices of media, or of samples, that the encoder sees as one batch.

    Args:
        indices: one or more of :func:`vision_index`; other keys are ignored.

    Returns:
        One for all units together.
    """
    sizes = torch.tensor([0] + [len(index["unit_order"]) for index in indices[:-1]])
    orders = [
        index["unit_order"] + first_unit
        for index, first_unit in zip(indices, sizes.cumsum(0), strict=True)
    ]
    other_keys = ("unit_positions", "window_lengths", "frame_lengths")
    return {
        "unit_order": torch.cat(orders),
        **{key: torch.cat([index[key] for index in indices]) for key in other_keys},
    }


def encoder_index(index: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Turn lengths into segments: what a vision encoder takes.

    Args:
        index: from :func:`vision_index` or :func:`join_vision_indices`.

    Returns:
        ``unit_order``, int32 [units]; ``unit_positions``; ``windows`` and ``frames``, each a dict
        from the lengths of all segments to their boundaries, the two arguments of
        :class:`~torchtune_vl.modules.Segments`: a key stays known to the host when tensors move to
        another device, and torchtune's recipes take nothing but dicts and tensors.
    """
    windows, frames = (
        Segments.of(index[f"{kind}_lengths"].tolist()) for kind in ("window", "frame")
    )
    return {
        "unit_order": index["unit_order"].to(torch.int32),
        "unit_positions": index["unit_positions"],
        "windows": {windows.lengths: windows.boundaries},
        "frames": {frames.lengths: frames.boundaries},
    }
