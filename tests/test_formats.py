"""The same conversations in every format and from every source."""

import gzip
import io
import json
import logging
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
import torch
from torchtune.datasets.multimodal import (
    llava_instruct_dataset,
    the_cauldron_dataset,
    vqa_dataset,
)

from tests import formats
from torchtune_vl.data._data_workers import loading
from torchtune_vl.datasets import measure_all, preference_pairs, vision_chat_dataset
from torchtune_vl.datasets._file_groups import FolderRecords, TarRecords
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform


@pytest.fixture(scope="module")
def transform(vocabulary: Path) -> Qwen2_5_VLTransform:
    return Qwen2_5_VLTransform(
        vocabulary / "tokenizer.json", patch_dtype="uint8", video_max_pixels=100352
    )


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("media")
    formats.write_media(directory)
    return directory


RECORDS = formats.generate()


@pytest.fixture(scope="module")
def expected(transform: Qwen2_5_VLTransform, media: Path) -> list[dict[str, Any]]:
    """The samples of the records, with paths that are whole."""
    samples = []
    for record in RECORDS:
        messages = [
            {
                **message,
                "content": [
                    {**item, item["type"]: str(media / item[item["type"]])}
                    if item["type"] in ("image", "video")
                    else item
                    for item in formats.items_of(message)
                ],
            }
            for message in record["messages"]
        ]
        samples.append(transform({**record, "messages": messages}))
    return samples


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def samples_of(dataset: Any) -> list[dict[str, Any]]:
    if hasattr(dataset, "__len__"):
        return [dataset[index] for index in range(len(dataset))]
    return [dataset.transform(sample) for sample in dataset]


@pytest.mark.parametrize("name", formats.WRITERS)
def test_samples_are_the_same(
    transform: Qwen2_5_VLTransform, media: Path, expected: list[Any], tmp_path: Path, name: str
) -> None:
    settings, held = formats.WRITERS[name](RECORDS, media)
    dataset = vision_chat_dataset(transform, cache_dir=str(tmp_path), **settings)
    samples = samples_of(dataset)
    assert len(samples) == len(held) >= len(RECORDS) // len(formats.KINDS)
    for sample, number in zip(samples, held, strict=True):
        labels = sample.pop("labels")
        assert same(sample, expected[number])
        mask = expected[number]["mask"]
        assert labels == [-100 if m else t for t, m in zip(sample["tokens"], mask, strict=True)]


@pytest.mark.parametrize("name", sorted(formats.WRITERS.keys() - {"chosen"}))
def test_streams_have_the_same_samples(
    transform: Qwen2_5_VLTransform, media: Path, tmp_path: Path, name: str
) -> None:
    """Read whole, in parts, and from a place on."""
    settings, _ = formats.WRITERS[name](RECORDS, media)
    settings = {**settings, "cache_dir": str(tmp_path), "streaming": False}
    table = vision_chat_dataset(transform, **settings)
    stream = vision_chat_dataset(transform, **{**settings, "streaming": True})
    assert [stream.make_raw(raw, 0)["tokens"] for raw in stream.raw()] == [
        sample["tokens"] for sample in samples_of(table)
    ]
    for part in range(3):
        raw = [*stream.part(part, 3).skip(1).raw()]
        numbers = [number for number, _ in raw]
        assert numbers == [*range(part + 3, len(table), 3)]
        for number, one in zip(numbers, raw, strict=True):
            assert stream.make_raw(one, 0)["tokens"] == table[number]["tokens"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("messages", "messages.jsonl: 60 records in the format 'messages' (messages)"),
        ("alpaca", "alpaca.jsonl: 54 records in the format 'alpaca' (instruction, output, input"),
        ("caption", "caption.jsonl: 6 records in the format 'caption' (caption, image)"),
        ("tars", "shard {000..001}.tar: 60 records in the format 'messages' (messages)"),
        ("parquet, streamed", "table.parquet: a stream of records in the format 'messages' ("),
        ("coco", "instances.json: 1 records in the format 'coco' (images, annotations)"),
    ],
)
def test_formats_are_told(
    transform: Qwen2_5_VLTransform,
    media: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    told: str,
) -> None:
    settings, _ = formats.WRITERS[name](RECORDS, media)
    with caplog.at_level(logging.INFO, "torchtune_vl"):
        vision_chat_dataset(transform, cache_dir=str(tmp_path), **settings)
    assert sum(record.getMessage().startswith(told) for record in caplog.records) == 1


def test_columns_that_are_not_read_are_told(
    transform: Qwen2_5_VLTransform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"query": "Why?", "rationale": "Hm.", "answer": "B", "source": "x"}\n')
    settings = {"source": "json", "data_files": str(path), "column_map": {"question": "query"}}
    with caplog.at_level(logging.INFO, "torchtune_vl"):
        vision_chat_dataset(transform, **settings)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.endswith("'vqa' (query, answer); not read: rationale, source")


