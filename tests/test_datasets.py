"""Rows in the formats that people have, to samples."""

import base64
import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from jinja2 import UndefinedError
from omegaconf import OmegaConf
from PIL import Image
from torchtune import config
from torchtune.datasets.multimodal import multimodal_chat_dataset

from quickstart.digits import write_digits
from tests import hostile
from torchtune_vl.chat._transform import Examined
from torchtune_vl.data import PackedRows, StreamedRows, padded_collate_vision_supervised
from torchtune_vl.data._data_workers import loading
from torchtune_vl.datasets import (
    SamplesError,
    VisionChatDataset,
    measure_all,
    vision_chat_dataset,
)
from torchtune_vl.datasets._record_formats import MediaDirectory, RecordReader
from torchtune_vl.datasets._tables import Table
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform
from torchtune_vl.recipes._launch import sentence_of

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}},
    {"type": "function", "function": {"name": "g", "parameters": {"properties": {"b": {}}}}},
]


@pytest.fixture(scope="module")
def transform(vocabulary: Path) -> Qwen2_5_VLTransform:
    return Qwen2_5_VLTransform(vocabulary / "tokenizer.json")


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A directory with two images, of 6 and 8 tokens, and a video of 4 tokens."""
    for name, height, width in (("a.png", 56, 84), ("sub/b.png", 112, 56)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(hostile.noise(height, width, 3)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def build(transform: Qwen2_5_VLTransform, media: Path):
    """Writes rows to a file beside the media, and makes a dataset of it."""

    def build(rows: list[dict[str, Any]], suffix: str = "jsonl", **settings: Any) -> Any:
        path = media / f"data.{suffix}"
        text = "\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows)
        if not path.exists() or path.read_text() != text:  # which ends the use of others
            path.write_text(text)
        settings = {"cache_dir": str(media / "cache"), "data_files": str(path), **settings}
        return vision_chat_dataset(transform, **{"source": "json", **settings})

    return build


def text_of(transform: Qwen2_5_VLTransform, sample: dict[str, Any]) -> str:
    """The text of a sample, placeholders of a medium as one."""
    tokens = sample["tokens"]
    kept = [t for i, t in enumerate(tokens) if t not in (151655, 151656) or t != tokens[i - 1]]
    return transform.decode(kept).removeprefix(PROMPT)


def grids(sample: dict[str, Any]) -> list[list[int]]:
    return (
        sample["encoder_input"]["vision"]["grid_thw"].tolist() if "encoder_input" in sample else []
    )


def turns(question: str, answer: str = "b") -> str:
    question = question.replace("<I>", f"<|vision_start|>{IMAGE_PAD}<|vision_end|>")
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


GPT = {"from": "gpt", "value": "b"}
ASSISTANT = {"role": "assistant", "content": "b"}
TAGGED = {"role": "assistant", "content": "<video> and <image>"}
A, B = [1, 4, 6], [1, 8, 4]


def sharegpt(question: str, **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, GPT], **columns}


def chat(content: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ASSISTANT], **columns}


FORMATS: dict[str, tuple[dict[str, Any], str, list[list[int]]]] = {
    "LLaVA": (sharegpt("<image>\nWhat?", image="a.png"), turns("<I>\nWhat?"), [A]),
    "two images": (
        sharegpt("1: <image>, 2: <image>.", images=["a.png", "sub/b.png"]),
        turns("1: <I>, 2: <I>."),
        [A, B],
    ),
    "images of one tag": (sharegpt("What?<image>", image=["a.png"]), turns("What?<I>"), [A]),
    "text": (sharegpt("What?"), turns("What?"), []),
    "system": (
        sharegpt("What?", system="Obey."),
        f"<|im_start|>system\nObey.<|im_end|>\n{turns('What?')}",
        [],
    ),
    "transformers": (
        chat([{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]),
        turns("<I>What?"),
        [A],
    ),
    "transformers, path": (
        chat([{"type": "text", "text": "What?"}, {"type": "image", "path": "sub/b.png"}]),
        turns("What?<I>"),
        [B],
    ),
    "OpenAI": (
        chat(
            [
                {"type": "text", "text": "What?"},
                {"type": "image_url", "image_url": {"url": "a.png"}},
            ]
        ),
        turns("What?<I>"),
        [A],
    ),
    "places": (
        chat([{"type": "image"}, {"type": "text", "text": "What?"}], images=["sub/b.png"]),
        turns("<I>What?"),
        [B],
    ),
    "tags in messages": (chat("<image>What?", images=["a.png"]), turns("<I>What?"), [A]),
    "tags in an answer": (
        {"messages": [{"role": "user", "content": "<image>?"}, TAGGED], "images": ["a.png"]},
        turns("<I>?", "<video> and <image>"),
        [A],
    ),
    "tags in an answer of text alone": (
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<video>"}]},
        turns("?", "<video>"),
        [],
    ),
    "tags in items": (
        chat([{"type": None, "text": "a<image>b"}, {"text": "c"}], image="sub/b.png"),
        turns("a<I>bc"),
        [B],
    ),
    "a tag behind a null": (
        chat([{"type": "text", "text": None, "content": "a<image>"}], image="sub/b.png"),
        turns("a<I>"),
        [B],
    ),
    "a tag that is none": (
        chat([{"type": "text", "text": "<"}, {"type": "text", "text": "video>?"}]),
        turns("<video>?"),
        [],
    ),
    "torchtune": (
        chat([{"type": "image", "content": "a.png"}, {"type": "text", "content": "a.png"}]),
        turns("<I>a.png"),
        [A],
    ),
}


def test_texts_without_places_stay_texts() -> None:
    """Templates of users and those with tools tell a text from a list of items."""
    read = RecordReader(MediaDirectory("", is_confining=False), {})
    row = {"messages": [TAGGED, {**TAGGED, "content": "<ref-object>"}], "objects": {"ref": ["x"]}}
    contents = [message["content"] for message in read(row, 0)["messages"]]
    assert contents == ["<video> and <image>", "x"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_formats(build, transform: Qwen2_5_VLTransform, name: str, suffix: str) -> None:
    row, text, media_grids = FORMATS[name]
    dataset = build([row], suffix)
    sample = dataset[0]
    assert text_of(transform, sample) == text
    assert grids(sample) == media_grids
    text_of_answer = text.split("assistant\n")[1].split("<|im_end|>")[0]
    answer = transform.encode(text_of_answer, False, False)
    answer.append(transform.special_tokens["<|im_end|>"])
    assert [label for label in sample["labels"] if label != -100] == answer
    is_label = np.array(sample["labels"]) != -100
    assert (np.array(sample["tokens"])[is_label] == answer).all()
    patches = sum(h * w for _, h, w in media_grids)
    assert dataset.measure(0) == (len(sample["tokens"]), patches, len(answer))


def test_all_formats_in_one_file(build, transform: Qwen2_5_VLTransform) -> None:
    dataset = build([row for row, _, _ in FORMATS.values()])
    assert len(dataset) == len(FORMATS)
    for number, (_, text, media_grids) in enumerate(FORMATS.values()):
        assert text_of(transform, dataset[number]) == text
        assert grids(dataset[number]) == media_grids


def test_videos(build, transform: Qwen2_5_VLTransform, media: Path) -> None:
    (media / "v.mp4").write_bytes(hostile.encode_video("mp4", "libx264", 20))
    frames = {"type": "video", "video": ["a.png", "a.png"]}
    for row in (
        sharegpt("<video>What?", video="v.mp4"),
        sharegpt("<video>What?", videos=["v.mp4"]),
        chat([{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "What?"}]),
    ):
        sample = build([row])[0]
        assert grids(sample) == [[2, 20, 28]]
        video = f"<|vision_start|>{VIDEO_PAD}<|vision_end|>"
        assert text_of(transform, sample) == turns(f"{video}What?")
    assert grids(build([chat([frames])])[0])[0][0] == 1


ANSWERS = [
    '"quoted"',
    '{"total": 42.8}',
    "007",
    "true",
    "null",
    "NaN",
    "[1, 2]",
    " \u2028 ",
    "1e999",
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_answers_that_look_like_json(
    build, transform: Qwen2_5_VLTransform, suffix: str, streaming: bool
) -> None:
    """In a column that holds lists and texts ``datasets`` parses them, or makes all JSON text."""
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    rows = [
        {"messages": [{"role": "user", "content": content}, {**ASSISTANT, "content": answer}]}
        for answer in ANSWERS
        for content in (question, "What?", '[{"type": "text", "text": "What?"}]')
    ]
    data = build(rows, suffix, streaming=streaming)
    samples = (
        [data.transform(s) for s in data] if streaming else [data[i] for i in range(len(data))]
    )
    expected = [
        turns(content if isinstance(content, str) else "<I>What?", answer)
        for answer in ANSWERS
        for content in (question, "What?", '[{"type": "text", "text": "What?"}]')
    ]
    assert [text_of(transform, sample) for sample in samples] == expected
    assert [grids(sample) for sample in samples] == [[A], [], []] * len(ANSWERS)


def test_numbers_of_tool_calls(build, transform: Qwen2_5_VLTransform) -> None:
    arguments = {"a": 1e-9, "b": 2**63 + 1, "c": 0.12345678901234567, "d": 1, "e": 1.0, "f": "1"}
    call = {"function": {"name": "f", "arguments": arguments}}
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    }
    mixed = chat([{"type": "text", "text": "a"}])
    text = text_of(transform, build([{**row, "tools": TOOLS}, mixed])[0])
    assert f'"arguments": {json.dumps(arguments)}' in text


def test_columns_that_appear_late(build, transform: Qwen2_5_VLTransform) -> None:
    """Behind the 10 MB from which ``datasets`` infers what columns there are."""
    filler = [sharegpt("x" * 1_000_000)] * 11
    dataset = build([*filler, sharegpt("<image>What?", image="a.png", score=[1]), chat("What?")])
    assert text_of(transform, dataset[11]) == turns("<I>What?")
    assert text_of(transform, dataset[12]) == turns("What?")


def test_splits(build, media: Path) -> None:
    rows = [sharegpt("a", id=number) for number in range(250)]
    for split in ("train", "train[:6]", "train[:1%]", "train[-3:]", "train[10%:50%]+train[:2]"):
        path = media / "data.jsonl"
        ours = build(rows, split=split)
        theirs = datasets.load_dataset(
            "json", data_files=str(path), split=split, cache_dir=str(media / "cache")
        )
        assert [ours._records[i][0]["id"] for i in range(len(ours))] == theirs["id"]
        stream = build(rows, split=split, streaming=True)
        assert [sample["id"] for sample in stream] == theirs["id"]
    named = {"train": str(path), "test": str(path)}
    assert len(build(rows, data_files=named, split="test[:5]+train[:4]")) == 9
    for wrong in ("validation", "train[:"):
        with pytest.raises(ValueError, match=r"split|Unrecognized"):
            build(rows, split=wrong)


def test_files_by_pattern_list_and_directory(build, media: Path) -> None:
    for number in range(3):
        content = [sharegpt("<image>", image="a.png", id=number)]
        text = json.dumps(content if number == 1 else content[0], indent=1)
        (media / f"part_{number}.json").write_text(text)
    files = [str(media / f"part_{number}.json") for number in range(3)]
    for named in (str(media / "part_*.json"), OmegaConf.create(files), {"train": files}):
        dataset = build([], data_files=named)
        assert [dataset._records[i][0]["id"] for i in range(3)] == [0, 1, 2]
        assert grids(dataset[2]) == [A]
    (media / "x").mkdir()
    for name in ("part_0.json", "a.png"):
        (media / "x" / name).write_bytes((media / name).read_bytes())
    assert grids(build([], source=str(media / "x"), data_files=None)[0]) == [A]
    for wrong in (str(media / "none.json"), str(media / "sub")):
        with pytest.raises(ValueError, match="'json' cannot be loaded: Unable to find"):
            build([], data_files=wrong)
    with pytest.raises(ValueError, match="unknown_setting"):
        build([sharegpt("a")], unknown_setting=3)


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_that_cannot_be_loaded(
    transform: Qwen2_5_VLTransform, tmp_path: Path, streaming: bool
) -> None:
    good, damaged = str(tmp_path / "good.parquet"), tmp_path / "damaged.parquet"
    datasets.Dataset.from_list([{"id": 1}]).to_parquet(good)
    damaged.write_bytes(b"PAR1 and no more")
    (tmp_path / "train.json").write_text('[{"id": 1}]')
    for source, files, split, reason in (
        ("parquet", str(damaged), "train", "'parquet' cannot be loaded: Parquet magic"),
        ("parquet", str(tmp_path / "train.json"), "train", "'parquet' cannot be loaded: Parquet"),
        ("parquet", good, "test", "'parquet' cannot be loaded: .* split"),
        ("parquet", [], "train", "data_files names no file"),
        ("json", {"train": []}, "train", "data_files names no file"),
        ("json", str(tmp_path / "train.json"), "train[:1%", r"split 'train\[:1%' cannot be read"),
        ("json", str(tmp_path / "train.json"), "train[1:]", r"split 'train\[1:\]' has no records"),
    ):
        with pytest.raises(ValueError, match=reason) as told:
            vision_chat_dataset(
                transform, source=source, data_files=files, split=split, streaming=streaming
            )
        assert sentence_of(told.value) == str(told.value)


def test_a_cache_that_cannot_be_made(
    transform: Qwen2_5_VLTransform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As below the home of a user who has none."""
    (tmp_path / "train.json").write_text('[{"id": 1}]')
    given = {"source": "json", "data_files": str(tmp_path / "train.json")}

    def refuse(denied: str | Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(denied))

    monkeypatch.setattr("torchtune_vl.datasets._tables.HF_DATASETS_CACHE", "/nowhere/datasets")
    for denied, settings, told in (
        ("/nowhere", {}, "set HF_DATASETS_CACHE to"),
        ("/nowhere/datasets/a.lock", {}, "set HF_DATASETS_CACHE to"),
        (tmp_path / "home", {"cache_dir": str(tmp_path / "home/cache")}, "set cache_dir to"),
    ):
        monkeypatch.setattr("datasets.builder.os.makedirs", partial(refuse, denied))
        with pytest.raises(ValueError, match=f"cannot be written .*Permission denied.*; {told}"):
            vision_chat_dataset(transform, **given, **settings)
    for unreadable in (tmp_path / "train.json", "/nowhere/datasets-of-mine/train.json"):
        monkeypatch.setattr("datasets.builder.os.makedirs", partial(refuse, unreadable))
        with pytest.raises(PermissionError):
            vision_chat_dataset(transform, **given)


