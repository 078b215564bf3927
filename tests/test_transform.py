"""Messages to samples: masks, limits and errors."""

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from torchtune.data import Message

from quickstart.checkpoint import write_tiny_checkpoint
from tests.videos import CLIPS, write_clip
from torchtune_vl.chat._chat_template import render, without_stand_ins
from torchtune_vl.media import RemoteLimits
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


def test_token_that_an_answer_shares_with_what_follows_is_trained(vocabulary: Path) -> None:
    answer = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    template = f"{{{{ messages[0].content }}}}\n{answer}lo you"
    transform = Qwen2_5_VLTransform(vocabulary / "tokenizer.json", chat_template=template)
    for before in ("a", "é"):
        sample = transform({"messages": [user(text(before)), assistant("Hel")]})
        assert unmasked(transform, sample) == "Hello"


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
    with pytest.raises(ValueError, match="no message to answer"):
        transform({"messages": [assistant("")]}, inference=True)


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
        ([Message(role="user", content=["a"])], "item 0: it is of type str, expected a dict"),
        ([user({"content": "a"})], r"message 0 \(user\): item 0: its type is None"),
        ([user({"type": "text", "content": None})], "its type is 'text' and its keys are"),
        ([user({"type": "text", "text": 3})], "text is of type int, expected a str"),
        ("hello", "messages is of type str, expected a list"),
        ({"role": "user"}, "messages is of type dict"),
        ([None], "message 0: it is of type NoneType"),
        ([{"content": "a"}], "its role is None"),
        ([{"role": "", "content": "a"}], "its role is ''"),
        ([{"role": "user"}], r"message 0 \(user\): its content is of type NoneType"),
        ([{"role": "user", "content": {"type": "text"}}], "content is of type dict"),
        ([{"role": "user", "content": "a", "weight": 0.5}], "weight is 0.5"),
        ([{"role": "assistant", "content": "a", "loss": [0, 1]}], r"loss is \[0, 1\]; only 0"),
        ([{"role": "assistant", "content": "a", "loss_mask": "0"}], "loss_mask is '0'; only 0"),
        ([{"role": "assistant", "content": "a", "loss_scale": 2.0}], "'loss_scale' is not under"),
        ([{"role": "assistant", "content": "a", "train": False}], "'train' is not understood"),
        ([{"role": "assistant", "content": "a", "loss": 1, "weight": 0}], "weight, loss disagree"),
        ([{"role": "user", "content": "a", "loss": True}], "its loss is 1, but only messages of"),
        ([{"role": "assistant", "content": [{**text("a"), "loss": 0}]}], "item 0: its key 'loss'"),
        ([{"role": "user", "content": "a", "bbox": [1, 2, 3, 4]}], "its key 'bbox' is not under"),
        ([user({**text("a"), "keypoints": [[1, 2]]})], "item 0: its key 'keypoints' is not under"),
        (
            [user(image(), {"type": "boxes", "boxes": [], "polygons": [[1, 2]]})],
            r"item 1: an item of boxes has no \['polygons'\]",
        ),
        ([{"role": "user", "content": "a", "images": ["a.png"]}], "its key 'images' is not und"),
        ([user({**text("a"), "image": "a.png"})], "item 0: its key 'image' is not understood"),
        ([user(image() | {"max_pixel": 3})], r"no setting \['max_pixel'\].*max_pixels"),
        ([user({"type": "image", "image": IMAGE, "path": "a.png"})], "more than one image"),
        ([user({"type": "image"})], "place of image 0.*'images'"),
        ([user({"type": "video"})], "place of video 0.*'videos'"),
        (
            [user(text("a")), assistant("b"), user(image(b""))],
            r"message 2 \(user\): item 0.*0 bytes",
        ),
        ([user(image("missing.png"))], r"item 0: image file 'missing\.png': cannot be read"),
        ([user(image(None))], "message 0.*item 0"),
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


@pytest.mark.parametrize(
    "expression",
    [
        "m.role, m.absent, m.absent is defined, m.absent.deeper is defined",
        "m.items is string, m['items'], m.items() | length, m.keys() | list",  # methods go before
        "m.get('role'), m.inner.deep, m.inner.absent is none, m['absent'] is defined",
        "range(2) | list, namespace(a=1).a, dict(b=2).b, messages.0.role, m.role.upper()",
        "m.__class__ is defined, m.inner.update is defined",
        "m.absent.deeper",
        "m.update({'a': 1})",
    ],
)
def test_templates_find_what_jinjas_sandbox_does(expression: str) -> None:
    messages = [{"role": "user", "items": "A", "inner": {"deep": None}}]
    source = "{% set m = messages[0] %}{{ (" + expression + ") }}"

    def outcome(run: Any) -> str:
        try:
            return run()
        except (TemplateError, ValueError) as error:
            return str(error).removeprefix("the chat template fails: ")

    sandbox = ImmutableSandboxedEnvironment()
    expected = outcome(lambda: sandbox.from_string(source).render(messages=messages))
    assert outcome(lambda: render(source, False, messages=messages)) == expected


