"""The sizes of all samples, before training begins."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from torchtune_vl.data._data_workers import loading
from torchtune_vl.media._errors import naming_sample

# Sending a batch from a worker costs as much as measuring some samples
_BATCH_SIZE = 128
_NUM_SHOWN = 20

_log = logging.getLogger(__name__)


class SamplesError(ValueError):
    """Samples that cannot be measured.

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
        told = f"{self.bad} of {self.of} samples cannot be read: correct them or remove them from "
        lines = [told + "the data", *(reason for _, reason in self.first)]
        more = self.bad - len(self.first)
        return "\n".join([*lines, f"and {more} more"] if more else lines)


def measure_all(
    dataset: Any, indices: Sequence[int], num_workers: int = 0, show_progress: bool = True
) -> np.ndarray:
    """Measure samples before training, and log how many are cut because they are too long.

    Args:
        dataset: has ``measure``, of an index, and perhaps ``examine``, which also tells what a
            sample loses, as those of :func:`~torchtune_vl.datasets.vision_chat_dataset` have.
        indices: of the samples, ``range(len(dataset))`` for all.
        num_workers: processes to measure in, besides this one; 0: in this one.
        show_progress: whether to show a progress bar. With several ranks, let one do so.

    Returns:
        int32 [len(indices), 3], tokens, patches and supervised tokens of each sample.

    Raises:
        SamplesError: if samples cannot be measured; a ValueError if the dataset does not do so.
    """
    if not hasattr(dataset, "measure"):
        problem = f"a {type(dataset).__name__} does not know the sizes of its samples"
        raise ValueError(f"{problem}: use torchtune_vl.datasets.vision_chat_dataset")
    # With more processes than samples some measure none
    sizes = [np.empty((0, 3), np.int32)]
    bad, cut = [], []
    examine = partial(_examine, dataset)
    loader = loading(indices, num_workers, batch_size=_BATCH_SIZE, collate_fn=examine)
    bar = tqdm(total=len(indices), desc="measuring", unit=" samples", disable=not show_progress)
    with loader as batches, bar:
        for sizes_of_batch, bad_ones, cut_ones in batches:
            sizes.append(sizes_of_batch)
            bad += bad_ones
            cut += cut_ones
            bar.update(len(sizes_of_batch))
    if bad:
        raise SamplesError(bad, len(bad), len(indices))
    if cut:
        without_media = [(index, lost) for index, lost in cut if lost["images"] or lost["videos"]]
        index, lost = (without_media or cut)[0]
        parts = ", ".join(f"{count} {what}" for what, count in lost.items())
        _log.warning(
            f"{len(cut)} of {len(indices)} samples are longer than max_seq_len and are cut, "
            f"{len(without_media)} of them by images or videos: sample {index}, for one, loses "
            f"{parts}; raise max_seq_len, or make media smaller"
        )
    return np.concatenate(sizes)


def _examine(dataset: Any, indices: Sequence[int]) -> tuple[np.ndarray, list[Any], list[Any]]:
    """Sizes, and indices of samples that cannot be measured or are cut, with why and what."""
    sizes = np.zeros((len(indices), 3), np.int32)
    bad, cut = [], []
    examine = getattr(dataset, "examine", None)
    for place, index in enumerate(indices):
        try:
            with naming_sample(index):
                size, lost = examine(index) if examine else (dataset.measure(index), None)
                sizes[place] = size
            if lost:
                cut.append((index, lost))
        except ValueError as error:  # one bad sample must not hide the others
            bad.append((index, str(error)))
    return sizes, bad, cut
