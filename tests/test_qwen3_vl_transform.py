"""Qwen3-VL's conversations: loss, thoughts, times of videos, boxes, and settings of files."""

import json
import logging
from dataclasses import replace
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quickstart.checkpoint import QWEN3_VL_CONFIG, write_tiny_checkpoint
from tests.finetune_runs import NARROW_QWEN3_VL
from tests.videos import Clip, write_clip, x264
from torchtune_vl.chat._chat_template import without_marks
from torchtune_vl.chat._messages import read_conversation
from torchtune_vl.evaluation import metrics_of
from torchtune_vl.generation._answer_file import choices_of
from torchtune_vl.media import Augmentation
from torchtune_vl.models import qwen3_vl
from torchtune_vl.models._registry import family_of
from torchtune_vl.models.qwen3_vl import Qwen3_VLTransform, Qwen3_VLVideoTransform

IM_START, IM_END, VISION_START, VISION_END, VIDEO_PAD = 151644, 151645, 151652, 151653, 151656
THINKING = without_marks((files(qwen3_vl) / "thinking.jinja").read_text(encoding="utf-8"))
FILM = {"type": "video", "video": np.zeros((5, 64, 96, 3), np.uint8), "sample_fps": 2}
IMAGE = {"type": "image", "image": np.zeros((200, 400, 3), np.uint8)}
FUNCTION = {"function": {"name": "f", "arguments": {"a": 1}}}


@pytest.fixture(scope="module")
def instruct(vocabulary: Path) -> Qwen3_VLTransform:
    return Qwen3_VLTransform(vocabulary / "qwen.tiktoken")


@pytest.fixture
def thinking(vocabulary: Path) -> Qwen3_VLTransform:
    return Qwen3_VLTransform(vocabulary / "qwen.tiktoken", chat_template=THINKING)


@pytest.fixture(scope="module")
def transforms(vocabulary: Path) -> dict[tuple[bool, str], Qwen3_VLTransform]:
    """Transforms by whether they think and by what special tokens in texts are."""
    return {
        (thinks, special): Qwen3_VLTransform(
            vocabulary / "qwen.tiktoken",
            chat_template=THINKING if thinks else None,
            parse_special=special,
        )
        for thinks in (False, True)
        for special in ("content", "all")
    }


def limited(base: Qwen3_VLTransform, **changed: Any) -> Qwen3_VLTransform:
    other = Qwen3_VLTransform.__new__(Qwen3_VLTransform)
    other.__dict__ = {**base.__dict__, **changed}
    return other


def trained(transform: Qwen3_VLTransform, messages: list[Any], **more: Any) -> str:
    """The text that carries loss."""
    sample = transform({"messages": messages, **more})
    pairs = zip(sample["tokens"], sample["mask"], strict=True)
    return transform.decode([token for token, masked in pairs if not masked])


def asked(*items: Any, text: str = "Why?") -> dict[str, Any]:
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def answered(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


# What templates look for, what stands for other things while they run, and what joins with others
END = "<|im_end|>"
SEAMS = (
    *("", "\n", "\n\nA", " ", "e\u0301", "图片", "\ufdd0", "\ufddf", "Picture 1: "),
    *("<|im_end|>", "<|im_", "end|>", "<|vision_start|>", "<|image_pad|>", "<|object_ref_start|>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>", "<think>\nB\n</think>\n\nC"),
)
texts = st.lists(st.sampled_from(SEAMS) | st.text(max_size=5), max_size=3).map("".join)
small = {"type": "image", "image": np.zeros((64, 96, 3), np.uint8)}
items = st.sampled_from([small, FILM]) | st.builds(lambda t: {"type": "text", "text": t}, texts)
torn = st.integers(1, 9).map(lambda n: [{"type": "text", "text": t} for t in (END[:n], END[n:])])
contents = texts | st.lists(items, max_size=4) | torn
usual = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": contents},
    optional={"masked": st.booleans()},
)
others = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "image"]),
        "content": contents,
    },
    optional={
        "masked": st.booleans(),
        "name": st.sampled_from(["A", "\ufdd0"]),
        "reasoning_content": texts,
        "tool_calls": st.sampled_from([[], [FUNCTION]]),
    },
)
system = st.lists(st.builds(lambda c: {"role": "system", "content": c}, contents), max_size=1)


