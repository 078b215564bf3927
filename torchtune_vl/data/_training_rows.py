"""The rows of one rank, in an order that neither ranks nor data workers change."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import chain, count, islice, takewhile
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from torchtune_vl.data._collate import Batch
from torchtune_vl.data._packing import Planner, Size, planner_of, settings_of
from torchtune_vl.media._errors import naming_sample
from torchtune_vl.modules import IGNORE_INDEX

# Of so many random orders of an epoch's rows the most even is taken
_ORDERS = 64


class Row(NamedTuple):
    """What one forward and backward of one rank takes.

    Args:
        batch: arguments of the model.
        samples: the index in the dataset of each sample, its number in a stream.
        sizes: the size of each.
        position: the position in the epoch after the step that this row belongs to, where the data
            go on: values that JSON can hold, the same on all ranks. ``step`` counts the steps so
            far, ``epoch`` is that of the next, ``has_begun`` tells whether other steps of this
            epoch are done, and ``had_media`` whether any step so far had images or videos.
        step_has_media: whether any row of the step, on any rank, has images or videos.
    """

    batch: Batch
    samples: list[int]
    sizes: list[Size]
    position: dict[str, Any]
    step_has_media: bool


class _Sample(NamedTuple):
    number: int  # in the dataset
    size: Size
    make: Callable[[], Mapping[str, Any]]


class _Step(NamedTuple):
    rows: list[list[_Sample]]  # of all ranks
    has_media: bool
    position: dict[str, Any]


# The rows of each step, and the part of its position that says what is left of the epoch
_Plan = Iterator[tuple[Iterable[list[_Sample]], dict[str, Any]]]


@dataclass(eq=False, repr=False)
class TrainingRows(IterableDataset[Row]):
    """The rows that one rank trains on, for ``DataLoader(rows, batch_size=None)``.

    A step, after which the weights change, has ``rows_per_step`` rows over all ranks. Each rank
    gets equally many, their work as equal as it can be, heaviest first. An epoch has each sample
    exactly once; rows that its last step lacks come from dividing others, or else are empty.

    Rows come in a random order, large and small samples evenly over the epoch. Not shuffled, and
    from a stream, an epoch is planned in pieces of ``planner.lookahead`` samples, and only the rows
    of a piece come in a random order. Every data worker of every rank plans all rows, from sizes
    alone, and makes the samples of its own: nothing is exchanged, and neither changes the order.

    Args:
        dataset: has ``__len__``, ``__getitem__`` and ``measure``, both of an index; or, if it is a
            stream, ``__iter__`` over raw samples, ``measure`` and ``transform``, both of a raw
            sample, and perhaps ``skip(n)``, an iterable without the first n. Measuring gives
            the fields of a :class:`Size`, and samples are what collate functions take.
        planner: :class:`PackedRows` or :class:`PaddedRows`.
        rows_per_step: rows of a step, over all ranks.
        rank: number of this rank among the ``world_size`` that get different rows.
        world_size: how many these are.
        seed: of the order, >= 0.
        shuffle: whether each epoch has an order of its own, instead of the dataset's.
        epochs: how often to go through the dataset; None for no end.
        position: of the last row that was trained on, to go on behind its step, with any number of
            ranks; with another planner or ``rows_per_step`` the rest of its epoch is planned anew.
        sizes: int [samples, 3], the :class:`Size` of each sample; None measures them when planned.

    Raises:
        ValueError: if ranks cannot share a step equally, a stream is to be shuffled, or the
            position is that of a run on other data or behind the last epoch; then or from
            iterating, if a sample cannot be measured or made, does not have the size that was
            measured, exceeds a row or has no supervised token, or there is none.
    """

    dataset: Any
    planner: Planner
    _: KW_ONLY
    rows_per_step: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    position: Mapping[str, Any] | None = None
    sizes: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.is_stream = not hasattr(self.dataset, "__getitem__")
        if self.rows_per_step % self.world_size:
            found = f"{self.world_size} ranks cannot share the {self.rows_per_step} rows of a step"
            raise ValueError(f"{found}: set rows_per_step to a multiple of {self.world_size}")
        if self.shuffle and self.is_stream:
            raise ValueError("a stream has an order of its own: set shuffle to False")
        samples = None if self.is_stream else len(self.dataset)
        self._identity = {"seed": self.seed, "shuffle": self.shuffle, "samples": samples}
        self._settings = {"rows_per_step": self.rows_per_step, "rows": settings_of(self.planner)}
        start = {"step": 0, "epoch": 0, "has_begun": False, "had_media": False}
        self._position: Mapping[str, Any] = self.position or {**start, **self._identity}
        for name, value in self._identity.items():
            if self._position[name] != value:
                raise ValueError(
                    f"the position belongs to a run with {name} {self._position[name]}, this one "
                    f"has {value}: samples would be repeated or left out. Restore it, or start anew"
                )
        begun = self._position["epoch"] + self._position["has_begun"]
        if self.epochs is not None and begun > self.epochs:
            problem = f"the run is in epoch {begun}, but was told to end after {self.epochs}"
            raise ValueError(f"{problem}: set epochs to {begun} or more")
        if self.sizes is not None and len(self.sizes):
            tokens, patches, _ = self.sizes.max(axis=0).tolist()
            try:  # no sample has more, or fewer targets, and millions are slow to check one by one
                self._checked((tokens, patches, int(self.sizes[:, 2].min())))
            except ValueError:
                for number, measured in enumerate(self.sizes.tolist()):
                    with naming_sample(number):
                        self._checked(measured)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows of this rank, in a data worker over those that it makes."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        own = ((row, step) for step in self._steps() for row in self._share(step))
        for row, step in islice(own, first, None, stride):
            batch = self.planner.collate([_made(sample) for sample in row])
            numbers, sizes = [sample.number for sample in row], [sample.size for sample in row]
            yield Row(batch, numbers, sizes, step.position, step.has_media)

    def last_step(self) -> int:
        """Return the number of the last step, by planning all; a ValueError without ``epochs``."""
        if self.epochs is None:
            raise ValueError("epochs is None: the steps have no end to count to")
        return int(self._position["step"]) + sum(1 for _ in self._planned())

    def has_media(self, last_step: int) -> bool:
        """Return whether any step up to this number, before the position too, has media."""
        if self._position["had_media"]:
            return True
        steps = takewhile(lambda step: step.position["step"] <= last_step, self._steps())
        return any(step.has_media for step in steps)

    def _steps(self) -> Iterator[_Step]:
        had_media = self._position["had_media"]
        for step, (planned, left) in enumerate(self._planned(), self._position["step"] + 1):
            rows = list(planned)
            has_media = any(sample.size.patches for row in rows for sample in row)
            had_media |= has_media
            position = {"step": step, "had_media": had_media, **left, **self._identity}
            yield _Step(self._completed(rows), has_media, position)

    def _planned(self) -> _Plan:
        first = self._position["epoch"]
        plan = self._plan_shuffled if self.shuffle else self._plan_in_order
        position = self._position
        for epoch in count(first) if self.epochs is None else range(first, self.epochs):
            for rows, left in plan(epoch, position):
                ended = {"epoch": epoch + 1, "has_begun": False}
                yield rows, {"epoch": epoch, "has_begun": True, **left} if left else ended
            position = {}

    def _plan_shuffled(self, epoch: int, position: Mapping[str, Any]) -> _Plan:
        """The steps that are left of an epoch, which is planned as a whole."""
        # Pairs of settings and how many steps were taken with them: as often as they changed
        plans = list(position.get("plans", []))
        if not plans or plans[-1][0] != self._settings:
            plans.append([self._settings, 0])
        *before, (_, done) = plans
        rows = self._shuffled_rows(epoch, plans)
        for first in range(0, len(rows), self.rows_per_step):
            done += 1
            stop = first + self.rows_per_step
            planned = ([self._sample(i, i) for i in row.tolist()] for row in rows[first:stop])
            yield planned, {"plans": [*before, [self._settings, done]]} if stop < len(rows) else {}

    def _shuffled_rows(self, epoch: int, plans: Sequence[Sequence[Any]]) -> list[np.ndarray]:
        """The rows of an epoch, as indices, that are left after these steps of these plans."""
        if self.sizes is None:
            self.sizes = np.array([self._size(i, i) for i in range(len(self.dataset))])
        if not len(self.sizes):
            raise ValueError("the dataset has no samples")
        left = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes))
        rows: list[np.ndarray] = []
        for number, (settings, done) in enumerate(plans, 1):
            # All but those of the first steps of the plan before, in the order of the epoch
            left = left[np.isin(left, np.concatenate(rows))] if rows else left
            planner = self.planner if settings == self._settings else planner_of(**settings["rows"])
            sizes = self.sizes[left]
            planned = _evenly(planner.plan(sizes), sizes, (self.seed, epoch, number))
            rows = [left[row] for row in planned[done * settings["rows_per_step"] :]]
        return rows

    def _plan_in_order(self, epoch: int, position: Mapping[str, Any]) -> _Plan:
        """The steps that are left of an epoch, which is planned piece by piece."""
        numbers, next_number = position.get("rows", []), position.get("next", 0)
        known = {*chain(position.get("waiting", []), *numbers)}
        arriving = self._arriving(known, next_number)
        samples = {sample.number: sample for sample in islice(arriving, len(known))}
        if missing := known - samples.keys():
            raise ValueError(f"the dataset ends before sample {min(missing)}")
        if position.get("settings") != self._settings:
            numbers = []
        rows = [[samples.pop(number) for number in row] for row in numbers]
        waiting = [samples[number] for number in sorted(samples)]
        has_ended = False
        while True:
            while len(rows) < self.rows_per_step and not has_ended:
                new = list(islice(arriving, self.planner.lookahead))
                has_ended = len(new) < self.planner.lookahead
                waiting += new
                sizes = np.array([sample.size for sample in waiting]).reshape(-1, 3)
                planned = self.planner.plan(sizes) if waiting else []
                # The last row may not be full: its samples wait for others
                last = [] if has_ended else sorted(planned.pop())
                planned = _evenly(planned, sizes, (self.seed, epoch, next_number))
                rows += [[waiting[i] for i in row] for row in planned]
                waiting = [waiting[i] for i in last]
                next_number += len(new)
            if not rows:
                raise ValueError("the dataset has no samples")
            step, rows = rows[: self.rows_per_step], rows[self.rows_per_step :]
            if not rows and not waiting:
                yield step, {}
                return
            numbers = [[sample.number for sample in row] for row in rows]
            left = {"rows": numbers, "waiting": [sample.number for sample in waiting]}
            yield step, {"settings": self._settings, **left, "next": next_number}

    def _arriving(self, numbers: Set[int], next_number: int) -> Iterator[_Sample]:
        """These samples of the dataset, and all from the next on."""
        first = min(numbers, default=next_number)
        if not self.is_stream:
            every: Iterable[Any] = range(first, len(self.dataset))
        elif hasattr(self.dataset, "skip"):
            every = self.dataset.skip(first)
        else:
            every = islice(self.dataset, first, None)
        for number, raw in enumerate(every, first):
            if number >= next_number or number in numbers:
                yield self._sample(number, raw)

    def _sample(self, number: int, raw: Any) -> _Sample:
        make = self.dataset.transform if self.is_stream else self.dataset.__getitem__
        return _Sample(number, self._size(number, raw), partial(make, raw))

    def _size(self, number: int, raw: Any) -> Size:
        if self.sizes is not None:
            return Size(*self.sizes[number].tolist())
        with naming_sample(number):
            return self._checked(self.dataset.measure(raw))

    def _checked(self, measured: Sequence[int]) -> Size:
        size = Size(*measured)
        if size.targets == 0:
            raise ValueError("it has no supervised token: remove it from the data")
        self.planner.check(size)
        return size

    def _completed(self, rows: list[list[_Sample]]) -> list[list[_Sample]]:
        """The rows of an epoch's last step, made as many as those of the others."""
        while len(rows) < self.rows_per_step:
            divisible = [row for row in rows if len(row) > 1]
            if not divisible:
                return rows + [[]] * (self.rows_per_step - len(rows))
            heaviest = max(divisible, key=self._work)
            rows = [row for row in rows if row is not heaviest]
            rows += [heaviest[::2], heaviest[1::2]]
        return rows

    def _share(self, step: _Step) -> list[list[_Sample]]:
        """The rows of a step that this rank gets: always the heaviest left to the least loaded."""
        shares: list[list[list[_Sample]]] = [[] for _ in range(self.world_size)]
        loads = [(0.0, number) for number in range(self.world_size)]
        for row in sorted(step.rows, key=self._work, reverse=True):
            load, number = heapq.heappop(loads)
            shares[number].append(row)
            if len(shares[number]) < self.rows_per_step // self.world_size:
                heapq.heappush(loads, (load + self._work(row), number))
        # Share 0 tends to be the heaviest: each rank gets it in turn
        return shares[(self.rank + step.position["step"]) % self.world_size]

    def _work(self, row: Sequence[_Sample]) -> float:
        return self.planner.work([sample.size for sample in row])


