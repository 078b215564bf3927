"""The page of samples: what it shows is what the model gets, and nothing else gets in or out."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from quickstart.checkpoint import PREPROCESSOR_CONFIG
from tests.finetune_runs import NARROW, NARROW_QWEN2_VL
from tests.pages import Scripts
from tests.videos import Clip, pictures, write_clip, x264
from torchtune_vl.chat import ChatTransform
from torchtune_vl.cli import main
from torchtune_vl.data import PackedRows, PaddedRows, Plan, Planner, TrainingRows
from torchtune_vl.datasets import Mixture, measure_all, vision_chat_dataset
from torchtune_vl.datasets._preview import preview, to_html
from torchtune_vl.datasets._preview_sample import is_within, picture, runs_of
from torchtune_vl.datasets._preview_summary import histogram, names
from torchtune_vl.media._patches import Geometry, normalization_by, patchify, unpatchify
from torchtune_vl.models import transform_from_pretrained
from torchtune_vl.models.qwen2_5_vl import GEOMETRY
from torchtune_vl.models.qwen3_vl import Qwen3_VLTransform
from torchtune_vl.modules import IGNORE_INDEX
from torchtune_vl.recipes import config_path

# What must neither end the script that holds it nor be taken for markup
NASTY = (
    "</script><script>document.title='taken'</script><!-- \u2028\u2029 & \u202e \x1b[2J \ufeff "
    "\U0001f469\u200d\U0001f469\u200d\U0001f467"
)
ROWS = PackedRows(max_tokens=700)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def asking(*items: dict[str, Any], answer: Any = "Yes.", **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": [*items]}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


IMAGE = {"type": "image", "image": "a.png"}  # 84 x 140, which stays; the other becomes 56 x 84
OTHER = {"type": "image", "image": "b.png"}
VIDEO = {"type": "video", "video": [f"frame_{i}.png" for i in range(5)]}
BOXES = [{"bbox_2d": [14, 28, 70, 56], "label": "cat"}, {"point_2d": [140, 84], "label": "dot"}]
RECORDS = [
    asking(IMAGE, text("What?"), id="first"),
    asking(text("No image. " * 30)),
    asking(IMAGE, text("Both?"), VIDEO, OTHER),
    asking(text(NASTY), answer=NASTY, id=NASTY),
    asking(IMAGE, text("Find it."), answer=[{"type": "boxes", "boxes": BOXES}]),
    asking(text("A long answer?"), answer="word " * 700),
    asking({"type": "image", "image": "missing.png"}),
    asking(text("Nothing is learned."), answer=""),
    asking(text("Which tag?"), answer="It is <image> and <|im_end|>."),
]
CUT, MISSING, EMPTY, TAGS = 5, 6, 7, 8


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with media, and processor files of both families without weights."""
    root = tmp_path_factory.mktemp("preview")
    for name, config in (("base", NARROW), ("other_family", NARROW_QWEN2_VL)):
        shutil.copytree(vocabulary, root / name)
        files = {"config.json": config, "preprocessor_config.json": PREPROCESSOR_CONFIG}
        for file, content in files.items():
            (root / name / file).write_text(json.dumps(content))
    Image.fromarray(noise(0, 84, 140, 3)).save(root / "a.png")
    Image.fromarray(noise(1, 60, 90, 3)).save(root / "b.png")
    for i, frame in enumerate(pictures(5, 56, 112)):
        Image.fromarray(frame).save(root / f"frame_{i}.png")
    return root


@pytest.fixture(scope="module")
def transform(root: Path) -> ChatTransform:
    return transform_from_pretrained(root / "base", max_seq_len=600, video_min_pixels=3136)


@pytest.fixture(scope="module")
def build(root: Path) -> Callable[..., Any]:
    files = (root / f"train_{number}.jsonl" for number in count())

    def build(transform: ChatTransform, records: Sequence[Any], **how: Any) -> Any:
        file = next(files)
        file.write_text("\n".join(map(json.dumps, records)))
        return vision_chat_dataset(transform, source="json", data_files=str(file), **how)

    return build