@settings(max_examples=300, deadline=None)
@given(
    messages=st.tuples(
        system, st.lists(usual, min_size=1, max_size=4), st.lists(others, max_size=1)
    ),
    tools=st.sampled_from([[], [], [{"name": "f"}]]),
    inference=st.booleans(),
    is_numbered=st.booleans(),
    special=st.sampled_from(["content", "all"]),
    thinks=st.booleans(),
)
def test_code_follows_the_templates(
    transforms: Any, messages, tools, inference, is_numbered, special, thinks
) -> None:
    """Beside Jinja's run: ids, loss, places of media, and errors."""
    transform = transforms[thinks, special]
    transform.prompts.add_vision_id = is_numbered

    def outcome(prompts: Any) -> Any:
        try:
            turns = read_conversation([*chain(*messages)], roles=prompts.roles)
            prompt = prompts.build(transform._encoded(turns, measuring=True), tools, inference)
        except ValueError as error:
            return str(error)
        return prompt.tokens, prompt.mask, [*prompt.media]

    by_jinja = replace(transform.prompts, plain=None)
    assert outcome(transform.prompts) == outcome(by_jinja)


@pytest.mark.parametrize("length", range(1, len(END)))
def test_texts_make_no_structural_token_together(transforms: Any, length: int) -> None:
    torn = [{"type": "text", "text": text} for text in ("A", END[:length], END[length:])]
    for role in ("user", "tool"):  # of which code follows the one, and Jinja runs the other
        messages = [{"role": "user", "content": "B"}, {"role": role, "content": torn}]
        whole = [*messages[:1], {"role": role, "content": f"A{END}"}]
        for thinks in (False, True):
            transform = transforms[thinks, "content"]
            found, expected = (
                transform.tokenize_messages([*given, answered("C")])[0]
                for given in (messages, whole)
            )
            assert found == expected
            assert found.count(transform.im_end_id) == 3


def test_added_tokens_are_content(instruct: Qwen3_VLTransform) -> None:
    """Four more than Qwen2.5's, none of them special."""
    names = "<tool_response>", "</tool_response>", "<think>", "</think>"
    ids = [151665, 151666, 151667, 151668]
    assert [instruct.special_tokens[name] for name in names] == ids
    assert instruct.encode_content("".join(names)) == ids
    assert instruct.decode([*ids, IM_END], skip_special_tokens=True) == "".join(names)
    assert instruct.vocab_size == 151669


def test_loss_of_instruct(instruct: Qwen3_VLTransform) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        asked(IMAGE),
        answered("I call", tool_calls=[FUNCTION]),
        {"role": "tool", "content": [IMAGE, {"type": "text", "text": "2"}]},
        answered("Two."),
        asked(FILM),
        answered("Three.", weight=0),
        asked(),
        answered("\n\nFour."),
    ]
    call = '\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    # A line break of the last answer is one token with that of its header
    expected = f"I call{call}<|im_end|>Two.<|im_end|>\n\n\nFour.<|im_end|>"
    assert trained(instruct, messages, tools=[{"name": "f"}]) == expected