def test_saved_directories(transform: Qwen2_5_VLTransform, media: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, ASSISTANT], "id": i} for i in range(9)]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(media / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(media / "dict")
    for name, split, ids in (("one", "train[2:5]", [2, 3, 4]), ("dict", "test[:2]", [0, 1])):
        dataset = vision_chat_dataset(transform, source=str(media / name), split=split)
        assert [dataset._records[i][0]["id"] for i in range(len(dataset))] == ids
        stream = vision_chat_dataset(
            transform, source=str(media / name), split=split, streaming=True
        )
        assert [sample["id"] for sample in stream] == ids
        assert text_of(transform, dataset[0]) == turns("a")


def test_errors_name_file_and_line(build, media: Path) -> None:
    path = media / "raw.jsonl"
    good = json.dumps(sharegpt("a")).encode()
    for line, message in (
        (good[:50], r"raw.jsonl, line 3, column \d+: this is no JSON \("),
        (good.replace(b'"a"', b'"\xfcber"'), r"line 3, column 48: the byte 0xfc is no UTF-8"),
        (b'{"a": 1, "a": 2}', "line 3: an object has the key 'a' twice"),
        (b"[" * 100_000, "line 3: this is nested too deeply"),
        (b"7", r"it is 7, expected an object \(.*raw.jsonl, line 3\)$"),
        (b"null", r"it is None, expected an object \(.*raw.jsonl, line 3\)$"),
        (b'{"messages": 7}', r"\(.*raw.jsonl, line 3\)$"),
        (b'{"conversations": [7]}', r"7 is no turn .* \(.*raw.jsonl, line 3\)$"),
        (json.dumps(sharegpt("<image>", image="none.png")).encode(), r"line 3\)$"),
        (json.dumps(sharegpt("a", tools="[" * 100_000)).encode(), r"tools: no JSON .*line 3\)$"),
    ):
        path.write_bytes(b"\n".join([good, b"", line, good]))
        dataset = build([], data_files=str(path))
        assert len(dataset) == 3
        for read in (dataset.__getitem__, dataset.measure):
            with pytest.raises(ValueError, match=f"^sample 1: .*{message}") as raised:
                read(1)
            assert len(str(raised.value)) < 2000
        with pytest.raises(ValueError, match=r"1 of 3 samples .*\nsample 1: "):
            measure_all(dataset, range(3), show_progress=False)
        stream = build([], data_files=str(path), streaming=True)
        with pytest.raises(ValueError, match=r"^sample 1: "):
            [stream.measure(sample) for sample in stream]


OUTSIDE = "outside of media_dir .*: correct it, or set media_dir"


def test_media_dir_confines(build, transform: Qwen2_5_VLTransform, media: Path) -> None:
    root = media / "sub"
    (root / "link.png").symlink_to(media / "a.png")
    (root / "own.png").symlink_to(root / "b.png")
    (root / "up").symlink_to(media)
    (media / "linked").symlink_to(root)
    (media / "sub2").mkdir()
    (media / "sub2" / "b.png").write_bytes((media / "a.png").read_bytes())
    outside = ["../a.png", "x/../../a.png", "link.png", "up/a.png", str(media / "a.png")]
    outside += [(media / "a.png").as_uri(), f"FILE://{media}/a.png", "../sub2/b.png"]
    led_out = [
        row
        for path in outside
        for row in (
            sharegpt("<image>", image=path),
            sharegpt("<video>", video=[path]),
            chat([{"type": "image", "image": path}]),
            chat([{"type": "image_url", "image_url": {"url": path}}]),
            chat([{"type": "image", "content": path}]),
            chat([{"type": "image", "path": {"bytes": path}}]),
        )
    ]
    inside = ["b.png", "own.png", "./b.png", str(root / "b.png"), "up/sub/b.png"]
    for directory in (root, media / "linked"):
        dataset = build(
            led_out + [sharegpt("<image>", image=path) for path in inside], media_dir=str(directory)
        )
        for index in range(len(led_out)):
            for read in (dataset.__getitem__, dataset.measure):
                with pytest.raises(ValueError, match=f"^sample {index}: .*the path .*{OUTSIDE}"):
                    read(index)
        for index in range(len(led_out), len(dataset)):
            assert grids(dataset[index]) == [B]
    for path in outside:  # none of which is there, from another directory
        if path.startswith(("/", "file:")):
            assert grids(build([sharegpt("<image>", image=path)])[0]) == [A]


def test_a_row_with_megabytes(build, transform: Qwen2_5_VLTransform) -> None:
    huge = "x" * 3_000_000
    rows = [
        sharegpt(huge, image="a.png"),
        {"conversations": [{"from": huge, "value": "a"}]},
        {"conversations": [{"from": "function_call", "value": huge}]},
        {"conversations": [huge]},
        {huge: 1},
        sharegpt("<image>", image=huge, id=huge),
        chat([{"type": "image", "image": "a.png", huge: 1}]),
        chat([{"type": "boxes", "boxes": [huge]}]),
    ]
    dataset = build(rows)
    with pytest.raises(ValueError, match="8 of 8 samples") as raised:
        measure_all(dataset, range(8), show_progress=False)
    assert len(str(raised.value)) < 15_000
    for index in range(8):
        with pytest.raises(ValueError, match=r"data.jsonl, line") as raised:
            dataset[index]
        error: BaseException | None = raised.value
        while error is not None:
            assert len(str(error)) < 2000
            error = error.__cause__


def test_settings_that_are_too_large(build, media: Path) -> None:
    (media / "v.mp4").write_bytes(hostile.encode_video("mp4", "libx264", 20))
    image = {"type": "image", "image": "a.png"}
    video = {"type": "video", "video": "v.mp4"}
    rows = [
        chat([{**image, "min_pixels": 10**12}]),
        chat([{**image, "min_pixels": 10**12, "max_pixels": 10**13}]),
        chat([{**video, "min_pixels": 10**12}]),
        chat([{**video, "min_pixels": 10**12, "max_pixels": 10**12, "total_pixels": 10**15}]),
        chat([{**video, "nframes": 10**12}]),
    ]
    dataset = build(rows)
    for index in range(len(rows)):
        for read in (dataset.measure, dataset.__getitem__):
            with pytest.raises(ValueError, match=r"min_pixels is|lower min_pixels|nframes"):
                read(index)
    huge = {"resized_height": 10**9, "resized_width": 10**9}
    assert build([chat([{**image, **huge}])]).measure(0)[0] < 20_000
    assert grids(build([chat([{**video, "fps": 1e12, "max_frames": 10**12}])])[0])[0][0] == 10


def test_tools_stay_as_they_are(build, transform: Qwen2_5_VLTransform) -> None:
    """A table that gives every row the keys of all would add parameters to functions."""
    rows = [chat("a", tools=[tool]) for tool in TOOLS]
    dataset = build(rows)
    for number, tool in enumerate(TOOLS):
        assert f"<tools>\n{json.dumps(tool)}\n</tools>" in text_of(transform, dataset[number])


def test_function_calls_of_llama_factory(build, transform: Qwen2_5_VLTransform) -> None:
    call = {"name": "f", "arguments": {"a": 1}}
    row = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": json.dumps(TOOLS),
    }
    text = text_of(transform, build([row])[0])
    assert f"<tool_call>\n{json.dumps(call)}\n</tool_call>" in text
    assert "<tool_response>\n2\n</tool_response>" in text
    assert json.dumps(TOOLS[1]) in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (sharegpt("What?", image="a.png"), "0 places for images, but there are 1 images"),
        (sharegpt("<image>What?"), "message 0: its <image> is .* none in 'image' or 'images'"),
        (sharegpt("<image><video>", image="a.png"), "message 0: its <video> is .* none in 'video'"),
        (sharegpt("a", system="<image>"), "message 0: its <image> is the place"),
        (chat("<image>What?", imgs=["a.png"]), "message 0: its <image> .*column_map"),
        (chat([{"text": "<image>"}], imgs=["a.png"]), "message 0: its <image> .*'<' and 'image>'"),
        (chat([{"text": "<video>"}], images=["a.png"]), "message 0: its <video> is the place"),
        (
            {"messages": [{"role": "tool", "content": "<image>"}, ASSISTANT]},
            "message 0: its <image> is the place",
        ),
        (chat("What?", images=["a.png"]), "0 places for images, but there are 1 images"),
        (
            {"messages": [{"role": "user", "content": "?"}, TAGGED], "images": ["a.png"]},
            "0 places for images, but there are 1 images",
        ),
        (chat([{"type": "image"}]), "1 places for images, but there are 0 images"),
        (sharegpt("<image>", image="none.png"), "none.png"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "from 'me'"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "is no turn such as"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "no JSON"),
        ({"text": "a"}, "column_map"),
        ({"messages": [{"role": "user"}]}, "message 0"),
    ],
)
def test_errors_name_the_sample(build, row: dict[str, Any], message: str) -> None:
    for name, named in (("3", row), ("'x/7'", {**row, "id": "x/7"})):
        dataset = build([sharegpt("a")] * 3 + [named])
        for read in (dataset.__getitem__, dataset.measure):
            with pytest.raises(ValueError, match=f"^sample {name}: .*{message}"):
                read(3)