def _evenly(rows: list[np.ndarray], sizes: np.ndarray, seed: tuple[int, ...]) -> list[np.ndarray]:
    """Rows in a random order in which small samples are neither early nor late.

    Packing leaves the smallest samples to few rows, which in some orders are all early or late.
    """
    if len(rows) < 2:
        return rows
    standardized = (sizes - sizes.mean(axis=0)) / sizes.std(axis=0).clip(1)
    starts = np.cumsum([0, *map(len, rows[:-1])])
    excess = np.add.reduceat(standardized[np.concatenate(rows)], starts)
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(rows)) for _ in range(_ORDERS)]
    middle = (len(rows) - 1) / 2
    places = min(orders, key=lambda places: float(np.abs((places - middle) @ excess).max()))
    return [rows[i] for i in places.argsort()]


def _made(sample: _Sample) -> Mapping[str, Any]:
    with naming_sample(sample.number):
        made = sample.make()
    patches = made["encoder_input"]["vision"]["patches"] if "encoder_input" in made else ()
    targets = len(made["labels"]) - 1 - made["labels"][1:].count(IGNORE_INDEX)
    size = Size(len(made["tokens"]), len(patches), targets)
    if size != sample.size:
        problem = f"sample {sample.number} has {size}, but had {sample.size} when it was measured"
        raise ValueError(f"{problem}: it has changed since; measure the dataset anew")
    return made