def test_loss_of_thoughts(thinking: Qwen3_VLTransform, caplog: pytest.LogCaptureFixture) -> None:
    """The prompt's <think> and answers without their reasoning carry none."""
    messages = [
        asked(),
        answered("One.", reasoning_content="First"),
        asked(FILM),
        answered("<think>\nLook it up\n</think>\n\nI call", tool_calls=[FUNCTION]),
        {"role": "tool", "content": "2"},
        answered("No thought.", tool_calls=[FUNCTION]),
        {"role": "tool", "content": "2"},
        answered("Two.", reasoning_content="So"),
    ]
    call = '\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    expected = f"Look it up\n</think>\n\nI call{call}So\n</think>\n\nTwo.<|im_end|>"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert trained(thinking, messages) == expected
    (told,) = caplog.records
    assert "without their reasoning: these carry no loss" in told.getMessage()
    text = thinking.decode(thinking({"messages": messages})["tokens"])
    assert "First" not in text
    assert "assistant\nOne.<|im_end|>" in text
    # An answer without a thought has an empty one
    assert trained(thinking, [asked(), answered("Yes.")]) == "\n\n</think>\n\nYes.<|im_end|>"


def test_no_answer_is_left_out_unsaid_or_said_without_need(
    vocabulary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = vocabulary / "qwen.tiktoken"
    last = Qwen3_VLTransform(path, chat_template=THINKING, train_on="last")
    messages = [asked(), answered("One."), asked(), answered("Two.", reasoning_content="So")]
    with caplog.at_level(logging.WARNING):
        assert trained(last, messages) == "So\n</think>\n\nTwo.<|im_end|>"
        last({"messages": messages}, inference=True)
        messages[1]["weight"] = 0
        every = Qwen3_VLTransform(path, chat_template=THINKING)
        assert trained(every, messages) == "So\n</think>\n\nTwo.<|im_end|>"
        assert trained(last, [asked(), answered("Yes.")]) == "\n\n</think>\n\nYes.<|im_end|>"
    assert not caplog.records


def test_a_line_break_before_an_answer_that_is_left_out(thinking: Qwen3_VLTransform) -> None:
    """It is one token with that of the header, which no mark of loss may touch."""
    messages = [asked(), answered("\nOne."), asked(), answered("Two.", reasoning_content="So")]
    assert trained(thinking, messages) == "So\n</think>\n\nTwo.<|im_end|>"


def test_prompts_and_answers(instruct: Qwen3_VLTransform, thinking: Qwen3_VLTransform) -> None:
    for transform, end in ((instruct, "assistant\n"), (thinking, "assistant\n<think>\n")):
        thought = {} if transform is instruct else {"reasoning_content": "Hm"}
        messages = [asked(IMAGE), answered("Yes.", **thought)]
        prompt = transform({"messages": messages[:1]}, inference=True)["tokens"]
        assert transform.decode(prompt).endswith(f"<|im_start|>{end}")
        assert transform.answer_of({"messages": messages}) == "Yes."
        answer = "Yes." if transform is instruct else "Hm\n</think>\n\nYes."
        whole = transform({"messages": messages})["tokens"]
        assert [*prompt, *transform.answer_tokens(answer)] == whole[:-1]
        tokens, mask = transform.tokenize_message(messages[0])
        assert tokens == whole[: len(tokens)]
        assert all(mask)


def test_what_the_template_drops_is_an_error(instruct: Qwen3_VLTransform) -> None:
    later = [asked(), {"role": "system", "content": "Be brief."}, answered("Yes.")]
    with pytest.raises(ValueError, match="left out by the template: move its text"):
        instruct({"messages": later})
    for turn in (
        {"role": "system", "content": [IMAGE]},
        {"role": "assistant", "content": [IMAGE]},
    ):
        messages = [turn, asked(), answered("Yes.")]
        with pytest.raises(ValueError, match="places are not those of the media"):
            instruct({"messages": messages})


def test_times_of_a_video(instruct: Qwen3_VLTransform) -> None:
    sample = instruct({"messages": [asked(FILM), answered("Yes.")]})
    text = instruct.decode(sample["tokens"])
    ((steps, rows, columns),) = sample["encoder_input"]["vision"]["grid_thw"].tolist()
    assert steps == 3
    pads = "<|video_pad|>" * (rows * columns // 4)
    shown = "".join(
        f"<{time} seconds><|vision_start|>{pads}<|vision_end|>" for time in ("0.2", "1.2", "2.0")
    )
    assert f"user\n{shown}Why?" in text
    # One position for each step, whose height and width count from it
    first = sample["tokens"].index(VIDEO_PAD)
    of_video = sample["input_pos"][[i for i, t in enumerate(sample["tokens"]) if t == VIDEO_PAD]]
    assert of_video[0].tolist() == [first] * 3
    assert len(of_video[:, 0].unique()) == steps


def test_frames_of_a_file(tmp_path: Path) -> None:
    clip = Clip("mp4", frames=50, rate=10, size=(64, 96), options=x264("keyint=9"))
    path = str(write_clip(tmp_path / "clip.mp4", clip))
    transform = Qwen3_VLVideoTransform()
    whole = transform({"video": path})
    assert whole["frame_indices"] == [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]
    assert whole["step_times"][:2] == [0.25, pytest.approx(1.35)]
    part = transform({"video": path, "video_start": 1.0, "video_end": 3.0, "nframes": 5})
    assert part["frame_indices"] == [10, 15, 20, 25, 30]
    assert part["step_times"] == [1.25, 2.25, 3.0]  # the last is repeated
    assert part["video_grid_thw"][0, 0] == 3
    given = transform({"video": path, "frame_indices": [7]})
    assert given["step_times"] == [0.7]
    patches = given["pixel_values_videos"].unflatten(1, (3, 2, 256))
    assert torch.equal(patches[:, :, 0], patches[:, :, 1])
    # A sample's own limits are of all frames together, and of a frame
    large = transform({"video": path, "resized_height": 320, "resized_width": 640})
    assert large["video_grid_thw"].tolist() == [[5, 20, 40]]
    for name, limit, columns in (("total_pixels", 10 * 2048, 2), ("max_pixels", 6143, 4)):
        grid = transform({"video": path, name: limit})["video_grid_thw"].tolist()
        assert grid == [[5, 2, columns]]
    with pytest.raises(ValueError, match="min_pixels is 5000 and total_pixels 4096"):
        transform({"video": path, "min_pixels": 5000, "total_pixels": 4096})


@pytest.mark.parametrize("truncation", ["right", "left"])
def test_a_video_is_never_cut(instruct: Qwen3_VLTransform, truncation: str) -> None:
    """Nor are its times, of which the first may share a token with the text before it."""
    text = {"type": "text", "text": "look:"}
    messages = [asked(text, FILM), answered("Yes, this."), asked(FILM), answered("No, that.")]
    whole = instruct({"messages": messages})
    tokens = whole["tokens"]
    cut_off = 0
    for limit in range(30, len(tokens)):
        transform = limited(instruct, max_seq_len=limit, truncation=truncation)
        try:
            cut = transform({"messages": messages})
        except ValueError as error:
            if "max_seq_len" in str(error):
                continue
            raise
        kept = cut["tokens"]
        assert kept == (tokens[: len(kept)] if truncation == "right" else tokens[-len(kept) :])
        count = kept.count(VISION_START)
        assert count % 3 == 0
        assert kept.count(VISION_END) == count
        assert transform.decode(kept).count(" seconds>") == count
        assert "seconds" not in transform.decode(kept[-3:])
        videos = len(cut.get("encoder_input", {}).get("vision", {"grid_thw": ()})["grid_thw"])
        assert videos == count // 3
        assert len(cut["input_pos"]) == len(kept)
        assert cut["truncated"]["videos"] == 2 - videos
        assert transform.examine({"messages": messages}).size[0] == len(kept)
        cut_off += count < 6
    assert cut_off > 10


def test_measuring(instruct: Qwen3_VLTransform, thinking: Qwen3_VLTransform, tmp_path: Path):
    clip = Clip("mp4", frames=33, rate=10, size=(64, 96), options=x264("keyint=9"))
    film = {"type": "video", "video": str(write_clip(tmp_path / "clip.mp4", clip))}
    for transform in (instruct, thinking):
        thought = {} if transform is instruct else {"reasoning_content": "Hm"}
        messages = [
            asked(IMAGE, film),
            answered("a", tool_calls=[FUNCTION], **thought),
            {"role": "tool", "content": [FILM, IMAGE]},
            answered("b", **thought),
            asked({**film, "max_frames": 5}),
            answered("c"),
        ]
        for length in range(2, 7, 2):
            sample = {"messages": messages[:length]}
            made = transform(sample)
            sizes = len(made["tokens"]), len(made["encoder_input"]["vision"]["patches"])
            assert transform.examine(sample).size == (*sizes, made["mask"][1:].count(False))


def test_boxes_are_in_thousandths(instruct: Qwen3_VLTransform) -> None:
    boxes = [{"bbox_2d": [100, 50, 400, 200], "label": "a cat"}, {"point_2d": [200, 100]}]
    messages = [asked(IMAGE), {"role": "assistant", "content": [{"type": "boxes", "boxes": boxes}]}]
    written = trained(instruct, messages)
    assert '{"bbox_2d": [250, 250, 1000, 1000], "label": "a cat"}' in written
    assert '{"point_2d": [500, 500]}' in written
    found = instruct.boxes_in_answer({"messages": messages}, written)
    assert found == [
        {"bbox_2d": [100.0, 50.0, 400.0, 200.0], "label": "a cat"},
        {"point_2d": [200.0, 100.0]},
    ]
    flipped = instruct.augmented({"messages": messages}, Augmentation(flip=1.0), 0, 0)
    assert flipped["augmented"][0]["flip"]
    assert '"bbox_2d": [0, 250, 750, 1000]' in instruct.decode(flipped["tokens"])


def test_settings_of_a_directory(tmp_path: Path, vocabulary: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(vocabulary / name)
    size = {"shortest_edge": 4096, "longest_edge": 25165824}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 16}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": THINKING}))
    path = tmp_path / "video_preprocessor_config.json"
    for written, cap in (
        ({}, None),
        ({"cap_pixels_per_frame": False}, None),
        ({"cap_pixels_per_frame": True}, 768 * 1024),
        ({"cap_pixels_per_frame": True, "max_video_tokens": 7}, 7 * 1024),
    ):
        path.write_text(json.dumps({"size": size, **written}))
        transform = Qwen3_VLTransform.from_pretrained(tmp_path)
        videos = transform.video_transform
        assert (videos.min_pixels, videos.total_pixels) == (4096, 25165824)
        assert videos.max_pixels == cap
        again = json.loads(transform.processor_files()["video_preprocessor_config.json"])
        assert again["size"] == size
        assert again["cap_pixels_per_frame"] == (cap is not None)
    assert transform.chat_template == THINKING
    assert transform.has_published_template
    path.write_text(json.dumps({"patch_size": 14}))
    with pytest.raises(ValueError, match=r"patch_size.*16"):
        Qwen3_VLTransform.from_pretrained(tmp_path)


def test_another_template_is_run_as_it_is(vocabulary: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    transform = Qwen3_VLTransform(vocabulary / "qwen.tiktoken", chat_template=template)
    messages = [{"role": "user", "content": "Why?"}, answered("<think>a</think>b")]
    assert trained(transform, messages) == "<think>a</think>b"
    assert transform.chat_template == template
    assert not transform.has_published_template


def test_answers_are_scored_without_their_reasoning(
    instruct: Qwen3_VLTransform, thinking: Qwen3_VLTransform
) -> None:
    whole = "It is small.\n</think>\n\nB"
    assert [t.final_answer(whole) for t in (instruct, thinking)] == [whole, "B"]
    assert thinking.final_answer("It is") == ""  # not ended
    sample = {"messages": [asked(), answered("B", reasoning_content="Hm.")]}
    assert thinking.answer_of(sample) == "B"
    assert thinking.answer_of({"messages": [asked(), answered("B")]}) == "B"
    choices = {"choices": ["cat", "dog"], "messages": [asked(), answered("B")]}
    assert choices_of(choices, "B", instruct).keys() == {"A", "B"}
    assert not choices_of(choices, "B", thinking)


def test_a_reasoning_that_the_template_leaves_out(instruct: Qwen3_VLTransform) -> None:
    sample = {"messages": [asked(), answered("B", reasoning_content="Hm.")]}
    with pytest.raises(ValueError, match=r"message 1 \(assistant\).*leaves its reasoning_content"):
        instruct(sample)
    sample["messages"][1]["reasoning_content"] = ""
    assert instruct(sample)["tokens"]


def test_an_answer_without_a_reasoning_is_told_once(
    instruct: Qwen3_VLTransform, thinking: Qwen3_VLTransform, caplog: pytest.LogCaptureFixture
) -> None:
    bare, reasoned = answered("B"), answered("B", reasoning_content="Hm.")
    for transform, messages in (
        (instruct, [asked(), bare]),
        (thinking, [asked(), reasoned]),
        (thinking, [asked(), answered("Hm.\n</think>\n\nB")]),
        (thinking, [asked(), {**bare, "weight": 0}, asked(), reasoned]),
        (thinking, [asked(), answered("<think>\n\n</think>", reasoning_content="Hm.")]),
    ):
        transform.examine({"messages": messages})
    thinking.examine({"messages": [asked(), bare, asked()]}, inference=True)
    assert not [told for told in caplog.records if "no reasoning" in told.getMessage()]
    for _ in range(2):
        thinking.examine({"messages": [asked(), bare]})
    (told,) = [told for told in caplog.records if "no reasoning" in told.getMessage()]
    assert "ends its reasoning at once. Give answers their reasoning_content" in told.getMessage()


@pytest.mark.parametrize("key", ["thinking", "reasoning", "cot"])
def test_a_reasoning_that_no_template_reads(
    key: str, instruct: Qwen3_VLTransform, thinking: Qwen3_VLTransform, vocabulary: Path
) -> None:
    message = answered("B", **{key: "Hm."})
    for transform in (instruct, thinking):
        left_out = rf"1 \(assistant\): the chat template leaves its {key} out: remove it, or make"
        with pytest.raises(ValueError, match=left_out):
            transform({"messages": [asked(), message]})
        settings = {"stop_reason": "end", "reasoning_effort": "low", key: True}
        assert transform({"messages": [{**asked(), key: "off"}, answered("B", **settings)]})
    twice = answered("B", **{key: "Hm.", "reasoning_content": "Hm."})
    assert "Hm." in thinking.decode(thinking({"messages": [asked(), twice]})["tokens"])
    written = f"{{% generation %}}{{{{ messages[0]['{key}'] }}}}{{% endgeneration %}}"
    reads_it = Qwen3_VLTransform(vocabulary / "qwen.tiktoken", chat_template=written)
    assert reads_it.decode(reads_it({"messages": [message]})["tokens"]) == "Hm."


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"reasoning_content": ["Hm."]}, "its reasoning_content is of type list, expected a str"),
        (
            {"content": [{"type": "text", "text": "B", "thinking": "Hm."}]},
            "item 0: its thinking belongs to the message: make it its reasoning_content",
        ),
        (
            {"content": None, "function_call": {"name": "f", "arguments": "{}"}},
            "its function_call is of OpenAI's older format: make it tool_calls",
        ),
    ],
)
def test_a_part_of_an_answer_at_the_wrong_place(
    message: dict[str, Any], told: str, thinking: Qwen3_VLTransform
) -> None:
    with pytest.raises(ValueError, match=rf"message 1 \(assistant\): {told}"):
        thinking({"messages": [asked(), {**answered("B"), **message}]})


