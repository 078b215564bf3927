"""The parity report: that it passes what is equal, and fails the right row for what is not."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from quickstart.checkpoint import PREPROCESSOR_CONFIG, write_tiny_checkpoint
from quickstart.vocabulary import write_vocabulary
from tests.finetune_runs import NARROW_QWEN3_VL, NARROW_QWEN3_VL_MOE
from tests.reference import QWEN2_VL, reference_config, reference_model
from torchtune_vl.chat import CHAT_TEMPLATE, QwenTokenizer
from torchtune_vl.chat._vocabulary import SPECIAL_TOKENS
from torchtune_vl.media import ImageTransform
from torchtune_vl.models.qwen2_5_vl import (
    Qwen2_5_VLTokenizer,
    Qwen2_5_VLTransform,
)
from torchtune_vl.validation import (
    Inputs,
    Picture,
    Report,
    Row,
    find_images,
    find_videos,
    print_report,
    read_conversations,
    to_html,
    to_markdown,
    validate,
)
from torchtune_vl.validation import _compare_models as comparing
from torchtune_vl.validation._compare import Comparison, compare
from torchtune_vl.validation._compare_files import (
    compare_chat_templates,
    compare_image_settings,
    compare_special_tokens,
    compare_texts,
    compare_vocabularies,
)
from torchtune_vl.validation._compare_media import compare_images, compare_videos
from torchtune_vl.validation._compare_models import (
    compare_conversations,
    compare_models,
    continue_behind_media,
)
from torchtune_vl.validation._inputs import builtin_inputs
from torchtune_vl.validation._ours_and_reference import Ours, Reference, attempt
from torchtune_vl.validation._report import KEPT_EVIDENCE, Case

ROWS = [
    "vocabulary",
    "special tokens",
    "image settings",
    "chat template",
    "text ids",
    "chat ids",
    "image grids",
    "pixels, torchvision",
    "pixels, PIL",
    "video grids",
    "video pixels",
    "chat pixels",
    "positions",
    "weights",
    "logits",
    "top-1",
]


def rows_of(function: Callable[..., object], ours: Ours, reference: Reference, *args) -> list[Row]:
    """The rows that one of the comparisons fills or leaves out."""
    run = Comparison(ours, reference)
    function(run, *args)
    return [row for row in run.rows.values() if row.cases or row.skipped]


def failing(report: Report) -> set[str]:
    return {row.name for row in report.rows if row.status == "fail"}


def row_of(report: Report, name: str) -> Row:
    (row,) = (row for row in report.rows if row.name == name)
    return row


def case_of(row: Row, name: str) -> Case:
    (case,) = (case for case in row.cases if case.name == name)
    return case


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("validated") / "base"
    write_tiny_checkpoint(directory, vocabulary)
    return directory


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> Ours:
    return Ours(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture
def altered(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the checkpoint with one place of one file altered."""

    def alter(name: str, old: str, new: str) -> Path:
        directory = tmp_path / "altered"
        directory.mkdir()
        for path in checkpoint.iterdir():
            (directory / path.name).symlink_to(path)
        text = (checkpoint / name).read_text(encoding="utf-8")
        assert text.count(old) >= 1
        (directory / name).unlink()
        (directory / name).write_text(text.replace(old, new, 1), encoding="utf-8")
        return directory

    return alter