@pytest.fixture
def build(transform: Qwen2_5_VLTransform, media: Path, tmp_path: Path):
    """Writes records to a file, and makes a dataset of it, with the media of all tests."""

    def build(records: list[Any], **settings: Any) -> Any:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        common = {"source": "json", "data_files": str(path), "media_dir": str(media)}
        return vision_chat_dataset(transform, **{**common, **settings})

    return build


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def text_of(transform: Qwen2_5_VLTransform, sample: dict[str, Any]) -> str:
    """The text of a sample, roles in angle brackets, and media as one sign."""
    text = transform.decode(sample["tokens"]).removeprefix(SYSTEM)
    text = re.sub(r"<\|vision_start\|>(<\|(\w+)_pad\|>)+<\|vision_end\|>", r"[\2]", text)
    return re.sub(r"<\|im_start\|>(\w+)\n", r"<\1>", text).replace("<|im_end|>\n", "")


def learned(transform: Qwen2_5_VLTransform, sample: dict[str, Any]) -> str:
    text = transform.decode([label for label in sample["labels"] if label != -100])
    return text.replace("<|im_end|>", "|")


IMAGE = formats.IMAGES[0]
ALPACA = {"instruction": "a", "output": "b"}
VQA = {"question": "Which?", "choices": ["x", "y", "B"]}


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (ALPACA, "<user>a<assistant>b"),
        ({**ALPACA, "input": ""}, "<user>a<assistant>b"),
        ({**ALPACA, "input": None, "history": None, "system": ""}, "<user>a<assistant>b"),
        ({**ALPACA, "prompt": None, "completion": None}, "<user>a<assistant>b"),
        ({**ALPACA, "input": "c\n"}, "<user>a\nc\n<assistant>b"),
        ({**ALPACA, "history": '[["c", "d"]]'}, "<user>c<assistant>d<user>a<assistant>b"),
        ({**ALPACA, "image": IMAGE, "history": [["c", "d"]]}, "<user>[image]c<assistant>d<user>a"),
        ({**ALPACA, "image": IMAGE, "input": "<image>?"}, "<user>a\n[image]?<assistant>b"),
        ({**ALPACA, "images": [IMAGE] * 2, "video": formats.VIDEO}, "<user>[image][image][video]a"),
        (
            {**ALPACA, "instruction": "<video>", "image": IMAGE, "video": formats.VIDEO},
            "<user>[image][video]<assistant>b",
        ),
        ({"prompt": " a", "completion": " b "}, "<user> a<assistant> b "),
        ({**VQA, "answer": 0}, "<user>Which?\nA. x\nB. y\nC. B<assistant>A"),
        ({**VQA, "answer": 2}, "<user>Which?\nA. x\nB. y\nC. B<assistant>C"),
        ({**VQA, "answer": "A"}, "<user>Which?\nA. x\nB. y\nC. B<assistant>A"),
        ({**VQA, "answer": "y"}, "<user>Which?\nA. x\nB. y\nC. B<assistant>y"),
        (
            {"question": "q", "options": ["A", "B"], "answer": "B"},
            "<user>q\nA. A\nB. B<assistant>B",
        ),
        ({"question": "q", "choices": [], "answer": "B"}, "<user>q<assistant>B"),
        ({"question": "q", "answers": ["b", "c", "a", "c", "a"]}, "<user>q<assistant>c"),
        ({"question": "q", "answer": ["b"]}, "<user>q<assistant>b"),
    ],
)
def test_texts(build, transform: Qwen2_5_VLTransform, record: dict[str, Any], text: str) -> None:
    dataset = build([record])
    assert text_of(transform, dataset[0]).startswith(text)
    assert dataset.measure(0)[0] == len(dataset[0]["tokens"])


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({**ALPACA, "output": 7}, "its output is 7, expected a text"),
        ({**ALPACA, "output": ""}, "no token of an answer carries loss"),
        ({**ALPACA, "history": [["a"]]}, r"its history is .*, expected a list of .instruction"),
        ({**ALPACA, "history": "["}, "history: no JSON"),
        ({**ALPACA, "image": "none.png"}, "none.png"),
        ({**ALPACA, "input": "<image>"}, "its <image> is the place of a medium"),
        ({**ALPACA, "input": "<image>", "images": [IMAGE] * 2}, "1 places for images, but .* 2"),
        ({"prompt": 7, "completion": "b"}, "7 is neither a text nor a list of messages"),
        ({"prompt": "a", "completion": []}, "neither a text nor a list of messages"),
        (
            {"prompt": [{"role": "system", "content": "a"}], "completion": "b", "image": IMAGE},
            "no message of the user to put them in",
        ),
        ({**VQA, "answer": 3}, r"its answer to the choices .* is 3, expected the index"),
        ({**VQA, "answer": True}, r"its answer to the choices .* is True"),
        ({**VQA, "answer": "B"}, r"its answer to the choices .* is 'B', .* no two of these"),
        ({**VQA, "answer": "z"}, r"its answer to the choices .* is 'z'"),
        ({**VQA, "choices": [*"abcdefghijklmnopqrstuvwxyz", "1"], "answer": 0}, "at most 26"),
        ({**VQA, "choices": [1, 2], "answer": 1}, r"its choices are \[1, 2\], expected a list"),
        ({**VQA, "options": ["x"], "answer": 0}, "it has both 'choices' and 'options': choose by"),
        ({"question": "q", "answers": []}, "its list of answers is empty"),
        ({"question": "q", "answers": [{"text": "a"}]}, "its answer is None, expected a text"),
        ({"question": "q", "answer": "a", "answers": ["a"]}, "both 'answer' and 'answers'"),
        ({"question": "q", "answer": 7}, "its answer is 7, expected a text"),
    ],
)
def test_errors_of_records(build, record: dict[str, Any], problem: str) -> None:
    dataset = build([record])
    for read in (dataset.__getitem__, dataset.measure):
        with pytest.raises(
            ValueError, match=rf"^sample 0: .*{problem}.* \(.*data.jsonl, line 1\)$"
        ):
            read(0)


