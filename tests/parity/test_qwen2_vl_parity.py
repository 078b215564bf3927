"""Qwen2-VL beside transformers: conversations, sizes, boxes; see the other files for its model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from quickstart.checkpoint import PREPROCESSOR_CONFIG
from quickstart.vocabulary import write_vocabulary
from tests.parity.figures import record
from tests.parity.test_mixed_media_parity import LIMITS, reference, with_videos
from tests.positions import defined_positions
from tests.reference import QWEN2_VL, reference_config, reference_model
from torchtune_vl.chat import CHAT_TEMPLATE, QwenTokenizer
from torchtune_vl.models import model_from_pretrained, transform_from_pretrained
from torchtune_vl.models.qwen2_vl import Qwen2VLTransform, boxes_in_original


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_vocabulary(QwenTokenizer(vocabulary / "tokenizer.json"), directory)
    settings = {**PREPROCESSOR_CONFIG, "processor_class": "Qwen2VLProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    template = json.dumps({"chat_template": CHAT_TEMPLATE})
    (directory / "chat_template.json").write_text(template)
    config = reference_config(
        QWEN2_VL,
        vocab_size=151936,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )
    reference_model(config).save_pretrained(directory)
    return directory


def test_conversations(checkpoint: Path) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert isinstance(processor, Qwen2VLProcessor)
    transform = transform_from_pretrained(checkpoint, add_vision_id=True, **LIMITS)
    assert isinstance(transform, Qwen2VLTransform)
    for seed in range(60):
        conversation = with_videos(seed)
        expected = reference(processor, conversation)
        sample = transform({"messages": conversation})
        assert sample["tokens"] == expected["input_ids"][0].tolist(), seed

        kinds = [i["type"] for turn in conversation for i in turn["content"] if i["type"] != "text"]
        grids = {
            "image": iter(expected.get("image_grid_thw", torch.empty(0, 3)).tolist()),
            "video": iter(expected["video_grid_thw"].tolist()),
        }
        # A step of a video's grid is one position, whatever the clock says
        positions = defined_positions(
            sample["tokens"],
            [next(grids[kind]) for kind in kinds],
            [1.0] * kinds.count("video"),
            tokens_per_second=1,
        )
        assert torch.equal(sample["input_pos"], positions), seed

        vision = sample["encoder_input"]["vision"]
        patches = vision["patches"].split(vision["grid_thw"].prod(1).tolist())
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            ours = [i for i, k in enumerate(kinds) if k == kind]
            if ours:
                assert torch.equal(vision["grid_thw"][ours], expected[f"{kind}_grid_thw"]), seed
                assert torch.equal(torch.cat([patches[i] for i in ours]), expected[pixels]), seed
        record("Qwen2-VL, conversations: ids, grids, pixels, positions", 1, 0)


def test_exported_processor_files_are_those_of_the_family(checkpoint: Path) -> None:
    files = transform_from_pretrained(checkpoint).processor_files()
    named = {json.loads(text)["processor_class"] for name, text in files.items() if "proc" in name}
    assert named == {"Qwen2VLProcessor"}


def test_boxes_are_written_in_thousandths(checkpoint: Path) -> None:
    transform = transform_from_pretrained(checkpoint)
    image = torch.zeros(3, 200, 400, dtype=torch.uint8)
    boxes = [
        {"bbox_2d": [100, 50, 400, 200], "label": "a cat"},
        {"point_2d": [200, 100]},
    ]
    turns = [
        {"role": "user", "content": [{"type": "image", "image": image}]},
        {"role": "assistant", "content": [{"type": "boxes", "boxes": boxes}]},
    ]
    sample = transform({"messages": turns})
    answer = [t for t, masked in zip(sample["tokens"], sample["mask"], strict=True) if not masked]
    written = transform.decode(answer)
    assert written == (
        "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(250,250),(1000,1000)<|box_end|>"
        "<|box_start|>(500,500)<|box_end|><|im_end|>"
    )
    # As tokens of their own, not as text
    assert sum(token in answer for token in range(151646, 151650)) == 4
    assert boxes_in_original(written, (200, 400)) == [
        {"bbox_2d": [100.0, 50.0, 400.0, 200.0], "label": "a cat"},
        {"point_2d": [200.0, 100.0]},
    ]
    boxes[0]["color"] = "red"
    with pytest.raises(ValueError, match=r"no place for \['color'\]"):
        transform({"messages": turns})


def test_weights_of_a_directory_are_loaded(checkpoint: Path) -> None:
    model = model_from_pretrained(checkpoint, encoder_trainable=False)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint)
    assert torch.equal(model.decoder.tok_embeddings.weight, theirs.get_input_embeddings().weight)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "encoders"}  # of which the merger alone
    assert not model.encoders["vision"].layers[0].attn.qkv.weight.requires_grad