@pytest.fixture
def builtin(tmp_path: Path) -> Inputs:
    return builtin_inputs(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's: images, broken ones among them, and conversations."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 130, 3), dtype=np.uint8))
    image.save(folder / "a.png")
    image.rotate(90, expand=True).save(folder / "b.jpg")
    whole = (folder / "b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    (folder / "empty.png").write_bytes(b"")
    (folder / "no_video.mp4").write_text("text")
    buffer = BytesIO()
    image.save(buffer, "PNG")
    data_url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    (folder / "chat.json").write_text(json.dumps(conversations(data_url)))
    return folder


def conversations(data_url: str) -> list:
    question = {"type": "text", "text": "What?"}
    answer = {"role": "assistant", "content": "This."}
    tool_call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    return [
        [{"role": "user", "content": [{"type": "image", "image": "a.png"}, question]}, answer],
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url}}]}
            ]
        },
        {
            "image": "b.jpg",
            "conversations": [
                {"from": "human", "value": "Left: <image>\nright: nothing"},
                {"from": "gpt", "value": "Yes <|im_end|>"},
            ],
        },
        {
            "images": ["a.png", "b.jpg"],
            "messages": [{"role": "user", "content": "<image><image>Same?"}, answer],
        },
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "https://x.org/a"}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": 9}]}
            ]
        },
        {"messages": [{"role": "user", "content": "<image>"}], "images": []},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [tool_call]}]},
        {"something": "else"},
        7,
    ]