def test_settings_that_mean_nothing_here(vocabulary: Path, tmp_path: Path) -> None:
    path = vocabulary / "qwen.tiktoken"
    with pytest.raises(ValueError, match="positions follow the clock: leave it out"):
        Qwen3_VLTransform(path, tokens_per_second=2)
    file = tmp_path / "template.jinja"
    file.write_text(THINKING)
    with pytest.raises(ValueError, match="are two templates: give one"):
        Qwen3_VLTransform(path, chat_template=THINKING, chat_template_file=file)


def test_a_template_of_ones_own_goes_before_the_directorys(
    vocabulary: Path, tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path, vocabulary, config=NARROW_QWEN3_VL)
    given = Qwen3_VLTransform.from_pretrained(tmp_path, chat_template=THINKING)
    assert given.chat_template == THINKING
    path = tmp_path / "video_preprocessor_config.json"
    stated = json.loads(path.read_text())
    for changes, message in (
        ({"min_pixels": 4096}, "min_pixels is 4096, expected none: size has the limits"),
        ({"num_frames": 16}, "num_frames is 16"),
        ({"size": None}, "size is None, expected an object"),
    ):
        path.write_text(json.dumps({**stated, **changes}))
        with pytest.raises(ValueError, match=message):
            Qwen3_VLTransform.from_pretrained(tmp_path)


