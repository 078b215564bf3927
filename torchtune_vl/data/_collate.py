"""Samples to padded batches and packed rows.

Shape notation: b samples, s tokens of the longest or of a packed row, n patches of all images.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from torchtune_vl.modules import Segments, concatenate_patches, encoder_index, join_vision_indices
from torchtune_vl.modules.context import RowShare

# Those of a row
Samples = Sequence[Mapping[str, Any]]
# A file of shared memory costs each side half a millisecond; by value so many bytes cost less
LARGEST_BY_VALUE = 2**18


class Batch(dict[str, Any]):
    """A dict, also of dicts, whose small tensors go from process to process by value.

    torch sends each tensor of a batch as a file of shared memory. That is right for patches, but
    some ten small tensors of integers would cost the trainer's Python milliseconds of each step.
    """

    # How pickle, and so a queue between processes, takes it apart
    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (_exchanged(self),)


def _received(values: Mapping[str, Any]) -> Batch:
    return Batch(_exchanged(values))


def _exchanged(value: Any) -> Any:
    """Small tensors of integers as arrays, which go by value, and arrays as tensors."""
    if isinstance(value, Mapping):
        return {key: _exchanged(entry) for key, entry in value.items()}
    if isinstance(value, Segments):
        return Segments(value.lengths, _exchanged(value.boundaries))
    if isinstance(value, RowShare):
        return value.with_each(_exchanged)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    is_small = isinstance(value, torch.Tensor) and value.nbytes <= LARGEST_BY_VALUE
    return value.numpy() if is_small and not value.is_floating_point() else value


def padded_collate_vision(
    batch: Samples,
    padding_idx: int = 0,
    ignore_idx: int = -100,
) -> Batch:
    """Pad samples to one length, on the right, and join their media, if any.

    Args:
        batch: samples with ``tokens``, list[int]; ``input_pos``, int64 [length, 3]; ``labels``,
            list[int], if the loss is to be taken; and if there are media ``encoder_input``, whose
            ``vision`` has ``patches``, ``grid_thw`` and perhaps the index of the encoder.
        padding_idx: id of the padding token.
        ignore_idx: label of padding.

    Returns:
        ``tokens``, int64 [b, s]; ``input_pos``, int64 [b, s, 3]; ``labels``, int64 [b, s], if the
        samples have them; and ``encoder_input`` if any sample has media: ``vision`` with
        ``patches`` [n, width], ``grid_thw``, int64 [k, 3], and what
        :func:`~torchtune_vl.modules.encoder_index` returns.

    Raises:
        ValueError: if the batch is empty.
    """
    if not batch:
        raise ValueError("cannot collate an empty batch")
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    paddings = {"tokens": padding_idx, "input_pos": 0, "labels": ignore_idx}
    collated = Batch()
    for key in [key for key in paddings if key in batch[0]]:
        values = [sample[key] for sample in batch]
        tensors = [x if isinstance(x, torch.Tensor) else _integers(x) for x in values]
        collated[key] = pad(tensors, padding_value=paddings[key])
    return Batch(collated, **join_media(batch))


def padded_collate_vision_supervised(
    batch: Samples, padding_idx: int = 0, ignore_idx: int = -100
) -> Batch:
    """Pad samples as :func:`padded_collate_vision` does, and tell the model where labels are.

    The batch has ``output_positions`` too, int64 [supervised labels]: the positions in the
    flattened batch whose next token is supervised. The model computes logits of these only, as
    :class:`~torchtune_vl.modules.SupervisedCrossEntropyLoss` takes them.
    """
    collated = padded_collate_vision(batch, padding_idx, ignore_idx)
    is_next_supervised = torch.nn.functional.pad(collated["labels"][:, 1:] != ignore_idx, (0, 1))
    return Batch(collated, output_positions=is_next_supervised.flatten().nonzero().squeeze(1))


def padded_collate_vision_targets(
    batch: Samples, padding_idx: int = 0, ignore_idx: int = -100
) -> Batch:
    """Pad samples as :func:`padded_collate_vision` does, for a model that computes the loss.

    Instead of labels the batch has ``output_positions``, int64 [supervised labels], the positions
    in the flattened batch whose next token is supervised, and ``targets``, int64 of the same shape,
    the ids of these next tokens. No samples give one padding token without a target.
    """
    batch = batch or _padding(padding_idx, ignore_idx)
    collated = padded_collate_vision_supervised(batch, padding_idx, ignore_idx)
    labels = collated.pop("labels").flatten()
    return Batch(collated, targets=labels[collated["output_positions"] + 1])


def packed_collate_vision(batch: Samples, padding_idx: int = 0, ignore_idx: int = -100) -> Batch:
    """Lay samples end to end in one row, each a document that sees itself only.

    Samples are as in :func:`padded_collate_vision`, with ``labels``; none give a document of one
    padding token without a target. The row has ``tokens``, int64 [1, s]; ``input_pos``, int64
    [1, s, 3], which starts anew in each document; ``mask``, its
    :class:`~torchtune_vl.modules.Segments`; ``output_positions`` and ``targets`` as in
    :func:`padded_collate_vision_targets`; and ``encoder_input`` as in
    :func:`padded_collate_vision`. No document predicts the first token of the next.
    """
    batch = batch or _padding(padding_idx, ignore_idx)
    tokens, labels = (
        _integers(chain.from_iterable(sample[key] for sample in batch))
        for key in ("tokens", "labels")
    )
    documents = Segments.of([len(sample["tokens"]) for sample in batch])
    labels[documents.boundaries[:-1]] = ignore_idx
    supervised = (labels != ignore_idx).nonzero().squeeze(1)
    return Batch(
        tokens=tokens[None],
        input_pos=torch.cat([sample["input_pos"] for sample in batch])[None],
        mask=documents,
        output_positions=supervised - 1,
        targets=labels[supervised],
        **join_media(batch),
    )


def _integers(numbers: Iterable[int]) -> torch.Tensor:
    # torch.tensor takes seven times as long of a list
    return torch.from_numpy(np.fromiter(numbers, np.int64))


def _padding(padding_idx: int, ignore_idx: int) -> Samples:
    input_pos = torch.zeros(1, 3, dtype=torch.int64)
    return [{"tokens": [padding_idx], "labels": [ignore_idx], "input_pos": input_pos}]


def join_media(batch: Samples) -> dict[str, Any]:
    """Join the media of samples to the ``encoder_input`` of a batch, which is absent without."""
    vision = [sample["encoder_input"]["vision"] for sample in batch if "encoder_input" in sample]
    if not vision:
        return {}
    # A data worker's batch travels in shared memory: made there, it is not copied to it
    shared = get_worker_info() is not None
    collated = {
        "patches": concatenate_patches([v["patches"] for v in vision], shared),
        "grid_thw": torch.cat([v["grid_thw"] for v in vision]),
    }
    if all("unit_order" in v for v in vision):  # otherwise the encoder computes the index
        collated |= encoder_index(join_vision_indices(vision))
    return {"encoder_input": {"vision": collated}}
