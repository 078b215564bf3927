"""Packed rows and padded batches with targets, beside their samples alone."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from tests.reference import Conversation
from torchtune_vl.data import (
    Batch,
    packed_collate_vision,
    padded_collate_vision,
    padded_collate_vision_targets,
)
from torchtune_vl.modules import Segments


def samples() -> list[dict[str, Any]]:
    """With an image, text alone, with two videos; the second half of each has labels."""
    generator = torch.Generator().manual_seed(0)
    conversations = [
        Conversation([(1, 4, 4)], 5),
        Conversation([], 12),
        Conversation([(2, 4, 6), (3, 2, 4)], 3, seconds_per_step=[1.0, 0.5]),
    ]
    made = [conversation.sample(generator) for conversation in conversations]
    for sample in made:
        answer = len(sample["tokens"]) // 2
        sample["labels"] = [-100] * answer + sample["tokens"][answer:]
    return made


def test_a_packed_row_is_its_documents_end_to_end() -> None:
    given = samples()
    row = packed_collate_vision(given)
    alone = [packed_collate_vision([sample]) for sample in given]
    lengths = tuple(len(sample["tokens"]) for sample in given)
    assert row["mask"].lengths == lengths
    assert row["mask"].boundaries.tolist() == [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    assert row["mask"].boundaries.dtype == torch.int32
    assert row["tokens"].tolist() == [[token for sample in given for token in sample["tokens"]]]
    assert torch.equal(row["input_pos"][0], torch.cat([sample["input_pos"] for sample in given]))
    starts = row["mask"].boundaries.tolist()
    positions = [one["output_positions"] + at for one, at in zip(alone, starts, strict=False)]
    assert torch.equal(row["output_positions"], torch.cat(positions))
    assert torch.equal(row["targets"], torch.cat([one["targets"] for one in alone]))
    assert torch.equal(row["tokens"][0, row["output_positions"] + 1], row["targets"])
    assert "labels" not in row

    padded = padded_collate_vision(given)["encoder_input"]["vision"]
    vision = row["encoder_input"]["vision"]
    assert vision.keys() == padded.keys()
    for key in ("patches", "grid_thw", "unit_order", "unit_positions"):
        assert torch.equal(vision[key], padded[key])


def test_no_document_predicts_the_first_token_of_the_next() -> None:
    given = samples()[:2]
    for sample in given:
        sample["labels"] = sample["tokens"]  # its first token too
    lengths = [len(sample["tokens"]) for sample in given]
    row = packed_collate_vision(given)
    assert row["output_positions"].tolist() == [
        *range(lengths[0] - 1),
        *range(lengths[0], sum(lengths) - 1),
    ]
    assert row["targets"].tolist() == given[0]["tokens"][1:] + given[1]["tokens"][1:]


def test_padded_targets_are_those_of_the_samples_alone() -> None:
    given = samples()
    batch = padded_collate_vision_targets(given, padding_idx=7)
    padded = padded_collate_vision(given, padding_idx=7)
    assert torch.equal(batch["tokens"], padded["tokens"])
    assert "labels" not in batch
    assert "mask" not in batch
    longest = batch["tokens"].shape[1]
    alone = [packed_collate_vision([sample]) for sample in given]
    positions = [one["output_positions"] + n * longest for n, one in enumerate(alone)]
    assert torch.equal(batch["output_positions"], torch.cat(positions))
    assert torch.equal(batch["targets"], torch.cat([one["targets"] for one in alone]))
    assert torch.equal(batch["tokens"].flatten()[batch["output_positions"] + 1], batch["targets"])


@pytest.mark.parametrize("collate", [packed_collate_vision, padded_collate_vision_targets])
def test_no_samples_and_no_labels(collate: Any) -> None:
    empty = collate([], padding_idx=7)
    assert empty["tokens"].tolist() == [[7]]
    assert empty["input_pos"].tolist() == [[[0, 0, 0]]]
    assert "encoder_input" not in empty
    (unsupervised,) = samples()[:1]
    unsupervised["labels"] = [-100] * len(unsupervised["tokens"])
    for batch in (empty, collate([unsupervised])):
        for key in ("output_positions", "targets"):
            assert batch[key].shape == (0,)
            assert batch[key].dtype == torch.int64
    assert packed_collate_vision([])["mask"].lengths == (1,)


class OneRow(IterableDataset):
    def __iter__(self) -> Iterator[Batch]:
        yield packed_collate_vision(samples())


def test_documents_travel_between_processes_and_into_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # needs no accelerator
    row = packed_collate_vision(samples())
    (received,) = DataLoader(OneRow(), batch_size=None, num_workers=1)
    for batch in (received, pickle.loads(pickle.dumps(row)), pin_memory(row)):
        documents = batch["mask"]
        assert isinstance(documents, Segments)
        assert documents.lengths == row["mask"].lengths
        assert torch.equal(documents.boundaries, row["mask"].boundaries)
    assert not received["mask"].boundaries.is_shared()  # by value