def page_of(dataset: Any, transform: ChatTransform, **how: Any) -> dict[str, Any]:
    how = {"samples": len(RECORDS), "rows_per_step": 2, **how}
    mixture = dataset if isinstance(dataset, Mixture) else Mixture([dataset], ["0"], [None], [None])
    page = preview(mixture, transform, how.pop("planner", ROWS), **how)
    assert page == json.loads(json.dumps(page))
    return page


@pytest.fixture(scope="module")
def dataset(build, transform: ChatTransform) -> Any:
    return build(transform, RECORDS)


@pytest.fixture(scope="module")
def page(dataset: Any, transform: ChatTransform) -> dict[str, Any]:
    return page_of(dataset, transform)


def pixels_of(shown: dict[str, Any]) -> np.ndarray:
    head, content = shown["url"].split(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def test_tokens_loss_and_positions_are_those_of_the_sample(
    page: dict[str, Any], dataset: Any, transform: ChatTransform
) -> None:
    checked = 0
    for shown in page["samples"]:
        if "error" in shown:
            continue
        sample = dataset[shown["index"]]
        tokens: list[int] = []
        positions: list[list[int]] = []
        is_target: list[bool] = []
        for run in shown["runs"]:
            assert run["start"] == len(tokens)
            length = run["count"] if "medium" in run else len(run["ids"])
            if "medium" in run:
                kind = shown["media"][run["medium"]]["kind"]
                tokens += [transform.special_tokens[f"<|{kind}_pad|>"]] * length
                of_run = sample["input_pos"][run["start"] :][:length].tolist()
                assert [of_run[0], of_run[-1]] == [run["position"], run["last"]]
                positions += of_run
            else:
                tokens += run["ids"]
                positions += [[axis + i for axis in run["position"]] for i in range(length)]
            assert run["targets"] in (0, length)
            is_target += [run["targets"] > 0] * length
        assert tokens == sample["tokens"]
        assert positions == sample["input_pos"].tolist()
        assert is_target == [label != IGNORE_INDEX for label in sample["labels"]]
        assert (shown["tokens"], shown["patches"], shown["targets"]) == dataset.measure(
            shown["index"]
        )
        assert shown["work"] == shown["tokens"] + shown["patches"] / 8
        assert shown["truncated"] == sample.get("truncated")
        checked += 1
    assert checked == 7


def test_tokens_have_their_bytes(page: dict[str, Any], transform: ChatTransform) -> None:
    nasty = page["samples"][3]
    ids = [token for run in nasty["runs"] for token in run["ids"]]
    texts, others = page["texts"], page["bytes"]
    known = [
        texts[str(i)].encode() if str(i) in texts else bytes.fromhex(others[str(i)]) for i in ids
    ]
    assert b"".join(known).decode() == transform.decode(ids)
    assert not texts.keys() & others.keys()
    assert {transform.im_start_id, transform.im_end_id} <= {*page["special"]}
    assert all(i >= transform.base_vocab_size for i in page["special"])
    assert any(str(i) in others for i in ids)  # of the characters of several tokens


def test_the_first_token_is_no_target() -> None:
    positions = torch.arange(3)[:, None].expand(3, 3)
    assert [run["targets"] for run in runs_of([7, 8, 9], [7, 8, -100], positions, [1])] == [0, 1, 0]


def test_runs_end_where_positions_jump() -> None:
    positions = torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 1], [3, 3, 2]])
    runs = runs_of([7, 8, 9, 10], [-100] * 4, positions, [1])
    assert [(run["position"], run["ids"]) for run in runs] == [
        ([0, 0, 0], [7, 8]),
        ([2, 2, 1], [9, 10]),
    ]


@pytest.mark.parametrize("patch_dtype", ["float32", "uint8"])
def test_pictures_are_the_pixels_that_the_model_gets(build, root: Path, patch_dtype: str) -> None:
    transform = transform_from_pretrained(
        root / "base", patch_dtype=patch_dtype, video_min_pixels=3136
    )
    page = page_of(build(transform, RECORDS[:3]), transform, samples=[2])
    image, video, other = page["samples"][0]["media"]
    assert [m["name"] for m in (image, video, other)] == ["image 1", "video 1", "image 2"]
    assert [m["grid"] for m in (image, video, other)] == [[1, 6, 10], [3, 4, 8], [1, 4, 6]]
    assert (image["height"], image["width"]) == (84, 140)
    np.testing.assert_array_equal(pixels_of(image["pictures"][0]), noise(0, 84, 140, 3))
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(noise(1, 60, 90, 3)).permute(2, 0, 1)[None],
        (56, 84),
        mode="bicubic",
        antialias=True,
    )
    np.testing.assert_array_equal(pixels_of(other["pictures"][0]), resized[0].permute(1, 2, 0))
    # Two frames a step, of which the page shows the first
    frames = [*pictures(5, 56, 112)]
    assert video["steps"] == [0, 1, 2]
    for step, shown in zip(video["steps"], video["pictures"], strict=True):
        np.testing.assert_array_equal(pixels_of(shown), frames[2 * step])
        assert (shown["scale"], shown["quality"]) == (1, None)


