"""Segments of a packed sequence.

Windows and frames of a vision encoder and the documents of a packed row are all segments:
neighbouring rows of one sequence, which see each other and nothing else.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

import torch


class Segments:
    """Segments that lie end to end.

    Lengths are known to the host, so that nothing waits for the device to tell them. An object,
    since torch.compile would look into a dict or a list, and compile anew for each batch.

    Args:
        lengths: rows of each segment, in order.
        boundaries: where they start, and the end of the last, int32 [segments + 1].
    """

    def __init__(self, lengths: Sequence[int], boundaries: torch.Tensor) -> None:
        self.lengths = tuple(lengths)
        self.boundaries = boundaries

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Segments":
        """Describe segments.

        Args:
            lengths: rows of each.

        Returns:
            The description, on the CPU.
        """
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return cls(lengths, ends.to(torch.int32))

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segments":
        """Return them with boundaries on a device, as :meth:`torch.Tensor.to` does."""
        return Segments(self.lengths, self.boundaries.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Segments":
        """Return them with boundaries in pinned memory, as data loaders ask for."""
        return Segments(self.lengths, self.boundaries.pin_memory())

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Length and number of neighbouring segments of one length."""
        return [(length, len([*run])) for length, run in groupby(self.lengths)]

    @cached_property
    def by_length(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rows in the order of their segments' lengths, and back; None if that saves nothing.

        Both int64 [N], on the device of the boundaries.
        """
        if len(self.runs) == len({*self.lengths}):
            return None
        lengths = torch.tensor(self.lengths)
        ordered, order = lengths.sort(stable=True)
        starts = lengths.cumsum(0) - lengths
        shift = starts[order] - (ordered.cumsum(0) - ordered)
        rows = shift.repeat_interleave(ordered) + torch.arange(int(lengths.sum()))
        rows = rows.to(self.boundaries.device)
        return rows, rows.argsort()