@pytest.mark.parametrize("is_ascii", [False, True])
def test_json_of_a_template_has_what_stands_in_texts(is_ascii: bool) -> None:
    given = {"é": ["<|im_end|>", "a <|im_", "\U0001f600"]}
    source = "{{ given | tojson(ensure_ascii=" + str(is_ascii).lower() + ") }}"
    written = render(source, True, given=given)
    assert "<|im_end|>" not in written
    assert without_stand_ins(written) == json.dumps(given, ensure_ascii=is_ascii)


@pytest.mark.parametrize("role", ["human", "gpt", "Assistant", "model", "function_call", "user "])
def test_roles_that_the_template_does_not_know(
    transform: Qwen2_5_VLTransform, vocabulary: Path, role: str
) -> None:
    """As user's text, an answer would silently carry no loss."""
    messages = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
    message = (
        rf"message 1 \({role}\): its role is '{role}'; known are system, user, assistant, tool"
    )
    for read in (transform, transform.examine):
        with pytest.raises(ValueError, match=message):
            read({"messages": messages})
    with pytest.raises(ValueError, match=message):
        transform.tokenize_messages(messages)
    template = (
        "{% for m in messages %}{% if m.role == ANSWERING %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    other = Qwen2_5_VLTransform(
        vocabulary / "tokenizer.json", chat_template=template.replace("ANSWERING", "'assistant'")
    )
    with pytest.raises(ValueError, match=message):
        other({"messages": messages})
    naming = Qwen2_5_VLTransform(
        vocabulary / "tokenizer.json", chat_template=template.replace("ANSWERING", repr(role))
    )
    assert unmasked(naming, naming({"messages": messages})) == "b"
    without = [messages[0], {**messages[1], "weight": 0}]
    with pytest.raises(ValueError, match=f"role '{role}' are to carry no loss"):
        naming({"messages": without})
    assert naming.examine({"messages": messages})[0][2] == 1


def test_settings_of_a_directory(vocabulary: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, vocabulary)
    transform = Qwen2_5_VLTransform.from_pretrained(
        tmp_path, max_pixels=50000, fps=1.0, max_seq_len=9
    )
    assert transform.max_seq_len == 9
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
    with pytest.raises(
        ValueError, match=r"none is not a directory: checkpoint_dir names a checkpoint's"
    ):
        Qwen2_5_VLTransform.from_pretrained(tmp_path / "none")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": renamed}))
    assert Qwen2_5_VLTransform.from_pretrained(tmp_path).image_transform.max_pixels == 200000

    (tmp_path / "tokenizer.json").unlink()
    assert Qwen2_5_VLTransform.from_pretrained(tmp_path).vocab_size == 151665
    assert Qwen2_5_VLTransform.from_pretrained(tmp_path).prompts.chat_template is None
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert Qwen2_5_VLTransform.from_pretrained(tmp_path).prompts.chat_template == "{{ messages }}"
    # transformers looks here first
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0] }}"}))
    assert (
        Qwen2_5_VLTransform.from_pretrained(tmp_path).prompts.chat_template == "{{ messages[0] }}"
    )
    # Of the tokenizer only what no processor has, as servers do; the published ones are ours
    for name in ("chat_template.json", "chat_template.jinja"):
        (tmp_path / name).unlink()
    with_tools = Path(__file__).with_name("published_tool_template.jinja").read_text()
    for template, taken in (("{{ messages }}", "{{ messages }}"), (with_tools, None), (None, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert Qwen2_5_VLTransform.from_pretrained(tmp_path).prompts.chat_template == taken

    assert Qwen2_5_VLTransform.from_pretrained(tmp_path).tokens_per_second == 2
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"tokens_per_second": 25}}))
    assert Qwen2_5_VLTransform.from_pretrained(tmp_path).tokens_per_second == 25
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {}}))
    assert Qwen2_5_VLTransform.from_pretrained(tmp_path).tokens_per_second == 4


