"""Integer maths that depends on the shapes of media: done once, in the data workers."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from torchtune_vl.modules import concatenate_window_indices

# The data workers index by these and the model attends by them: all published checkpoints share
# them, and a model that had others would silently be wrong.
MERGE_SIZE = 2
WINDOW_UNITS = 4


def mrope_positions(
    tokens: Sequence[int],
    grid_thw: torch.Tensor,
    seconds_per_step: Sequence[float] = (),
    *,
    image_token_id: int = 151655,
    video_token_id: int = 151656,
    tokens_per_second: int = 2,
) -> torch.Tensor:
    """Positions of M-RoPE: equal on all axes for text, temporal, height and width for media.

    What follows a medium begins at the largest position so far + 1, as "Qwen2-VL" (arXiv
    2409.12191, section 2.1) defines it, and time goes by the clock, as "Qwen2.5-VL Technical
    Report" (arXiv 2502.13923, section 2.1.3) does. So transformers numbered until release 4.51, and
    so vLLM and SGLang do. transformers >= 5.3 goes on at half the larger side of the medium's grid,
    which is less behind a video of many seconds.

    Args:
        tokens: token ids, placeholders expanded, of length s.
        grid_thw: patches of each medium along time, height and width, int64 [k, 3], in the order
            of the media in ``tokens``.
        seconds_per_step: for each video, in order, the seconds between steps of its temporal grid.
        image_token_id: id of the placeholder of an image.
        video_token_id: id of the placeholder of a video.
        tokens_per_second: temporal positions per second of video, from the model's config.

    Returns:
        int64 [s, 3].

    Raises:
        ValueError: if the placeholders do not fit the grids.
    """
    grids = grid_thw.tolist()
    placeholders = tokens.count(image_token_id) + tokens.count(video_token_id)
    expected = sum(t * h * w for t, h, w in grids) // MERGE_SIZE**2
    if placeholders != expected:
        raise ValueError(
            f"the text has {placeholders} placeholder tokens of images and videos, "
            f"but its {len(grids)} media have {expected} embeddings"
        )
    media = (image_token_id, video_token_id)
    seconds = iter(seconds_per_step)
    positions = np.empty((len(tokens), 3), np.int64)
    end = position = 0
    for t, h, w in grids:
        start = next(i for i in range(end, len(tokens)) if tokens[i] in media)
        positions[end:start] = np.arange(position, position + start - end)[:, None]
        position += start - end
        interval = 1.0
        if tokens[start] == video_token_id:
            interval = tokens_per_second * _next_interval(seconds)
        grid = _grid_positions(t, h // MERGE_SIZE, w // MERGE_SIZE, interval)
        end = start + len(grid)
        positions[start:end] = grid + position
        position += int(grid[-1].max()) + 1
    positions[end:] = np.arange(position, position + len(tokens) - end)[:, None]
    return torch.from_numpy(positions)


def _next_interval(seconds: Iterator[float]) -> float:
    try:
        return next(seconds)
    except StopIteration:
        raise ValueError("seconds_per_step has fewer entries than there are videos") from None


def vision_index(grid_thw: torch.Tensor) -> dict[str, torch.Tensor]:
    """Window order and segment lengths of media, which the vision encoder works by.

    A unit is the square of 2 x 2 patches that becomes one embedding, a window one of 4 x 4 units.
    Patches come unit by unit, so that windows are permutations of units. After transformers'
    ``get_vision_window_index`` and ``get_vision_position_ids``.

    Args:
        grid_thw: patches of each medium along time, height and width, int64 [k, 3], on the CPU.

    Returns:
        ``window_order``, int64 [units]: the units, window after window;
        ``unit_positions``, int32 [units, 2]: row and column of each unit, in that order;
        ``window_lengths``, int64 [windows], and ``frame_lengths``, int64 [frames]: patches of each.
    """
    indices = [
        _index_of_frames(t, h // MERGE_SIZE, w // MERGE_SIZE) for t, h, w in grid_thw.tolist()
    ]
    return indices[0] if len(indices) == 1 else concatenate_window_indices(indices)


def _index_of_frames(t: int, h: int, w: int) -> dict[str, torch.Tensor]:
    """The index of one medium of t frames of h x w units."""
    order, positions, window_lengths = _index_of_frame(h, w)
    index = {
        "window_order": (order + np.arange(t)[:, None] * (h * w)).ravel(),
        "unit_positions": np.concatenate([positions] * t),
        "window_lengths": np.concatenate([window_lengths] * t),
        "frame_lengths": np.full(t, h * w * MERGE_SIZE**2),
    }
    return {name: torch.from_numpy(array) for name, array in index.items()}


# Few shapes recur in a data set, and those of the largest image take half a megabyte
_SHAPES = 64


@lru_cache(_SHAPES)
def _index_of_frame(h: int, w: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order, positions and window lengths of h x w units; to be copied, never changed."""
    rows, columns = np.indices((h, w)).reshape(2, -1)
    window = rows // WINDOW_UNITS * -(-w // WINDOW_UNITS) + columns // WINDOW_UNITS
    order = window.argsort(kind="stable")
    positions = np.stack([rows, columns], axis=1)[order].astype(np.int32)
    return order, positions, np.bincount(window) * MERGE_SIZE**2


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