def test_nulls_of_a_table(build, transform: Qwen2_5_VLTransform, media: Path) -> None:
    """A table gives every dict the keys of all; none of them may become text."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": "x"}}}
    boxes = [{"bbox_2d": [0, 0, 42, 28], "label": "cat"}, {"point_2d": [84, 56]}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Go"},
                {"role": "assistant", "content": "", "tool_calls": [call, other]},
                {"role": "tool", "content": "1", "name": "f"},
                {**ASSISTANT, "weight": 1},
            ],
            "tools": [{"name": "f", "x": {"a": 1}}, {"name": "g", "x": {"b": "c"}}],
        },
        {"messages": [{"role": "user", "content": "a"}, ASSISTANT], "tools": None},
    ]
    grounded = [
        chat([{"type": "image", "image": "a.png"}, {"type": "text", "text": "Where?"}]),
        chat([{"type": "text", "text": "Not here"}]),
    ]
    for row in grounded:
        row["messages"][1] = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
    grounded[0]["messages"][1]["content"] = [{"type": "boxes", "boxes": boxes}]
    for name, table in (("tools", rows), ("boxes", grounded)):
        path = media / f"{name}.parquet"
        datasets.Dataset.from_list(table).to_parquet(path)
        common = {"source": "parquet", "data_files": str(path), "cache_dir": str(media / "cache")}
        ours = vision_chat_dataset(transform, **common)
        stream = vision_chat_dataset(transform, streaming=True, **common)
        expected = build(table)
        assert "null" in json.dumps(datasets.Dataset.from_parquet(str(path))[0])
        for number, sample in enumerate(stream):
            text = text_of(transform, expected[number])
            assert "null" not in text
            assert text_of(transform, ours[number]) == text_of(transform, stream.transform(sample))
            assert text_of(transform, ours[number]) == text
    assert '{"bbox_2d": [0, 0, 42, 28], "label": "cat"},\n\t{"point_2d": [84, 56]}\n' in text_of(
        transform, ours[0]
    )


def test_json_text_in_a_table(transform: Qwen2_5_VLTransform, tmp_path: Path) -> None:
    """The way to keep what a table cannot: there a null is one."""
    call = {"name": "f", "arguments": json.dumps({"a": None, "b": [1, "x", 1e-7]})}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    tools = [{**TOOLS[0], "default": None}]
    rows = [
        {"messages": messages, "tools": list(map(json.dumps, tools))},
        {"messages": json.dumps(messages), "tools": json.dumps(tools)},
        {
            "conversations": json.dumps(
                [
                    {"from": "human", "value": "Go"},
                    {"from": "function_call", "value": json.dumps([call])},
                ]
            ),
            "tools": json.dumps(tools),
        },
    ]
    texts = []
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.parquet"
        datasets.Dataset.from_list([row]).to_parquet(path)
        dataset = vision_chat_dataset(
            transform, source="parquet", data_files=str(path), cache_dir=str(tmp_path / "cache")
        )
        texts.append(text_of(transform, dataset[0]))
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in texts[0]
    assert '"arguments": {"a": null, "b": [1, "x", 1e-07]}}' in texts[0]
    assert texts[1:] == texts[:1] * 2


def test_json_columns_of_a_table_keep_their_nulls() -> None:
    features = datasets.Features(
        {"tools": datasets.Json(), "x": {key: datasets.Value("int64") for key in "ab"}}
    )
    tools = [{"name": "f", "default": None}]
    rows = [{"tools": tools, "x": {"a": 1, "b": None}}]
    table = Table(datasets.Dataset.from_list(rows, features=features))
    assert table[0] == ({"tools": tools, "x": {"a": 1}}, "")
    assert list(table) == [table[0]]


def test_nulls_of_json_are_values_of_the_model(build, transform: Qwen2_5_VLTransform) -> None:
    """In arguments and schemas alone; elsewhere they say that there is nothing."""
    call = {"id": None, "function": {"name": "f", "arguments": {"a": None, "b": [None]}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Go", "image": None, "fps": None}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": None, "loss": None},
    ]
    tools = [{"name": "f", "default": None}]
    row = {"messages": messages, "conversations": None, "images": None, "tools": tools}
    text = text_of(transform, build([row])[0])
    assert '{"name": "f", "arguments": {"a": null, "b": [null]}}' in text
    assert '<tools>\n{"name": "f", "default": null}\n</tools>' in text
    assert text.count("null") == 3


def grounded(question: str, answer: str, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["a.png"], **columns}


# a.png is seen as it is, 84 x 56, and sub/b.png, 56 x 112, as well; c.png of 200 x 100 as 196 x 112
OBJECTS: dict[str, tuple[dict[str, Any], str]] = {
    "names and boxes": (
        grounded(
            "<image>Find <ref-object>.",
            "<ref-object><bbox> and <bbox>.",
            objects={
                "ref": ["a cat", "Cats: "],
                "bbox": [[10.4, 0, 20.6, 56], [0, 1, 84, 2]],
                "bbox_type": "real",
            },
        ),
        turns("<I>Find a cat.", "Cats: [10, 0, 21, 56] and [0, 1, 84, 2]."),
    ),
    "a point, resized": (
        grounded(
            "<image>Open it.",
            "click(start_box='<bbox>')",
            images=["c.png"],
            objects={"ref": [], "bbox": [[100, 25]]},
        ),
        turns("<I>Open it.", "click(start_box='[98, 28]')"),
    ),
    "parts": (
        grounded(
            "<image>Where?",
            '[\n\t{"bbox_2d": <bbox>, "label": "<ref-object>"}\n]',
            images=["c.png"],
            objects={"ref": ["x"], "bbox": [[0, 0.25, 0.5, 1]], "bbox_type": "norm1"},
        ),
        turns("<I>Where?", '[\n\t{"bbox_2d": [0, 28, 98, 112], "label": "x"}\n]'),
    ),
    "several images, a box before them": (
        grounded(
            "What is at <bbox>?<image><image>",
            "<bbox>",
            images=["a.png", "c.png"],
            objects={"bbox": [[100, 50], [1, 2]], "image_id": [1, 0]},
        ),
        turns("What is at [98, 56]?<I><I>", "[1, 2]"),
    ),
    "as JSON text": (
        grounded("<image>Where?", "<bbox>", objects=json.dumps({"bbox": [[1, 2]]})),
        turns("<I>Where?", "[1, 2]"),
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "<image>Where is <ref-object>?"},
                {"from": "gpt", "value": "<bbox>, not <image>"},
            ],
            "image": "a.png",
            "objects": {"ref": ["it"], "bbox": [[3, 4]]},
        },
        turns("<I>Where is it?", "[3, 4], not <image>"),
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_of_ms_swift(build, transform: Qwen2_5_VLTransform, media: Path, name: str) -> None:
    Image.fromarray(hostile.noise(100, 200, 3)).save(media / "c.png")
    row, text = OBJECTS[name]
    dataset = build([row])
    assert text_of(transform, dataset[0]) == text
    assert dataset.measure(0)[0] == len(dataset[0]["tokens"])


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (None, "have 1 places <ref-object>, but ms-swift's objects 0 for them"),
        ({"ref": ["a"]}, "have 1 places <bbox>, but ms-swift's objects 0 for them"),
        ({"ref": ["a"], "bbox": [[1, 2]] * 2}, "have 1 places <bbox>, but .* 2 for"),
        ({"ref": ["a", "b"], "bbox": [[1, 2]]}, "1 places <ref-object>, but .* 2 for"),
        (
            {"ref": ["a"], "bbox": [[1, 2]], "bbox_type": "norm1000"},
            "bbox_type.*expected .*real or norm1",
        ),
        (
            {"ref": ["a"], "bbox": [[1, 2]], "image_id": [0, 1]},
            "expected .*image_id, a list of as many",
        ),
        ({"ref": ["a"], "bbox": [[1, 2]], "image_id": [1]}, "of image 1 .* has 1 images"),
        ({"ref": ["a"], "bbox": [[1, 2]], "polygon": [[1, 2]]}, "'polygon'.*of nothing but ref,"),
        ({"ref": ["a"], "bbox": [[1, 2, 3]]}, "bbox_2d is .1, 2, 3., expected 4 numbers"),
        ({"ref": ["a"], "bbox": [[1, 2, 99, 4]]}, "outside of the image"),
        ({"ref": ["a"], "bbox": 3}, "'bbox': 3}, expected .*bbox, a list"),
        ({"ref": [3], "bbox": [[1, 2]]}, "expected .*ref, a list of texts"),
        ("{", "objects: no JSON"),
    ],
)
def test_objects_that_do_not_fit(build, objects: Any, message: str) -> None:
    dataset = build([grounded("<image>Find <ref-object>.", "<bbox>", objects=objects)])
    for read in (dataset.__getitem__, dataset.measure):
        with pytest.raises(ValueError, match=f"^sample 0: .*{message}"):
            read(0)


@pytest.mark.parametrize("key", ["weight", "loss", "loss_mask"])
def test_answers_without_loss(build, transform: Qwen2_5_VLTransform, key: str) -> None:
    def learned(row: dict[str, Any]) -> str:
        return transform.decode([label for label in build([row])[0]["labels"] if label != -100])

    for no, yes in ((0, 1), (False, True), (0.0, None)):
        conversations = [*sharegpt("a")["conversations"], *sharegpt("c")["conversations"]]
        conversations[1] = {"from": "gpt", "value": "first", key: no}
        conversations[3] = {"from": "gpt", "value": "second", key: yes}
        assert learned({"conversations": conversations}) == "second<|im_end|>"
        messages = [*chat("a")["messages"], *chat("c")["messages"]]
        messages[1] = {**ASSISTANT, "content": "first", key: no}
        messages[3] = {**ASSISTANT, "content": "second", key: yes}
        assert learned({"messages": messages}) == "second<|im_end|>"


UNSUPERVISED = {
    "no answer": {"messages": [{"role": "user", "content": "a"}]},
    "an empty answer": chat("a")
    | {"messages": [*chat("a")["messages"][:1], {**ASSISTANT, "content": ""}]},
    "no items": {"messages": [{"role": "user", "content": "a"}, {**ASSISTANT, "content": []}]},
    "no loss": {"messages": [{"role": "user", "content": "a"}, {**ASSISTANT, "weight": 0}]},
    "two empty answers": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}] * 2
    },
}


@pytest.mark.parametrize("name", UNSUPERVISED)
def test_samples_that_teach_nothing(build, name: str) -> None:
    rows = [chat("a"), {"id": "x", **UNSUPERVISED[name]}, chat("a")]
    table, stream = build(rows), build(rows, streaming=True)
    _, sample, _ = stream
    message = "^sample 'x': no token of an answer carries loss: .* or remove the sample"
    for read, argument in (
        (table.__getitem__, 1),
        (table.measure, 1),
        (stream.transform, sample),
        (stream.measure, sample),
    ):
        with pytest.raises(ValueError, match=message):
            read(argument)
    with pytest.raises(ValueError, match=r"1 of 3 samples cannot be.*\nsample 'x': no token of"):
        measure_all(table, range(3), show_progress=False)


def test_an_empty_answer_among_others(build, transform: Qwen2_5_VLTransform) -> None:
    rows = [
        {
            "conversations": [
                *sharegpt("a")["conversations"][:1],
                {**GPT, "value": ""},
                *sharegpt("c")["conversations"],
            ]
        }
    ]
    dataset = build(rows)
    end = transform.special_tokens["<|im_end|>"]
    labels = [label for label in dataset[0]["labels"] if label != -100]
    assert labels == [end, *transform.encode("b", False, False), end]
    assert dataset.measure(0)[2] == 3


def test_other_columns_and_directory(build, media: Path) -> None:
    row = {"dialogue": sharegpt("<image>")["conversations"], "picture": "b.png", "image": "c"}
    names = {"conversations": "dialogue", "image": "picture"}
    dataset = build([row], column_map=names, media_dir=str(media / "sub"))
    assert grids(dataset[0]) == [B]
    for wrong, message in (
        ({"words": "a"}, "has .'words'.; known are"),
        ({"id": "no"}, "names .'no'.;"),
    ):
        with pytest.raises(ValueError, match=message):
            build([row], column_map=wrong)


def test_paths_that_are_not_relative(build, media: Path) -> None:
    encoded = hostile.encode(Image.open(media / "a.png"), "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded).decode()
    for source in (str(media / "a.png"), (media / "a.png").as_uri(), url, url.split(",")[1]):
        assert grids(build([sharegpt("<image>", image=source)])[0]) == [A]


def test_files_of_several_directories(build, media: Path) -> None:
    for directory in ("x", "y"):
        (media / directory).mkdir()
        (media / directory / "d.json").write_text(json.dumps([sharegpt("<image>", image="a.png")]))
    files = [str(media / directory / "d.json") for directory in ("x", "y")]
    with pytest.raises(ValueError, match="media_dir"):
        build([], data_files=files)
    dataset = build([], data_files=files, media_dir=str(media))
    assert [grids(dataset[number]) for number in (0, 1)] == [[A], [A]]
    for one in (OmegaConf.create(files[:1]), {"train": files[0]}):
        (media / "x" / "a.png").write_bytes((media / "sub" / "b.png").read_bytes())
        assert grids(build([], data_files=one)[0]) == [B]


def test_a_table_of_encoded_images(transform: Qwen2_5_VLTransform, tmp_path: Path) -> None:
    """Bytes reach the transform as they are, not decoded, and so with their EXIF orientation."""
    jpeg = hostile.encode(Image.fromarray(hostile.noise(56, 84, 3)), "JPEG")
    sideways = hostile.with_exif(jpeg, hostile.orientation_exif(6))
    path = tmp_path / "t.parquet"
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List({k: datasets.Value("string") for k in ("role", "content")}),
        }
    )
    messages = [{"role": "user", "content": "<image><image>"}, ASSISTANT]
    row = {"images": [{"bytes": jpeg, "path": "a"}, {"bytes": sideways, "path": None}]}
    rows = datasets.Dataset.from_list([{**row, "messages": messages}], features=features)
    rows.to_parquet(path)
    build = partial(
        vision_chat_dataset,
        transform,
        source="parquet",
        data_files=str(path),
        cache_dir=str(tmp_path / "cache"),
    )
    table, stream = build(), build(streaming=True)
    (sample,) = stream
    assert sample["images"] == [jpeg, sideways]
    for transformed in (table[0], stream.transform(sample)):
        assert grids(transformed) == [[1, 4, 6], [1, 6, 4]]
    assert table.measure(0) == stream.measure(sample)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_stream_is_the_table_row_by_row(build) -> None:
    rows = [row for row, _, _ in FORMATS.values()]
    table, stream = build(rows), build(rows, streaming=True)
    assert not hasattr(stream, "__len__")
    for skipped in (0, 1, 5):
        rest = list(stream.skip(skipped))
        assert [sample["id"] for sample in rest] == list(range(skipped, len(rows)))
        for sample in rest:
            assert same(stream.transform(sample), table[sample["id"]])
            assert stream.measure(sample) == table.measure(sample["id"])
    assert [sample["id"] for sample in stream.skip(2).skip(3)] == list(range(5, len(rows)))


def test_digits_are_those_of_torchtune(transform: Qwen2_5_VLTransform, tmp_path: Path) -> None:
    train, _ = write_digits(tmp_path)
    common = {
        "source": "json",
        "data_files": str(train),
        "split": "train[:40]",
        "cache_dir": str(tmp_path / "cache"),
    }
    reference = multimodal_chat_dataset(
        transform, image_dir=str(tmp_path), image_tag="<image>", **common
    )
    component = {"_component_": "torchtune_vl.datasets.vision_chat_dataset", **common}
    # As recipes make it
    dataset = config.instantiate(OmegaConf.create(component), transform)
    collate = partial(padded_collate_vision_supervised, padding_idx=transform.pad_id)
    assert len(dataset) == len(reference) == 40
    batches = [collate([data[i] for i in range(40)]) for data in (dataset, reference)]
    assert same(*batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_are_measured(build, num_workers: int) -> None:
    rows = [sharegpt("<image>" + "a " * (i % 50), image="a.png") for i in range(300)]
    dataset = build(rows)
    sizes = measure_all(dataset, range(len(dataset)), num_workers, show_progress=False)
    assert sizes.dtype == np.int32
    assert sizes.tolist() == [list(dataset.measure(i)) for i in range(300)]
    none = measure_all(dataset, range(300, 300), num_workers, show_progress=False)
    assert none.shape == (0, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_that_are_cut_are_told(
    vocabulary: Path,
    build,
    media: Path,
    caplog: pytest.LogCaptureFixture,
    num_workers: int,
) -> None:
    """A run on answers whose images were cut off must not look like any other."""
    rows = [sharegpt("long " * 60), sharegpt("<image>" + "What? " * 14, image="a.png")]
    rows = [*rows, sharegpt("short")] * 2
    transform = Qwen2_5_VLTransform(
        vocabulary / "tokenizer.json", max_seq_len=40, truncation="left"
    )
    build(rows)
    dataset = vision_chat_dataset(transform, source="json", data_files=str(media / "data.jsonl"))
    lost = [dataset[index].get("truncated") for index in range(len(rows))]
    assert [bool(cut and cut["images"]) for cut in lost] == [False, True, False] * 2
    assert [cut is not None for cut in lost] == [True, True, False] * 2
    caplog.clear()
    sizes = measure_all(dataset, range(1, len(rows)), num_workers, show_progress=False)
    assert sizes.tolist() == [list(dataset.measure(index)) for index in range(1, len(rows))]
    assert [dataset.examine(index)[1] for index in range(len(rows))] == lost
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        "3 of 5 samples are longer than max_seq_len and are cut, 2 of them by images or videos: "
        f"sample 1, for one, loses {lost[1]['tokens']} tokens, 1 images, 0 videos, all together "
        f"lose {sum(cut['tokens'] for cut in lost[1:] if cut)} tokens, 2 images, 0 videos; raise"
    )
    caplog.clear()
    measure_all(dataset, [2, 5], num_workers, show_progress=False)
    assert not caplog.records


def test_all_that_cannot_be_measured_are_told(build, capsys: pytest.CaptureFixture) -> None:
    rows = [sharegpt("<image>" if i % 4 == 0 else "a") for i in range(120)]
    with pytest.raises(ValueError, match="30 of 120 samples") as raised:
        measure_all(build(rows), range(len(rows)))
    _, *lines = str(raised.value).split("\n")
    assert [line.split(":")[0] for line in lines[:20]] == [f"sample {4 * i}" for i in range(20)]
    assert all("its <image> is the place" in line for line in lines[:20])
    assert lines[20:] == ["and 10 more"]
    assert "120/120" in capsys.readouterr().err


KINDS = [TypeError, KeyError, RecursionError, UndefinedError, MemoryError, OSError, ValueError]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_of_every_kind_are_told(build, num_workers: int) -> None:
    class Raising:
        """A transform that measures every other sample."""

        def examine(self, sample: dict[str, Any]) -> Examined:
            if sample["id"] % 2:
                return Examined((1, 2, 3), None, 0)
            kind = KINDS[sample["id"] // 2]
            raise kind((f"sample {sample['id']}: " if kind is ValueError else "") + "x" * 5_000_000)

    rows = build([sharegpt("a")] * 2 * len(KINDS))._records
    for read in (lambda row, number: {"id": number}, RecordReader(MediaDirectory("", False), {})):
        dataset = VisionChatDataset(Raising(), rows, read)
        count = 2 * len(KINDS)
        with pytest.raises(ValueError, match="7 of 14 samples") as raised:
            measure_all(dataset, range(count), num_workers, show_progress=False)
        _, *lines = str(raised.value).split("\n")
        for number, (kind, line) in enumerate(zip(KINDS, lines, strict=True)):
            name = "" if issubclass(kind, ValueError) else f"{kind.__name__}: "
            assert line.startswith(f"sample {2 * number}: {name}")
            assert len(line) < 2000
            assert line.endswith(f"data.jsonl, line {2 * number + 1})")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_in_data_workers(build, workers: int) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    stream = build([{"messages": turns}] * 7, streaming=True)
    planned = StreamedRows([stream], PackedRows(64), rows_per_step=2, num_workers=2)
    with loading(planned, workers, batch_size=None) as rows:
        samples = [row.samples for row in islice(rows, 12)]
    assert {number for row in samples for number in row} == {*range(7)}
    assert [{number % 2 for number in row} for row in samples] == [{0}, {1}] * 6


@pytest.mark.parametrize("files", [4, 3])
def test_parts_of_a_streamed_table(
    transform: Qwen2_5_VLTransform, tmp_path: Path, files: int
) -> None:
    """Whole files if they can be shared out, and otherwise every so-manieth record."""
    for number in range(files):
        ids = [*range(5 * number, 5 * number + 5)]
        rows = {"messages": [json.dumps(chat("Hello")["messages"])] * 5, "id": ids}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{number}.parquet"))
    stream = vision_chat_dataset(
        transform, source="parquet", data_files=str(tmp_path / "*.parquet"), streaming=True
    )
    parts = [[sample["id"] for sample in stream.part(part, 2)] for part in range(2)]
    if files == 4:
        assert parts == [[*range(5), *range(10, 15)], [*range(5, 10), *range(15, 20)]]
    else:
        assert parts == [[*range(0, 15, 2)], [*range(1, 15, 2)]]
    for part, ids in enumerate(parts):
        assert [sample["id"] for sample in stream.part(part, 2).skip(3)] == ids[3:]
        raw = [*stream.part(part, 2).raw()]
        assert [number for number, _ in raw] == [part + 2 * place for place in range(len(ids))]
        assert stream.measure_raw(raw[0]) == stream.measure(next(iter(stream)))
        assert (
            stream.make_raw(raw[0], 0)["tokens"] == stream.transform(next(iter(stream)))["tokens"]
        )


def test_a_dataset_has_answers_and_units_of_its_own(
    transform: Qwen2_5_VLTransform, build, media: Path
) -> None:
    box = {"type": "boxes", "boxes": [{"bbox_2d": [0, 0, 0.5, 1], "label": "cat"}]}
    objects = {"ref": [], "bbox": [[0, 0, 0.5, 1]]}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "One."}]},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": [box, {"type": "text", "text": " or <bbox>"}]},
    ]
    answer = {**turns[3], "content": [{**box, "unit": "0..1"}, *turns[3]["content"][1:]]}
    expected = build(
        [{"messages": [*turns[:3], answer], "objects": {**objects, "bbox_type": "norm1"}}]
    )[0]
    build([{"messages": turns, "objects": objects}])
    settings: dict[str, Any] = {"source": "json", "data_files": str(media / "data.jsonl")}
    found = vision_chat_dataset(transform, box_unit="0..1", **settings)[0]
    assert same(found, expected)
    last = vision_chat_dataset(transform, box_unit="0..1", train_on="last", **settings)
    texts = transform.decode([t for t in last[0]["labels"] if t != -100])
    assert "One." not in texts
    assert "bbox_2d" in texts
    assert transform.train_on == "all"
    plain = vision_chat_dataset(transform, **settings)
    assert len({plain.fingerprint, last.fingerprint}) == 2
    for name, wrong in (("box_unit", "meters"), ("train_on", "none")):
        with pytest.raises(ValueError, match=f"{name} is '{wrong}': make it one of"):
            vision_chat_dataset(transform, **settings, **{name: wrong})


def test_a_dataset_of_one_s_own_is_measured() -> None:
    class Own:
        def __len__(self) -> int:
            return 3

        def measure(self, index: int) -> tuple[int, int, int]:
            return {0: (5, 4, 3), 2: (2, 0, 1)}[index]

    assert measure_all(Own(), [0, 2], show_progress=False).tolist() == [[5, 4, 3], [2, 0, 1]]
    with pytest.raises(SamplesError, match=r"1 of 3 samples .*\nsample 1: KeyError: 1$"):
        measure_all(Own(), range(3), show_progress=False)
