"""The sizes of all samples, before training begins."""

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from torchtune_vl.data._data_workers import loading
from torchtune_vl.media._errors import shortened

# Sending a batch from a worker costs as much as measuring some samples
_BATCH_SIZE = 128
_NUM_SHOWN = 20

_log = logging.getLogger(__name__)


class Measurable(Protocol):
    """A map-style dataset whose samples can be measured, as ``VisionChatDataset`` does.

    With its ``examine`` it tells too what samples lose.
    """

    def __len__(self) -> int: ...

    def measure(self, index: int) -> tuple[int, int, int]: ...


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
        lines = [
            f"{self.bad} of {self.of} samples cannot be read: correct them or remove them from the "
            "data",
            *(reason for _, reason in self.first),
        ]
        return "\n".join([*lines, f"and {more} more"] if more else lines)


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
        SamplesError: if samples cannot be measured.
        ValueError: if the dataset cannot measure them.
    """
    if not hasattr(dataset, "measure"):
        raise ValueError(
            f"a {type(dataset).__name__} does not know the sizes of its samples: use "
            "torchtune_vl.datasets.vision_chat_dataset"
        )
    examined = _Examined(dataset, indices)
    loader = loading(examined, num_workers, batch_size=_BATCH_SIZE, collate_fn=list)
    # With more processes than samples some measure none
    sizes = [np.empty((0, 3), np.int32)]
    bad: list[tuple[int, str]] = []
    cut: list[_Examination] = []
    bar = tqdm(total=len(indices), desc="measuring", unit=" samples", disable=not show_progress)
    with loader as batches, bar:
        for batch in batches:
            sizes.append(np.array([sample.size for sample in batch], np.int32))
            bad += [
                (sample.number, sample.problem) for sample in batch if sample.problem is not None
            ]
            cut += [sample for sample in batch if sample.lost]
            bar.update(len(batch))
    if bad:
        raise SamplesError(bad, len(bad), len(indices))
    if cut:
        _tell_cut(cut, len(indices))
    return np.concatenate(sizes)


class _Examination(NamedTuple):
    number: int  # in the dataset
    size: tuple[int, int, int] = (0, 0, 0)
    lost: dict[str, int] | None = None
    problem: str | None = None


class _Examined(Dataset):
    def __init__(self, dataset: Measurable, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> _Examination:
        index = self.indices[place]
        try:
            if hasattr(self.dataset, "examine"):
                return _Examination(index, *self.dataset.examine(index))
            return _Examination(index, self.dataset.measure(index))
        except ValueError as error:
            problem = str(error)
        except Exception as error:  # one bad sample must not hide the others
            problem = f"sample {index}: {type(error).__name__}: {error}"
        return _Examination(index, problem=shortened(problem))


def _tell_cut(cut: Sequence[_Examination], of: int) -> None:
    without_media = [s for s in cut if s.lost and (s.lost["images"] or s.lost["videos"])]
    example = (without_media or cut)[0]
    _log.warning(
        "%d of %d samples are longer than max_seq_len and are cut, %d of them by images or videos: "
        "sample %d, for one, loses %s; raise max_seq_len, or make media smaller",
        len(cut),
        of,
        len(without_media),
        example.number,
        ", ".join(f"{count} {what}" for what, count in (example.lost or {}).items()),
    )
