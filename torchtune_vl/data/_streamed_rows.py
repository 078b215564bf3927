"""The rows of one rank from streams, whose length nobody knows and which are read only once."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from torchtune_vl.data._packing import Planner, Size, settings_of
from torchtune_vl.data._plan import check_identity, evenly, reason_against
from torchtune_vl.data._row_shares import RowSharing
from torchtune_vl.data._training_rows import Ingredient, Row, make_row, rows_of_each_rank
from torchtune_vl.media._errors import naming_sample

# Of samples that are taken as they come
_LOOKAHEAD = 64
_DRAWS_AT_ONCE = 1024


class Stream(Protocol):
    """Samples of which nobody knows how many there are.

    Args:
        augments: whether samples may be smaller than they were measured.
    """

    @property
    def augments(self) -> bool: ...

    def part(self, number: int, of: int) -> "Stream":
        """One of so many parts, which together have each sample once."""

    def skip(self, count: int) -> "Stream":
        """All but so many at the beginning."""

    def raw(self) -> Iterable[Any]:
        """The samples as they are read, without looking at them."""

    def measure_raw(self, raw: Any) -> Sequence[int]:
        """The :class:`Size` of a sample, or ``ValueError``."""

    def make_raw(self, raw: Any, epoch: int) -> Mapping[str, Any]:
        """Make what collate functions take in a pass through the stream, or ``ValueError``."""


# Which sample it is: of which stream, in which pass through the lane's part, and its place there
_Name = tuple[int, int, int]


class _Sample(NamedTuple):
    name: _Name
    raw: Any
    size: Size


class _Row(NamedTuple):
    samples: list[_Sample]
    bad: list[tuple[int, str]]  # that were found on the way to it
    state: dict[str, Any]  # of the lane behind it


@dataclass(eq=False, repr=False)
class StreamedRows(IterableDataset[Row]):
    """The rows that one rank trains on of streams, for ``DataLoader(rows, batch_size=None)``.

    The streams are divided into lanes, each a part of every stream, which is packed for itself: the
    rows of a step come from one lane after another. There are as many lanes as it takes for each
    data worker of each rank to have its own, and to read and measure that alone. A run keeps its
    lanes, and so its rows, when it goes on with other ranks and workers. Each lane goes through its
    part of a stream again and again.

    Args:
        streams: of which a lane draws samples at random.
        planner: :class:`PackedRows` or :class:`PaddedRows`.
        rows_per_step: rows of a step, over all ranks, which must be able to share them equally.
        weights: how often each stream is drawn from, whatever their sum.
        rank: number of this rank among the ``world_size`` that get different rows.
        world_size: how many these are.
        num_workers: data workers of each rank, to find how many lanes a new run has.
        seed: of the draws and the order of rows, >= 0.
        position: of :meth:`position_after`, after the last step that was taken; with another
            planner what a lane had planned is planned anew.
        skips_bad: whether samples that cannot be measured or made are left out, and told by a row.
        sharing: how this device takes its share of a row; by default it has rows of its own.

    Raises:
        ValueError: if ranks cannot share a step, or the position is of a run with another seed or
            other streams; from iterating, if a sample cannot be measured or made, does not have the
            size that was measured or exceeds a row, or a part has no samples.
    """

    streams: Sequence[Stream]
    planner: Planner
    _: KW_ONLY
    rows_per_step: int
    weights: Sequence[float] = (1.0,)
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    seed: int = 0
    position: Mapping[str, Any] | None = None
    skips_bad: bool = False
    sharing: RowSharing | None = None

    def __post_init__(self) -> None:
        self._shares = tuple(weight / sum(self.weights) for weight in self.weights)
        rows_per_rank = rows_of_each_rank(self.rows_per_step, self.world_size)
        workers = max(self.num_workers, 1)
        lanes = self.rows_per_step * workers // math.gcd(rows_per_rank, workers)
        start = {"step": 0, "rows": 0, "epoch": 0, "has_begun": False, "had_media": False}
        self._identity = {"seed": self.seed, "streams": len(self.streams)}
        self._start = dict(self.position or {**start, **self._identity, "lanes": [None] * lanes})
        check_identity(self._start, self._identity)
        # A plan of nothing: what plans is compiled here and now, and not by each data worker
        self.planner.plan(np.zeros((0, 3), np.int32), np.zeros(0, np.int32))

    def __iter__(self) -> Iterator[Row]:
        """Iterate without end over the rows of this rank, in a worker over those that it makes."""
        states = self._start["lanes"]
        lanes: dict[int, Iterator[_Row]] = {}
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        rows_per_rank = self.rows_per_step // self.world_size
        while True:
            step, place = divmod(number, rows_per_rank)
            row = step * self.rows_per_step + self.rank * rows_per_rank + place
            taken, lane = divmod(self._start["rows"] + row, len(states))
            if lane not in lanes:
                lanes[lane] = self._lane(lane, states[lane])
            # Those between, if any, are another worker's
            found = next(row for row in lanes[lane] if row.state["taken"] == taken + 1)
            position = {"step": self._start["step"] + step + 1, "lane": lane, "state": found.state}
            ingredients = (self._ingredient(sample, lane) for sample in found.samples)
            yield make_row(
                *(ingredients, self.planner, self.skips_bad, position, None, found.bad),
                sharing=self.sharing,
            )
            number += stride

    def position_after(
        self, step: int, had_media: bool, states: Iterable[Mapping[int, dict[str, Any]]]
    ) -> dict[str, Any]:
        """The position after a step, of the newest states of lanes that each rank has from rows.

        It has the keys of :meth:`Plan.position`, where ``epoch`` counts how often rows have gone
        through all of the streams.
        """
        lanes = [*self._start["lanes"]]
        for lane, state in (pair for of_rank in states for pair in of_rank.items()):
            if lanes[lane] is None or lanes[lane]["taken"] < state["taken"]:
                lanes[lane] = state
        rows = self._start["rows"] + (step - self._start["step"]) * self.rows_per_step
        epoch = min(_first_pass_left(state) if state else 0 for state in lanes)
        position = {"step": step, "rows": rows, "lanes": lanes, "had_media": had_media}
        return {**position, "epoch": epoch, "has_begun": True, **self._identity}

    def _ingredient(self, sample: _Sample, lane: int) -> Ingredient:
        source, epoch, place = sample.name
        stream = self.streams[source]
        make = partial(stream.make_raw, sample.raw, epoch)
        number = self._number(lane, place)
        return Ingredient(number, sample.size, source, make, is_exact=not stream.augments)

    def _number(self, lane: int, place: int) -> int:
        return place * len(self._start["lanes"]) + lane

    def _lane(self, lane: int, state: dict[str, Any] | None) -> Iterator[_Row]:
        """The rows of a lane behind a state, and the state behind each."""
        settings = settings_of(self.planner)
        start = {"taken": 0, "drawn": 0, "cursors": [[0, 0]] * len(self.streams), "waiting": []}
        state = state or {**start, "rows": [], "settings": settings}
        taken, drawn = state["taken"], state["drawn"]
        known, parts = self._recovered(lane, state)
        rows = deque([known[tuple(name)] for name in row] for row in state["rows"])
        waiting = [known[tuple(name)] for name in state["waiting"]]
        if state["settings"] != settings:
            waiting, rows = [*chain(*rows), *waiting], deque()
        bad: list[tuple[int, str]] = []
        lookahead = self.planner.lookahead or _LOOKAHEAD
        while True:
            while not rows:
                for _ in range(lookahead):
                    name, raw = next(parts[self._source(lane, drawn)])
                    drawn += 1
                    try:
                        waiting.append(self._measured(lane, name, raw))
                    except ValueError as error:
                        if not self.skips_bad:
                            raise
                        bad.append((self._number(lane, name[2]), str(error)))
                        if not waiting and name[1] > 1:  # each was looked at twice
                            raise ValueError(f"no sample can be trained on: {error}") from error
                if waiting:
                    rows, waiting = self._planned(waiting, (self.seed, lane, drawn))
            row = rows.popleft()
            taken += 1
            state = {
                **{"taken": taken, "drawn": drawn, "settings": settings},
                "cursors": [[part.epoch, part.place] for part in parts],
                "waiting": [sample.name for sample in waiting],
                "rows": [[sample.name for sample in row] for row in rows],
            }
            yield _Row(row, bad, state)
            bad = []

    def _planned(
        self, waiting: list[_Sample], seed: tuple[int, ...]
    ) -> tuple[deque[list[_Sample]], list[_Sample]]:
        """Rows, in a random order, and the samples of one that may not be full, which wait."""
        sizes = np.array([sample.size for sample in waiting], np.int32)
        drawn = np.arange(len(waiting), dtype=np.int32)
        places, ends = self.planner.plan(sizes, drawn)
        stop = ends[-2] if len(ends) > 1 else 0
        left = [waiting[place] for place in np.sort(places[stop:])]
        if self.planner.lookahead is None:
            places, ends = places[:stop], ends[:-1]
        else:
            places, ends = evenly(places[:stop], ends[:-1], drawn, sizes, seed)
        rows = np.split(places, ends[:-1]) if len(ends) else []
        return deque([waiting[place] for place in row] for row in rows), left

    def _measured(self, lane: int, name: _Name, raw: Any) -> _Sample:
        source, _, place = name
        with naming_sample(self._number(lane, place)):
            size = Size(*self.streams[source].measure_raw(raw))
            if reason := reason_against(self.planner, size):
                raise ValueError(reason)
        return _Sample(name, raw, size)

    def _source(self, lane: int, drawn: int) -> int:
        """Which stream the next sample of a lane is of."""
        if len(self.streams) == 1:
            return 0
        block, place = divmod(drawn, _DRAWS_AT_ONCE)
        return _draws(self._shares, self.seed, lane, block)[place]

    def _recovered(
        self, lane: int, state: Mapping[str, Any]
    ) -> tuple[dict[_Name, _Sample], list["_Part"]]:
        """The samples that a state names, and parts of the streams behind all that were read."""
        names = {tuple(name) for name in chain(state["waiting"], *state["rows"])}
        known: dict[_Name, _Sample] = {}
        parts = []
        for source, stream in enumerate(self.streams):
            cursor = tuple(state["cursors"][source])
            first = min((name[1:] for name in names if name[0] == source), default=cursor)
            part = _Part(stream.part(lane, len(self._start["lanes"])), source, *first)
            while (part.epoch, part.place) < cursor:
                name, raw = next(part)
                if name in names:
                    known[name] = self._measured(lane, name, raw)
            parts.append(part)
        if missing := names - known.keys():
            number = self._number(lane, min(missing)[2])
            raise ValueError(f"the stream ends before sample {number}, which was read before")
        return known, parts


def _first_pass_left(state: Mapping[str, Any]) -> int:
    """The pass of a lane's first sample that is in no row yet: many more may have been read."""
    left = [epoch for _, epoch, _ in chain(state["waiting"], *state["rows"])]
    return min([*left, *(epoch for epoch, _ in state["cursors"])])


@lru_cache
def _draws(shares: tuple[float, ...], seed: int, lane: int, block: int) -> list[int]:
    random = np.random.default_rng((seed, lane, block))
    return random.choice(len(shares), _DRAWS_AT_ONCE, p=shares).tolist()


@dataclass
class _Part:
    """The samples of a part of a stream, again and again, from a pass and a place in it."""

    stream: Stream
    source: int
    epoch: int
    place: int

    def __post_init__(self) -> None:
        self._left = iter(self.stream.skip(self.place).raw())

    def __next__(self) -> tuple[_Name, Any]:
        for raw in self._left:
            name = self.source, self.epoch, self.place
            self.place += 1
            return name, raw
        if self.place == 0:
            raise ValueError(
                "a part of a stream has no samples: lower num_workers or rows_per_step, of which "
                "there are as many parts, or read it as a table, without streaming"
            )
        self.epoch, self.place = self.epoch + 1, 0
        self._left = iter(self.stream.raw())
        return next(self)
