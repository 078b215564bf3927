"""The sizes of all samples, before training begins."""

import logging
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from torchtune_vl.data._data_workers import loading
from torchtune_vl.datasets._record_cache import Kept, RecordCache
from torchtune_vl.media._errors import naming_sample

# Sending a batch from a worker costs as much as measuring some samples
_BATCH_SIZE = 512
# So many are kept at a time, and at most so many measured in vain if the process is killed
_NUM_KEPT_AT_ONCE = 10_000
_NUM_SHOWN = 20

_log = logging.getLogger(__name__)


# What `Measured` counts, as a cache keeps it
_COUNTS = struct.Struct("<7q")


class Measured(NamedTuple):
    """What was found of a sample.

    Args:
        counts: its tokens, patches, supervised tokens and media, and how many tokens, images and
            videos it loses because it is too long.
        files: the local files of its media.
        state: of these files, from :func:`~torchtune_vl.datasets._record_cache.state_of`; None if
            it must not be kept.
    """

    counts: tuple[int, ...]
    files: Sequence[str]
    state: bytes | None


class SamplesError(ValueError):
    """Samples that cannot be trained on.

    Args:
        first: index and reason of some of them, of which the first 20 are told.
        bad: how many there are.
        of: how many samples were measured.
    """

    def __init__(self, first: Sequence[tuple[int, str]], bad: int, of: int) -> None:
        super().__init__(first, bad, of)  # which pickle needs
        self.first = sorted(first)[:_NUM_SHOWN]
        self.bad = bad
        self.of = of

    def __str__(self) -> str:
        """Tell how many they are, and each reason in a line."""
        told = f"{self.bad} of {self.of} samples cannot be trained on: correct them or remove them "
        lines = [told + "from the data", *(reason for _, reason in self.first)]
        more = self.bad - len(self.first)
        return "\n".join([*lines, f"and {more} more"] if more else lines)


