"""What lies where in a row: integer maths on shapes of media, done once, in the data workers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch

from torchtune_vl.media import CHANNELS, Geometry

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
    """Positions of M-RoPE, int64 [tokens, 3]: equal on all axes for text, of a grid for media.

    ``grid_thw``, int64 [k, 3], has the patches of each medium along time, height and width in the
    order of ``tokens``, whose placeholders are expanded, or else there is a ``ValueError``;
    ``intervals`` are the temporal positions from one of its steps to the next.

    What follows a medium begins at the largest position so far + 1, as "Qwen2-VL" (arXiv
    2409.12191, section 2.1) defines it. So transformers numbered until release 4.51, and so vLLM
    and SGLang do. transformers >= 5.3 adds half of the grid's larger side: less behind long videos.
    """
    grids = grid_thw.tolist()
    placeholders = sum(tokens.count(token_id) for token_id in placeholder_ids)
    expected = sum(t * h * w for t, h, w in grids) // merge_size**2
    if placeholders != expected:
        found = f"the text has {placeholders} placeholder tokens of images and videos"
        raise ValueError(f"{found}, but its {len(grids)} media have {expected} embeddings")
    positions = np.empty((len(tokens), 3), np.int64)
    end = position = 0
    for (t, h, w), interval in zip(grids, intervals, strict=True):
        start = end
        while tokens[start] not in placeholder_ids:
            start += 1
        positions[end:start] = np.arange(position, position + start - end)[:, None]
        position += start - end
        grid, extent = _grid_positions(t, h // merge_size, w // merge_size, interval)
        end = start + len(grid)
        np.add(grid, position, out=positions[start:end])
        position += extent
    positions[end:] = np.arange(position, position + len(tokens) - end)[:, None]
    return torch.from_numpy(positions)


@lru_cache(_SHAPES)
def _grid_positions(t: int, h: int, w: int, interval: float) -> tuple[np.ndarray, int]:
    """M-RoPE positions of t x h x w units from 0, int64 [t * h * w, 3], and how far they go.

    Never to be changed.
    """
    # float32 and truncated, as transformers has it
    steps = (np.arange(t, dtype=np.float32) * np.float32(interval)).astype(np.int64)
    grid = np.meshgrid(steps, np.arange(h), np.arange(w), indexing="ij")
    return np.stack(grid, axis=-1).reshape(-1, 3), max(int(steps[-1]) + 1, h, w)


def vision_index(grid_thw: torch.Tensor, geometry: Geometry) -> dict[str, torch.Tensor]:
    """Order, positions and segments of media, which a vision encoder works by.

    A unit is the square of patches that becomes one embedding. Patches come unit by unit, so that
    windows permute units (transformers' ``get_vision_window_index``, ``get_vision_position_ids``).

    Of the patches of each medium along time, height and width, int64 [k, 3] on the CPU, returns
    ``unit_order``, int64 [units], where each unit comes from, window after window; its row and
    column, ``unit_positions``, int32 [units, 2]; and the patches of each window and frame,
    ``window_lengths`` and ``frame_lengths``, int64. Without windows the frames are the windows.
    """
    frames = [(h, w) for t, h, w in grid_thw.tolist() for _ in range(t)]
    return join_vision_indices([_index_of_frame(h, w, geometry) for h, w in frames])


@lru_cache(_SHAPES)
def _index_of_frame(h: int, w: int, geometry: Geometry) -> dict[str, torch.Tensor]:
    """The index of h x w patches; to be copied, never changed."""
    h, w, patches = h // geometry.merge_size, w // geometry.merge_size, geometry.merge_size**2
    rows, columns = np.indices((h, w)).reshape(2, -1)
    size = geometry.window_size or max(h, w)
    window = rows // size * -(-w // size) + columns // size
    order = window.argsort(kind="stable")
    index = {
        "unit_order": order,
        "unit_positions": np.stack([rows, columns], axis=1)[order].astype(np.int32),
        "window_lengths": np.bincount(window) * patches,
        "frame_lengths": np.array([h * w * patches]),
    }
    return {name: torch.from_numpy(array) for name, array in index.items()}


def join_vision_indices(indices: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join indices of :func:`vision_index` for a batch; other keys, of samples, are ignored."""
    keys = ("unit_order", "unit_positions", "window_lengths", "frame_lengths")
    if len(indices) == 1:  # as below, in a third of the time
        return {key: indices[0][key].clone() for key in keys}
    joined = {key: torch.cat([index[key] for index in indices]) for key in keys}
    sizes = torch.tensor([len(index["unit_order"]) for index in indices])
    joined["unit_order"] += (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return joined


def encoder_index(index: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Turn the lengths of an index, of :func:`vision_index`, into what a vision encoder takes.

    ``windows`` and ``frames`` are each a dict from the lengths of all segments to their boundaries,
    the two arguments of :class:`Segments`: a key stays known to the host when tensors move to
    another device, and torchtune's recipes take nothing but dicts and tensors.
    """
    kinds = ("window", "frame")
    segments = {f"{kind}s": Segments.of(index[f"{kind}_lengths"].tolist()) for kind in kinds}
    return {
        "unit_order": index["unit_order"].to(torch.int32),
        "unit_positions": index["unit_positions"],
        **{kind: {some.lengths: some.boundaries} for kind, some in segments.items()},
    }


class Segments:
    """Segments of a sequence that lie end to end, whose rows see each other and nothing else.

    Windows and frames of a vision encoder are segments, and the documents of a packed row.
    ``lengths``, the rows of each, are known to the host, so that nothing waits for the device to
    tell them; ``boundaries``, int32 [segments + 1], are where they start, and the end of the last.
    An object: torch.compile would look into a dict or a list, and compile anew for each batch.
    """

    def __init__(self, lengths: Sequence[int], boundaries: torch.Tensor) -> None:
        self.lengths = tuple(lengths)
        self.boundaries = boundaries

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Segments":
        """Make them of their lengths, on the CPU."""
        return cls(lengths, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segments":
        """Return them with boundaries on a device, as :meth:`torch.Tensor.to` does."""
        return Segments(self.lengths, self.boundaries.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Segments":
        """Return them with boundaries in pinned memory, as data loaders ask for."""
        return Segments(self.lengths, self.boundaries.pin_memory())

    @cached_property
    def by_length(self) -> tuple[list[tuple[int, int]], tuple[torch.Tensor, torch.Tensor] | None]:
        """Length and number of the segments of each length, and what order of rows joins them.

        This and its inverse, int64 [rows], are None where those of one length are neighbours.
        """
        runs = [(length, len([*run])) for length, run in groupby(self.lengths)]
        if len(runs) == len({*self.lengths}):
            return runs, None
        lengths = torch.tensor(self.lengths)
        order = lengths.repeat_interleave(lengths).argsort(stable=True).to(self.boundaries.device)
        return sorted(Counter(self.lengths).items()), (order, order.argsort())


def concatenate_patches(patches: Sequence[torch.Tensor], shared: bool = False) -> torch.Tensor:
    """Join patches of images and videos, [n, channels * frames * pixels] each, of one dtype.

    uint8 patches of an image hold one frame, those of a video two. Where both meet, the frame of
    an image is repeated. If several are to be ``shared``, other processes can map their memory.
    """
    if len(patches) == 1:
        return patches[0]  # what torch.cat would copy
    widest = max(p.shape[1] for p in patches)
    out = None
    if shared:
        shape = torch.Size([sum(map(len, patches)), widest])
        storage = torch.UntypedStorage._new_shared(shape.numel() * patches[0].itemsize)
        out = torch.empty(0, dtype=patches[0].dtype).set_(storage).view(shape)
    repeated = [
        p.unflatten(1, (CHANNELS, 1, -1)).expand(-1, -1, widest // p.shape[1], -1).flatten(1)
        for p in patches
    ]
    return torch.cat(repeated, out=out)
