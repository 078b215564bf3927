"""Pairs of a chosen and a rejected answer, for preference training."""

from functools import partial
from typing import Any

from torch.utils.data import Dataset

from torchtune_vl.chat import ChatTransform
from torchtune_vl.datasets._conversations import VisionChatDataset, vision_chat_dataset


class PreferencePairs(Dataset):
    """A table of pairs; see :func:`preference_pairs`."""

    def __init__(self, chosen: VisionChatDataset, rejected: VisionChatDataset) -> None:
        self._samples = {"chosen": chosen, "rejected": rejected}

    def __len__(self) -> int:
        return len(self._samples["chosen"])

    def __getitem__(self, index: int) -> dict[str, dict[str, Any]]:
        """Make both samples; a ValueError names their record."""
        return {answer: dataset[index] for answer, dataset in self._samples.items()}


def preference_pairs(tokenizer: ChatTransform, **settings: Any) -> PreferencePairs:
    """Build a dataset of pairs of two samples, ``chosen`` and ``rejected``, with one prompt.

    Each is what :func:`vision_chat_dataset` gives, and loss is on the last answer alone, which they
    do not share. Records have these columns, too, and the prompt in one of the ways that
    docs/datasets.md tells of.

    Args:
        tokenizer: the model's transform.
        **settings: of :func:`vision_chat_dataset`, but for ``format``, ``prompt``, ``streaming``.

    Raises:
        ValueError: as :func:`vision_chat_dataset` does.
    """
    if settings.get("streaming"):
        raise ValueError("pairs are read as a table: leave streaming out")
    build: Any = partial(vision_chat_dataset, tokenizer, **settings)
    return PreferencePairs(build(format="chosen"), build(format="rejected"))
