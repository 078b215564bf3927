"""Which samples make a row, from their sizes alone.

A row is what one forward takes. Best fit from a look-ahead buffer packs nearly as well as sorting
the whole dataset would: see `benchmarks/packing.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torchtune_vl.data._batch import Batch
from torchtune_vl.data._collate import packed_collate_vision, padded_collate_vision_targets

# A patch passes the vision encoder, a token the decoder; each costs by the parameters that it
# meets. The encoder has 0.09 (7B) to 0.2 (3B) times as many as the decoder. For larger decoders
# this is too much, but there both are nearly balanced when the tokens are.
PATCH_WORK = 1 / 8


class Size(NamedTuple):
    """What a sample takes of a row.

    Args:
        tokens: tokens, placeholders of media included.
        patches: patches of all its images and videos.
        targets: tokens that the loss is taken of. The first token is none: nothing predicts it.
    """

    tokens: int
    patches: int
    targets: int


class Planner(Protocol):
    """Decides which samples make a row, and how they become its batch.

    Args:
        lookahead: how many samples it wants to choose from.
        collate: from the samples of a row, perhaps none, to arguments of the model.
    """

    lookahead: int
    collate: Callable[[Sequence[Mapping[str, Any]]], Batch]

    def check(self, size: Size) -> None:
        """Raise a ValueError if a sample of this size fits no row."""

    def take(self, waiting: Sequence[Size]) -> list[int]:
        """Choose the next row: places among the samples waiting, the oldest of which is first."""

    def work(self, row: Sequence[Size]) -> float:
        """Return the cost of a row, in tokens."""


class PackedRows:
    """Rows of several samples end to end, within a budget of tokens and one of patches.

    A row starts with the sample that has waited longest, so that each waits for ``lookahead`` rows
    at most; then come the largest that still fit, in tokens (best-fit decreasing, of the samples
    waiting). On ten thousand samples of mixed lengths, rows are more than 99 % full.

    Args:
        max_tokens: most tokens of a row.
        max_patches: most patches of a row, no limit by default. Memory of the vision encoder grows
            with it.
        lookahead: how many samples to choose from: several times as many as a row holds, or else
            rows are not full.
    """

    collate = staticmethod(packed_collate_vision)

    def __init__(
        self, max_tokens: int, max_patches: int | None = None, lookahead: int = 256
    ) -> None:
        self.max_tokens = max_tokens
        self.max_patches = math.inf if max_patches is None else max_patches
        self.lookahead = lookahead

    def check(self, size: Size) -> None:
        """Refuse a sample that is larger than a row.

        Args:
            size: size of the sample.

        Raises:
            ValueError: if it exceeds a budget.
        """
        if size.tokens > self.max_tokens:
            raise ValueError(
                f"it has {size.tokens} tokens, more than a row's max_tokens of {self.max_tokens}: "
                "raise max_tokens, or set max_seq_len of the transform"
            )
        if size.patches > self.max_patches:
            raise ValueError(
                f"it has {size.patches} patches, more than a row's max_patches of "
                f"{self.max_patches}: raise max_patches, or set max_pixels of the transform"
            )

    def take(self, waiting: Sequence[Size]) -> list[int]:
        """Choose the samples of the next row.

        Args:
            waiting: sizes of samples that each fit a row, in order of arrival, at least one.

        Returns:
            Places in ``waiting``: 0, and the others from large to small.
        """
        tokens = self.max_tokens - waiting[0].tokens
        patches = self.max_patches - waiting[0].patches
        lengths = [size.tokens for size in waiting]
        taken = [0]
        # One pass suffices: what does not fit now does not fit later
        for place in sorted(range(1, len(waiting)), key=lengths.__getitem__, reverse=True):
            size = waiting[place]
            if size.tokens <= tokens and size.patches <= patches:
                taken.append(place)
                tokens -= size.tokens
                patches -= size.patches
        return taken

    def work(self, row: Sequence[Size]) -> float:
        """Estimate the cost of a row, the quadratic part of attention left out.

        Args:
            row: sizes of its samples.

        Returns:
            The cost, in tokens.
        """
        return sum(size.tokens + PATCH_WORK * size.patches for size in row)


class PaddedRows:
    """Rows of so many samples in their order, padded to the longest.

    Args:
        batch_size: samples of a row.
    """

    collate = staticmethod(padded_collate_vision_targets)

    def __init__(self, batch_size: int) -> None:
        self.lookahead = batch_size

    def check(self, size: Size) -> None:
        """Accept a sample of any size."""

    def take(self, waiting: Sequence[Size]) -> list[int]:
        """Choose the samples of the next row.

        Args:
            waiting: sizes of samples in order of arrival.

        Returns:
            The first ``batch_size`` places in ``waiting``.
        """
        return list(range(len(waiting)))[: self.lookahead]

    def work(self, row: Sequence[Size]) -> float:
        """Estimate the cost of a row, padding included.

        Args:
            row: sizes of its samples.

        Returns:
            The cost, in tokens.
        """
        longest = max((size.tokens for size in row), default=0)
        return len(row) * longest + PATCH_WORK * sum(size.patches for size in row)