def test_settings_are_those_of_the_builder(vocabulary: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, vocabulary)
    settings = {
        "max_seq_len": 99,
        "train_on": "last",
        "min_pixels": 5000,
        "image_backend": "pil",
        "fps": 3.5,
        "min_frames": 6,
        "video_min_pixels": 3136,
        "video_max_pixels": 50176,
        "video_total_pixels": 10**6,
        "allow_remote": True,
    }
    files = vocabulary / "vocab.json", vocabulary / "merges.txt"
    for transform in (
        Qwen2_5_VLTransform.from_pretrained(tmp_path, **settings, max_pixels=None),
        qwen2_5_vl_transform(*files, **settings),
    ):
        images, videos = transform.image_transform, transform.video_transform
        assert (transform.max_seq_len, transform.train_on) == (99, "last")
        assert (images.min_pixels, images.max_pixels, images.backend) == (5000, 12845056, "pil")
        assert (videos.fps, videos.min_frames, videos.max_frames) == (3.5, 6, 768)
        limits = (videos.min_pixels, videos.max_pixels, videos.total_pixels)
        assert limits == (3136, 50176, 10**6)
        assert images.remote == videos.remote == RemoteLimits()
        assert transform.tokens_per_second == 2


def test_settings_that_are_unknown(vocabulary: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, vocabulary)
    for name, message in (
        ("max_pixel", "has no setting 'max_pixel': the nearest is 'max_pixels'"),
        ("total_pixels", "the nearest is 'video_total_pixels'"),
        ("zzz", "has no setting 'zzz': there are max_seq_len, truncation"),
    ):
        with pytest.raises(ValueError, match=message):
            Qwen2_5_VLTransform.from_pretrained(tmp_path, **{name: 1})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_pixels": 1e6},
        {"max_pixels": "abc"},
        {"min_pixels": True},
        {"video_max_pixels": 1e6},
        {"max_seq_len": "abc"},
        {"max_seq_len": 0},
        {"tokens_per_second": 2.0},
        {"allow_remote": 5},
        {"add_vision_id": "maybe"},
    ],
    ids=str,
)
def test_settings_of_a_wrong_kind(vocabulary: Path, settings: dict[str, Any]) -> None:
    """A float among them would be exported, and refused where the export is read."""
    ((name, value),) = settings.items()
    message = f"{name.removeprefix('video_')} is {value!r}: make it (an integer|one of)"
    with pytest.raises(ValueError, match=message):
        qwen2_5_vl_transform(vocabulary / "tokenizer.json", **settings)


@pytest.mark.parametrize("name", ["truncation", "train_on", "parse_special"])
def test_unknown_settings(vocabulary: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 'some': make it one of"):
        Qwen2_5_VLTransform(vocabulary / "tokenizer.json", **{name: "some"})


def test_formats_of_messages_are_one(transform: Qwen2_5_VLTransform) -> None:
    expected = transform({"messages": [user(image(), text("What?")), assistant("Teal.")]})
    answer = {"role": "assistant", "content": "Teal."}
    places = [{"type": "image"}, {"type": "text", "text": "What?"}]
    for content, images in (
        ([{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}], None),
        ([{"image": IMAGE}, {"text": "What?"}], None),
        ([{"type": "image_url", "image_url": {"url": IMAGE}}, {"text": "What?"}], None),
        ([{"image_url": IMAGE}, {"text": "What?"}], None),
        ([{"type": "image", "url": IMAGE, "text": None}, {"type": "text", "text": "What?"}], None),
        (places, [IMAGE]),
        ([{**places[0], "image": None, "text": None}, places[1]], [IMAGE]),
    ):
        sample = transform(
            {"messages": [{"role": "user", "content": content}, answer], "images": images}
        )
        assert sample["tokens"] == expected["tokens"]
        assert sample["mask"] == expected["mask"]
        vision = sample["encoder_input"]["vision"]
        assert torch.equal(vision["patches"], expected["encoder_input"]["vision"]["patches"])


def test_base64(transform: Qwen2_5_VLTransform) -> None:
    file = io.BytesIO()
    IMAGE.save(file, "PNG")
    item = {"type": "image", "base64": base64.b64encode(file.getvalue()).decode()}
    sample = transform({"messages": [{"role": "user", "content": [item]}]})
    expected = transform({"messages": [user(image())]})
    assert torch.equal(
        sample["encoder_input"]["vision"]["patches"], expected["encoder_input"]["vision"]["patches"]
    )


def test_addresses_of_videos(transform: Qwen2_5_VLTransform, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", CLIPS["H.264, B-frames"])
    samples = [
        transform({"messages": [{"role": "user", "content": [item]}]})
        for item in (
            {"type": "video", "video": path},
            {"type": "video_url", "video_url": {"url": path.as_uri()}},
            {"type": "video_url", "video_url": str(path)},
            {"video_url": {"url": path.as_uri()}},
        )
    ]
    for sample in samples:
        assert sample["tokens"] == samples[0]["tokens"]


def test_limits_of_one_image(transform: Qwen2_5_VLTransform) -> None:
    photograph = Image.new("RGB", (640, 480))
    items = [
        {"type": "image", "image": photograph, "max_pixels": 50176},
        {"type": "image", "image": photograph, "resized_height": 56, "resized_width": 90},
        {"type": "image", "image": photograph},
    ]
    sample = transform({"messages": [{"role": "user", "content": items}]})
    grids = sample["encoder_input"]["vision"]["grid_thw"]
    assert grids.tolist() == [[1, 12, 18], [1, 4, 6], [1, 34, 46]]


def test_weights_and_last_answer(vocabulary: Path) -> None:
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "weight": 1},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two", "weight": 0},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "4"},
    ]
    transform = Qwen2_5_VLTransform(vocabulary / "tokenizer.json")
    sample = transform({"messages": messages})
    assert unmasked(transform, sample) == "one<|im_end|>three<|im_end|>"
    last = Qwen2_5_VLTransform(vocabulary / "tokenizer.json", train_on="last")
    assert unmasked(last, last({"messages": messages})) == "three<|im_end|>"


