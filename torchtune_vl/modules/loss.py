"""Losses."""

import torch
import torch.nn.functional as F
from torch import nn


class SupervisedCrossEntropyLoss(nn.Module):
    """Mean cross-entropy of logits that the model computed for supervised positions only.

    The counterpart of :func:`~torchtune_vl.data.padded_collate_vision_supervised`: most tokens of
    a vision-language batch carry no loss, and their logits over 150,000 entries cost more than the
    rest of a small model.

    Args:
        ignore_index: label of positions without loss.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: [n, vocabulary], for the n supervised positions in their order.
            labels: [b * s] or [b, s], shifted so that ``labels[i]`` is the token after position i.

        Returns:
            Scalar, float32.

        Raises:
            RuntimeError: if the labels do not have n supervised positions.
        """
        supervised = labels.flatten() != self.ignore_index
        torch._assert_async(
            supervised.sum() == len(logits),
            "the model's logits are not those of the supervised labels: use the collate function "
            "padded_collate_vision_supervised with this loss",
        )
        positions = torch.nonzero_static(supervised, size=len(logits)).squeeze(1)
        return F.cross_entropy(logits.float(), labels.flatten().index_select(0, positions))