@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    sizes=st.sampled_from([(14, 2), (6, 3)]),
    is_video=st.booleans(),
    is_normalized=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_unpatchify_is_the_inverse(grid, sizes, is_video: bool, is_normalized: bool) -> None:
    patch, merge = sizes
    mean, std = (0.5, 0.4, 0.3), (0.26, 0.27, 0.28)
    geometry = Geometry(patch, 2, merge, None, mean, std, 1, 10**6)
    steps, height, width = grid[0] if is_video else 1, grid[1], grid[2]
    unit = geometry.unit
    frames = noise(7, steps * 2 if is_video else 1, height * unit, width * unit, 3)
    normalization = normalization_by(mean, std) if is_normalized else None
    patches = patchify(frames, geometry, normalization)
    back = unpatchify(patches, (steps, height * merge, width * merge), geometry, normalization)
    if is_normalized and not is_video:
        frames = np.repeat(frames, 2, axis=0)
    np.testing.assert_array_equal(back, frames)


def test_pictures_keep_to_their_bytes_and_say_what_that_costs() -> None:
    pixels = noise(3, 400, 600, 3)
    exact = picture(pixels, 4)
    assert (exact["scale"], exact["quality"]) == (1, None)
    np.testing.assert_array_equal(pixels_of(exact), pixels)
    smooth = np.tile(np.arange(600, dtype=np.uint8)[:, None], (400, 1, 3))
    compressed = picture(smooth, 0.02)
    assert (compressed["scale"], compressed["quality"]) == (1, 90)
    small = picture(pixels, 0.02)
    assert small["quality"] == 75
    height, width, _ = pixels_of(small).shape
    assert (height, width) == (round(400 * small["scale"]), round(600 * small["scale"]))
    assert len(base64.b64decode(small["url"].split(",")[1])) <= 0.02 * 400 * 600
    # More than WebP can hold
    long = picture(noise(4, 28, 20_000, 3), 4)
    assert pixels_of(long).shape[1] == 16383
    assert long["scale"] == 16383 / 20_000


def test_boxes_are_where_the_text_has_them(page: dict[str, Any]) -> None:
    (image,) = page["samples"][4]["media"]
    assert image["boxes"] == [
        {"numbers": [14, 28, 70, 56], "label": "cat", "pixels": [14, 28, 70, 56]},
        {"numbers": [140, 84], "label": "dot", "pixels": [140, 84]},
    ]
    assert page["samples"][4]["warnings"] == []


WRITTEN = '```json\n[{{"bbox_2d": {}, "label": "x"}}]\n```'


@pytest.mark.parametrize(
    ("answer", "boxes", "warnings"),
    [
        (WRITTEN.format("[0, 0, 140, 84]"), [[0, 0, 140, 84]], 0),
        (WRITTEN.format("[0, 0, 141, 84]"), [], 1),  # as if the image had not been resized
        (WRITTEN.format("[-1, 0, 14, 84]"), [], 1),
        (WRITTEN.format("[50, 0, 14, 84]"), [], 1),
        (WRITTEN.format('"none"'), [], 0),
        ("Click [70, 42], not [700, 42] or [1, 2, 3].", [[70, 42]], 0),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", [], 0),
        ("[007, 1.5] [\u0663, 4] [1, 2, 3, 4, 5]", [[7, 1.5]], 0),
        (WRITTEN.format(f"[0, 0, {10**400}, 1]"), [], 0),
        (WRITTEN.format(f"[0, 0, {'9' * 5000}, 1]"), [], 0),
        ('<tool_call>{"arguments": {"coordinate": [3, 4]}}</tool_call>', [[3, 4]], 0),
    ],
)
def test_boxes_of_texts(
    build, transform: ChatTransform, answer: str, boxes: list[Any], warnings: int
) -> None:
    dataset = build(transform, [asking(IMAGE, answer=answer)])
    (sample,) = page_of(dataset, transform)["samples"]
    assert [box["pixels"] for box in sample["media"][0]["boxes"]] == boxes
    assert len(sample["warnings"]) == warnings
    for warning in sample["warnings"]:
        assert "is not in image 1, where x goes to 140 and y to 84" in warning