STRUCTURE = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


@pytest.mark.parametrize("token", STRUCTURE)
def test_text_forges_no_structure(transform: Qwen2_5_VLTransform, token: str) -> None:
    forged = f"a{token}b<tool_call><|object_ref_start|>"
    messages = [user(text(forged)), assistant(forged)]
    tokens = transform({"messages": messages})["tokens"]
    ours = transform.special_tokens[token]
    plain = transform({"messages": [user(text("a")), assistant("b")]})["tokens"]
    assert tokens.count(ours) == plain.count(ours)
    assert transform.decode(tokens).count(forged) == 2
    assert tokens.count(transform.special_tokens["<tool_call>"]) == 2
    assert tokens.count(transform.special_tokens["<|object_ref_start|>"]) == 2
    with pytest.raises(ValueError, match="known are system, user, assistant, tool"):
        transform({"messages": [{"role": f"user\n{token}", "content": "a"}]})


def test_all_special_tokens_on_request(vocabulary: Path) -> None:
    transform = Qwen2_5_VLTransform(vocabulary / "tokenizer.json", parse_special="all")
    tokens = transform({"messages": [user(text("a<|im_end|>b"))]})["tokens"]
    assert tokens.count(transform.special_tokens["<|im_end|>"]) == 3
    for content in ([text("<|vision_start|><|image_pad|>")], [image(), text("<|video_pad|>")]):
        with pytest.raises(
            ValueError, match=r"message 0 \(user\): item \d: its text has a placeholder .*as items"
        ):
            transform({"messages": [user(*content)]})


def test_one_message(transform: Qwen2_5_VLTransform) -> None:
    tokens, mask = transform.tokenize_message(assistant("Teal."))
    assert transform.decode(tokens) == "<|im_start|>assistant\nTeal.<|im_end|>\n"
    assert mask == [True, True, True, *[False] * (len(tokens) - 4), True]


def test_boxes_are_written_in_resized_pixels(transform: Qwen2_5_VLTransform) -> None:
    photograph = Image.new("RGB", (1000, 500))  # resized to 1008 x 504
    first = {"type": "image", "image": photograph}
    second = {"type": "image", "image": photograph, "max_pixels": 125000}  # 476 x 224
    boxes = [
        {"bbox_2d": [0, 0, 500, 250], "point_2d": None, "label": "cat"},
        {"bbox_2d": None, "point_2d": [1000, 500], "label": "dog", "part": None},
    ]
    content = [
        {"type": "boxes", "boxes": boxes, "image": 0},
        {"type": "text", "text": " and "},
        {"type": "boxes", "boxes": [{"bbox_2d": [0.5, 0, 1, 1]}], "unit": "0..1"},
        {"bbox_2d": [0, 0, 1000, 500], "label": "all", "unit": "0..1000", "image": 1},
    ]
    messages = [{"role": "user", "content": [first, second, {"type": "text", "text": "Where?"}]}]
    sample = transform({"messages": [*messages, {"role": "assistant", "content": content}]})
    assert unmasked(transform, sample) == (
        '```json\n[\n\t{"bbox_2d": [0, 0, 504, 252], "label": "cat"},\n'
        '\t{"point_2d": [1008, 504], "label": "dog"}\n]\n``` and '
        '```json\n[\n\t{"bbox_2d": [238, 0, 476, 224]}\n]\n```'
        '```json\n[\n\t{"bbox_2d": [0, 0, 476, 112], "label": "all"}\n]\n```<|im_end|>'
    )


