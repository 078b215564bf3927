"""Several datasets that a run draws its samples from."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from torchtune_vl.data import Draws
from torchtune_vl.datasets._sample_sizes import Measurements


@dataclass(frozen=True)
class Mixture:
    """Datasets, all tables or all streams, and how often a run draws from each.

    Args:
        datasets: whose samples have one numbering, in this order.
        names: of the datasets, for the log.
        weights: the share of each dataset in the samples, whatever their sum, or none.
        epochs: how often an epoch has each sample of a dataset, instead of weights; None for once.
        temperature: without either, each dataset's share is as its number of samples to the power
            of 1 / temperature: 1 for each sample once, and the larger, the more equal shares.

    Raises:
        ValueError: if these settings contradict each other.
    """

    datasets: Sequence[Any]
    names: Sequence[str]
    weights: Sequence[float | None]
    epochs: Sequence[float | None]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if len({*self.names}) < len(self.names):
            raise ValueError(f"the datasets have the names {[*self.names]}: make them differ")
        weighted = sum(weight is not None for weight in self.weights)
        repeated = any(epochs is not None for epochs in self.epochs)
        streams = sum(not hasattr(dataset, "__getitem__") for dataset in self.datasets)
        several = len(self.datasets) > 1
        refusals = {
            "some datasets are tables and some are streams: set streaming for all or for none": (
                0 < streams < len(self.datasets)
            ),
            "some datasets have a weight and some have none: give it to all or to none": (
                0 < weighted < len(self.datasets)
            ),
            "datasets have weight and epochs: give one of them": bool(weighted) and repeated,
            "sampling_temperature is for datasets without weight and epochs: leave it at 1": (
                self.temperature != 1 and bool(weighted or repeated or not several)
            ),
            "streams have no known end: give each a weight instead of epochs": (
                bool(streams) and (repeated or (several and not weighted))
            ),
        }
        for sentence, is_wrong in refusals.items():
            if is_wrong:
                raise ValueError(sentence)

    @cached_property
    def is_stream(self) -> bool:
        """Whether nobody knows how many samples there are."""
        return not hasattr(self.datasets[0], "__getitem__")

    @property
    def augments(self) -> bool:
        """Whether any dataset augments its samples."""
        return any(getattr(dataset, "augments", False) for dataset in self.datasets)

    def name_of(self, index: int) -> str:
        """The name of the dataset that a sample is of, "" if there is one only."""
        ends = [*accumulate(len(dataset) for dataset in self.datasets)]
        return self.names[bisect_right(ends, index)] if len(ends) > 1 else ""

    @cached_property
    def table(self) -> Any:
        """All samples behind each other."""
        return self.datasets[0] if len(self.datasets) == 1 else _Joined(self.datasets, self.names)

    def with_place(self, index: int, reason: str) -> str:
        """A reason against a sample, with the file and line that it is from if they are known."""
        place = self.table.origin(index)[1] if hasattr(self.table, "origin") else ""
        return f"{reason} ({place})" if place else reason

    def measured(self, found: Sequence[Measurements]) -> Measurements:
        """What was found of each dataset, as of one."""
        joined = Measurements.joined(found)
        if len(found) > 1:
            starts = accumulate((len(x.sizes) for x in found), initial=0)
            each = [*zip(starts, self.names, found, strict=False)]
            joined.bad = [
                (start + index, f"sample {start + index}: {name}: {reason}")
                for start, name, of_dataset in each
                for index, reason in of_dataset.bad
            ]
        return joined

    def is_drawable(self, sizes: np.ndarray) -> bool:
        """Whether each dataset has a sample to train on."""
        return all(self._usable(sizes))

    def _usable(self, sizes: np.ndarray) -> list[int]:
        parts = np.split(sizes, np.cumsum([len(dataset) for dataset in self.datasets])[:-1])
        return [int(np.count_nonzero(part[:, 0])) for part in parts]

    def draws(self, sizes: np.ndarray) -> Draws:
        """Which samples an epoch has; ``sizes`` are of all, those of no tokens are left out.

        Raises a ValueError if a dataset has no sample to train on.
        """
        lengths, usable = [len(dataset) for dataset in self.datasets], self._usable(sizes)
        if not self.is_drawable(sizes):
            name = self.names[usable.index(0)]
            raise ValueError(
                f"the dataset {name!r} has no sample to train on: `tune-vl check` tells why; "
                "correct it, or leave it out"
            )
        if any(epochs is not None for epochs in self.epochs):
            return Draws(lengths, [1.0 if x is None else x for x in self.epochs])
        weights = [n if w is None else w for n, w in zip(usable, self.weights, strict=True)]
        if self.temperature == 1 and self.weights[0] is None:
            return Draws(lengths, [1.0] * len(lengths))
        shares = np.power(np.array(weights, np.float64), 1 / self.temperature)
        drawn = shares / shares.sum() * sum(usable)
        return Draws(lengths, (drawn / usable).tolist())


class _Joined(ConcatDataset[Any]):
    """Datasets behind each other, whose errors name them."""

    def __init__(self, datasets: Sequence[Any], names: Sequence[str]) -> None:
        super().__init__(datasets)
        self._names = names

    def __getitem__(self, index: int) -> Any:
        return self._of_source(index, lambda dataset, own: dataset[own])

    def origin(self, index: int) -> tuple[Any, str]:
        """The ``id`` of a sample, and its place with the name of its dataset."""

        def find(dataset: Any, own: int) -> tuple[Any, str]:
            return dataset.origin(own) if hasattr(dataset, "origin") else (own, "")

        name, place = self._of_source(index, find)
        source = self._names[bisect_right(self.cumulative_sizes, index)]
        return name, f"{source}: {place}" if place else source

    def augmented(self, index: int, epoch: int) -> Any:
        """A sample as its dataset augments it in an epoch."""

        def make(dataset: Any, own: int) -> Any:
            return dataset.augmented(own, epoch) if hasattr(dataset, "augmented") else dataset[own]

        return self._of_source(index, make)

    def _of_source(self, index: int, make: Callable[[Any, int], Any]) -> Any:
        source = bisect_right(self.cumulative_sizes, index)
        own = index - self.cumulative_sizes[source - 1] if source else index
        try:
            return make(self.datasets[source], own)
        except ValueError as error:
            raise ValueError(f"sample {index}: {self._names[source]}: {error}") from error
