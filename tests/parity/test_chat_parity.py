"""Whole samples beside transformers' processor with the published template and settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from quickstart.checkpoint import write_tiny_checkpoint
from tests.conversations import as_messages, generate_conversation, images_of
from tests.parity.figures import record
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform

CONVERSATIONS = 200


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory, vocabulary)
    return directory


@pytest.fixture(scope="module")
def transform(checkpoint: Path) -> Qwen2_5_VLTransform:
    return Qwen2_5_VLTransform.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Qwen2_5_VLProcessor:
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.image_processor.backend == "torchvision"
    assert processor.image_processor.size["longest_edge"] == 12845056
    return processor


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def reference(
    processor: Qwen2_5_VLProcessor, conversation: list[dict[str, Any]], prompt: bool = False
) -> dict[str, torch.Tensor]:
    text = processor.apply_chat_template(conversation, add_generation_prompt=prompt)
    images = images_of(conversation)
    return processor(text=[text], images=images or None, return_tensors="pt")


@pytest.mark.parametrize("first", range(0, CONVERSATIONS, 25))
def test_conversations(
    transform: Qwen2_5_VLTransform,
    processor: Qwen2_5_VLProcessor,
    model: Qwen2_5_VLForConditionalGeneration,
    first: int,
) -> None:
    for seed in range(first, first + 25):
        conversation = generate_conversation(seed)
        expected = reference(processor, conversation)
        sample = transform({"messages": as_messages(conversation)})

        assert sample["tokens"] == expected["input_ids"][0].tolist(), seed
        assert len(sample["mask"]) == len(sample["tokens"])
        positions, _ = model.model.get_rope_index(
            expected["input_ids"],
            expected["mm_token_type_ids"],
            image_grid_thw=expected.get("image_grid_thw"),
        )
        assert torch.equal(sample["input_pos"], positions[:, 0].T), seed
        record("conversations: ids, grids, pixels, positions", 1, 0)
        if not images_of(conversation):
            assert "encoder_input" not in sample
            continue
        vision = sample["encoder_input"]["vision"]
        assert torch.equal(vision["grid_thw"], expected["image_grid_thw"]), seed
        assert torch.equal(vision["patches"], expected["pixel_values"]), seed


def test_generation_prompts(transform: Qwen2_5_VLTransform, processor: Qwen2_5_VLProcessor) -> None:
    for seed in range(30):
        conversation = generate_conversation(seed)
        expected = reference(processor, conversation, prompt=True)["input_ids"][0].tolist()
        messages = as_messages(conversation)
        if messages[-1].role == "assistant" and not messages[-1].text_content:
            continue  # torchtune's way to ask for an answer; tests/test_transform.py has it
        assert transform({"messages": messages}, inference=True)["tokens"] == expected, seed


def test_unmasked_tokens_are_the_answers(transform: Qwen2_5_VLTransform) -> None:
    for seed in range(CONVERSATIONS):
        messages = as_messages(generate_conversation(seed))
        sample = transform({"messages": messages})
        pairs = zip(sample["tokens"], sample["mask"], strict=True)
        unmasked = transform.decode([token for token, masked in pairs if not masked])
        answers = [f"{m.text_content}<|im_end|>" for m in messages if m.role == "assistant"]
        expected = transform.decode(transform.encode("".join(answers), add_eos=False))
        # Where an answer starts with line breaks, the first is one token with that of the header
        assert unmasked.replace("\n", "") == expected.replace("\n", ""), seed
        if not any(answer.startswith(("\n", "\t\n")) for answer in answers):
            assert unmasked == expected, seed