def test_sides_that_are_given(instruct: Qwen3_VLTransform) -> None:
    sides = {"resized_height": 64, "resized_width": 96}
    made = instruct.image_transform({**IMAGE, **sides})
    assert made["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_largest_areas_of_a_frame(vocabulary: Path) -> None:
    capped = Qwen3_VLVideoTransform(max_pixels=4 * 1024)
    with pytest.warns(UserWarning, match="more than that of the transform allows"):
        capped({**FILM, "max_pixels": 10**7})
    with pytest.raises(ValueError, match="max_pixels is 10, less than a token"):
        capped({**FILM, "max_pixels": 10})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"num_attention_heads": 8}}, "num_attention_heads is 8.*say num_heads"),
        ({"vision_config": {"rope_parameters": {"rope_theta": 100.0}}}, "rope_theta is 100.0"),
        ({"text_config": {"rope_parameters": {"rope_theta": 1e4}}}, "what rope_scaling says"),
        ({"text_config": {"attention_bias": True}}, "attention_bias is True, expected False"),
        ({"vision_config": {"num_position_embeddings": 24}}, "expected a square number"),
        ({"vision_config": {"deepstack_visual_indexes": [2, 0]}}, "expected increasing numbers"),
        ({"text_config": {"rope_scaling": None}}, None),
    ],
)
def test_configs_that_transformers_reads_otherwise(
    changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    config = {**QWEN3_VL_CONFIG}
    config["text_config"] = {**config["text_config"], "head_dim": 128}
    config["text_config"]["rope_scaling"] = {"mrope_section": [24, 20, 20]}
    for part, own in changes.items():
        config[part] = {**config[part], **own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message is None:
        assert family_of(tmp_path).all_dimensions(tmp_path)["mrope_sections"] == (24, 20, 20)
        return
    with pytest.raises(ValueError, match=message):
        family_of(tmp_path).all_dimensions(tmp_path)


def test_metrics_of_choices_are_refused_before_answers_are_made(
    instruct: Qwen3_VLTransform, thinking: Qwen3_VLTransform
) -> None:
    for metric in metrics_of(["choice_likelihood", "exact_match"]):
        metric.check_fits(instruct)
        if metric.name == "exact_match":
            metric.check_fits(thinking)
            continue
        with pytest.raises(ValueError, match="choice_likelihood needs answers without a reasoning"):
            metric.check_fits(thinking)
