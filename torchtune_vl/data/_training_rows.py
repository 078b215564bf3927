"""The rows of one rank, in an order that neither ranks nor data workers change."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from torchtune_vl.data._collate import Batch
from torchtune_vl.data._packing import Planner, Size
from torchtune_vl.data._plan import Plan
from torchtune_vl.data._row_shares import RowSharing
from torchtune_vl.media._errors import naming_sample
from torchtune_vl.modules import IGNORE_INDEX


class Row(NamedTuple):
    """What one forward and backward of one rank takes.

    Args:
        batch: arguments of the model.
        samples: the index in the dataset of each sample, its number in a stream.
        sizes: the size of each.
        position: after the step which this row belongs to, where the data go on: of
            :meth:`Plan.position`; of a stream ``step``, the row's ``lane`` and its ``state``.
        step_has_media: whether any row of the step, on any rank, has images or videos by the plan;
            None if no rank knows that alone.
        bad: index and reason of samples that could not be made, and are left out of the row.
        sources: of a mixture, the number of the dataset that each sample is of.
    """

    batch: Batch
    samples: list[int]
    sizes: list[Size]
    position: dict[str, Any]
    step_has_media: bool | None
    bad: list[tuple[int, str]]
    sources: list[int]


class Ingredient(NamedTuple):
    """A sample of a row before it is made, which may have less than its size unless it is exact."""

    number: int
    size: Size
    source: int
    make: Callable[[], Mapping[str, Any]]
    is_exact: bool


def make_row(
    ingredients: Iterable[Ingredient],
    planner: Planner,
    skips_bad: bool,
    position: dict[str, Any],
    step_has_media: bool | None,
    bad: Iterable[tuple[int, str]] = (),
    sharing: RowSharing | None = None,
) -> Row:
    """Make the samples of a row and its batch, or this device's share of it.

    Of ``bad`` samples it is known that they cannot be made.
    """
    row = Row(Batch(), [], [], position, step_has_media, [*bad], [])
    made = []
    for ingredient in ingredients:
        try:
            sample, size = _made(ingredient)
        except ValueError as error:
            if not skips_bad:
                raise
            row.bad.append((ingredient.number, str(error)))
        else:
            made.append(sample)
            row.samples.append(ingredient.number)
            row.sizes.append(size)
            row.sources.append(ingredient.source)
    batch = planner.collate(made)
    return row._replace(batch=sharing(batch) if sharing else batch)


def _made(ingredient: Ingredient) -> tuple[Mapping[str, Any], Size]:
    number, measured, _, make, is_exact = ingredient
    with naming_sample(number):
        made = make()
    size = size_of(made)
    if not is_as_measured(size, measured, is_exact):
        problem = f"sample {number} has {size}, but had {measured} when it was measured"
        raise ValueError(f"{problem}: it has changed since; measure the dataset anew")
    return made, size


def size_of(sample: Mapping[str, Any]) -> Size:
    """The size of a sample that was made, with its labels."""
    patches = sample["encoder_input"]["vision"]["patches"] if "encoder_input" in sample else ()
    targets = len(sample["labels"]) - 1 - sample["labels"][1:].count(IGNORE_INDEX)
    return Size(len(sample["tokens"]), len(patches), targets)


def is_as_measured(size: Size, measured: Size, is_exact: bool) -> bool:
    """Whether a size is the one that was measured, or, if that is not exact, at most as large."""
    fits = all(count <= most for count, most in zip(size, measured, strict=True))
    return size == measured if is_exact else fits


def rows_of_each_rank(rows_per_step: int, world_size: int) -> int:
    """How many rows of a step each rank gets; ``ValueError`` if they cannot be shared."""
    if rows_per_step % world_size:
        raise ValueError(
            f"{world_size} ranks cannot share the {rows_per_step} rows of a step: set "
            f"rows_per_step to a multiple of {world_size}"
        )
    return rows_per_step // world_size


@dataclass(eq=False, repr=False)
class TrainingRows(IterableDataset[Row]):
    """The rows that one rank trains on, for ``DataLoader(rows, batch_size=None)``.

    A step, after which the weights change, has the plan's ``rows_per_step`` rows over all ranks.
    Each rank gets equally many, their work as equal as it can be, heaviest first. A data worker
    reads of the plan the steps of its own rows, and makes the samples of these.

    Args:
        dataset: has ``__getitem__`` of an index, which gives what collate functions take.
        planner: that of the plan.
        plan: of :meth:`Plan.make`; it may be made later, before iteration.
        rank: number of this rank among the ``world_size`` that get different rows.
        world_size: how many these are.
        skips_bad: whether samples that cannot be made are left out of their row, and told by it.
        augments: whether to take samples from ``augmented`` of the dataset, of an index and an
            epoch, which may be smaller than they were measured.
        sharing: how this device takes its share of a row; by default it has rows of its own.

    Raises:
        ValueError: from iterating, if ranks cannot share a step equally, or if a sample cannot be
            made or does not have the size that was measured, unless it is skipped.
    """

    dataset: Any
    planner: Planner
    plan: Plan
    _: KW_ONLY
    rank: int = 0
    world_size: int = 1
    skips_bad: bool = False
    augments: bool = False
    sharing: RowSharing | None = None

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows of this rank, in a data worker over those that it makes."""
        plan = self.plan
        rows_per_rank = rows_of_each_rank(plan.rows_per_step, self.world_size)
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        steps = plan.last_step - plan.first_step + 1
        planned_step = None
        for number in range(first, steps * rows_per_rank, stride):
            step, place = number // rows_per_rank + plan.first_step, number % rows_per_rank
            if step != planned_step:
                planned_step, share, has_media = step, *self._share(step)
                position = plan.position(step)
            ingredients = self._ingredients(share[place], plan.epoch(step))
            yield make_row(
                *(ingredients, self.planner, self.skips_bad, position, has_media),
                sharing=self.sharing,
            )

    def _ingredients(self, entries: np.ndarray, epoch: int) -> Iterator[Ingredient]:
        for number, *size in entries.tolist():
            make = partial(self.dataset.__getitem__, number)
            if self.augments:
                make = partial(self.dataset.augmented, number, epoch)
            source = self.plan.source(number)
            yield Ingredient(number, Size(*size), source, make, not self.augments)

    def _share(self, step: int) -> tuple[list[np.ndarray], bool]:
        """The rows of a step that this rank gets, and whether any of the step's has media.

        The heaviest that is left always goes to the least loaded.
        """
        rows = [
            (row, self.planner.work(row["tokens"], row["patches"])) for row in self.plan.rows(step)
        ]
        shares: list[list[np.ndarray]] = [[] for _ in range(self.world_size)]
        loads = [(0.0, number) for number in range(self.world_size)]
        for row, work in sorted(rows, key=lambda pair: pair[1], reverse=True):
            load, number = heapq.heappop(loads)
            shares[number].append(row)
            if len(shares[number]) < len(rows) // self.world_size:
                heapq.heappush(loads, (load + work, number))
        has_media = any(row["patches"].any() for row, _ in rows)
        # Share 0 tends to be the heaviest: each rank gets it in turn
        return shares[(self.rank + step) % self.world_size], has_media
