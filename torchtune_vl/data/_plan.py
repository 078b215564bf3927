"""The rows of a whole run, planned once by one process, in files that all others map."""

import json
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_vl._numba import compiled
from torchtune_vl.data._packing import Planner, Size, planner_of, settings_of

# A sample of a row with its size: what a row needs lies in one place of the file
ENTRY = np.dtype([("sample", "i4"), ("tokens", "i4"), ("patches", "i4"), ("targets", "i4")])
_ENTRIES_AT_ONCE = 2**20
# Of so many random orders of an epoch's rows the most even is taken; of many rows any is even
_ORDERS = 64
_ROWS_OF_ALL_ORDERS = 10**6
# Samples in the order of their rows, and where each row ends
_Rows = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Draws:
    """Which samples of several sources, which lie one behind the other, an epoch has.

    Args:
        lengths: how many samples each source has.
        repeats: how often an epoch has each sample of a source. Of 1.5, an epoch has half of them
            twice and the next one the others: over a run, none comes more than once oftener than
            another of its source.
    """

    lengths: Sequence[int]
    repeats: Sequence[float]

    def of_epoch(self, epoch: int, sizes: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Draw indices, int32, of samples that have tokens, in a random order if shuffled."""
        parts = [np.empty(0, np.int32)]
        starts = accumulate(self.lengths, initial=0)
        for source, (start, length) in enumerate(zip(starts, self.lengths, strict=False)):
            usable = np.arange(start, start + length, dtype=np.int32)
            if not sizes[start : start + length, 0].all():
                usable = usable[sizes[start : start + length, 0] > 0]
            per_epoch = self.repeats[source] * len(usable)
            bounds = round(epoch * per_epoch), round((epoch + 1) * per_epoch)
            parts += _passes(usable, *bounds, (seed, source) if shuffle else None)
        if len(parts) == 2:
            return parts[1]
        drawn = np.concatenate(parts)
        if shuffle:
            np.random.default_rng((seed, epoch)).shuffle(drawn)
        return drawn


def _passes(
    samples: np.ndarray, start: int, stop: int, seed: tuple[int, int] | None
) -> Iterator[np.ndarray]:
    """A part of endless passes through samples, each in an order of its own."""
    length = len(samples)
    for number in range(start // length, -(-stop // length)) if length else ():
        order = samples
        if seed is not None:
            order = samples.copy()
            np.random.default_rng((*seed, number)).shuffle(order)
        yield order[max(start - number * length, 0) : stop - number * length]


@dataclass(frozen=True)
class Plan:
    """The rows of all steps that a run has, or has left, in the files of a directory.

    One process makes them, and those of all ranks map them: what a process holds in memory is what
    it has read lately, and does not grow with the number of samples.
    """

    directory: Path

    @classmethod
    def make(
        cls,
        directory: Path,
        planner: Planner,
        sizes: np.ndarray,
        *,
        rows_per_step: int,
        draws: Draws | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        max_steps: int | None = None,
        position: Mapping[str, Any] | None = None,
    ) -> "Plan":
        """Plan the rows of a run and write them down.

        They come in a random order, large and small samples evenly over the epoch. Not shuffled, an
        epoch is planned in pieces of ``planner.lookahead`` samples, and only the rows of a piece
        come in a random order.

        Args:
            directory: of the files, which are written anew.
            planner: :class:`PackedRows` or :class:`PaddedRows`.
            sizes: int32 [samples, 3], the :class:`Size` of each sample; those of no tokens are
                left out.
            rows_per_step: rows of a step, over all ranks. Those that the last step of an epoch
                lacks come from dividing others, or else are empty.
            draws: which samples an epoch has, by default each once.
            seed: of the order, >= 0.
            shuffle: whether each epoch has an order of its own, instead of the dataset's.
            epochs: how often to go through the dataset; None: until ``max_steps``.
            max_steps: the step whose epoch is the last to be planned; None: that of ``epochs``.
            position: of the last step that was taken, to go on behind it; with another planner or
                ``rows_per_step`` the rest of its epoch is planned anew.

        Raises:
            ValueError: if there are no samples, one exceeds a row or has no supervised token, or
                the position is that of a run on other data or behind the last epoch.
        """
        if epochs is None and max_steps is None:
            raise ValueError("a plan needs an end: give epochs or max_steps")
        if bad := unusable(planner, sizes):
            raise ValueError(bad[0][1])
        if not sizes[:, 0].any():
            raise ValueError("the dataset has no samples")
        identity = {"seed": seed, "shuffle": shuffle, "samples": len(sizes)}
        start = {"step": 0, "epoch": 0, "has_begun": False, "had_media": False, **identity}
        position = {**(position or start)}
        check_identity(position, identity)
        _check_epochs(position, epochs)
        draws = draws or Draws([len(sizes)], [1.0])
        planning = _Planning(planner, rows_per_step, sizes, draws, seed, shuffle)
        step, plans, planned = position["step"], position.get("plans", []), []
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "plan.json").unlink(missing_ok=True)
        entries_path, ends_path = directory / "entries", directory / "ends"
        with entries_path.open("wb") as entries, ends_path.open("wb") as ends:
            np.zeros(1, np.int64).tofile(ends)
            numbers = count(position["epoch"])
            for epoch in numbers if epochs is None else range(position["epoch"], epochs):
                if max_steps is not None and step >= max_steps:
                    break
                if not plans or plans[-1][0] != planning.settings:
                    plans = [*plans, [planning.settings, 0]]
                samples, row_ends = planning.rows_of_epoch(epoch, plans)
                (row_ends + np.int64(entries.tell() // ENTRY.itemsize)).tofile(ends)
                _write_entries(samples, sizes, entries)
                before, step = step, step + len(row_ends) // rows_per_step
                planned.append({"epoch": epoch, "before": before, "last": step, "plans": plans})
                plans = []
        plan = cls(directory)
        row = plan._first_row_with_media()
        facts = {
            "position": position,
            "identity": identity,
            "epochs": planned,
            "rows_per_step": rows_per_step,
            "source_ends": [*accumulate(draws.lengths)],
            "first_with_media": None
            if row is None
            else position["step"] + 1 + row // rows_per_step,
        }
        (directory / "plan.json").write_text(json.dumps(facts))
        return plan

    def wait(self, seconds: float = 60) -> None:
        """Wait until this process sees the files: other machines of a cluster may take a while."""
        path = self.directory / "plan.json"
        end = time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > end:
                problem = f"{path}, which the first process wrote, is not there"
                raise ValueError(f"{problem}: set output_dir to one that all machines share")
            time.sleep(0.1)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return json.loads((self.directory / "plan.json").read_text())

    @cached_property
    def entries(self) -> np.ndarray:
        """All samples with their sizes, of the type ``ENTRY``, in the order of their rows."""
        return _mapped(self.directory / "entries", ENTRY)

    @cached_property
    def ends(self) -> np.ndarray:
        """0, and then where each row ends in ``entries``, int64 [rows + 1]."""
        return _mapped(self.directory / "ends", np.dtype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}  # another process maps the files itself

    @property
    def rows_per_step(self) -> int:
        """How many rows a step has, over all ranks."""
        return self._facts["rows_per_step"]

    @property
    def first_step(self) -> int:
        """The number of the first step that is planned; the first of a run is 1."""
        return self._facts["position"]["step"] + 1

    @property
    def last_step(self) -> int:
        """The number of the last step that is planned."""
        return self.first_step - 1 + (len(self.ends) - 1) // self.rows_per_step

    def rows(self, step: int) -> list[np.ndarray]:
        """The rows of a step over all ranks, each of the type ``ENTRY``."""
        first = (step - self.first_step) * self.rows_per_step
        bounds = self.ends[first : first + self.rows_per_step + 1].tolist()
        entries = self.entries[bounds[0] : bounds[-1]]
        return np.split(entries, np.subtract(bounds[1:-1], bounds[0]))

    def source(self, sample: int) -> int:
        """The number of the source that a sample is of."""
        return bisect_right(self._facts["source_ends"], sample)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return self._epoch_of(step)["epoch"]

    def position(self, step: int) -> dict[str, Any]:
        """The position in the epoch after a step, from where :meth:`make` goes on.

        It has values that JSON can hold, the same on all ranks. ``step`` counts the steps so far,
        ``epoch`` is that of the next, ``has_begun`` tells whether other steps of this epoch are
        done, and ``had_media`` whether any step so far had images or videos.
        """
        if step < self.first_step:
            return self._facts["position"]
        epoch = self._epoch_of(step)
        position = {"step": step, "had_media": self.has_media(step), **self._facts["identity"]}
        if step == epoch["last"]:
            return {**position, "epoch": epoch["epoch"] + 1, "has_begun": False}
        # Pairs of settings and how many steps of the epoch were taken with them
        *plans, (settings, done) = epoch["plans"]
        plans += [[settings, done + step - epoch["before"]]]
        return {**position, "epoch": epoch["epoch"], "has_begun": True, "plans": plans}

    def has_media(self, last_step: int) -> bool:
        """Whether any step up to this number, before the plan too, has images or videos."""
        first = self._facts["first_with_media"]
        return self._facts["position"]["had_media"] or (first is not None and first <= last_step)

    def _epoch_of(self, step: int) -> dict[str, Any]:
        epochs = self._facts["epochs"]
        return epochs[bisect_left(epochs, step, key=lambda epoch: epoch["last"])]

    def _first_row_with_media(self) -> int | None:
        for first in range(0, len(self.entries), _ENTRIES_AT_ONCE):
            found = np.flatnonzero(self.entries["patches"][first : first + _ENTRIES_AT_ONCE])
            if len(found):
                return int(np.searchsorted(self.ends, first + found[0], side="right")) - 1
        return None


def unusable(planner: Planner, sizes: np.ndarray) -> list[tuple[int, str]]:
    """Index and reason of samples that exceed a row or have no supervised token.

    ``sizes`` are those of :meth:`Plan.make`; samples of no tokens are not looked at.
    """
    present = sizes[:, 0] > 0
    if not present.any():
        return []
    # No sample has more, or fewer targets, and millions are slow to check one by one
    least_targets = sizes[:, 2].min(where=present, initial=np.iinfo(sizes.dtype).max)
    tokens, patches, _ = sizes.max(axis=0).tolist()
    if reason_against(planner, Size(tokens, patches, int(least_targets))) is None:
        return []
    found = (
        (i, reason_against(planner, Size(*sizes[i].tolist())))
        for i in np.flatnonzero(present).tolist()
    )
    return [(i, f"sample {i}: {reason}") for i, reason in found if reason]


def reason_against(planner: Planner, size: Size) -> str | None:
    """Tell why a sample of this size cannot be trained on, None if it can."""
    if size.targets == 0:
        return "it has no supervised token: remove it from the data"
    try:
        planner.check(size)
    except ValueError as error:
        return str(error)
    return None


def check_identity(position: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a position is that of another run."""
    for name, value in identity.items():
        if position.get(name) != value:
            raise ValueError(
                f"the position belongs to a run with {name} {position.get(name)}, this one has "
                f"{value}: samples would be repeated or left out. Restore it, or start anew"
            )


def _check_epochs(position: Mapping[str, Any], epochs: int | None) -> None:
    begun = position["epoch"] + position["has_begun"]
    if epochs is not None and begun > epochs:
        problem = f"the run is in epoch {begun}, but was told to end after {epochs}"
        raise ValueError(f"{problem}: set epochs to {begun} or more")


@dataclass
class _Planning:
    """Plans epochs, each from what the run is alone."""

    planner: Planner
    rows_per_step: int
    sizes: np.ndarray
    draws: Draws
    seed: int
    shuffle: bool

    @property
    def settings(self) -> dict[str, Any]:
        return {"rows_per_step": self.rows_per_step, "rows": settings_of(self.planner)}

    def rows_of_epoch(self, epoch: int, plans: Sequence[Sequence[Any]]) -> _Rows:
        """The samples of an epoch, row by row, that are left after these steps of these plans."""
        drawn = self.draws.of_epoch(epoch, self.sizes, self.seed, self.shuffle)
        rows: _Rows = np.empty(0, np.int32), np.empty(0, np.int32)
        for number, (settings, done) in enumerate(plans, 1):
            # All but those of the first steps of the plan before, in the order of the epoch
            drawn = drawn if number == 1 else drawn[np.sort(rows[0])]
            planner = self.planner if settings == self.settings else planner_of(**settings["rows"])
            rows = self._planned(planner, drawn, (self.seed, epoch, number))
            rows = _without_first(*rows, done * settings["rows_per_step"])
        places, ends = self._completed(*rows, drawn)
        return drawn[places], ends

    def _planned(self, planner: Planner, drawn: np.ndarray, seed: tuple[int, ...]) -> _Rows:
        """Rows as places in what is drawn."""
        if self.shuffle:
            return evenly(*planner.plan(self.sizes, drawn), drawn, self.sizes, seed)
        if planner.lookahead is None:
            return planner.plan(self.sizes, drawn)
        waiting, all_places, all_ends = np.empty(0, np.int32), [], []
        for first in range(0, len(drawn), planner.lookahead):
            new = np.arange(first, min(first + planner.lookahead, len(drawn)), dtype=np.int32)
            waiting = np.concatenate([waiting, new])
            places, ends = planner.plan(self.sizes, drawn[waiting])
            # The last row may not be full: its samples wait for others
            full = ends if new[-1] + 1 == len(drawn) else ends[:-1]
            stop = full[-1] if len(full) else 0
            rest = np.sort(places[stop:])
            seeds = (*seed, first)
            places, full = evenly(places[:stop], full, drawn[waiting], self.sizes, seeds)
            all_places.append(waiting[places])
            all_ends.append(full + sum(map(len, all_places[:-1])))
            waiting = waiting[rest]
        return np.concatenate(all_places), np.concatenate(all_ends)

    def _completed(self, places: np.ndarray, ends: np.ndarray, drawn: np.ndarray) -> _Rows:
        """The rows of an epoch's last step, made as many as those of the others."""
        kept = len(ends) - len(ends) % self.rows_per_step
        if kept == len(ends):
            return places, ends
        start = ends[kept - 1] if kept else 0
        rows = np.split(places[start:], ends[kept:-1] - start)

        def work(row: np.ndarray) -> float:
            tokens, patches, _ = self.sizes[drawn[row]].T
            return self.planner.work(tokens, patches)

        while len(rows) < self.rows_per_step:
            divisible = [row for row in rows if len(row) > 1]
            if not divisible:
                rows += [places[:0]] * (self.rows_per_step - len(rows))
                break
            heaviest = max(divisible, key=work)
            rows = [row for row in rows if row is not heaviest]
            rows += [heaviest[::2], heaviest[1::2]]
        last_ends = start + np.cumsum([len(row) for row in rows], dtype=np.int32)
        return np.concatenate([places[:start], *rows]), np.concatenate([ends[:kept], last_ends])


def _without_first(places: np.ndarray, ends: np.ndarray, rows: int) -> _Rows:
    if rows == 0:
        return places, ends
    return places[ends[rows - 1] :], ends[rows:] - ends[rows - 1]


def evenly(
    places: np.ndarray,
    ends: np.ndarray,
    drawn: np.ndarray,
    sizes: np.ndarray,
    seed: tuple[int, ...],
) -> _Rows:
    """Rows, as places in what is drawn, in a random order: small samples neither early nor late.

    Packing leaves the smallest samples to few rows, which in some orders are all early or late.
    """
    if len(ends) < 2:
        return places, ends
    excess = _excess(places, ends, drawn, np.asarray(sizes))
    random = np.random.default_rng(seed)
    middle = (len(ends) - 1) / 2
    least, order = np.inf, ends
    for _ in range(min(_ORDERS, 1 + _ROWS_OF_ALL_ORDERS // len(ends))):
        place_of_row = random.permutation(len(ends)).astype(np.int32)
        unevenness = np.abs((place_of_row - middle) @ excess).max()
        if unevenness < least:
            least, order = unevenness, place_of_row
    return _rearranged(places, ends, order.argsort())


@compiled
def _excess(places, ends, drawn, sizes):  # type: ignore[no-untyped-def]
    """By how many deviations of a sample's size a row's samples exceed the mean, together."""
    sums, squares = np.zeros(3), np.zeros(3)
    for sample in drawn:
        for kind in range(3):
            size = float(sizes[sample, kind])
            sums[kind] += size
            squares[kind] += size * size
    means = sums / len(drawn)
    deviations = np.sqrt(np.maximum(squares / len(drawn) - means * means, 1.0))
    excess = np.zeros((len(ends), 3))
    start = 0
    for row, end in enumerate(ends):
        for place in range(start, end):
            for kind in range(3):
                size = float(sizes[drawn[places[place]], kind])
                excess[row, kind] += (size - means[kind]) / deviations[kind]
        start = end
    return excess


@compiled
def _rearranged(places, ends, rows):  # type: ignore[no-untyped-def]
    """The same rows in another order."""
    new_places, new_ends = np.empty_like(places), np.empty_like(ends)
    done = 0
    for number, row in enumerate(rows):
        start = ends[row - 1] if row else 0
        length = ends[row] - start
        new_places[done : done + length] = places[start : ends[row]]
        done += length
        new_ends[number] = done
    return new_places, new_ends


def _write_entries(samples: np.ndarray, sizes: np.ndarray, file: Any) -> None:
    for first in range(0, len(samples), _ENTRIES_AT_ONCE):
        part = samples[first : first + _ENTRIES_AT_ONCE]
        entries = np.empty(len(part), ENTRY)
        entries["sample"] = part
        entries["tokens"], entries["patches"], entries["targets"] = sizes[part].T
        entries.tofile(file)


def _mapped(path: Path, kind: np.dtype) -> np.ndarray:
    """What a file holds; a file without anything cannot be mapped."""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