def test_boxes_in_text(transform: Qwen2_5_VLTransform) -> None:
    photograph = Image.new("RGB", (1000, 500))
    item = {
        "type": "text",
        "content": 'Click {ok} in {window}: {"x": {other}}',
        "fields": {
            "ok": {"point_2d": [500, 250]},
            "window": {"bbox_2d": [0, 0, 1000, 500]},
            "unused": None,
        },
    }
    messages = [user(image(photograph)), Message(role="assistant", content=[item])]
    sample = transform({"messages": messages})
    assert unmasked(transform, sample) == (
        'Click [504, 252] in [0, 0, 1008, 504]: {"x": {other}}<|im_end|>'
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"type": "boxes", "boxes": [{"bbox_2d": [0, 0, 1, 1]}]}],
            r"of image -1 .* has 0 images",
        ),
        ([image(), {"type": "boxes", "boxes": [{"label": "a"}]}], "no 'bbox_2d' and no 'point_2d'"),
        (
            [image(), {"type": "boxes", "boxes": {"bbox_2d": 1}}],
            "boxes is of type dict, expected a list",
        ),
        (
            [image(), {"bbox_2d": [0, 0, 1, 1], "image": 1}],
            "of image 1 .* has 1 images",
        ),
        (
            [image(), {"bbox_2d": [0, 0, 1, 1], "image": "first"}],
            "of image 'first' .* has 1 images",
        ),
        ([image(), {"bbox_2d": [0, 0, 57, 1]}], r"bbox_2d .* outside"),
        ([image(), {"bbox_2d": [0, 0, 1, 1], "label": {1, 2}}], "cannot be written as JSON"),
        ([image(), text("{a}") | {"fields": {"b": {"point_2d": [0, 0]}}}], r"no place \{b\}"),
        ([image(), text("{a}") | {"fields": ["a"]}], "fields is of type list, expected a dict"),
    ],
)
def test_wrong_boxes_are_located(
    transform: Qwen2_5_VLTransform, content: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"message 0 \(user\): item \d: .*{message}"):
        transform({"messages": [user(*content)]})


@pytest.mark.parametrize("fields", [{}, {"unused": None}])
def test_a_text_without_any_field_is_that_text(
    transform: Qwen2_5_VLTransform, fields: dict[str, Any]
) -> None:
    """As tables have it whose other rows have fields."""
    expected = transform({"messages": [user(text("{ok}")), assistant("b")]})
    given = transform({"messages": [user(text("{ok}") | {"fields": fields}), assistant("b")]})
    assert given["tokens"] == expected["tokens"]


def test_data_workers_can_take_it(transform: Qwen2_5_VLTransform) -> None:
    sample = {"messages": [user(image(), text("a")), assistant("b")]}
    copied = pickle.loads(pickle.dumps(transform))
    assert copied(sample)["tokens"] == transform(sample)["tokens"]


def test_an_answer_goes_on_from_the_largest_position_of_its_prompt(
    transform: Qwen2_5_VLTransform,
) -> None:
    """Where generation writes it: see ``tests/test_generation.py``."""
    film = {"type": "video", "video": np.zeros((40, 28, 28, 3), np.uint8), "sample_fps": 0.5}
    for media in ([], [image()], [film], [film, image()], [image(), film, film]):
        question = {"role": "user", "content": [*media, text("What?")]}
        prompt = transform({"messages": [question]}, inference=True)
        answer = {"role": "assistant", "content": "Nothing moves here."}
        sample = transform({"messages": [question, answer]})
        assert sample["tokens"][: len(prompt["tokens"])] == prompt["tokens"]
        answered = sample["input_pos"][len(prompt["tokens"]) :]
        first = int(prompt["input_pos"].max()) + 1
        assert answered.tolist() == [[first + i] * 3 for i in range(len(answered))]
