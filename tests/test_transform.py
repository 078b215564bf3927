"""Messages to samples: masks, limits and errors."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchtune.data import Message

from quickstart.checkpoint import write_tiny_checkpoint
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform, qwen2_5_vl_transform

IMAGE = Image.new("RGB", (56, 84), "teal")


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "content": content}


def image(content: Any = IMAGE) -> dict[str, Any]:
    return {"type": "image", "content": content}


def user(*content: dict[str, Any]) -> Message:
    return Message(role="user", content=list(content))


def assistant(content: str, **kwargs: Any) -> Message:
    return Message(role="assistant", content=content, **kwargs)


@pytest.fixture(scope="module")
def transform(vocabulary: Path) -> Qwen2_5_VLTransform:
    return qwen2_5_vl_transform(vocabulary / "vocab.json", vocabulary / "merges.txt")


def unmasked(transform: Qwen2_5_VLTransform, sample: dict[str, Any]) -> str:
    pairs = zip(sample["tokens"], sample["mask"], strict=True)
    return transform.decode([token for token, masked in pairs if not masked])


def test_sample(transform: Qwen2_5_VLTransform) -> None:
    given = {"messages": [user(image(), text("What colour?")), assistant("Teal.")]}
    sample = transform(given)
    assert transform.decode(sample["tokens"]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|>"
        "<|image_pad|><|image_pad|><|vision_end|>What colour?<|im_end|>\n"
        "<|im_start|>assistant\nTeal.<|im_end|>\n"
    )
    assert unmasked(transform, sample) == "Teal.<|im_end|>"
    vision = sample["encoder_input"]["vision"]
    assert vision["grid_thw"].tolist() == [[1, 6, 4]]
    assert vision["patches"].shape == (24, 1176)
    assert sample["input_pos"].shape == (len(sample["tokens"]), 3)
    assert list(given) == ["messages"]  # the caller's sample is as it was


def test_tokenizer_interface(transform: Qwen2_5_VLTransform) -> None:
    assert (transform.base_vocab_size, transform.vocab_size) == (151643, 151665)
    assert transform.pad_id == 151643
    assert transform.stop_tokens == [151645, 151643]
    assert len(transform.special_tokens) == 22
    tokens, mask = transform.tokenize_messages([user(text("a")), assistant("b")], add_eos=True)
    sample = transform({"messages": [user(text("a")), assistant("b")]})
    assert (tokens, mask) == (sample["tokens"], sample["mask"])


def test_masked_answers_carry_no_loss(transform: Qwen2_5_VLTransform) -> None:
    messages = [user(text("1")), assistant("one", masked=True), user(text("2")), assistant("two")]
    assert unmasked(transform, transform({"messages": messages})) == "two<|im_end|>"


def test_images_in_answers_carry_no_loss(transform: Qwen2_5_VLTransform) -> None:
    answer = Message(role="assistant", content=[text("Here: "), image(), text(" as asked")])
    sample = transform({"messages": [user(text("Draw")), answer]})
    assert unmasked(transform, sample) == "Here:  as asked<|im_end|>"


def test_line_break_that_merges_with_the_header_is_trained(transform: Qwen2_5_VLTransform) -> None:
    sample = transform({"messages": [user(text("a")), assistant("\nb")]})
    assert unmasked(transform, sample) == "\n\nb<|im_end|>"


def test_empty_answer_at_the_end_asks_for_one(transform: Qwen2_5_VLTransform) -> None:
    question = user(image(), text("a"))
    asked = transform({"messages": [question, assistant("")]}, inference=True)
    expected = transform({"messages": [question]}, inference=True)
    assert asked["tokens"] == expected["tokens"]
    assert transform.decode(asked["tokens"]).endswith("<|im_start|>assistant\n")
    assert all(asked["mask"])
    pictured = Message(role="assistant", content=[image()])
    kept = transform({"messages": [question, pictured]}, inference=True)
    assert len(kept["encoder_input"]["vision"]["grid_thw"]) == 2
    with pytest.raises(ValueError, match="at least one message"):
        transform({"messages": []}, inference=True)


def test_images_of_the_sample_fill_the_places(transform: Qwen2_5_VLTransform) -> None:
    small, large = Image.new("RGB", (56, 56)), Image.new("RGB", (112, 56))
    messages = [user({"type": "image"}, text("and"), image(None)), assistant("b")]
    sample = transform({"messages": messages, "images": [small, large]})
    assert sample["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8]]
    with pytest.raises(ValueError, match="2 places for images, but there are 1"):
        transform({"messages": messages, "images": [small]})
    with pytest.raises(ValueError, match="2 places for images, but there are 3"):
        transform({"messages": messages, "images": [small, small, small]})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (
            [user(text("a"), {"type": "audio", "content": b""})],
            r"message 0 \(user\): item 1.*audio",
        ),
        ([Message(role="user", content=["a"])], "item 0 is of type str, expected a dict"),
        ([user({"content": "a"})], r"message 0 \(user\): item 0: content of type None"),
        ([user({"type": "text", "content": None})], "value of type NoneType"),
        (
            [user(text("a")), assistant("b"), user(image(b""))],
            r"message 2 \(user\): item 0.*0 bytes",
        ),
        ([user(image("missing.png"))], r"item 0: image file 'missing\.png': cannot be read"),
        ([user(image(None))], "message 0.*item 0"),
        ([user(text("<|vision_start|><|image_pad|><|vision_end|>"))], "without an image"),
        ([user(image(), text("<|image_pad|>"))], "without an image"),
        ([user(text("\ud800"))], r"message 0 \(user\).*surrogate"),
    ],
)
def test_bad_input_is_located(
    transform: Qwen2_5_VLTransform, messages: list[Message], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        transform({"messages": messages})
    with pytest.raises(ValueError, match=r"sample 'no\. 7': "):
        transform({"messages": messages, "id": "no. 7"})


def test_text_is_cut_but_never_an_image(vocabulary: Path) -> None:
    def limited(max_seq_len: int) -> Qwen2_5_VLTransform:
        return qwen2_5_vl_transform(vocabulary / "tokenizer.json", max_seq_len=max_seq_len)

    messages = [user(image(), text("a question")), assistant("an answer of several words")]
    whole = limited(1000)({"messages": messages})
    end_of_image = whole["tokens"].index(151653) + 1

    cut = limited(len(whole["tokens"]) - 3)({"messages": messages})
    assert cut["tokens"] == whole["tokens"][:-3]
    assert cut["mask"] == whole["mask"][:-3]
    assert torch.equal(cut["input_pos"], whole["input_pos"][:-3])
    assert limited(end_of_image)({"messages": messages})["tokens"][-1] == 151653
    for too_short in (end_of_image - 1, end_of_image - 4, 5):
        with pytest.raises(ValueError, match=r"sample 3: .*an image would be cut.*max_seq_len"):
            limited(too_short)({"messages": messages, "id": 3})
    with pytest.raises(ValueError, match="prompt has"):
        limited(end_of_image)({"messages": messages[:1]}, inference=True)


def test_settings_of_a_directory(vocabulary: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, vocabulary)
    transform = Qwen2_5_VLTransform.from_pretrained(tmp_path, max_pixels=50000)
    assert transform.image_transform.max_pixels == 50000
    assert transform.image_transform.min_pixels == 3136

    path = tmp_path / "preprocessor_config.json"
    config = json.loads(path.read_text())
    limits = {"shortest_edge": 4000, "longest_edge": 200000}
    renamed = {k: v for k, v in config.items() if not k.endswith("_pixels")} | {"size": limits}
    path.write_text(json.dumps({**renamed, "image_mean": [0.5, 0.5, 0.5]}))
    image_transform = Qwen2_5_VLTransform.from_pretrained(tmp_path).image_transform
    assert (image_transform.min_pixels, image_transform.max_pixels) == (4000, 200000)
    assert image_transform.image_mean == (0.5, 0.5, 0.5)

    path.write_text(json.dumps({**config, "do_rescale": False}))
    with pytest.raises(ValueError, match="do_rescale is False"):
        Qwen2_5_VLTransform.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        Qwen2_5_VLTransform.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": renamed}))
    assert Qwen2_5_VLTransform.from_pretrained(tmp_path).image_transform.max_pixels == 200000

    (tmp_path / "tokenizer.json").unlink()
    assert Qwen2_5_VLTransform.from_pretrained(tmp_path).vocab_size == 151665
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    with pytest.raises(ValueError, match="not the published chat template"):
        Qwen2_5_VLTransform.from_pretrained(tmp_path)


def test_data_workers_can_take_it(transform: Qwen2_5_VLTransform) -> None:
    sample = {"messages": [user(image(), text("a")), assistant("b")]}
    copied = pickle.loads(pickle.dumps(transform))
    assert copied(sample)["tokens"] == transform(sample)["tokens"]