@pytest.fixture(scope="module")
def report(checkpoint: Path, data: Path) -> Report:
    """Of the whole command on what is equal."""
    inputs = Inputs(
        images=find_images([data]),
        videos=find_videos([data]),
        conversations=read_conversations(data / "chat.json"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "MAX_TOKENS", 120)  # 151,936 logits each
        return validate(checkpoint, inputs=inputs, logits=True)


def test_all_rows_pass(report: Report) -> None:
    assert [row.name for row in report.rows] == ROWS
    for row in report.rows:
        assert row.status == "pass", row
        assert row.compared > 0
        if row.name != "logits":
            assert all(case.largest == 0 for case in row.cases)
    assert report.passed
    assert report.verdict == "16 rows pass, 0 fail"


@pytest.mark.slow
def test_another_family(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vocabulary(QwenTokenizer(vocabulary / "tokenizer.json"), tmp_path)
    settings = {**PREPROCESSOR_CONFIG, "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    template = json.dumps({"chat_template": CHAT_TEMPLATE})
    (tmp_path / "chat_template.json").write_text(template)
    names = ("image", "video", "vision_start", "vision_end")
    ids = [SPECIAL_TOKENS[f"<|{n if 'vision' in n else f'{n}_pad'}|>"] for n in names]
    tokens = {f"{name}_token_id": i for name, i in zip(names, ids, strict=True)}
    config = reference_config(QWEN2_VL, vocab_size=151_936, **tokens)
    reference_model(config).save_pretrained(tmp_path)
    monkeypatch.setattr(comparing, "MAX_TOKENS", 60)
    report = validate(tmp_path, logits=True)
    assert report.verdict == "16 rows pass, 0 fail"
    names = {type(Reference(tmp_path).processor).__name__, Reference(tmp_path).family.name}
    assert names == {"Qwen2VLProcessor", "Qwen2-VL"}
    # Of a video, with positions of its own, too
    assert "built-in video" in {case.name for case in row_of(report, "positions").cases}


TIMED_STEPS = {"dense": NARROW_QWEN3_VL, "experts": NARROW_QWEN3_VL_MOE}


@pytest.mark.parametrize("config", TIMED_STEPS.values(), ids=TIMED_STEPS)
def test_a_family_whose_videos_are_steps_with_times(
    config: dict[str, Any], vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_checkpoint(tmp_path, vocabulary, config=config)
    monkeypatch.setattr(comparing, "MAX_TOKENS", 60)
    report = validate(tmp_path, logits=True)
    assert report.verdict == "16 rows pass, 0 fail"
    ids = row_of(report, "chat ids")
    assert "built-in video" in {case.name for case in ids.cases}
    assert "leaves a pair of <|vision_start|> and <|vision_end|> around each video" in ids.note
    assert "min_pixels is 4,096, published 65,536" in row_of(report, "image settings").note


def test_every_input_is_compared(report: Report, data: Path) -> None:
    pixels = row_of(report, "pixels, torchvision")
    names = {case.name for case in pixels.cases}
    assert {str(data / name) for name in ("a.png", "b.jpg", "cut.jpg", "empty.png")} <= names
    # Of the conversations: a data URL, and a file that is not there
    assert {"chat.json #1, image 1", "chat.json #4, image 1"} <= names
    chats = {case.name for case in row_of(report, "chat ids").cases if "chat.json" in case.name}
    assert chats == {f"chat.json #{n}" for n in range(5)}
    assert {case.name for case in row_of(report, "video pixels").cases} == {
        "built-in moving square, 10 frames of 160 x 120",
        str(data / "no_video.mp4"),
    }
    texts = {case.name for case in row_of(report, "text ids").cases}
    assert "chat.json #2: \\nright: nothing" in texts
    assert row_of(report, "vocabulary").compared == 151_643 + 4


def test_what_both_refuse_passes_and_is_told(report: Report, data: Path) -> None:
    for name in ("pixels, torchvision", "pixels, PIL"):
        case = case_of(row_of(report, name), str(data / "cut.jpg"))
        assert case.refused == "both"
        assert "Ours: " in case.detail
        assert "transformers: " in case.detail
        assert "4 refused by both" in row_of(report, name).figure
    assert case_of(row_of(report, "chat ids"), "chat.json #4").refused == "both"


def test_what_transformers_does_not_know_is_told(report: Report) -> None:
    note = row_of(report, "chat ids").note
    assert "Not compared: 6" in note
    assert "https://x.org/a is remote" in note
    assert "<|im_end|> in a text: 1" in note


def test_known_difference_of_positions_is_named(report: Report) -> None:
    """Two built-in conversations have a video of more seconds than its frames are wide."""
    note = row_of(report, "positions").note
    assert re.match(r"transformers 5\.\d+\.\d+ begins .* videos of 2 conversations before", note)


def test_positions_move_behind_media_only() -> None:
    """Two tokens of text, a video of two steps, text, an image, text."""
    kinds = torch.tensor([0, 0, 2, 2, 0, 0, 1, 0])
    behind = [[0] * 3, [1] * 3, [2, 2, 2], [9, 2, 2], [10] * 3, [11] * 3, [12] * 3, [13] * 3]
    within = [[0] * 3, [1] * 3, [2, 2, 2], [9, 2, 2], [3] * 3, [4] * 3, [5] * 3, [6] * 3]
    for given in (within, behind):
        assert continue_behind_media(torch.tensor(given), kinds).tolist() == behind


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("preprocessor_config.json", "0.4578275", "0.4578276", {"image settings"}),
        ("preprocessor_config.json", "0.27577711", "0.27577712", {"image settings"}),
        ("preprocessor_config.json", '"merge_size": 2', '"merge_size": 4', {"image settings"}),
        ("preprocessor_config.json", "{", "", {"image settings"}),
        ("merges.txt", "\nĠt h\n", "\nĠ th\n", {"vocabulary"}),
        ("merges.txt", "\nĠt h\n", "\nĠt f\n", {"vocabulary"}),
        ("vocab.json", '"Ġthe":', '"Ġthf":', {"vocabulary"}),
        ("tokenizer.json", '"Ġthe": 279', '"Ġthf": 279', {"vocabulary"}),
        ("tokenizer.json", '"Ġt h"', '"Ġ th"', {"vocabulary", "text ids"}),
        ("tokenizer.json", '"<|box_start|>"', '"<|box_begin|>"', {"special tokens", "text ids"}),
        ("tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "!"', None),
    ],
)
def test_alteration_fails_the_right_row(
    altered: Callable[..., Path], name: str, old: str, new: str, expected: set[str] | None
) -> None:
    directory = altered(name, old, new)
    ours, reference = Ours(directory), Reference(directory)
    rows = rows_of(compare_image_settings, ours, reference)
    if name != "preprocessor_config.json":
        texts = {"a": ["All in this text: <|box_start|>(1,2)<|box_end|>"]}
        rows += [
            *rows_of(compare_vocabularies, ours, reference),
            *rows_of(compare_special_tokens, ours, reference),
            *rows_of(compare_texts, ours, reference, texts),
        ]
    assert {row.name for row in rows if row.status == "fail"} == (expected or {"special tokens"})


def test_swapped_tokens(altered: Callable[..., Path], reference: Reference) -> None:
    """A vocabulary that is whole, and not the published one."""
    directory = altered("tokenizer.json", "{", "{")
    (directory / "vocab.json").unlink()
    content = json.loads((directory / "tokenizer.json").read_bytes())
    model = content["model"]
    a, b = (next(t for t, i in model["vocab"].items() if i == place) for place in (1000, 1001))
    model["vocab"] |= {a: 1001, b: 1000}
    model["merges"][744:746] = reversed(model["merges"][744:746])
    (directory / "tokenizer.json").write_text(json.dumps(content))

    (alone,) = rows_of(compare_vocabularies, Ours(directory), Reference(directory))
    assert [case.name for case in alone.failed] == [
        "tokens of tokenizer.json beside the published",
        "merges that transformers reads beside the published",
    ]
    beside = case_of(
        *rows_of(compare_vocabularies, Ours(directory), reference), "ours beside transformers"
    )
    assert beside.differing == 2
    assert "first difference at 1,000: ours b'" in beside.detail
    first, second = (pair for pair in beside.tokens if pair.ours != pair.reference)
    assert (first.place, second.place) == (1000, 1001)
    assert first.ours[1] == second.reference[1]


def test_altered_weight_fails_beside_the_original(
    checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "altered")
    path = tmp_path / "altered" / "model.safetensors"
    weights = load_file(path)
    name = "visual.blocks.1.mlp.up_proj.weight"
    weights[name][3, 4] += 1e-4
    save_file(weights, path, metadata={"format": "pt"})
    row, *_ = rows_of(
        compare_models, Ours(tmp_path / "altered"), reference, [], torch.float32, True, False
    )
    (case,) = row.failed
    assert (case.name, case.differing) == (name, 1)
    assert case.largest == pytest.approx(1e-4, rel=1e-2)


def test_altered_mean_beside_the_original(
    reference: Reference, altered: Callable[..., Path], builtin: Inputs
) -> None:
    ours = Ours(altered("preprocessor_config.json", "0.4578275", "0.46"))
    rows = [
        *rows_of(compare_image_settings, ours, reference),
        *rows_of(compare_images, ours, reference, builtin.images),
        *rows_of(compare_videos, ours, reference, builtin.videos),
    ]
    assert {row.name for row in rows if row.status == "fail"} == {
        "image settings",
        "pixels, torchvision",
        "pixels, PIL",
        "video pixels",
    }


def test_another_template_is_followed_and_said(
    altered: Callable[..., Path], builtin: Inputs
) -> None:
    directory = altered("chat_template.json", "You are a helpful assistant.", "You are helpful.")
    ours, reference = Ours(directory), Reference(directory)
    (row,) = rows_of(compare_chat_templates, ours, reference)
    assert row.status == "pass"
    assert row.note == "This template is not the published one"
    chat = rows_of(compare_conversations, ours, reference, builtin.conversations, 0)
    assert [row.status for row in chat] == ["pass"] * 3
    assert chat[0].compared > 1000


def test_larger_limit_is_a_choice(altered: Callable[..., Path]) -> None:
    directory = altered("preprocessor_config.json", "12845056", "1003520")
    (row,) = rows_of(compare_image_settings, Ours(directory), Reference(directory))
    assert row.status == "pass"
    assert row.note == "Used here: max_pixels is 1,003,520, published 12,845,056"


def test_settings_of_an_export_hold_for_both_sides(
    altered: Callable[..., Path], builtin: Inputs
) -> None:
    directory = altered("config.json", "{", "{")
    transform = Qwen2_5_VLTransform.from_pretrained(
        directory,
        max_pixels=50_000,
        fps=0.5,
        video_min_pixels=3136,
        video_max_pixels=12_000,
        add_vision_id=True,
    )
    for name, text in transform.processor_files().items():
        (directory / name).unlink(missing_ok=True)  # a link to the file that all tests share
        (directory / name).write_text(text)
    ours, reference = Ours(directory), Reference(directory)
    chat = rows_of(compare_conversations, ours, reference, builtin.conversations, 0)
    rows = [
        *rows_of(compare_image_settings, ours, reference),
        *rows_of(compare_chat_templates, ours, reference),
        *rows_of(compare_images, ours, reference, builtin.images),
        *rows_of(compare_videos, ours, reference, builtin.videos),
        *chat,
    ]
    assert {row.status for row in rows} == {"pass"}
    (path,) = builtin.videos.values()
    assert ours.video(path)["video_grid_thw"].tolist() == [[2, 6, 8]]


def test_max_pixels_holds_for_both_sides(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (500, 400), "red").save(tmp_path / "red.png")
    path = str(tmp_path / "red.png")
    sides = Ours(checkpoint, 50_000), Reference(checkpoint, 50_000)
    rows = rows_of(compare_images, *sides, {"red": path})
    assert [row.status for row in rows] == ["pass"] * 3
    assert sides[1].image(path, "pil")["image_grid_thw"].prod() * 14**2 <= 50_000


def test_directory_without_config(altered: Callable[..., Path], builtin: Inputs) -> None:
    directory = altered("config.json", "{", "{")
    (directory / "config.json").unlink()
    ours, reference = Ours(directory), Reference(directory)
    *_, positions = rows_of(compare_conversations, ours, reference, builtin.conversations, 0)
    assert positions.status == "not compared"
    assert "config.json" in positions.figure
    weights, *_ = rows_of(compare_models, ours, reference, [], torch.float32, True, False)
    assert weights.status == "fail"
    assert "config.json" in weights.cases[0].detail


def test_models_are_compared_when_asked_to(ours: Ours, reference: Reference) -> None:
    rows = rows_of(compare_models, ours, reference, [], torch.bfloat16, False, False)
    reasons = [f"only with --{option}" for option in ("weights", "logits", "logits")]
    assert [row.figure for row in rows] == reasons
    assert ["in bfloat16" in row.about for row in rows] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "see"),
    [
        ("tokenizer.json", {"special tokens": "vocabulary", "text ids": "vocabulary"}),
        (
            "preprocessor_config.json",
            dict.fromkeys(("image grids", "pixels, torchvision", "pixels, PIL"), "image settings"),
        ),
    ],
)
def test_what_cannot_be_read_is_left_out(
    altered: Callable[..., Path], builtin: Inputs, name: str, see: dict[str, str]
) -> None:
    directory = altered(name, "{", "")
    ours, reference = Ours(directory), Reference(directory)
    rows = [
        *rows_of(compare_special_tokens, ours, reference),
        *rows_of(compare_texts, ours, reference, {"a": ["b"]}),
        *rows_of(compare_images, ours, reference, dict([*builtin.images.items()][:1])),
        *rows_of(compare_chat_templates, ours, reference),
        *rows_of(compare_videos, ours, reference, builtin.videos),
        *rows_of(compare_conversations, ours, reference, builtin.conversations, 0),
        *rows_of(compare_models, ours, reference, [], torch.float32, False, True)[1:],
    ]
    both = ("chat template", "video grids", "video pixels", "chat ids", "chat pixels", "positions")
    see |= dict.fromkeys(both, "vocabulary and image settings")
    see |= dict.fromkeys(("logits", "top-1"), "vocabulary, image settings and weights")
    left_out = {row.name: row.figure for row in rows if row.status == "not compared"}
    assert left_out == {row: f"unreadable: see {where}" for row, where in see.items()}
    assert {row.status for row in rows if row.name not in see} == {"pass"}


def test_without_torchvision(
    checkpoint: Path, ours: Ours, builtin: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "torchvision is not installed"
    monkeypatch.setattr(Reference, "no_torchvision", reason)
    reference = Reference(checkpoint)
    chat = rows_of(compare_conversations, ours, reference, builtin.conversations, 0)
    rows = [
        *chat,
        *rows_of(compare_chat_templates, ours, reference),
        *rows_of(compare_images, ours, reference, builtin.images),
        *rows_of(compare_videos, ours, reference, builtin.videos),
    ]
    assert {row.name for row in rows if row.status == "pass"} == {
        "image grids",
        "pixels, PIL",
    }
    assert all(row.figure == reason for row in rows if row.status != "pass")
    report = Report("a", "b", {}, rows)
    assert report.passed
    assert report.verdict == "2 rows pass, 0 fail, 7 not compared"


# Our side broken


def test_pixel_off_by_one_level_is_shown(
    ours: Ours, reference: Reference, builtin: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ImageTransform.__call__

    def shifted(self, sample, inference=False):
        processed = whole(self, sample, inference)
        processed["pixel_values"][0, 7] += 1 / 255
        return processed

    monkeypatch.setattr(ImageTransform, "__call__", shifted)
    name = "built-in gradient, 224 x 224 PNG"
    rows = rows_of(compare_images, ours, reference, {name: builtin.images[name]})
    assert [row.status for row in rows] == ["pass", "fail", "fail"]
    (case,) = rows[1].failed
    assert case.differing == 1
    assert case.largest == pytest.approx(1 / 255, rel=1e-3)
    assert case.total == pytest.approx(1 / 255, rel=1e-3)

    image, difference = (np.asarray(Image.open(BytesIO(p.png))) for p in case.pictures)
    levels = np.asarray(Image.open(builtin.images[name])).astype(int)
    levels[0, 7] += [1, 0, 0]
    assert np.abs(levels - image).max() <= 1
    assert difference.shape == image.shape
    bright = difference.max(axis=-1) > 0
    assert bright.sum() == 1
    assert difference[0, 7].tolist() == [255, 255, 255]

    page = to_html(Report("a", "b", {}, rows))
    assert page.index("pixels, PIL</h2>") < page.index("image grids</h2>")
    assert base64.b64encode(case.pictures[1].png).decode() in page
    assert case.pictures[1].caption in page


def test_wrong_grid(ours: Ours, reference: Reference, monkeypatch: pytest.MonkeyPatch, builtin):
    monkeypatch.setattr("torchtune_vl.media._patches.MAX_ASPECT_RATIO", 300, raising=True)
    name = "built-in thread, 2 x 500 PNG"
    rows = rows_of(compare_images, ours, reference, {name: builtin.images[name]})
    (case,) = rows[1].failed
    assert case.refused == "theirs"
    assert rows[1].figure == "1 refused by one side"
    # What one side has can be drawn
    assert len(case.pictures) == 1


def test_wrong_id_is_shown(
    ours: Ours, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ours.tokenizer.vocab_size  # reads its files with what is right
    whole = Qwen2_5_VLTokenizer.encode

    def wrong(self, text, add_bos=True, add_eos=True):
        ids = whole(self, text, add_bos, add_eos)
        return [*ids[:2], 0, *ids[3:]]

    monkeypatch.setattr(Qwen2_5_VLTokenizer, "encode", wrong)
    (row,) = rows_of(
        compare_texts, ours, reference, {"a": ["one two <b>three</b> four five", "a\nb c"]}
    )
    assert row.status == "fail"
    case = case_of(row, "a: one two <b>three</b> four five")
    assert case.differing == 1
    differing = [pair for pair in case.tokens if pair.ours != pair.reference]
    assert [pair.place for pair in differing] == [2]
    assert [pair.place for pair in case.tokens] == [*range(len(case.tokens))]
    assert differing[0].ours == (0, "!")
    assert differing[0].reference[1] == " <"

    page = to_html(Report("a", "b", {}, [row]))
    assert "␣&lt;" in page
    assert "a: one two &lt;b&gt;three&lt;/b&gt; four five" in page
    assert "<b>" not in page
    text = to_markdown(Report("a", "b", {}, [row]))
    assert "## text ids: 2 of 2 inputs fail" in text
    assert "| 2 | 0 '!' |" in text


def test_wrong_positions_and_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Qwen2_5_VLTransform.__call__

    def moved(self, sample, inference=False):
        sample = whole(self, sample, inference)
        return {**sample, "input_pos": sample["input_pos"] + (sample["input_pos"] > 20)}

    load = comparing._load

    def shaken(directory, dtype):
        model = load(directory, dtype)
        with torch.no_grad():
            next(model.decoder.layers[1].parameters()).mul_(1.01)
        return model

    monkeypatch.setattr(Qwen2_5_VLTransform, "__call__", moved)
    monkeypatch.setattr(comparing, "_load", shaken)
    monkeypatch.setattr(comparing, "MAX_TOKENS", 60)
    report = validate(checkpoint, logits=True)
    assert failing(report) == {"positions", "weights", "logits"}
    worst = row_of(report, "positions").cases[0]
    assert re.search(r"first difference at \d+: ours \[.*\], transformers \[", worst.detail)
    assert len(row_of(report, "weights").failed) == 1
    assert "the tolerance is" in row_of(report, "logits").cases[0].detail


# Pieces


def test_top_case_forgives_ties_only() -> None:
    reference = torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.9999, 0.0]])
    tie, clear = reference.clone(), reference.clone()
    tie[1, 1] = 1.0001
    clear[0, 2] = 2.0
    assert not comparing._top_case("tie", tie, reference, 1e-3).failed
    assert comparing._top_case("tie", tie, reference, 1e-3).differing == 1
    assert comparing._top_case("clear", clear, reference, 1e-3).failed


def test_compare_sequences_of_other_lengths() -> None:
    case = compare("x", [1, 2, 3], [1, 2], text_of=str)
    assert case.failed
    assert case.differing == 1
    assert case.tokens[-1].reference is None


def test_compare_tensors_that_hold_no_numbers() -> None:
    nan = torch.tensor([1.0, float("nan")])
    case = compare("x", nan, torch.ones(2), tolerance=1.0)
    assert (case.failed, case.differing, case.largest) == (True, 1, float("inf"))
    assert compare("x", torch.ones(2), torch.ones(3), tolerance=1.0).failed
    assert not compare("x", torch.ones(2), torch.ones(2) + 0.5, tolerance=0.5).failed


def test_our_side_may_refuse_only_with_an_explanation() -> None:
    refusing = attempt(int, "x")
    crashing = attempt(lambda: [][0])
    assert not compare("x", refusing, refusing).failed
    assert compare("x", crashing, refusing).failed
    assert compare("x", refusing, [1]).refused == "ours"
    assert not compare("x", [1], [1]).refused


def test_worst_cases_come_first_and_keep_their_evidence() -> None:
    row = Row("x", "", "values")
    for i in (3, 9, 1, 0, 7, 5, 2, 8, 4, 6, 11, 10):
        row.add(Case(str(i), largest=float(i), failed=i > 8, pictures=[i], tokens=[i]))
    assert [case.name for case in row.cases] == [str(i) for i in reversed(range(12))]
    assert [bool(case.pictures) for case in row.cases] == [i < KEPT_EVIDENCE for i in range(12)]


def test_terminal_lists_five_cases_of_a_kind() -> None:
    failing = [Case(f"wrong {i}", 2, 1, 1.0, 1.0, failed=True) for i in range(7)]
    refused = Case("refused", refused="both", detail="Both refuse it")
    rows = [
        Row("texts", "", "ids", cases=[*failing, refused]),
        Row("grids", "", "numbers", cases=[refused]),
        Row("logits", "", "values", skipped="only with --logits", note="A note"),
    ]
    stream = StringIO()
    print_report(Report("a", "b", {}, rows), Console(file=stream, width=200))
    lines = [line.strip() for line in stream.getvalue().splitlines() if line.strip()]
    cells = [[cell.strip() for cell in re.split("  +", line)] for line in lines]
    assert ["texts", "8", "14", "7 ids differ, 1 refused by both", "fail"] in cells
    assert ["logits", "only with --logits", "not compared"] in cells
    assert "• logits: A note." in lines
    listed = [f"• wrong {i}: 1 of 2 differ" for i in range(5)]
    place = lines.index("texts: 7 of 8 inputs fail")
    assert lines[place + 1 : place + 7] == [*listed, "... and 2 more"]
    verdict = "1 rows pass, 1 fail, 1 not compared"
    both = ["Refused by both sides: 1", "• refused: Both refuse it", verdict]
    assert lines[place + 7 :] == both


def test_page_needs_nothing_else(report: Report) -> None:
    page = to_html(report)
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", page)
    assert len(addresses) > 20
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not re.search(r"<script|<link|@import|url\(|<iframe|javascript:", page)
    assert len(page) < 5e6
    assert "{{" not in page
    assert "{%" not in page


def test_markdown_has_every_row(report: Report) -> None:
    lines = [line for line in to_markdown(report).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(ROWS)
    assert lines[0] == "| Compared | Inputs | Values | Difference | Result |"
    assert lines[2].startswith("| vocabulary | 5 | 151,647 | 0 values differ | pass |")


def test_lines_of_json(tmp_path: Path) -> None:
    entries = [{"messages": [{"role": "user", "content": text}]} for text in ("a", "b\nc")]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    assert [c.values("text") for c in read_conversations(path)] == [["a"], ["b\nc"]]
    path.write_text(json.dumps(entries[0]["messages"]))
    assert [c.values("text") for c in read_conversations(path)] == [["a"]]
    path.write_text("no JSON")
    with pytest.raises(ValueError, match="cannot be read as conversations"):
        read_conversations(path)


def test_conversations_are_read_as_training_does(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": '"007" is <image>, {"a": 1.0}'}
    boxes = {"type": "boxes", "boxes": [{"bbox_2d": [1, 2, 3, 4]}]}
    rows = [
        {"messages": [{"role": "user", "content": "<image>?"}, answer], "images": ["a.png"]},
        {
            "conversations": [
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "1"},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, boxes]}]},
        {"messages": [{"role": "user", "content": "<bbox>"}], "objects": {"bbox": [[1, 2, 3, 4]]}},
        {"conversations": [{"from": "me", "value": "a"}]},
    ]
    path = tmp_path / "chat.jsonl"
    lines = "\r\n\r\n".join(json.dumps(row) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    tagged, called, *others = read_conversations(path)
    image = {"type": "image", "image": str(tmp_path / "a.png")}
    assert tagged.messages[0]["content"] == [image, {"type": "text", "text": "?"}]
    assert tagged.messages[1] == answer
    assert called.messages[0]["tool_calls"] == [{"name": "f", "arguments": {}}]
    assert called.messages[1] == {"role": "tool", "content": "1"}
    for conversation, problem in zip(
        others, ("no items of", "no items of", "from 'me'"), strict=True
    ):
        assert problem in conversation.problem
    path.write_text(f"{json.dumps(rows[0])}\n\n{json.dumps(rows[0])[:-3]}")
    with pytest.raises(ValueError, match=r"cannot be read as conversations: .*chat.jsonl, line 3"):
        read_conversations(path)


def test_tools_are_joined_texts(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"messages": messages, "tools": [{"name": "f"}]}]))
    (conversation,) = read_conversations(path)
    assert conversation.messages[0]["content"] == "ab"
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert conversation.tools == [{"name": "f"}]


def test_no_control_character_reaches_an_output() -> None:
    """Nor a byte of a name that is not UTF-8, which cannot be written."""
    name = "caf\udce9\x1b[2J\u202e.png"
    case = Case(name, 1, 1, 1.0, 1.0, failed=True, detail=f"said {name}")
    case.pictures = [Picture(name, b"")]
    row = Row("pixels", "about", "values", note=name, cases=[case])
    report = Report(name, name, {"torch": "2"}, [row])
    stream = StringIO()
    print_report(report, Console(file=stream, width=200))
    for text in (stream.getvalue(), to_markdown(report), to_html(report)):
        text.encode()
        assert {c for c in text if not c.isprintable()} <= {"\n"}
        plain = text.replace("\\\\", "\\").replace("\\[", "[")
        assert "caf\\udce9\\x1b[2J\\u202e.png" in plain