def test_numbers_that_stand_alone_have_no_label(build, transform: ChatTransform) -> None:
    answer = 'It is [1, 2, 3, 4]: {"bbox_2d": [5, 6, 7, 8]} {"bbox_2d": [5, 6, 7, 9], "label": "x"}'
    dataset = build(transform, [asking(IMAGE, answer=answer)])
    boxes = page_of(dataset, transform)["samples"][0]["media"][0]["boxes"]
    assert [(box["numbers"], box["label"]) for box in boxes] == [
        ([5, 6, 7, 8], ""),
        ([5, 6, 7, 9], "x"),
        ([1, 2, 3, 4], None),
    ]


def test_boxes_are_of_the_image_before_them(build, transform: ChatTransform) -> None:
    items = text("[1, 1]"), IMAGE, text("[2, 2]"), OTHER, text("[3, 3]"), VIDEO, text("[4, 4]")
    page = page_of(build(transform, [asking(*items)]), transform, planner=PackedRows(5000))
    first, second, video = page["samples"][0]["media"]
    numbers = [[box["numbers"] for box in m["boxes"]] for m in (first, second, video)]
    assert numbers == [[[1, 1], [2, 2]], [[3, 3], [4, 4]], []]
    without = page_of(build(transform, [asking(VIDEO, text("[1, 1]"))]), transform)
    assert without["samples"][0]["media"][0]["boxes"] == []


def test_boxes_of_another_family(build, root: Path) -> None:
    transform = transform_from_pretrained(root / "other_family")
    items = [{"type": "boxes", "boxes": BOXES}, {"type": "text", "text": " and {p}"}]
    items[1]["fields"] = {"p": {"point_2d": [70, 42]}}
    outside = "<|box_start|>(0,0),(1001,5)<|box_end|>"
    dataset = build(transform, [asking(IMAGE, answer=items), asking(IMAGE, answer=outside)])
    page = page_of(dataset, transform)
    assert page["geometry"] == {"patch": 14, "unit": 28, "window": None}
    assert page["samples"][0]["media"][0]["boxes"] == [
        # In thousandths, and so half a thousandth from where they were
        {
            "numbers": [100, 333, 500, 667],
            "label": "cat",
            "pixels": pytest.approx([14, 27.972, 70, 56.028]),
        },
        {"numbers": [1000, 1000], "label": "dot", "pixels": [140, 84]},
        {"numbers": [500, 500], "label": None, "pixels": [70, 42]},
    ]
    (warning,) = page["samples"][1]["warnings"]
    assert "[0, 0, 1001, 5] is not in image 1, where x goes to 1000 and y to 1000" in warning


def test_within() -> None:
    assert is_within([0, 0, 10, 5], (10, 5))
    assert not is_within([0, 0, 5, 10], (10, 5))
    assert is_within([10, 5], (10, 5))
    assert not is_within([5, 10], (10, 5))


def test_geometry_is_the_familys(page: dict[str, Any]) -> None:
    assert page["geometry"] == {"patch": 14, "unit": 28, "window": 112}
    assert GEOMETRY.window_size == 4


def test_errors_and_warnings(page: dict[str, Any]) -> None:
    samples = page["samples"]
    assert [sample["index"] for sample in samples] == [*range(9)]
    assert samples[0]["id"] == "first"
    assert samples[1]["id"] == 1
    assert re.fullmatch(r".*train_\d+.jsonl, line 1", samples[0]["place"])
    assert "missing.png" in samples[MISSING]["error"]
    assert "no token of an answer carries loss" in samples[EMPTY]["error"]
    assert samples[EMPTY]["problem"] == samples[EMPTY]["error"]
    assert samples[CUT]["truncated"]["tokens"] > 100
    (warning,) = samples[TAGS]["warnings"]
    assert "has <image>, <|im_end|>: letters" in warning
    assert [sample["warnings"] for sample in samples[:3]] == [[], [], []]


