"""Datasets whose questions have one numbering."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import xxhash
from torch.utils.data import ConcatDataset

from torchtune_vl.datasets import VisionChatDataset

SOURCE = "source"


class Sources:
    """Tables of conversations behind each other, whose column ``source`` has their names."""

    def __init__(self, datasets: Sequence[VisionChatDataset], names: Sequence[str]) -> None:
        self._datasets = datasets
        self._names = names
        self._ends = ConcatDataset.cumsum(datasets)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def records(self) -> str:
        """Tells the records from others; media that they name by path are not looked at."""
        digest = xxhash.xxh3_64()
        for dataset in self._datasets:
            for record in dataset.digests(range(len(dataset))):
                digest.update(record)
        return digest.hexdigest()

    @property
    def reading(self) -> str:
        """Tells how records become prompts."""
        each = [dataset.fingerprint for dataset in self._datasets]
        return xxhash.xxh3_64_hexdigest(repr(each).encode("utf-8", "surrogatepass"))

    def read(self, index: int) -> dict[str, Any]:
        """Read a sample as a transform takes it."""
        source, own = self._of(index)
        return self._datasets[source].read(own)

    def column(self, index: int, name: str) -> Any:
        """Return what a sample's record has in a column, None if it has none of that name."""
        source, own = self._of(index)
        return self._names[source] if name == SOURCE else self._datasets[source].column(own, name)

    def _of(self, index: int) -> tuple[int, int]:
        source = bisect_right(self._ends, index)
        return source, index - (self._ends[source - 1] if source else 0)
