"""Batches: padding, masks, media and supervised positions."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchtune.utils import batch_to_device

from tests.reference import Conversation, reference_config, reference_model
from torchtune_vl.data import Batch, padded_collate_vision, padded_collate_vision_supervised
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config
from torchtune_vl.modules import SupervisedCrossEntropyLoss


def samples(*conversations: Conversation) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [conversation.sample(generator) for conversation in conversations]


def test_right_padding() -> None:
    short, long = samples(Conversation([(1, 4, 4)]), Conversation([(1, 2, 6), (1, 8, 4)]))
    batch = padded_collate_vision([short, long], padding_idx=7, ignore_idx=-5)
    n = len(short["tokens"])
    assert batch["tokens"].shape == batch["labels"].shape == (2, len(long["tokens"]))
    assert batch["tokens"][0].tolist() == short["tokens"] + [7] * (len(long["tokens"]) - n)
    assert batch["labels"][0].tolist() == short["labels"] + [-5] * (len(long["tokens"]) - n)
    assert torch.equal(batch["input_pos"][0, :n], short["input_pos"])
    assert torch.equal(batch["input_pos"][1], long["input_pos"])
    assert "mask" not in batch  # causal: no token sees the padding behind it
    vision = batch["encoder_input"]["vision"]
    assert vision["grid_thw"].tolist() == [[1, 4, 4], [1, 2, 6], [1, 8, 4]]
    patches = [s["encoder_input"]["vision"]["patches"] for s in (short, long)]
    assert torch.equal(vision["patches"], torch.cat(patches))
    assert sorted(vision["unit_order"].tolist()) == list(range(4 + 3 + 8))
    batch_to_device(batch, torch.device("cpu"))  # torchtune's: tensors and dicts only


def test_text_only_batches_have_no_encoder_input() -> None:
    batch = padded_collate_vision(samples(Conversation([]), Conversation([])))
    assert "encoder_input" not in batch


def test_mixed_batches_keep_the_order_of_media() -> None:
    text, first, second = samples(
        Conversation([]), Conversation([(1, 4, 4)]), Conversation([(1, 6, 6)])
    )
    batch = padded_collate_vision([first, text, second])
    assert batch["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 4, 4], [1, 6, 6]]


def test_errors() -> None:
    with pytest.raises(ValueError, match="empty batch"):
        padded_collate_vision([])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    directory = tmp_path_factory.mktemp("model")
    reference_model(reference_config()).config.save_pretrained(directory)
    torch.manual_seed(0)
    return qwen2_5_vl_from_config(directory).eval()


def test_the_index_gives_what_the_encoder_would_compute(model: torch.nn.Module) -> None:
    conversations = samples(
        Conversation([(1, 10, 14), (1, 4, 4)]), Conversation([(3, 18, 6)], seconds_per_step=[1.0])
    )
    batch = padded_collate_vision(conversations)
    del batch["labels"]
    for sample in conversations:
        vision = sample["encoder_input"]["vision"]
        sample["encoder_input"] = {"vision": {k: vision[k] for k in ("patches", "grid_thw")}}
    bare = padded_collate_vision(conversations)
    assert set(bare["encoder_input"]["vision"]) == {"patches", "grid_thw"}
    del bare["labels"]
    with torch.no_grad():
        assert torch.equal(model(**batch), model(**bare))


def test_supervised_logits_give_the_same_loss(model: torch.nn.Module) -> None:
    conversations = samples(Conversation([(1, 4, 4)], 5), Conversation([], 12), Conversation([], 2))
    for sample in conversations:
        answer = len(sample["labels"]) // 2
        sample["labels"] = [-100] * answer + sample["labels"][answer:]
    full = padded_collate_vision(conversations)
    supervised = padded_collate_vision_supervised(conversations)
    losses = []
    for batch, loss in (
        (full, torch.nn.CrossEntropyLoss()),
        (supervised, SupervisedCrossEntropyLoss()),
    ):
        labels = batch.pop("labels")
        shifted = torch.hstack([labels[:, 1:], torch.full((3, 1), -100)])  # as the recipes do
        logits = model(**batch)
        losses.append(loss(logits.reshape(-1, logits.size(-1)), shifted.reshape(-1)))
    assert logits.shape[0] == sum(
        label != -100 for sample in conversations for label in sample["labels"][1:]
    )
    torch.testing.assert_close(losses[0], losses[1])


def test_supervised_loss_refuses_other_logits() -> None:
    labels = torch.tensor([-100, 3, -100, 4])
    with pytest.raises(RuntimeError, match="padded_collate_vision_supervised"):
        SupervisedCrossEntropyLoss()(torch.randn(4, 10), labels)


def test_media_that_do_not_fit_the_placeholders_are_refused(model: torch.nn.Module) -> None:
    (sample,) = samples(Conversation([(1, 4, 4), (1, 4, 4)]))
    batch = padded_collate_vision([sample])
    del batch["labels"]
    for tokens in (batch["tokens"][:, :-25], batch["tokens"].repeat(1, 2)):
        with pytest.raises(RuntimeError, match="one placeholder token for each embedding"):
            model(tokens, encoder_input=batch["encoder_input"])
    with pytest.raises(ValueError, match="expected"):
        model(batch["tokens"], encoder_input={"images": {}})


def test_uint8_images_and_videos_in_one_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    image = Conversation([(1, 4, 4)]).sample(generator)
    video = Conversation([(2, 4, 4)], seconds_per_step=[1.0]).sample(generator)
    frame, frames = torch.arange(16 * 588) % 256, torch.arange(32 * 1176) % 251
    image["encoder_input"]["vision"]["patches"] = frame.view(16, 588).to(torch.uint8)
    video["encoder_input"]["vision"]["patches"] = frames.view(32, 1176).to(torch.uint8)
    patches = padded_collate_vision([image, video])["encoder_input"]["vision"]["patches"]
    assert patches.dtype == torch.uint8
    assert torch.equal(patches[16:], frames.view(32, 1176))
    both = patches[:16].view(16, 3, 2, 196)
    assert torch.equal(both[:, :, 0], both[:, :, 1])
    assert torch.equal(both[:, :, 0].flatten(1), frame.view(16, 588))


class Repeated(torch.utils.data.Dataset):
    def __init__(self, given: list[dict[str, Any]]) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.given[index]


def leaves(batch: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in batch.items():
        name = f"{prefix}{key}"
        found |= leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_data_worker_sends_large_tensors_by_memory_and_small_ones_by_value(
    count: int, dtype: torch.dtype
) -> None:
    given = samples(*[Conversation([(1, 4, 4)], 15_000)] * 2, Conversation([(1, 8, 4)]))[:count]
    for sample in given:
        vision = sample["encoder_input"]["vision"]
        vision["patches"] = (vision["patches"] * 30).to(dtype)
    expected = leaves(padded_collate_vision(given))
    (batch,) = DataLoader(
        Repeated(given), batch_size=count, num_workers=1, collate_fn=padded_collate_vision
    )
    received = leaves(batch)
    assert received.keys() == expected.keys()
    for name, tensor in expected.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor), name
    shared = {name for name, tensor in received.items() if tensor.is_shared()}
    patches = set() if dtype == torch.uint8 else {"encoder_input.vision.patches"}
    assert shared == patches | {"input_pos"} | ({"tokens", "labels"} if count > 1 else set())
    assert copy.copy(batch).keys() == batch.keys()  # pinning memory copies it
    assert isinstance(copy.copy(batch), Batch)
