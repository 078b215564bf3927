"""Conversations of images and videos beside transformers' processor, and defined positions."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoProcessor,
    Qwen2_5_VLProcessor,
)

from quickstart.checkpoint import write_tiny_checkpoint
from tests.conversations import generate_conversation, images_of
from tests.parity.figures import record
from tests.positions import defined_positions
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform

VIDEO_SIZE = {"shortest_edge": 4 * 28 * 28, "longest_edge": 24 * 28 * 28}
LIMITS = {
    "video_min_pixels": VIDEO_SIZE["shortest_edge"],
    "video_max_pixels": VIDEO_SIZE["longest_edge"],
}
RATES = (0.5, 1, 2.0, 3, 7.5, 23.976, 24, 29.97, 30, 59.94, 1 / 3)


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory, vocabulary)
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Qwen2_5_VLProcessor:
    return AutoProcessor.from_pretrained(checkpoint)


def with_videos(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    conversation = generate_conversation(seed)
    for _ in range(rng.randint(1, 3)):
        shape = (rng.randint(2, 13), rng.randint(20, 120), rng.randint(20, 120), 3)
        frames = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, shape, np.uint8)
        item = {"type": "video", "video": frames, "sample_fps": rng.choice(RATES)}
        content = rng.choice(conversation)["content"]
        content.insert(rng.randint(0, len(content)), item)
    return conversation


def reference(
    processor: Qwen2_5_VLProcessor, conversation: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    videos = [i for turn in conversation for i in turn["content"] if i["type"] == "video"]
    metadata = [
        {
            "fps": video["sample_fps"],
            "total_num_frames": len(video["video"]),
            "frames_indices": list(range(len(video["video"]))),
        }
        for video in videos
    ]
    return processor(
        text=[processor.apply_chat_template(conversation, add_vision_id=True)],
        images=images_of(conversation) or None,
        videos=[torch.from_numpy(video["video"]).permute(0, 3, 1, 2) for video in videos],
        video_metadata=metadata,
        videos_kwargs={"size": VIDEO_SIZE, "do_sample_frames": False},
        return_tensors="pt",
    )


def positions(conversation: list[dict[str, Any]], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Those of the definition, for transformers' ids, grids and seconds."""
    grids = {
        "image": iter(inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()),
        "video": iter(inputs["video_grid_thw"].tolist()),
    }
    kinds = [item["type"] for turn in conversation for item in turn["content"]]
    return defined_positions(
        inputs["input_ids"][0].tolist(),
        [next(grids[kind]) for kind in kinds if kind != "text"],
        inputs["second_per_grid_ts"],
    )


def test_images_and_videos(checkpoint: Path, processor: Qwen2_5_VLProcessor) -> None:
    transform = Qwen2_5_VLTransform.from_pretrained(checkpoint, add_vision_id=True, **LIMITS)
    as_uint8 = Qwen2_5_VLTransform.from_pretrained(
        checkpoint,
        add_vision_id=True,
        patch_dtype="uint8",
        **LIMITS,
    )
    for seed in range(60):
        conversation = with_videos(seed)
        expected = reference(processor, conversation)
        sample = transform({"messages": conversation})

        assert sample["tokens"] == expected["input_ids"][0].tolist(), seed
        assert torch.equal(sample["input_pos"], positions(conversation, expected)), seed

        vision = sample["encoder_input"]["vision"]
        kinds = [i["type"] for turn in conversation for i in turn["content"] if i["type"] != "text"]
        patches = vision["patches"].split(vision["grid_thw"].prod(1).tolist())
        for kind, pixels, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            ours = [i for i, k in enumerate(kinds) if k == kind]
            if ours:
                assert torch.equal(vision["grid_thw"][ours], expected[grids]), seed
                assert torch.equal(torch.cat([patches[i] for i in ours]), expected[pixels]), seed

        raw = as_uint8({"messages": conversation})["encoder_input"]["vision"]["patches"]
        assert raw.dtype == torch.uint8
        assert raw.shape == vision["patches"].shape
        record("conversations with videos: ids, grids, pixels, positions", 1, 0)


def test_a_batch_of_all_kinds(checkpoint: Path, processor: Qwen2_5_VLProcessor) -> None:
    """Logits of a batch of text, images and videos, one row after another beside transformers."""
    from tests.reference import reference_config, reference_model
    from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config
    from torchtune_vl.training import Qwen2_5_VLCheckpointer

    directory = checkpoint / "model"
    config = reference_config(
        vocab_size=151936,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )
    theirs = reference_model(config)
    theirs.save_pretrained(directory)
    model = qwen2_5_vl_from_config(directory).eval()
    weights = Qwen2_5_VLCheckpointer(directory, checkpoint / "unused").load_checkpoint()["model"]
    model.load_state_dict(weights)

    transform = Qwen2_5_VLTransform.from_pretrained(
        checkpoint,
        add_vision_id=True,
        patch_dtype="uint8",
        **LIMITS,
    )
    conversations = [with_videos(0), generate_conversation(3), with_videos(5)]
    conversations.append([{"role": "user", "content": [{"type": "text", "text": "Text alone."}]}])
    batch = padded_collate_vision([transform({"messages": c}) for c in conversations])
    with torch.no_grad():
        ours = model(**batch)
        for row, conversation in enumerate(conversations):
            if any(item["type"] == "video" for turn in conversation for item in turn["content"]):
                inputs = reference(processor, conversation)
            else:
                text = processor.apply_chat_template(conversation, add_vision_id=True)
                images = images_of(conversation) or None
                inputs = processor(text=[text], images=images, return_tensors="pt")
            if "video_grid_thw" in inputs:
                inputs["position_ids"] = positions(conversation, inputs).T[:, None]
            for name in ("video_metadata", "second_per_grid_ts"):
                inputs.pop(name, None)
            expected = theirs(**inputs).logits[0]
            difference = (ours[row, : len(expected)] - expected).abs().max()
            assert difference < 1e-4, row
            record(
                "mixed batch with uint8 patches: logits, float32, absolute", 1, float(difference)
            )