@dataclass
class Measurements:
    """What was found of samples.

    Args:
        sizes: int32 [samples, 3], tokens, patches and supervised tokens of each, of a bad one 0.
        bad: index and reason of those that cannot be measured.
        counts: of all, ``media``; ``truncated``, how many are cut, and ``lost media``, how many
            of them by images or videos; and what they lose, ``tokens``, ``images`` and ``videos``.
        example: index and losses of one that is cut, if there is one by media.
    """

    sizes: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int32))
    bad: list[tuple[int, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    example: tuple[int, dict[str, int]] | None = None

    @classmethod
    def joined(cls, parts: Iterable["Measurements"]) -> "Measurements":
        """Those of samples one part behind the other."""
        joined, sizes = cls(), [cls().sizes]
        for part in parts:
            sizes.append(part.sizes)
            joined.bad += part.bad
            joined.counts += part.counts
            joined._take_example(part.example)
        joined.sizes = np.concatenate(sizes)
        return joined

    @classmethod
    def interleaved(cls, shares: Sequence["Measurements"]) -> "Measurements":
        """Those of which each share has every so-manieth."""
        joined = cls.joined(shares)
        for number, share in enumerate(shares):
            joined.sizes[number :: len(shares)] = share.sizes
        return joined

    def add(self, place: int, index: int, counts: Sequence[int]) -> None:
        """Add what ``Measured`` counts of a sample."""
        *size, media, tokens, images, videos = counts
        self.sizes[place] = size
        self.counts["media"] += media
        if tokens:
            self.counts["truncated"] += 1
            self.counts["lost media"] += bool(images or videos)
            lost = {"tokens": tokens, "images": images, "videos": videos}
            self.counts.update(lost)
            self._take_example((index, lost))

    def _take_example(self, example: tuple[int, dict[str, int]] | None) -> None:
        def loses_media(cut: tuple[int, dict[str, int]]) -> bool:
            return bool(cut[1]["images"] or cut[1]["videos"])

        if example and (not self.example or loses_media(example) > loses_media(self.example)):
            self.example = example

    def tell_truncated(self) -> None:
        """Log how many samples are cut because they are too long, if any are."""
        if not self.example:
            return
        index, lost = self.example
        parts = ", ".join(f"{count} {what}" for what, count in lost.items())
        in_all = ", ".join(f"{self.counts[what]} {what}" for what in lost)
        _log.warning(
            f"{self.counts['truncated']} of {len(self.sizes)} samples are longer than max_seq_len "
            f"and are cut, {self.counts['lost media']} of them by images or videos: sample "
            f"{index}, for one, loses {parts}, all together lose {in_all}; raise max_seq_len, or "
            "make media smaller"
        )


def measure_all(
    dataset: Any, indices: Sequence[int], num_workers: int = 0, show_progress: bool = True
) -> np.ndarray:
    """Measure samples before training, and log how many are cut because they are too long.

    Args:
        dataset: as of :func:`measure`.
        indices: of the samples, ``range(len(dataset))`` for all.
        num_workers: processes to measure in, besides this one; 0: in this one.
        show_progress: whether to show a progress bar. With several ranks, let one do so.

    Returns:
        int32 [len(indices), 3], tokens, patches and supervised tokens of each sample.

    Raises:
        SamplesError: if samples cannot be measured; a ValueError if the dataset does not do so.
    """
    found = measure(dataset, indices, num_workers, "measuring" if show_progress else None)
    if found.bad:
        raise SamplesError(found.bad, len(found.bad), len(indices))
    found.tell_truncated()
    return found.sizes


def measure(
    dataset: Any, indices: Sequence[int], num_workers: int = 0, shown: str | None = "measuring"
) -> Measurements:
    """Measure samples, bad ones among them, from what earlier runs found as far as it holds.

    Args:
        dataset: has ``measure``, of an index, and perhaps ``examine``, which also tells what a
            sample loses, as those of :func:`~torchtune_vl.datasets.vision_chat_dataset` have; or
            ``measurements``, of indices, which gives what this function does.
        indices: of the samples, ``range(len(dataset))`` for all.
        num_workers: processes to measure in, besides this one; 0: in this one.
        shown: text of a progress bar, None for no bar. With several ranks, let one show it.
    """
    if hasattr(dataset, "measurements"):
        return dataset.measurements(indices)
    if not hasattr(dataset, "measure"):
        problem = f"a {type(dataset).__name__} does not know the sizes of its samples"
        raise ValueError(f"{problem}: use torchtune_vl.datasets.vision_chat_dataset")
    parts: list[Measurements] = []
    new: list[Kept] = []
    problems = dict[str, None]()
    collate = partial(_measure_batch, dataset)
    loader = loading(indices, num_workers, batch_size=_BATCH_SIZE, collate_fn=collate)
    bar = tqdm(total=len(indices), desc=shown, unit=" samples", disable=shown is None)
    try:
        with loader as batches, bar:
            for part, new_of_batch, problem in batches:
                parts.append(part)
                new += new_of_batch
                problems |= dict.fromkeys(problem)
                if len(new) >= _NUM_KEPT_AT_ONCE:
                    problems |= dict.fromkeys(_keep(dataset, new))
                    new = []
                bar.update(len(part.sizes))
    finally:
        problems |= dict.fromkeys(_keep(dataset, new))
        for problem in problems:
            _log.warning("All samples are measured anew: %s", problem)
    return Measurements.joined(parts)


def _keep(dataset: Any, new: Sequence[Kept]) -> list[str]:
    """Add to the dataset's cache; gives the reason if that cannot be done."""
    if not new:
        return []
    try:
        with RecordCache("sizes", dataset.fingerprint) as cache:
            cache.add(new)
    except ValueError as error:
        return [str(error)]
    return []


def _measure_batch(
    dataset: Any, indices: Sequence[int]
) -> tuple[Measurements, list[Kept], list[str]]:
    """Measure samples; gives those, too, that are to be kept, and why the cache was not used."""
    found = Measurements(np.zeros((len(indices), 3), np.int32))
    digests, known, problem = _known(dataset, indices)
    new = []
    for place, index in enumerate(indices):
        try:
            with naming_sample(index):
                if digests and digests[place] in known:
                    counts = _COUNTS.unpack(known[digests[place]])
                elif digests:
                    counts, files, state = dataset.measure_to_keep(index)
                    if state is not None:
                        new.append(Kept(digests[place], _COUNTS.pack(*counts), files, state))
                else:
                    counts = _counts(dataset, index)
                found.add(place, index, counts)
        except ValueError as error:  # one bad sample must not hide the others
            found.bad.append((index, str(error)))
    return found, new, problem


def _known(
    dataset: Any, indices: Sequence[int]
) -> tuple[list[bytes], dict[bytes, bytes], list[str]]:
    """Digests of records, none if they are not kept, and what is known of them."""
    if getattr(dataset, "fingerprint", None) is None:
        return [], {}, []
    try:
        digests = dataset.digests(indices)
    except (ValueError, OSError):  # is told by each of the samples
        return [], {}, []
    try:
        with RecordCache("sizes", dataset.fingerprint) as cache:
            return digests, cache.find(digests), []
    except ValueError as error:
        return [], {}, [str(error)]


def _counts(dataset: Any, index: int) -> tuple[int, ...]:
    if not hasattr(dataset, "examine"):
        return (*dataset.measure(index), 0, 0, 0, 0)
    return counts_of(dataset.examine(index))


def counts_of(examined: Any) -> tuple[int, ...]:
    """What :class:`Measured` counts, of what ``examine`` of a transform finds."""
    lost = examined.truncated or {"tokens": 0, "images": 0, "videos": 0}
    return (*examined.size, examined.media, *lost.values())
