"""Which samples make a row, from their sizes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from torchtune_vl._numba import compiled
from torchtune_vl.data import _collate

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

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.patches} patches and {self.targets} supervised tokens"


class Planner(Protocol):
    """Decides which samples make a row, and how they become its batch.

    Its attributes are the arguments that it was made with: they say which plan it makes.
    ``collate`` makes arguments of the model of the samples of a row, perhaps none.
    """

    collate: Callable[[_collate.Samples], _collate.Batch]

    @property
    def lookahead(self) -> int | None:
        """How many samples it chooses from, None if it takes them as they come."""

    def check(self, size: Size) -> None:
        """Raise a ValueError if a sample of this size fits no row; by default every one does."""

    def plan(self, sizes: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Divide samples into rows.

        Args:
            sizes: int32 [samples, 3], the :class:`Size` of each sample of the dataset.
            draws: int32 [n], which of them arrive, in this order; some perhaps more than once.

        Returns:
            int32 [n], places in ``draws`` from 0 to n - 1, the rows one behind the other, and
            int32 [rows], where in these each row ends.
        """

    def work(self, tokens: np.ndarray, patches: np.ndarray) -> float:
        """Return the cost of a row, in tokens, from those and the patches of its samples.

        The quadratic part of attention is left out.
        """


class _Counts:
    """Arguments of a planner, which are counts or None."""

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{name} of rows must be a whole number from 1, not {count!r}")


@dataclass
class PackedRows(_Counts, Planner):
    """Rows of several samples end to end, within a budget of tokens and one of patches.

    A row starts with the sample that has waited longest, so that each waits for ``lookahead`` rows
    at most; then come the largest that still fit, in tokens (best-fit decreasing, of the samples
    waiting). On ten thousand samples of mixed lengths, rows are more than 99 % full, nearly as
    full as if the whole dataset were sorted: see `benchmarks/packing.py`.

    Args:
        max_tokens: most tokens of a row.
        max_patches: most patches of a row, None for no limit; the encoder's memory grows with it.
        lookahead: how many samples to choose from: to fill rows, several times as many as one has.

    Raises:
        ValueError: if a number is not at least 1.
    """

    max_tokens: int
    max_patches: int | None = None
    lookahead: int = 1024

    collate = staticmethod(_collate.packed_collate_vision)

    def check(self, size: Size) -> None:
        for kind, setting in (("tokens", "max_seq_len"), ("patches", "max_pixels")):
            count, limit = getattr(size, kind), getattr(self, f"max_{kind}")
            if limit is not None and count > limit:
                raise ValueError(
                    f"it has {count} {kind}, more than a row's max_{kind} of {limit}: raise "
                    f"max_{kind}, or set {setting} of the transform"
                )

    def plan(self, sizes: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        limit = np.iinfo(np.int64).max if self.max_patches is None else self.max_patches
        return _best_fit(np.asarray(sizes), draws, self.max_tokens, limit, self.lookahead)

    def work(self, tokens: np.ndarray, patches: np.ndarray) -> float:
        return float(tokens.sum() + PATCH_WORK * patches.sum())


@dataclass
class PaddedRows(_Counts, Planner):
    """Rows of ``batch_size`` samples in their order, at least 1, padded to the longest."""

    batch_size: int

    collate = staticmethod(_collate.padded_collate_vision_targets)

    @property
    def lookahead(self) -> None:
        return None

    def plan(self, sizes: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.arange(len(draws), dtype=np.int32)
        return order, np.append(order[self.batch_size :: self.batch_size], np.int32(len(draws)))

    def work(self, tokens: np.ndarray, patches: np.ndarray) -> float:
        return float(len(tokens) * tokens.max(initial=0) + PATCH_WORK * patches.sum())


def settings_of(planner: Planner) -> dict[str, Any]:
    """Describe a planner by its name and arguments, which JSON can hold, to make its plan again."""
    return {"planner": type(planner).__name__, **vars(planner)}


def planner_of(planner: str, **arguments: Any) -> Planner:
    """Make a planner of :func:`settings_of`; a ValueError if it is none of ours."""
    known: dict[str, Any] = {"PackedRows": PackedRows, "PaddedRows": PaddedRows}
    if planner not in known:
        problem = f"rows so far were those of a {planner}, whose plan cannot be made again"
        raise ValueError(f"{problem}: go on with the same settings of rows")
    return known[planner](**arguments)


@compiled
def _best_fit(sizes, draws, max_tokens, max_patches, lookahead):  # type: ignore[no-untyped-def]
    """Rows one behind the other, and where each ends."""
    count = len(draws)
    order, ends = np.empty(count, np.int32), np.empty(count, np.int32)
    is_left = np.ones(count, np.bool_)
    # From small to large; of equals the oldest comes last, and so is taken first. What is taken
    # becomes -1 until the row is full.
    waiting, tokens = np.empty(lookahead, np.int32), np.empty(lookahead, np.int32)
    arrived = oldest = done = rows = held = 0
    while done < count:
        while held < lookahead and arrived < count:
            size = sizes[draws[arrived], 0]
            place = np.searchsorted(tokens[:held], size)
            for above in range(held, place, -1):
                waiting[above], tokens[above] = waiting[above - 1], tokens[above - 1]
            waiting[place], tokens[place] = arrived, size
            arrived += 1
            held += 1
        while not is_left[oldest]:
            oldest += 1
        size = sizes[draws[oldest], 0]
        place = np.searchsorted(tokens[:held], size, side="right") - 1
        room, patch_room = np.int64(max_tokens), np.int64(max_patches)
        lowest = place
        # One pass suffices: what does not fit now does not fit later
        while place >= 0:
            sample = waiting[place]
            if sample >= 0:
                patches = sizes[draws[sample], 1]
                if patches <= patch_room or sample == oldest:
                    order[done] = sample
                    is_left[sample] = False
                    waiting[place] = -1
                    lowest = min(lowest, place)
                    done += 1
                    room -= tokens[place]
                    patch_room -= patches
                    if sample == oldest:  # the others from the largest that fits
                        place = held
            place = min(place, np.searchsorted(tokens[:held], room, side="right")) - 1
        kept = lowest
        for place in range(lowest, held):
            if waiting[place] >= 0:
                waiting[kept], tokens[kept] = waiting[place], tokens[place]
                kept += 1
        held = kept
        ends[rows] = done
        rows += 1
    return order, ends[:rows].copy()
