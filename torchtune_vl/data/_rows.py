"""The rows of one rank, in an order that neither ranks nor data workers change.

Every data worker of every rank plans all rows, from sizes alone, and makes the samples of its own.
So nothing is exchanged, no sample is seen twice, and the position in the data is the same for all.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_vl.data._batch import Batch
from torchtune_vl.data._packing import Planner, Size


class Row(NamedTuple):
    """What one forward and backward of one rank takes.

    Args:
        batch: arguments of the model.
        samples: the index in the dataset of each sample, its number in a stream.
        sizes: the size of each.
        position: where the data go on after the step that this row belongs to: values that JSON
            can hold, the same on all ranks.
    """

    batch: Batch
    samples: list[int]
    sizes: list[Size]
    position: dict[str, Any]


class _Sample(NamedTuple):
    place: int  # in the order of the epoch
    number: int  # in the dataset
    size: Size
    make: Callable[[], Mapping[str, Any]]


# Places in the order of an epoch: the next to arrive, and those that did and wait for a row
_NOTHING_USED: dict[str, Any] = {"next": 0, "waiting": []}


class _Step(NamedTuple):
    epoch: int
    rows: list[list[_Sample]]
    position: dict[str, Any]


class TrainingRows(IterableDataset[Row]):
    """The rows that one rank trains on, for ``DataLoader(rows, batch_size=None)``.

    A step has ``rows_per_step`` rows over all ranks. Each rank gets equally many, their work as
    equal as it can be, heaviest first. An epoch has each sample exactly once; rows that its last
    step lacks come from dividing others, and are empty where that does not suffice. The number of
    data workers changes nothing.

    Args:
        dataset: has ``__len__``, ``__getitem__`` and ``measure``, both of an index; or, if it is a
            stream, ``__iter__`` over raw samples, ``measure`` and ``transform``, both of a raw
            sample, and perhaps ``skip(n)``, an iterable without the first n. Measuring gives
            the fields of a :class:`Size`, and samples are what collate functions take. Every rank
            and data worker has to see the same samples.
        planner: :class:`PackedRows` or :class:`PaddedRows`.
        rows_per_step: rows of an optimizer step, over all ranks.
        rank: number of this rank among those that get different rows.
        world_size: how many these are.
        seed: of the order, >= 0.
        shuffle: whether each epoch has an order of its own, instead of the dataset's.
        epochs: how often to go through the dataset; None for no end.
        position: from the last row that was trained on, to go on behind its step, with any number
            of ranks.
        sizes: int [samples, 3], the :class:`Size` of each sample of a dataset with indices. None
            measures them when they are planned.

    Raises:
        ValueError: if ranks cannot share a step equally, a size exceeds a row or has no supervised
            token, a stream is to be shuffled, or the position is that of a run with other settings.
            From iterating, if a sample cannot be measured or made, exceeds a row or has no
            supervised token, or there is none.
        RuntimeError: from iterating, if a sample does not have the size that was measured.
    """

    def __init__(
        self,
        dataset: Any,
        planner: Planner,
        *,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        position: Mapping[str, Any] | None = None,
        sizes: np.ndarray | None = None,
    ) -> None:
        self.dataset = dataset
        self.planner = planner
        self.rows_per_step = rows_per_step
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.epochs = epochs
        self.sizes = sizes
        self.is_stream = not hasattr(dataset, "__getitem__")
        if rows_per_step % world_size:
            raise ValueError(
                f"{world_size} ranks cannot share the {rows_per_step} rows of a step equally: set "
                f"rows_per_step to a multiple of {world_size}"
            )
        if shuffle and self.is_stream:
            raise ValueError(
                "a stream has an order of its own: set shuffle to False, and shuffle its source"
            )
        self._settings = {
            "rows_per_step": rows_per_step,
            "seed": seed,
            "shuffle": shuffle,
            "samples": None if self.is_stream else len(dataset),
        }
        self._start = {"step": 0, "epoch": 0, **_NOTHING_USED, **self._settings}
        self._position = position or self._start
        for name, value in self._settings.items():
            if self._position[name] != value:
                raise ValueError(
                    f"the position belongs to a run with {name} {self._position[name]}, this one "
                    f"has {value}: samples would be repeated or left out. Restore it, or start anew"
                )
        for number, size in enumerate([] if sizes is None else sizes.tolist()):
            with _naming(number):
                self._check(Size(*size))

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows of this rank, in a data worker over those that it makes."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        own = (
            (row, step.position) for step in self._plan(self._position) for row in self._hand(step)
        )
        for row, position in islice(own, first, None, stride):
            yield Row(
                self.planner.collate([_made(sample) for sample in row]),
                [sample.number for sample in row],
                [sample.size for sample in row],
                position,
            )

    def steps_per_epoch(self) -> list[int]:
        """Count the steps of each epoch, whose orders differ, by planning them from the first.

        Returns:
            The number of steps of each epoch.

        Raises:
            ValueError: if the number of epochs is not known; otherwise as iterating does.
        """
        if self.epochs is None:
            raise ValueError("epochs is None: the steps have no end to count to")
        steps = Counter(step.epoch for step in self._plan(self._start))
        return [steps[epoch] for epoch in range(self.epochs)]

    def _plan(self, position: Mapping[str, Any]) -> Iterator[_Step]:
        step, first = position["step"], position["epoch"]
        places, next_place = position["waiting"], position["next"]
        for epoch in count(first) if self.epochs is None else range(first, self.epochs):
            arriving = self._arriving(epoch, places, next_place)
            queue = _Queue(self.planner, arriving, len(places), next_place)
            if not queue.waiting:
                raise ValueError(f"the dataset ends before sample {next_place}")
            while rows := list(islice(queue, self.rows_per_step)):
                step += 1
                yield _Step(
                    epoch,
                    self._completed(rows),
                    {"step": step, **queue.position(epoch), **self._settings},
                )
            places, next_place = [], 0

    def _arriving(self, epoch: int, places: Sequence[int], next_place: int) -> Iterator[_Sample]:
        """Samples at these places in the order of an epoch, and all from the next place on."""
        if self.is_stream:
            first = min(places, default=next_place)
            for place, raw in enumerate(self._stream_from(first), first):
                if place >= next_place or place in places:
                    yield self._sample(place, place, raw)
            return
        order = np.arange(len(self.dataset))
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for place in chain(places, range(next_place, len(order))):
            index = int(order[place])
            yield self._sample(place, index, index)

    def _stream_from(self, first: int) -> Iterable[Any]:
        if hasattr(self.dataset, "skip"):
            return self.dataset.skip(first)
        return islice(self.dataset, first, None)

    def _sample(self, place: int, number: int, raw: Any) -> _Sample:
        with _naming(number):
            size = Size(*self._measured(raw))
            self._check(size)
        make = self.dataset.transform if self.is_stream else self.dataset.__getitem__
        return _Sample(place, number, size, partial(make, raw))

    def _check(self, size: Size) -> None:
        if size.targets == 0:
            raise ValueError("it has no supervised token: remove it from the data")
        self.planner.check(size)

    def _measured(self, raw: Any) -> Iterable[int]:
        return self.dataset.measure(raw) if self.sizes is None else self.sizes[raw].tolist()

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

    def _hand(self, step: _Step) -> list[list[_Sample]]:
        """The rows of a step that this rank gets: always the heaviest left to the least loaded."""
        hands: list[list[list[_Sample]]] = [[] for _ in range(self.world_size)]
        loads = [(0.0, hand) for hand in range(self.world_size)]
        for row in sorted(step.rows, key=self._work, reverse=True):
            load, hand = heapq.heappop(loads)
            hands[hand].append(row)
            if len(hands[hand]) < self.rows_per_step // self.world_size:
                heapq.heappush(loads, (load + self._work(row), hand))
        # Hand 0 tends to be the heaviest: hands go around
        return hands[(self.rank + step.position["step"]) % self.world_size]

    def _work(self, row: Sequence[_Sample]) -> float:
        return self.planner.work([sample.size for sample in row])


class _Queue:
    """Samples of an epoch that wait for a row, and an iterator over the rows they make.

    Whenever it stands still it holds as many as the planner wants to choose from.
    """

    def __init__(
        self, planner: Planner, arriving: Iterator[_Sample], first: int, next_place: int
    ) -> None:
        self.planner = planner
        self.arriving = arriving
        self.waiting = list(islice(arriving, first))
        self.next_place = next_place
        self._fill()

    def __iter__(self) -> "_Queue":
        return self

    def __next__(self) -> list[_Sample]:
        if not self.waiting:
            raise StopIteration
        taken = self.planner.take([sample.size for sample in self.waiting])
        row = [self.waiting[index] for index in taken]
        gone = set(taken)
        self.waiting = [x for index, x in enumerate(self.waiting) if index not in gone]
        self._fill()
        return row

    def _fill(self) -> None:
        missing = max(0, self.planner.lookahead - len(self.waiting))
        arrived = list(islice(self.arriving, missing))
        self.waiting += arrived
        self.next_place += len(arrived)

    def position(self, epoch: int) -> dict[str, Any]:
        """Where an epoch goes on: places of samples that wait, and the next one to arrive."""
        if not self.waiting:
            return {"epoch": epoch + 1, **_NOTHING_USED}
        places = [sample.place for sample in self.waiting]
        return {"epoch": epoch, "next": self.next_place, "waiting": places}


def _made(sample: _Sample) -> Mapping[str, Any]:
    with _naming(sample.number):
        made = sample.make()
    patches = made["encoder_input"]["vision"]["patches"] if "encoder_input" in made else ()
    targets = len(made["labels"]) - 1 - made["labels"][1:].count(CROSS_ENTROPY_IGNORE_IDX)
    size = Size(len(made["tokens"]), len(patches), targets)
    if size != sample.size:
        now, before = (
            f"{s.tokens} tokens, {s.patches} patches and {s.targets} supervised tokens"
            for s in (size, sample.size)
        )
        raise RuntimeError(
            f"sample {sample.number} of the dataset has {now}, but had {before} when it was "
            "measured: it has changed since; measure the dataset anew"
        )
    return made


@contextmanager
def _naming(number: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"sample {number} of the dataset: {error}") from error