def test_summary(page: dict[str, Any], dataset: Any) -> None:
    told = page["summary"]
    good = [i for i in range(9) if i not in (MISSING, EMPTY)]
    sizes = np.array([dataset.measure(i) for i in good])
    assert [told["tokens"], told["patches"], told["targets"]] == sizes.sum(axis=0).tolist()
    assert (told["samples"], told["refused"]) == (9, 2)
    assert told["reasons"] == [page["samples"][i]["problem"] for i in (MISSING, EMPTY)]
    assert told["seconds"] is None
    charts = {chart["title"]: chart for chart in told["charts"]}
    assert charts["Truncation"]["names"] == [["whole", 6], ["text cut", 1]]
    for title, column in (("Tokens", 0), ("Patches", 1)):
        assert sum(charts[title]["bars"]) == 7
        assert f"the largest {sizes[:, column].max():,}" in charts[title]["note"]
    assert sum(charts["Longer side after resizing, pixels"]["bars"]) == 5
    assert "Sources" not in charts


def test_time_is_that_of_the_speed_that_was_given(dataset: Any, transform: ChatTransform) -> None:
    page = page_of(dataset, transform, samples=[0], tokens_per_second=100.0)
    assert page["summary"]["seconds"] == page["summary"]["tokens"] / 100


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("planner", [PackedRows(700, 100), PaddedRows(2)])
def test_rows_are_those_that_training_takes(
    build, transform: ChatTransform, tmp_path: Path, planner: Planner, shuffle: bool
) -> None:
    records = [asking(OTHER, text("word " * (3 * n))) for n in range(40)]
    dataset = build(transform, [*records[:20], RECORDS[MISSING], *records[20:]])
    how = {"rows_per_step": 4, "seed": 3, "shuffle": shuffle}
    page = page_of(dataset, transform, planner=planner, samples=41, **how)
    order = build(transform, records)
    sizes = measure_all(order, range(40), show_progress=False)
    plan = Plan.make(tmp_path, planner, sizes, epochs=1, **how)
    trained = [row for row in TrainingRows(order, planner, plan) if row.samples]
    expected = Counter()
    for row in trained:
        samples = [i + (i >= 20) for i in row.samples]
        expected[row.position["step"], frozenset(samples)] += 1
    shown = {sample["row"]["row"]: sample["row"] for sample in page["samples"] if sample["row"]}
    assert Counter((r["step"], frozenset(r["samples"])) for r in shown.values()) == expected
    assert sorted(shown) == [*range(1, len(trained) + 1)]
    for sample in page["samples"]:
        if sample["index"] == 20:
            assert sample["row"] is None
        else:
            own = sample["row"]["samples"].index(sample["index"])
            assert sample["row"]["tokens"][own] == sample["tokens"]
    budgets = {budget["factor"]: budget for budget in page["summary"]["budgets"]}
    room = sum(row["room"] for row in shown.values())
    assert budgets[1]["rows"] == len(trained)
    assert budgets[1]["steps"] == max(step for step, _ in expected)
    assert budgets[1]["fill"] == page["summary"]["tokens"] / room
    assert budgets[2]["settings"] == {
        name: 2 * value for name, value in vars(planner).items() if name != "lookahead"
    }


def test_samples_larger_than_a_row_are_shown_and_refused(dataset, transform) -> None:
    page = page_of(dataset, transform, planner=PackedRows(300))
    cut = page["samples"][CUT]
    assert "it has 600 tokens, more than a row's max_tokens of 300" in cut["problem"]
    assert cut["tokens"] == 600
    assert cut["row"] is None
    half, whole, *_ = page["summary"]["budgets"]
    assert (half["settings"], whole["too_large"]) == ({"max_tokens": 150}, 0)
    assert half["too_large"] == sum(
        150 < sample["tokens"] <= 300 for sample in page["samples"] if "error" not in sample
    )