def test_mixed_formats(build) -> None:
    """The first record says what all are."""
    rows = [ALPACA, {"question": "q", "answer": "a"}, {"instruction": "a", "output": None}, ALPACA]
    dataset = build([[], *rows], format="alpaca")
    for number, lacking in ((0, "instruction, output"), (2, "instruction, output"), (3, "output")):
        problem = f"^sample {number}: it has no {lacking}, which the format 'alpaca' needs, but "
        with pytest.raises(ValueError, match=problem + ".* or set another format"):
            dataset[number]
    tokens = dataset[1]["tokens"]
    assert build(rows)[3]["tokens"] == tokens
    with pytest.raises(ValueError, match="no messages or conversations, which the format 'messag"):
        build([{"messages": [], "answer": "b"}, ALPACA])[1]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ("question answer caption image", "fit the formats vqa, caption: set format="),
        ("instruction output prompt completion", "fit the formats alpaca, prompt_completion: set"),
        ("query response", "which fit no format: name columns by column_map .*alpaca: instruction"),
        ("text", "fit no format"),
        ("", "fit no format"),
        ("prompt chosen rejected", r"preference_pairs, or set format='chosen'"),
        ("messages prompt chosen rejected", r"preference_pairs, or set format='chosen'"),
    ],
)
def test_columns_that_fit_no_one_format(build, columns: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^data.jsonl: the records have .*{problem}"):
        build([dict.fromkeys(columns.split(), "a") | {"n": 1}])


def test_what_records_have_beside_messages(build, transform: Qwen2_5_VLTransform) -> None:
    """Today's files go on being read, whatever other columns they have."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    dataset = build([{"messages": messages, "caption": "c", "image": None, "text": "d"}])
    assert text_of(transform, dataset[0]) == "<user>a<assistant>b"


@pytest.mark.parametrize(
    ("record", "settings", "problem"),
    [
        ({"image": IMAGE, "caption": "a"}, {}, "'caption' has no questions: set prompt, such as"),
        ({"image": IMAGE, "caption": "a"}, {"prompt": ""}, "has no questions: set prompt"),
        (ALPACA, {"prompt": "?"}, "the format 'alpaca' has questions of its own: leave prompt out"),
        (ALPACA, {"format": "json"}, "format is 'json': make it one of messages, alpaca"),
        (
            {**ALPACA, "x": 1},
            {"column_map": {"answer": "x"}},
            r"\['answer'\], which the format 'al",
        ),
        (ALPACA, {"format": "coco", "prompt": "?"}, "line 1: it has no lists images, annotations"),
        (ALPACA, {"format": "coco", "prompt": "?", "split": "train[:9]"}, "is of whole JSON files"),
    ],
)
def test_settings_that_do_not_fit(
    build, record: dict[str, Any], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        build([record], **settings)


def test_columns_with_other_names(build, transform: Qwen2_5_VLTransform) -> None:
    turns = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
    both = {"image": IMAGE, "caption": "a", "text": "b"}
    for record, names, text in (
        ({"query": "a", "response": "b"}, {"instruction": "query", "output": "response"}, "a"),
        ({"messages": turns, "images": IMAGE}, {"conversations": "messages"}, "[image]a"),
        ({"conversations": turns, "images": IMAGE}, {"image": "images"}, "[image]a"),
        ({**both, "question": "a", "answer": "b"}, {"caption": "text", "id": "answer"}, "[image]a"),
        ({"question": "a", "answer": "b", "answers": ["c"]}, {"answers": "answer"}, "a"),
    ):
        is_caption = "caption" in names
        settings = {"format": "caption", "prompt": "a"} if is_caption else {}
        sample = build([record], column_map=names, **settings)[0]
        assert text_of(transform, sample) == f"<user>{text}<assistant>b"
    with pytest.raises(ValueError, match=r"both 'caption' and 'text': .* .'caption': 'text'."):
        build([both], prompt="a")[0]


def test_coco_s_files(
    build, transform: Qwen2_5_VLTransform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [{"id": i, "file_name": formats.IMAGES[i], "width": 1} for i in (3, 0)]
    box = {"id": 1, "image_id": 0, "category_id": 5, "bbox": [0.1, 0.2, 83.9, 55.8]}
    crowd = {**box, "iscrowd": 1, "segmentation": {}}
    file = {"images": images, "annotations": [crowd, box], "categories": [{"id": 5, "name": "x"}]}
    with caplog.at_level(logging.INFO, "torchtune_vl"):
        dataset = build([file, file], prompt="Where <image>?")
    assert "line 2: 2 images, 1 boxes of crowds left out" in caplog.text
    assert len(dataset) == 4
    assert learned(transform, dataset[2]) == "```json\n[]\n```|"
    written = '```json\n[\n\t{"bbox_2d": [0, 0, 84, 56], "label": "x"}\n]\n```'
    assert text_of(transform, dataset[3]) == f"<user>Where [image]?<assistant>{written}"
    stream = build([file, file], prompt="Where <image>?", streaming=True)
    assert [sample["id"] for sample in stream] == [3, 0] * 2
    records = dataset._records.datasets[0]
    digests = records.digests([0, 1, 2, -1])
    assert digests == [*digests[:2]] * 2
    assert digests[0] != digests[1]
    for wrong, problem in (
        ({**file, "images": images[:1]}, "annotation 0 is not COCO's .*its image_id 0 is not in"),
        ({**file, "categories": []}, "annotation 0 is not COCO's .*its category_id 5 is not in"),
        ({**file, "images": images * 2}, "several images have the same id"),
        ({**file, "images": [{"id": 0}]}, "an image or a category is not COCO's .*'file_name'"),
        ({**file, "annotations": [{**box, "bbox": [1]}]}, "annotation 0 is not COCO's"),
        ({**file, "annotations": [{"caption": "x"}]}, "annotation 0 is not COCO's .*'image_id'"),
    ):
        with pytest.raises(ValueError, match=f"data.jsonl, line 1: {problem}"):
            build([wrong], prompt="?")
    outside = build([{**file, "annotations": [{**box, "bbox": [0, 0, 85, 1]}]}], prompt="?")
    with pytest.raises(ValueError, match=r"sample 0: .*outside of the image.*line 1"):
        outside[1]


def says(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


ASKED = [says("user", "a"), says("assistant", "b"), says("user", "c")]
TURNS = [{"from": "human", "value": "c"}, {"from": "gpt", "value": "y"}]
PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "texts": ({"prompt": "c", "chosen": "y", "rejected": "n"}, "<user>c<assistant>"),
    "messages": (
        {"prompt": ASKED, "chosen": [says("assistant", "y")], "rejected": says("assistant", "n")},
        "<user>a<assistant>b<user>c<assistant>",
    ),
    "no prompt": (
        {answer: [*ASKED, says("assistant", answer[0])] for answer in ("yes", "no")},
        "<user>a<assistant>b<user>c<assistant>",
    ),
    "the prompt once more": (
        {
            "prompt": "c",
            "yes": [ASKED[2], says("assistant", "y")],
            "no": [ASKED[2], says("assistant", "n")],
        },
        "<user>c<assistant>",
    ),
    "LLaMA-Factory": (
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "n"}},
        "<user>c<assistant>",
    ),
    "alpaca": (
        {"instruction": "c", "input": "d", "history": [["a", "b"]], "chosen": "y", "rejected": "n"},
        "<user>a<assistant>b<user>c\nd<assistant>",
    ),
    "an image": (
        {"prompt": "c", "chosen": "y", "rejected": "n", "images": [IMAGE], "system": "s"},
        "<system>s<user>[image]c<assistant>",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(
    transform: Qwen2_5_VLTransform, media: Path, build, tmp_path: Path, name: str
) -> None:
    record, prompt = PAIRS[name]
    names = {"chosen": "yes", "rejected": "no"} if "yes" in record else {}
    build([record], format="chosen", column_map=names)
    files = {"source": "json", "data_files": str(tmp_path / "data.jsonl"), "media_dir": str(media)}
    pairs = preference_pairs(transform, column_map=names, **files)
    (pair,) = [pairs[index] for index in range(len(pairs))]
    assert [*pair] == ["chosen", "rejected"]
    for sample, answer in zip(pair.values(), "yn", strict=True):
        assert text_of(transform, sample) == prompt + answer
        assert learned(transform, sample) == f"{answer}|"  # the prompt's answers carry no loss
    chosen = build([record], format="chosen", column_map=names)[0]
    assert same(chosen, pair["chosen"])


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"chosen": "a", "rejected": "a"}, "chosen and rejected do not differ"),
        ({"chosen": [says("user", "a")], "rejected": ["a"]}, "neither a text nor a list of mess"),
        ({"chosen": ASKED, "rejected": ASKED[:1]}, "chosen and rejected do not differ"),
        (
            {"prompt": "x", "chosen": ASKED[:2], "rejected": [ASKED[0], says("assistant", "n")]},
            "begin with something else than the prompt",
        ),
        ({"chosen": "a", "rejected": None}, "no rejected, which the format 'chosen' needs"),
    ],
)
def test_pairs_that_are_none(build, record: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"sample 0: .*{problem}"):
        build([record], format="chosen")[0]


def test_pairs_are_no_stream(transform: Qwen2_5_VLTransform) -> None:
    with pytest.raises(ValueError, match="leave streaming out"):
        preference_pairs(transform, source="json", data_files="x", streaming=True)


CAPTIONED = {"source": "folder", "prompt": "?"}


def in_folder(directory: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = directory / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(directory / "files")


def test_folders(
    transform: Qwen2_5_VLTransform, media: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = (media / IMAGE).read_bytes()
    files = {
        "b/é.x.JPG": image,
        "b/é.x.txt": b"\xef\xbb\xbfsecond\r\n\n",
        "a.png": image,
        "a.txt": b" first",
        "c.txt": b"no image",
        "d.png": image,
        "e.png": image,
        "e.jpg": image,
        "e.txt": b"two images",
        "f.png": image,
        "f.txt": b"\xff",
        "g.json": b'{"text": "with text", "image": "a.png"}',
        "g.txt": b"twice",
        "h.json": b"7",
        "i.json": b"{",
        "j.json": b'{"caption": "j", "image": "b/\\u00e9.x.JPG"}',
        ".git/a.txt": b"hidden",
        "notes.md": b"left out",
        "LICENSE": b"left out",
    }
    root = in_folder(tmp_path, files)
    with caplog.at_level(logging.INFO, "torchtune_vl"):
        dataset = vision_chat_dataset(transform, data_files=root, **CAPTIONED)
    assert "are left out: 1 .txt, 1 others, 1 .md" in caplog.text
    problems = {
        2: "c: it has no image or images or video or videos, which the format 'caption' needs",
        3: "d: of d.png, one has to be a .json or a .txt, or one each",
        4: "2 images lie beside it: name them in its .json",
        5: "f.txt is no text",
        6: "g.txt is the text of a record that has one",
        7: "h.json is no object and no list of messages",
        8: "i.json, line 1, column 2: this is no JSON",
    }
    texts = {0: " first", 1: "second", 9: "j"}
    assert len(dataset) == len(problems) + len(texts)
    for index in range(len(dataset)):
        if index in texts:
            expected = f"<user>[image]?<assistant>{texts[index]}"
            assert text_of(transform, dataset[index]) == expected
            continue
        with pytest.raises(ValueError, match=f"^sample {index}: .*") as raised:
            dataset[index]
        assert all(part in str(raised.value) for part in problems[index].split(": ", 1))
    with pytest.raises(ValueError, match=f"{len(problems)} of 10 samples"):
        measure_all(dataset, range(len(dataset)), show_progress=False)
    for wrong, problem in (("none", "is no directory"), ("empty", "has no images, videos")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=problem):
            vision_chat_dataset(transform, data_files=str(tmp_path / wrong), **CAPTIONED)
    with pytest.raises(ValueError, match="the source 'folder' lacks data_files"):
        vision_chat_dataset(transform, **CAPTIONED)


def test_tars(transform: Qwen2_5_VLTransform, media: Path, tmp_path: Path) -> None:
    image, other = ((media / name).read_bytes() for name in formats.IMAGES[:2])
    question = {"question": "q", "answer": "a"}
    inline = [{"type": "image", "image": "../2/b.png"}, {"type": "image", "image": "1/e.Ä.png"}]
    messages = [says("user", ""), says("assistant", "a")]
    named = [{**messages[0], "content": inline}, messages[1]]
    placed = [{**messages[0], "content": "<image>"}, messages[1]]
    tar = tmp_path / "t.tar"
    files = {
        "1/a.png": image,
        "1/a.json": json.dumps(question),
        "2/b.png": other,
        "2/b.json": json.dumps(placed),
        "1/c.0.png": image,
        "1/c.1.png": other,
        "1/c.json": json.dumps({**question, "images": ["c.1.png", "./1/c.0.png"]}),
        "1/d.0.png": image,
        "1/d.1.png": other,
        "1/d.json": json.dumps(question),
        "1/e.Ä.png": other,
        "1/e.json": json.dumps({"messages": named, "images": []}),
        "1/f.json": json.dumps({**question, "images": ["a.jpeg"]}),
        "1/g.json": json.dumps({**question, "image": Path(media / IMAGE).as_uri()}),
        "1/h.json": json.dumps({**question, "image": str(media / IMAGE)}),
        "1/i.json": json.dumps({**question, "image": "https://example.org/a.png"}),
        "1/j.png": image[:50],
        "1/j.json": json.dumps(question),
    }
    content = [(k, v.encode() if isinstance(v, str) else v) for k, v in files.items()]
    formats.write_tar(tar, [*content, ("x.npy", b"?")])
    dataset = vision_chat_dataset(transform, source="webdataset", data_files=str(tar), format="vqa")
    chats = vision_chat_dataset(
        transform, source="webdataset", data_files=str(tar), format="messages"
    )

    def grids(sample: dict[str, Any]) -> list[list[int]]:
        return sample["encoder_input"]["vision"]["grid_thw"].tolist()

    first, second = [1, 4, 6], [1, 4, 8]
    assert [grids(dataset[i]) for i in (0, 2)] == [[first], [second, first]]
    assert [grids(chats[i]) for i in (1, 4)] == [[second], [second, second]]
    for number, problem in (
        (3, "2 images lie beside it: name them in its .json, in their order, images"),
        (5, "t.tar has no image or video 'a.jpeg', which 1/f.json names: correct the name"),
        (6, "t.tar has no image or video 'file:///"),
        (7, "t.tar has no image or video '/"),
        (8, "is a remote URL; download it first"),
        (9, r"image file handle '1/j.png'"),
    ):
        with pytest.raises(ValueError, match=rf"sample {number}: .*{problem}.*t.tar, 1/\w\)$"):
            dataset[number]
    sizes = measure_all(dataset, [0, 2], num_workers=1, show_progress=False)
    assert sizes.tolist() == [[len(dataset[i]["tokens"]), *dataset.measure(i)[1:]] for i in (0, 2)]
    with pytest.raises(ValueError, match="media of tars are files in them: leave media_dir out"):
        vision_chat_dataset(
            transform, source="webdataset", data_files=str(tar), media_dir=str(media)
        )
    tar.write_bytes(tar.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"sample 0: .*t.tar has changed since it was opened"):
        dataset[0]


def test_tars_that_are_damaged(transform: Qwen2_5_VLTransform, media: Path, tmp_path: Path) -> None:
    image = (media / IMAGE).read_bytes()
    files = [
        (f"{i}.{suffix}", c) for i in range(3) for suffix, c in (("png", image), ("txt", b"a"))
    ]
    good, tar = tmp_path / "good.tar", tmp_path / "t.tar"
    formats.write_tar(good, files)
    content = good.read_bytes()
    end = len(content.rstrip(b"\0"))

    def build() -> Any:
        return vision_chat_dataset(transform, source="webdataset", data_files=str(tar), prompt="?")

    cuts = {*range(0, end, 1777), *(i * 512 for i in range(end // 512 + 1)), 600, end - 1, end}
    for cut in cuts:  # also between files
        tar.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"t.tar (cannot be read as a tar|is cut off) .*write"):
            build()
    tar.write_bytes(content)
    assert len(build()) == 3
    for damage, problem in (
        (gzip.compress(content), "cannot be read as a tar .*do not compress it"),
        (b"", "cannot be read as a tar"),
        (content + content, "cut off or damaged"),
        (bytes(10240), "has no images, videos, .json or .txt"),
        (content[: end // 512 * 512 - 1024] + b"x" * 1024 + bytes(1024), "cut off or damaged"),
    ):
        tar.write_bytes(damage)
        with pytest.raises(ValueError, match=problem):
            build()
    formats.write_tar(tar, [*files, ("./0.txt", b"b")])
    with pytest.raises(ValueError, match=r"t.tar has '0.txt' twice: write it again without one"):
        build()
    for pattern in ("none*.tar", "t{0..1}.tar"):
        tars = str(tmp_path / pattern)
        with pytest.raises(ValueError, match="'webdataset' cannot be loaded: Unable to find"):
            vision_chat_dataset(transform, source="webdataset", data_files=tars, prompt="?")


def test_links_in_tars(
    transform: Qwen2_5_VLTransform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Never followed: a record whose medium is one has none."""
    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    text = tarfile.TarInfo("a.txt")
    text.size = 1
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.addfile(link)
        tar.addfile(text, io.BytesIO(b"b"))
    with caplog.at_level(logging.INFO, "torchtune_vl"):
        dataset = vision_chat_dataset(
            transform,
            source="webdataset",
            data_files=str(tmp_path / "t.tar"),
            prompt="?",
            format="caption",
        )
    assert "1 links and other entries without content are left out" in caplog.text
    with pytest.raises(ValueError, match="it has no image"):
        dataset[0]


def test_parts_of_tars_and_folders(
    transform: Qwen2_5_VLTransform, media: Path, tmp_path: Path
) -> None:
    image = (media / IMAGE).read_bytes()
    for shard in range(9, 12):
        files = {
            f"{shard}_{i}.{k}": c for i in range(2) for k, c in (("png", image), ("txt", b"a"))
        }
        formats.write_tar(tmp_path / f"{shard:02}.tar", files.items())
        in_folder(tmp_path, files)
    common = {"prompt": "?", "split": "test[1:]+train[:2]"}
    tars = vision_chat_dataset(
        transform,
        source="webdataset",
        data_files={"train": str(tmp_path / "{09..10}.tar"), "test": str(tmp_path / "11.tar")},
        **common,
    )
    names = [place.split(", ")[-1] for _, place in (tars._records[i] for i in range(len(tars)))]
    assert names == ["11_1", "9_0", "9_1"]
    root = str(tmp_path / "files")
    folder = vision_chat_dataset(
        transform,
        source="folder",
        data_files={"train": root, "test": root},
        media_dir=root,
        **common,
    )
    names = [place.split(", ")[-1] for _, place in (folder._records[i] for i in range(len(folder)))]
    assert names == [*["10_1", "11_0", "11_1", "9_0", "9_1"], "10_0", "10_1"]
    with pytest.raises(ValueError, match="the split 'val' is not there; there are train"):
        vision_chat_dataset(transform, source="folder", data_files=root, split="val", prompt="?")
    with pytest.raises(ValueError, match=r"'folder' cannot be loaded: .*unknown_setting"):
        vision_chat_dataset(transform, source="folder", data_files=root, unknown_setting=3)


def test_digests(media: Path, tmp_path: Path) -> None:
    """They change with what a record says, and with where its media lie in which tar."""
    image = (media / IMAGE).read_bytes()
    files = {f"{i}.{k}": c for i in "ab" for k, c in (("png", image), ("txt", b"text"))}

    def of_folder() -> list[bytes]:
        return FolderRecords([in_folder(tmp_path, files)], {}).digests([0, 1])

    def of_tar() -> list[bytes]:
        formats.write_tar(tmp_path / "t.tar", files.items())
        os.utime(tmp_path / "t.tar", (1, 1))
        return TarRecords([str(tmp_path / "t.tar")]).digests([0, 1])

    for digests in (of_folder, of_tar):
        before = digests()
        assert len({*before}) == 2
        assert digests() == before
        files["a.txt"] = b"changed in " + digests.__name__.encode()
        after = digests()
        assert after[0] != before[0]
        if digests is of_folder:
            assert after[1] == before[1]


@pytest.fixture
def stored(media: Path) -> Any:
    """A store of fsspec with an image inside of a directory, and one outside."""
    fs = fsspec.filesystem("memory")
    fs.pipe("/stored/in/a b.png", (media / IMAGE).read_bytes())
    fs.pipe("/stored/in/sub/cut.png", (media / IMAGE).read_bytes()[:60])
    fs.pipe("/stored/in/empty.png", b"")
    fs.pipe("/stored/out.png", (media / IMAGE).read_bytes())
    yield fs
    fs.rm("/stored", recursive=True)


def test_media_of_a_store(build, transform: Qwen2_5_VLTransform, media: Path, stored: Any) -> None:
    root = "memory://stored/in"
    inside = ["a b.png", "./sub/../a b.png", f"{root}/a b.png"]
    row = {"question": "q", "answer": "a"}
    outside = [
        "../out.png",
        "sub/../../out.png",
        "..",
        "/stored/in/a b.png",
        "memory://stored/out.png",
    ]
    outside += ["memory://stored/in/../out.png", "s3://bucket/a.png", (media / IMAGE).as_uri()]
    outside += ["memory://stored/inner.png"]
    broken = {
        "none.png": f"{root}/none.png cannot be read .*; correct the path",
        f"x::{(media / IMAGE).as_uri()}": "cannot be read",
        "sub": "cannot be read",
        "empty.png": f"{root}/empty.png cannot be read .*is empty",
        "sub/cut.png": f"image file handle '{root}/sub/cut.png'",
        "https://example.org/a.png": "is a remote URL; download it first",
    }
    for directory in (root, f"{root}/"):
        dataset = build(
            [{**row, "image": path} for path in (*inside, *outside, *broken)], media_dir=directory
        )
        for number in range(len(inside)):
            assert text_of(transform, dataset[number]) == "<user>[image]q<assistant>a"
        for number, path in enumerate(outside, len(inside)):
            with pytest.raises(
                ValueError, match=f"sample {number}: .*is outside of media_dir"
            ) as told:
                dataset[number]
            assert path.split("/")[-1] in str(told.value)
        for number, problem in enumerate(broken.values(), len(inside) + len(outside)):
            with pytest.raises(ValueError, match=f"sample {number}: .*{problem}"):
                dataset[number]
    # Which nobody named
    local = build([{**row, "image": f"{root}/a b.png"}])
    with pytest.raises(ValueError, match="is a memory:// URL, of which only https:// is read"):
        local[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stores_in_data_workers(build, stored: Any, num_workers: int) -> None:
    row = {"question": "q", "answer": "a", "image": "a b.png"}
    dataset = build([row] * 9, media_dir="memory://stored/in")
    with loading(dataset, num_workers, batch_size=None) as samples:
        assert [same(sample, dataset[0]) for sample in samples] == [True] * 9
    sizes = measure_all(dataset, range(9), num_workers, show_progress=False)
    assert sizes.tolist() == [[*dataset.measure(0)]] * 9


def test_files_of_a_store_that_change(
    transform: Qwen2_5_VLTransform, tmp_path: Path, stored: Any
) -> None:
    common = {"data_files": "memory://stored/d.jsonl", "cache_dir": str(tmp_path)}
    for answer in ("a", "b", "b"):
        text = json.dumps({"question": "q", "answer": answer})
        if answer == "a" or stored.cat("/stored/d.jsonl") != text.encode():
            stored.pipe("/stored/d.jsonl", text.encode())
        dataset = vision_chat_dataset(transform, source="json", **common)
        assert text_of(transform, dataset[0]) == f"<user>q<assistant>{answer}"
    assert len([*tmp_path.glob("fetched-*")]) == 2
    for source, files, problem in (
        ("json", "memory://stored/none.jsonl", "cannot be loaded: Unable to find"),
        ("webdataset", "memory://stored/*.tar", "cannot be loaded: Unable to find"),
        ("folder", "memory://stored/none", "memory://stored/none is no directory"),
        ("memory://stored/none", None, "memory://stored/none cannot be loaded"),
        ("nowhere://stored", None, "nowhere://stored cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=problem):
            vision_chat_dataset(transform, source=source, data_files=files, prompt="?")


def test_torchtune_s_own_datasets(
    build, transform: Qwen2_5_VLTransform, media: Path, tmp_path: Path
) -> None:
    """Its builders take our transform, and give what ours does."""
    image = str(media / "bild 0.jpg")
    rows = [{"question": f"What is {i}?", "answer": f"{i}.", "image": image} for i in range(3)]
    ours = build(rows)
    names = {"input": "question", "output": "answer", "image": "image"}
    common = {"source": "json", "split": "train", "cache_dir": str(tmp_path)}
    vqa = vqa_dataset(
        transform, data_files=str(tmp_path / "data.jsonl"), column_map=names, **common
    )
    path = tmp_path / "llava.json"
    turns = [[("human", f"<image>What is {i}?"), ("gpt", f"{i}.")] for i in range(3)]
    llava = [
        {"image": image, "conversations": [{"from": who, "value": text} for who, text in each]}
        for each in turns
    ]
    path.write_text(json.dumps(llava))
    instruct = llava_instruct_dataset(transform, image_dir="", data_files=str(path), **common)
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": [{k: datasets.Value("string") for k in ("user", "assistant")}],
        }
    )
    texts = [[{"user": row["question"], "assistant": row["answer"]}] for row in rows]
    table = datasets.Dataset.from_list(
        [{"images": [image], "texts": text} for text in texts], features=features
    )
    table.to_parquet(tmp_path / "cauldron.parquet")
    cauldron = the_cauldron_dataset(
        transform,
        subset=None,
        source="parquet",
        data_files=str(tmp_path / "cauldron.parquet"),
        cache_dir=str(tmp_path),
    )
    assert len(vqa) == len(instruct) == len(cauldron) == 3
    for index in range(3):
        sample = ours[index]
        for theirs in (vqa[index], instruct[index], cauldron[index]):
            assert [int(label) for label in theirs["labels"]] == sample["labels"]
            assert theirs["tokens"] == sample["tokens"]
            assert torch.equal(theirs["input_pos"], sample["input_pos"])
            assert same(theirs["encoder_input"], sample["encoder_input"])
