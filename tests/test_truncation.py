"""What a sample that is too long loses, and what never."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tests.conversations import as_messages, generate_conversation
from torchtune_vl.media._said import Said
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform

IM_END, VISION_START, VISION_END, IMAGE_PAD = 151645, 151652, 151653, 151655
IMAGE = Image.new("RGB", (56, 84))


@pytest.fixture(scope="module")
def make(vocabulary: Path):
    base = Qwen2_5_VLTransform(vocabulary / "tokenizer.json")

    def limited(max_seq_len: int | None, truncation: str = "right") -> Qwen2_5_VLTransform:
        transform = Qwen2_5_VLTransform.__new__(Qwen2_5_VLTransform)
        transform.__dict__ = {
            **base.__dict__,
            "max_seq_len": max_seq_len,
            "truncation": truncation,
            "_told": Said("media", "texts"),
        }
        return transform

    return limited


def exchange(number: int, *media: Any) -> list[dict[str, Any]]:
    question = [*media, {"type": "text", "text": f"question {number}"}]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"answer {number}"},
    ]


MEDIUM = {"type": "image", "image": IMAGE}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    *exchange(0, MEDIUM),
    *exchange(1),
    *exchange(2, MEDIUM, MEDIUM),
]


def test_nothing_is_reported_where_nothing_is_cut(make) -> None:
    whole = make(None)({"messages": MESSAGES})
    assert "truncated" not in whole
    exactly = make(len(whole["tokens"]))({"messages": MESSAGES})
    assert exactly.keys() == whole.keys()
    assert exactly["tokens"] == whole["tokens"]


@pytest.mark.parametrize("truncation", ["right", "left"])
def test_every_limit(make, truncation: str) -> None:
    whole = make(None)({"messages": MESSAGES})
    tokens, patches = whole["tokens"], whole["encoder_input"]["vision"]["patches"]
    refused = set()
    for limit in range(1, len(tokens)):
        try:
            cut = make(limit, truncation)({"messages": MESSAGES, "id": 7})
        except ValueError as error:
            refused.add(limit)
            if "sample 7" in str(error) and "max_seq_len" in str(error):
                continue
            raise
        kept = len(cut["tokens"])
        first = 0 if truncation == "right" else len(tokens) - kept
        window = slice(first, first + kept)
        assert cut["tokens"] == tokens[window]
        assert cut["mask"] == whole["mask"][window]
        learned = zip(cut["tokens"][1:], cut["mask"][1:], strict=True)  # nothing predicts the first
        assert any(token != IM_END for token, masked in learned if not masked)
        # As much as fits: one token more would be too many, or part of an image
        removed = tokens[first + kept] if truncation == "right" else tokens[first - 1]
        assert kept == limit or removed == (VISION_START if truncation == "right" else VISION_END)
        images = cut["tokens"].count(VISION_START)
        assert cut["tokens"].count(VISION_END) == images
        assert cut["tokens"].count(IMAGE_PAD) == 6 * images
        lost = {"tokens": len(tokens) - kept, "images": 3 - images, "videos": 0}
        assert cut["truncated"] == lost
        if images:
            vision = cut["encoder_input"]["vision"]
            expected = patches[: 24 * images] if truncation == "right" else patches[-24 * images :]
            assert torch.equal(vision["patches"], expected)
            assert len(vision["grid_thw"]) == images
        else:
            assert "encoder_input" not in cut
        assert cut["input_pos"][0].tolist() == [0, 0, 0]
    loss = [i for i, masked in enumerate(whole["mask"]) if not masked]
    if truncation == "right":
        assert refused == set(range(1, loss[0] + 1))
    else:
        assert refused == set(range(1, len(tokens) - loss[-2] + 1))


def test_whole_turns_go_from_the_oldest(make) -> None:
    lengths = [
        len(make(None)({"messages": [MESSAGES[0], *MESSAGES[first:]]})["tokens"])
        for first in (1, 3, 5)
    ]
    for limit in range(lengths[2], lengths[0]):
        kept = next(i for i, length in enumerate(lengths) if length <= limit)
        messages = [MESSAGES[0], *MESSAGES[1 + 2 * kept :]]
        expected = make(None)({"messages": messages})
        cut = make(limit, "turns")({"messages": MESSAGES})
        assert cut["tokens"] == expected["tokens"]
        assert cut["mask"] == expected["mask"]
        assert torch.equal(cut["input_pos"], expected["input_pos"])
        assert cut["truncated"]["images"] == 1
        assert cut["truncated"]["tokens"] == lengths[0] - len(cut["tokens"])
    with pytest.raises(ValueError, match=r"its last turn alone \d+: raise max_seq_len"):
        make(lengths[2] - 1, "turns")({"messages": MESSAGES})
    with pytest.raises(ValueError, match="last turn alone"):
        make(4, "turns")({"messages": MESSAGES[-1:]})


def test_turns_of_tools_stay_together(make) -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    tooled = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "y"},
    ]
    sample = {"messages": [*tooled, *tooled], "tools": [{"name": "f"}]}
    whole = make(None)(sample)
    once = make(None)({**sample, "messages": tooled})
    cut = make(len(whole["tokens"]) - 1, "turns")(sample)
    assert cut["tokens"] == once["tokens"]


def test_no_image_is_left_over_without_loss(make) -> None:
    messages = exchange(0, MEDIUM)
    whole = make(None)({"messages": messages})
    end_of_image = whole["tokens"].index(VISION_END) + 1
    with pytest.raises(ValueError, match="none that carries loss would be left"):
        make(end_of_image)({"messages": messages})


def test_prompts_are_not_cut(make) -> None:
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens: raise max_seq_len \(now 9\)"):
        make(9)({"messages": MESSAGES}, inference=True)


def test_lost_texts_and_lost_media_are_told_once_each(
    make, caplog: pytest.LogCaptureFixture
) -> None:
    """The first that is cut may lose some words alone, and the next its images."""
    transform = make(60)
    texts = [*exchange(0), *exchange(1, {"type": "text", "text": "long " * 99}), *exchange(2)]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            transform({"messages": texts})
            transform({"messages": MESSAGES})
    of_texts, of_media = (record.getMessage() for record in caplog.records)
    assert "0 images, 0 videos. Lost texts are said once" in of_texts
    assert "1 images, 0 videos. Lost media are said once" in of_media


def test_one_of_all_data_workers_tells(make, caplog: pytest.LogCaptureFixture) -> None:
    transform = make(60)

    def tell(number: int) -> int:
        before = len(caplog.records)
        transform({"messages": MESSAGES})
        return len(caplog.records) - before

    def tell_all(numbers: list[int]) -> int:
        return sum(map(tell, numbers))

    with caplog.at_level(logging.WARNING):
        assert sum(DataLoader(range(8), num_workers=2, collate_fn=tell_all)) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(["right", "left", "turns"]))
def test_any_conversation(make, seed: int, part: float, truncation: str) -> None:
    messages = as_messages(generate_conversation(seed))
    whole = make(None)({"messages": messages})
    limit = max(1, int(part * len(whole["tokens"])))
    try:
        cut = make(limit, truncation)({"messages": messages})
    except ValueError as error:
        if "max_seq_len" in str(error):
            return
        raise
    assert len(cut["tokens"]) <= limit or cut["tokens"] == whole["tokens"]
    assert len(cut["input_pos"]) == len(cut["mask"]) == len(cut["tokens"])
    grids = cut.get("encoder_input", {}).get("vision", {}).get("grid_thw", torch.empty(0, 3))
    assert cut["tokens"].count(IMAGE_PAD) == int(grids.prod(1).sum()) // 4
    assert cut["tokens"].count(VISION_START) == len(grids)


def test_a_medium_that_just_fits_stays(make) -> None:
    messages = [*MESSAGES[:3], {"role": "user", "content": [MEDIUM]}, MESSAGES[2]]
    whole = make(None)({"messages": messages})["tokens"]
    end = len(whole) - whole[::-1].index(VISION_END)
    cut = make(end)({"messages": messages})
    assert cut["tokens"] == whole[:end]
    assert cut["truncated"]["images"] == 0


def test_the_remedy_is_that_of_the_media(make) -> None:
    film = {"type": "video", "video": np.zeros((8, 28, 28, 3), np.uint8)}
    fps = r"lower fps, max_frames or video_max_pixels \(of one video nframes or max_pixels\)"
    for media, remedy in (
        ([], r"\(now 9\), or shorten"),
        ([MEDIUM], r"\(now 9\), lower max_pixels, or shorten"),
        ([film], rf"\(now 9\), {fps}, or shorten"),
        ([film, MEDIUM], rf"\(now 9\), lower max_pixels, {fps}, or shorten"),
    ):
        for messages in (exchange(0, *media), exchange(0, *media)[:1]):
            with pytest.raises(ValueError, match=remedy):
                make(9)({"messages": messages}, inference=len(messages) == 1)