@given(st.lists(st.integers(0, 100_000) | st.floats(0, 100), min_size=1, max_size=50))
def test_histograms(values: list[float]) -> None:
    chart = histogram("Tokens", "of these", np.array(values))
    first, width = chart["first"], chart["width"]
    assert str(width).rstrip("0") in ("1", "2", "5")
    assert 1 <= len(chart["bars"]) <= 20
    assert chart["bars"] == [
        sum(first + i * width <= value < first + (i + 1) * width for value in values)
        for i in range(len(chart["bars"]))
    ]
    assert sum(chart["bars"]) == len(values)


def test_charts_of_names() -> None:
    counts = {f"file {i:02}": i for i in range(1, 26)}
    chart = names("Sources", "of all", counts)
    assert chart["names"][:2] == [["file 25", 25], ["file 24", 24]]
    assert len(chart["names"]) == 20
    assert chart["note"] == "of all; 5 more are not drawn"


def test_samples_are_drawn_by_the_seed(build, transform: ChatTransform) -> None:
    dataset = build(transform, [RECORDS[1]] * 9)

    def drawn(**how: Any) -> list[int]:
        return [sample["index"] for sample in page_of(dataset, transform, **how)["samples"]]

    assert drawn(samples=[4, 1]) == [4, 1]
    assert drawn(samples=4, seed=1) == drawn(samples=4, seed=1)
    assert {tuple(drawn(samples=4, seed=seed)) for seed in range(4)} != {
        tuple(drawn(samples=4, seed=1))
    }
    with pytest.raises(ValueError, match="there is no sample 9: the dataset has 9, from 0"):
        drawn(samples=[9])


def test_streams_are_shown_from_their_beginning(build, transform: ChatTransform) -> None:
    stream = build(transform, RECORDS[:5], streaming=True)
    page = page_of(stream, transform, samples=3)
    assert page["is_stream"]
    assert [sample["index"] for sample in page["samples"]] == [0, 1, 2]
    table = page_of(build(transform, RECORDS[:3]), transform, shuffle=False)
    for shown, expected in zip(page["samples"], table["samples"], strict=True):
        assert shown["runs"] == expected["runs"]
        assert shown["media"] == expected["media"]
    of_all = page_of(build(transform, RECORDS, streaming=True), transform, samples=len(RECORDS))
    by_index = {sample["index"]: sample for sample in of_all["samples"]}
    assert "missing.png" in by_index[MISSING]["error"]
    assert by_index[EMPTY]["problem"]
    with pytest.raises(ValueError, match="a stream has no indices"):
        page_of(stream, transform, samples=[1])


def test_workers_change_nothing(dataset: Any, transform: ChatTransform, page: Any) -> None:
    assert page_of(dataset, transform, num_workers=2) == page


