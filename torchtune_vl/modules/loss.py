"""Losses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

# Rows of logits at a time: enough for a fast product, but small beside the layers' activations
CHUNK = 1024
# Label of what carries no loss, as everywhere in torch
IGNORE_INDEX = -100


def chunked_cross_entropy(
    hidden: torch.Tensor, output: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of an output layer, whose logits are made chunk by chunk, float32 [n].

    ``hidden`` [n, d] is what the layer takes, ``targets``, int64 [n], are the right entries.
    Gradients make logits anew, but for the last chunk, with which they begin: memory is that of
    one chunk, at the price of a second product of the others.
    """

    def losses(rows: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        logits = output(rows)
        if isinstance(logits, DTensor):  # of a layer that devices share
            logits = logits.full_tensor()
        return F.cross_entropy(logits.float(), right, reduction="none")

    starts = range(0, max(len(targets), 1), CHUNK)  # also none are a chunk
    *chunks, last = ((hidden[i : i + CHUNK], targets[i : i + CHUNK]) for i in starts)
    anew = [checkpoint(losses, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    return torch.cat([*anew, losses(*last)])


class SupervisedCrossEntropyLoss(nn.Module):
    """Mean cross-entropy of logits that the model computed for supervised positions only.

    The counterpart of :func:`~torchtune_vl.data.padded_collate_vision_supervised`: most labels are
    ``ignore_index``, and their logits of 150,000 entries cost more than a small model's rest.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss, a float32 scalar, of logits [n, vocabulary].

        They are of the n supervised positions of ``labels``, [b, s] or flat, which are shifted so
        that the label of a position is the token behind it; other labels are a ``RuntimeError``.
        """
        supervised = labels.flatten() != self.ignore_index
        torch._assert_async(
            supervised.sum() == len(logits),
            "the model's logits are not those of the supervised labels: use the collate function "
            "padded_collate_vision_supervised with this loss",
        )
        positions = torch.nonzero_static(supervised, size=len(logits)).squeeze(1)
        return F.cross_entropy(logits.float(), labels.flatten().index_select(0, positions))
