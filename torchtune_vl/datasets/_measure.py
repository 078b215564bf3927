"""The sizes of all samples, before training begins."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from torchtune_vl.data._loading import loading
from torchtune_vl.media._errors import shortened

# Sending a batch from a worker costs as much as measuring some samples
_BATCH_SIZE = 128
_NUM_SHOWN = 20

_log = logging.getLogger(__name__)


class Measurable(Protocol):
    """A map-style dataset whose samples can be measured.

    With ``examine``, see ``VisionChatDataset``, it tells too what samples lose.
    """

    def __len__(self) -> int: ...

    def measure(self, index: int) -> tuple[int, int, int]:
        """Tokens, patches and supervised tokens of a sample, or a ValueError that names it."""


class SamplesError(ValueError):
    """Samples that cannot be measured.

    Args:
        first: index and reason of some of them, of which the first 20 are told.
        bad: how many there are.
        of: how many samples were measured.
    """

    def __init__(self, first: Sequence[tuple[int, str]], bad: int, of: int) -> None:
        super().__init__(first, bad, of)
        self.first = sorted(first)[:_NUM_SHOWN]
        self.bad = bad
        self.of = of

    def __str__(self) -> str:
        """Tell how many they are, and each reason in a line."""
        more = self.bad - len(self.first)
        return "\n".join(
            [
                f"{self.bad} of {self.of} samples cannot be read: correct them or remove them from "
                "the data",
                *(reason for _, reason in self.first),
                *([f"and {more} more"] if more else []),
            ]
        )


def measure_all(
    dataset: Measurable,
    indices: Sequence[int],
    num_workers: int = 0,
    show_progress: bool = True,
) -> np.ndarray:
    """Measure samples, so that those which cannot be read are found before training.

    How many are cut because they are too long is logged.

    Args:
        dataset: a map-style dataset with ``measure``, such as that of
            :func:`~torchtune_vl.datasets.vision_chat_dataset`.
        indices: of the samples, ``range(len(dataset))`` for all.
        num_workers: processes to measure in, besides this one; 0: in this one.
        show_progress: whether to show a progress bar. With several ranks, let one do so.

    Returns:
        int32 [len(indices), 3], tokens, patches and supervised tokens of each sample.

    Raises:
        SamplesError: if samples cannot be measured: it lists the first 20 with the reason and says
            how many there are.
        ValueError: if the dataset cannot measure them.
    """
    if not hasattr(dataset, "measure"):
        raise ValueError(
            f"a {type(dataset).__name__} does not know the sizes of its samples: use "
            "torchtune_vl.datasets.vision_chat_dataset"
        )
    measurements = Subset(_Measurements(dataset), indices)
    loader = loading(measurements, num_workers, batch_size=_BATCH_SIZE, collate_fn=_as_arrays)
    # With more processes than samples some measure none
    sizes = [np.empty((0, 3), np.int32)]
    problems: list[tuple[int, str]] = []
    cuts: list[tuple[int, dict[str, int]]] = []
    measured = 0
    bar = tqdm(total=len(indices), desc="measuring", unit=" samples", disable=not show_progress)
    with loader as batches, bar:
        for batch_sizes, batch_problems, batch_cuts in batches:
            sizes.append(batch_sizes)
            problems += [(indices[measured + place], reason) for place, reason in batch_problems]
            cuts += [(indices[measured + place], lost) for place, lost in batch_cuts]
            measured += len(batch_sizes)
            bar.update(len(batch_sizes))
    if problems:
        raise SamplesError(problems, len(problems), len(indices))
    _tell_cuts(cuts, len(indices))
    return np.concatenate(sizes)


def _tell_cuts(cuts: Sequence[tuple[int, dict[str, int]]], of: int) -> None:
    if not cuts:
        return
    without = [cut for cut in cuts if cut[1]["images"] or cut[1]["videos"]]
    index, lost = (without or cuts)[0]
    _log.warning(
        "%d of %d samples are longer than max_seq_len and are cut, %d of them by images or videos: "
        "sample %d, for one, loses %s; raise max_seq_len, or make media smaller",
        len(cuts),
        of,
        len(without),
        index,
        ", ".join(f"{count} {what}" for what, count in lost.items()),
    )


class _Measurements(Dataset):
    """The size of each sample, or what is wrong with it."""

    def __init__(self, dataset: Measurable) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[tuple[int, int, int], dict[str, int] | None] | str:
        try:
            if hasattr(self.dataset, "examine"):
                return self.dataset.examine(index)
            return self.dataset.measure(index), None
        except ValueError as error:
            return shortened(str(error))
        except Exception as error:  # one bad sample must not hide the others
            return shortened(f"sample {index}: {type(error).__name__}: {error}")


def _as_arrays(
    batch: Sequence[Any],
) -> tuple[np.ndarray, list[tuple[int, str]], list[tuple[int, dict[str, int]]]]:
    """Sizes, and by place in the batch what is wrong and what is cut."""
    problems = [(place, entry) for place, entry in enumerate(batch) if isinstance(entry, str)]
    examined = [((0, 0, 0), None) if isinstance(entry, str) else entry for entry in batch]
    cuts = [(place, lost) for place, (_, lost) in enumerate(examined) if lost]
    return np.array([size for size, _ in examined], np.int32), problems, cuts