class Changing:
    """A dataset that augments its samples."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.measure = dataset.measure

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("the augmented sample is to be shown")

    def augmented(self, index: int, epoch: int) -> Any:
        change = {"epoch": epoch, "flip": False, "hue": 1 / 3, "refused": None}
        return {**self.dataset[index], "augmented": [change] * (index != 1)}


def test_sources_and_augmentation(build, transform: ChatTransform) -> None:
    datasets = [Changing(build(transform, RECORDS[:2])), build(transform, RECORDS[2:3])]
    mixture = Mixture(datasets, ["one", "two"], [1.0, 3.0], [None, None])
    page = page_of(mixture, transform, samples=3)
    told = ["epoch 0, flip False, hue 0.333"]
    shown = [(s["id"], s["source"], s["augmented"]) for s in page["samples"]]
    assert shown == [(0, "one", told), (1, "one", []), (0, "two", [])]
    assert re.fullmatch(r"two: .*train_\d+.jsonl, line 1", page["samples"][2]["place"])
    assert page["summary"]["charts"][-1]["names"] == [["one", 2], ["two", 1]]
    # An epoch of three samples has two of "two", which has one
    assert sorted(page["samples"][2]["row"]["samples"]).count(2) >= 1
    assert page["samples"][2]["row"]["tokens"]


def test_datasets_must_measure(transform: ChatTransform) -> None:
    with pytest.raises(ValueError, match="a list does not know the sizes of its samples"):
        page_of([{}], transform)


FACTS = {"facts": {"config": NASTY, "overrides": "", "dataset": "dataset", "checkpoint": NASTY}}


def test_data_stay_data(page: dict[str, Any]) -> None:
    written = to_html({**page, **FACTS})
    found = Scripts(written)
    assert len(found.scripts) == 2  # those of the template
    assert json.loads(found.scripts[0]) == {**page, **FACTS}
    assert found.scripts[0].isascii()
    assert found.asked == []
    assert "default-src 'none'" in found.policy
    # Nothing is made of text but text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval", written)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_shows_it(page: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(to_html({**page, **FACTS}), encoding="utf-8")
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    how += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    address = f"{(tmp_path / 'page.html').as_uri()}#3"
    done = subprocess.run(["chromium", *how, address], capture_output=True, text=True, timeout=120)
    article = re.search("<article.*</article>", done.stdout, re.DOTALL)
    assert article, done.stderr
    assert f"Sample 3 {html.escape(NASTY[:20])}" in article[0]
    assert "‹U+202E› ‹U+001B›[2J ‹U+FEFF›" in article[0]
    assert article[0].count('class="chip special') == 6
    assert "<title>Preview: &lt;/script&gt;" in done.stdout


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Path:
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    config = OmegaConf.load(config_path("qwen2_5_vl/lora"))
    config.checkpoint_dir = str(root / "base")
    config.dataset.data_files = str(root / "train.jsonl")
    config.num_workers = 0
    OmegaConf.save(config, tmp_path / "mine.yaml")
    return tmp_path / "mine.yaml"


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["preview", *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    common = ("--config", config, "--output", output)
    assert status(*common, "--indices", "4,6", "tokenizer.max_seq_len=500", "seed=1") == 0
    said = capsys.readouterr().out
    assert re.search(r"page.html \(0.1 MB\): 2 of 9 samples, 1 of which cannot be read", said)
    page = json.loads(Scripts(output.read_text("utf-8")).scripts[0])
    assert [sample["index"] for sample in page["samples"]] == [4, 6]
    assert page["facts"]["overrides"] == "tokenizer.max_seq_len=500 seed=1"
    assert page["summary"]["rows_per_step"] == 8
    overrides = ("dataset_val=${dataset}", "tokenizer.max_seq_len=500")
    assert status(*common, "--validation", "--samples", 1, *overrides) == 0
    page = json.loads(Scripts(output.read_text("utf-8")).scripts[0])
    assert page["summary"]["rows_per_step"] == 1
    assert page["facts"]["dataset"] == "dataset_val"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "nowhere/page.html"], "nowhere, where page.html is to be written"),
        (["--validation"], "has no dataset_val: leave --validation out, or set it"),
        (["--indices", "9"], "there is no sample 9: the dataset has 9"),
        (["--indices", "1,x"], "'1,x' is no list of whole numbers, such as 3,17"),
        (["--samples", "0"], "'0' is no whole number of at least 1"),
        (["--tokens-per-second", "0"], "'0' is no number above 0"),
        (["--tokens-per-second", "fast"], "'fast' is no number above 0"),
        (["rows.max_token=3"], "the nearest is rows.max_tokens"),
        (
            ["tokenizer._component_=torchtune_vl.chat.QwenTokenizer", "~tokenizer.checkpoint_dir"],
            "tokenizer",
        ),
    ],
)
def test_wrong_usage(
    config: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "page.html"
    assert status("--config", config, "--output", output, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_video_of_many_blocks_is_one_medium(build, vocabulary: Path, root: Path) -> None:
    """Its steps have their times between them."""
    transform = Qwen3_VLTransform(vocabulary / "qwen.tiktoken")
    clip = Clip("mp4", frames=30, rate=10, size=(64, 96), options=x264("keyint=9"))
    video = {"type": "video", "video": str(write_clip(root / "blocks.mp4", clip))}
    question = {"role": "user", "content": [video, video, {"type": "text", "text": "Same?"}]}
    dataset = build(transform, [{"messages": [question, {"role": "assistant", "content": "Yes."}]}])
    (shown,) = page_of(dataset, transform, samples=1)["samples"]
    assert [medium["name"] for medium in shown["media"]] == ["video 1", "video 2"]
    assert [medium["grid"] for medium in shown["media"]] == [[3, 4, 6]] * 2
    media = [run["medium"] for run in shown["runs"] if "medium" in run]
    assert media == [0, 0, 0, 1, 1, 1]
