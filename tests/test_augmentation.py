"""Training images that are changed at random, and what becomes of their boxes and texts."""

import io
import json
import re
import unicodedata
from copy import copy
from dataclasses import replace
from fractions import Fraction
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset

from tests import hostile
from torchtune_vl._torchtune import instantiate
from torchtune_vl.chat._words import find_place, find_sides
from torchtune_vl.datasets import vision_chat_dataset
from torchtune_vl.media import Augmentation, ImageTransform
from torchtune_vl.media._augment import Change
from torchtune_vl.models.qwen2_5_vl import GEOMETRY, Qwen2_5_VLTransform
from torchtune_vl.models.qwen2_vl import Qwen2VLTransform
from torchtune_vl.recipes._check_config import read_config

KINDS: dict[str, dict[str, Any]] = {
    "crop": {"crop": 0.5},
    "flip": {"flip": 1},
    "scale": {"scale": 0.5},
    "jpeg": {"jpeg_quality": (90, 95)},
    "brightness": {"brightness": 0.05},
    "contrast": {"contrast": 0.05},
    "saturation": {"saturation": 0.5},
    "hue": {"hue": 0.05},
}
EVERYTHING = {name: value for kind in KINDS.values() for name, value in kind.items()}
EVERYTHING["flip"] = 0.5
# Height and width, reduced and enlarged, and that of the result
SIZES = [(300, 420), (200, 250), (640, 480), (123, 457)]
UNITS = {"pixels": 0, "0..1": 1, "0..1000": 1000}


@pytest.fixture(scope="module")
def transform(vocabulary: Path) -> Qwen2_5_VLTransform:
    return Qwen2_5_VLTransform(
        vocabulary / "tokenizer.json", patch_dtype="uint8", min_pixels=80_000, max_pixels=150_000
    )


@pytest.fixture(scope="module")
def plain_transform(vocabulary: Path) -> Qwen2_5_VLTransform:
    """Resizes images as little as it can."""
    return Qwen2_5_VLTransform(vocabulary / "tokenizer.json", patch_dtype="uint8")


def conversation(image: Any, *answer: dict[str, Any], question: str = "Where?") -> dict[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [*answer]}]
    return {"messages": messages}


def box_of(numbers: Any, unit: str = "pixels") -> dict[str, Any]:
    return {"type": "boxes", "boxes": [{"bbox_2d": [*numbers]}], "unit": unit}


def written(transform: Any, sample: dict[str, Any]) -> list[int]:
    """The numbers of an answer."""
    answer = [t for t, m in zip(sample["tokens"], sample["mask"], strict=True) if not m]
    text = transform.decode(answer).replace("bbox_2d", "").replace("point_2d", "")
    return [int(number) for number in re.findall(r"\d+", text)]


def pixels(sample: dict[str, Any]) -> np.ndarray:
    """The image that the model sees, from uint8 patches [H, W, 3]."""
    vision = sample["encoder_input"]["vision"]
    ((_, rows, columns),) = vision["grid_thw"].tolist()
    patches = vision["patches"].numpy().reshape(rows // 2, columns // 2, 2, 2, 3, 14, 14)
    return patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * 14, columns * 14, 3)


def drawn(size: tuple[int, int], box: Any) -> Image.Image:
    image = Image.new("RGB", size[::-1], (30, 40, 50))
    image.paste((210, 200, 190), tuple(box))
    return image


def edges(profile: np.ndarray) -> tuple[float, float]:
    """Where a line of gray values becomes brighter and where darker again, between its pixels.

    A symmetric kernel of any width leaves the centre of mass of a step where the step was.
    """
    middle = (profile.max() + profile.min()) / 2
    found = []
    for values, is_bright in (
        (profile, profile[0] > middle),
        (profile[::-1], profile[-1] > middle),
    ):
        steps = np.diff(values)
        largest = int(steps.argmax())
        near = slice(max(largest - 8, 0), largest + 9)
        weights = steps[near] * (abs(steps[near]) > 4)  # the rest is noise of JPEG
        places = np.arange(len(steps))[near] + 1
        found.append(0.0 if is_bright else float((weights * places).sum() / weights.sum()))
    return found[0], len(profile) - found[1]


def rectangle(image_HWC: np.ndarray) -> list[float]:
    """Where the bright rectangle of an image lies: x1, y1, x2, y2."""
    gray_HW = image_HWC.mean(axis=2)
    is_bright = gray_HW > (gray_HW.max() + gray_HW.min()) / 2
    ys, xs = np.nonzero(is_bright)
    y, x = int(np.median(ys)), int(np.median(xs))
    x1, x2 = edges(gray_HW[y - 12 : y + 13].mean(axis=0))
    y1, y2 = edges(gray_HW[:, x - 12 : x + 13].mean(axis=1))
    return [x1, y1, x2, y2]


@st.composite
def boxes(draw: Any) -> tuple[tuple[int, int], list[int]]:
    """A size of an image and a box that is small enough for the rest to be darker on average."""
    size = draw(st.sampled_from(SIZES))
    corners = []
    for side in size[::-1]:
        length = draw(st.integers(side // 4, side // 2))
        start = draw(st.integers(side // 8, side - side // 8 - length))
        corners.append((start, start + length))
    (x1, x2), (y1, y2) = corners
    return size, [x1, y1, x2, y2]


def moved(box: Any, change: dict[str, Any], width: int) -> list[Fraction]:
    """Where a box of the original lies in the result, exactly."""
    window, place = change["window"], change["place"]
    points = [
        place[i % 2] + Fraction(x - window[i % 2]) * size / (window[i % 2 + 2] - window[i % 2])
        for i, x in enumerate(box)
        for size in [place[i % 2 + 2] - place[i % 2]]
    ]
    if change["flip"]:
        points[::2] = [width - x for x in reversed(points[::2])]
    return points


@pytest.mark.parametrize("kind", [*KINDS, "everything"])
def test_boxes_lie_where_pixels_say(transform: Qwen2_5_VLTransform, kind: str) -> None:
    augmentation = Augmentation(**KINDS.get(kind, EVERYTHING))

    @settings(max_examples=15, deadline=None)
    @given(boxes(), st.integers(0, 999))
    def check(case: tuple[tuple[int, int], list[int]], number: int) -> None:
        size, box = case
        made = transform.augmented(
            conversation(drawn(size, box), box_of(box)), augmentation, 0, number
        )
        image = pixels(made)
        exact = moved(box, made["augmented"][0], image.shape[1])
        # 0.1 is what 8 bits and the ends of the picture leave unknown, JPEG some more
        assert np.abs(np.subtract(rectangle(image), np.array(exact, float))).max() < 0.3
        assert max(abs(a - b) for a, b in zip(written(transform, made), exact, strict=True)) <= 0.5

    check()


SHARES = st.lists(st.fractions(0, 1, max_denominator=1000), min_size=4, max_size=4)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(30, 200), st.integers(30, 200)),
    st.lists(SHARES, min_size=1, max_size=3),
    st.sampled_from([*UNITS]),
    st.integers(0, 99),
)
def test_boxes_of_every_unit_and_place(
    transform: Qwen2_5_VLTransform,
    size: tuple[int, int],
    shares: list[list[Fraction]],
    unit: str,
    number: int,
) -> None:
    """In lists, in texts, and as points: half a pixel is what whole numbers cost."""
    exact_boxes, numbers = [], []
    for a, b, c, d in shares:
        parts = [min(a, c), min(b, d), max(a, c), max(b, d)]
        numbers.append([float(p * (UNITS[unit] or size[1 - i % 2])) for i, p in enumerate(parts)])
        exact_boxes.append([p * size[1 - i % 2] for i, p in enumerate(parts)])
    text = {"type": "text", "text": "{b} and {p}", "unit": unit}
    text["fields"] = {"b": {"bbox_2d": numbers[0]}, "p": {"point_2d": numbers[0][:2]}}
    answer = {"type": "boxes", "boxes": [{"bbox_2d": n} for n in numbers], "unit": unit}
    sample = conversation(hostile.noise(*size, 3), answer, text)
    augmentation = Augmentation(crop=0.2, scale=0.2, flip=0.5)
    made = transform.augmented(sample, augmentation, epoch=3, number=number)
    (change,) = made["augmented"]
    height, width, _ = pixels(made).shape
    expected = [x for box in [*exact_boxes, exact_boxes[0]] for x in moved(box, change, width)]
    point = [*exact_boxes[0][:2]] * 2
    expected += moved(point, change, width)[:2]
    for value, exact in zip(written(transform, made), expected, strict=True):
        assert abs(value - exact) <= 0.5 + 1e-9
        assert 0 <= value <= max(height, width)
    # No box is cut, and no side of the window is too small
    left, top, right, bottom = change["window"]
    for x1, y1, x2, y2 in exact_boxes:
        assert left - 1e-9 <= x1 <= x2 <= right + 1e-9
        assert top - 1e-9 <= y1 <= y2 <= bottom + 1e-9
    assert right - left >= 0.2 * size[1] - 1e-9
    assert bottom - top >= 0.2 * size[0] - 1e-9
    x1, y1, x2, y2 = change["place"]
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    assert x2 - x1 >= 0.2 * width - 1e-9


def test_windows_and_places_are_spread_out() -> None:
    """Over all sizes and positions that are allowed, around the box."""
    augmentation, random = Augmentation(crop=0.5), np.random.default_rng(0)
    changes = [
        augmentation.draw(random, (100, 200), (112, 196), (120, 30, 140, 50)) for _ in range(500)
    ]
    windows = np.array([change.window for change in changes])
    widths = windows[:, 2] - windows[:, 0]
    assert (widths.min(), widths.max()) == (101, 200)
    assert 145 < widths.mean() < 155
    assert windows[:, 0].max() >= 90
    assert {change.place for change in changes} == {(0, 0, 196, 112)}
    augmentation = Augmentation(scale=0.5, crop=0.5)
    changes = [
        augmentation.draw(random, (100, 200), (112, 196), (200, 100, 0, 0)) for _ in range(500)
    ]
    whole, full = (0, 0, 200, 100), (0, 0, 196, 112)
    assert all(c.window == whole or c.place == full for c in changes)
    assert 200 < sum(c.window == whole for c in changes) < 300


def test_a_box_of_the_whole_image_leaves_no_room(plain_transform: Qwen2_5_VLTransform) -> None:
    sample = conversation(hostile.noise(56, 84, 3), box_of([0, 0, 84, 56]))
    for number in range(5):
        made = plain_transform.augmented(sample, Augmentation(crop=0.1), 0, number)
        assert made["augmented"][0]["window"] == (0, 0, 84, 56)


def test_a_window_has_all_boxes_of_its_own_image(plain_transform: Qwen2_5_VLTransform) -> None:
    image = {"type": "image", "image": hostile.noise(30, 40, 3)}
    first = {"boxes": [{"bbox_2d": [10.5, 12.5, 20.5, 21.5]}, {"point_2d": [25.5, 4]}], "image": 0}
    second = {"boxes": [{"bbox_2d": [0, 0, 0.1, 0.9]}], "unit": "0..1", "image": 1}
    messages = [
        {"role": "user", "content": [image, image]},
        {"role": "assistant", "content": [first, second]},
    ]
    windows: list[set[Any]] = [set(), set()]
    for number in range(60):
        made = plain_transform.augmented({"messages": messages}, Augmentation(crop=0.1), 0, number)
        for seen, change in zip(windows, made["augmented"], strict=True):
            seen.add(change["window"])
    lefts, tops, rights, bottoms = np.array([*windows[0]]).T
    assert (lefts.max(), tops.max(), rights.min(), bottoms.min()) == (10, 4, 26, 22)
    lefts, tops, rights, bottoms = np.array([*windows[1]]).T
    assert (lefts.max(), tops.max(), bottoms.min()) == (0, 0, 28)  # sides are rounded up
    assert rights.min() < 39


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_that_are_turned_upright(transform: Qwen2_5_VLTransform, orientation: int) -> None:
    upright = drawn((300, 420), box := [90, 60, 250, 190])
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = upright.transpose(turn[orientation]) if orientation in turn else upright
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif, quality=95)
    sample = conversation(file.getvalue(), box_of(box))
    for number in range(4):
        made = transform.augmented(sample, Augmentation(crop=0.6, flip=0.5, scale=0.6), 0, number)
        assert np.abs(np.subtract(written(transform, made), rectangle(pixels(made)))).max() < 0.8


def test_boxes_in_thousandths(vocabulary: Path) -> None:
    transform = Qwen2VLTransform(vocabulary / "tokenizer.json", patch_dtype="uint8")
    box = [90, 60, 250, 190]
    sample = conversation(drawn((300, 420), box), {"type": "text", "text": "It is"}, box_of(box))
    for number in range(10):
        made = transform.augmented(sample, Augmentation(crop=0.5, flip=0.5, scale=0.5), 0, number)
        height, width, _ = pixels(made).shape
        exact = moved(box, made["augmented"][0], width)
        thousandths = [x * 1000 / side for x, side in zip(exact, cycle((width, height)))]
        assert (
            max(abs(a - b) for a, b in zip(written(transform, made), thousandths, strict=True))
            <= 0.5
        )


def test_the_window_is_resized_alone(transform: Qwen2_5_VLTransform) -> None:
    """By the same rule as a whole image, once."""
    noise = hostile.noise(200, 300, 3)
    change = Change((31, 20, 231, 160), (0, 0, 308, 196), flip=True)
    made = change.resize(torch.from_numpy(noise).permute(2, 0, 1), 196, 308, "pil")
    part = (
        Image.fromarray(noise).crop((31, 20, 231, 160)).resize((308, 196), Image.Resampling.BICUBIC)
    )
    assert np.array_equal(made, np.array(part)[:, ::-1])
    change = Change((0, 0, 300, 200), (40, 30, 240, 130))
    made = change.resize(torch.from_numpy(noise).permute(2, 0, 1), 196, 308, "pil")
    small = np.array(Image.fromarray(noise).resize((200, 100), Image.Resampling.BICUBIC))
    assert np.array_equal(made[30:130, 40:240], small)
    rest = np.ones(made.shape[:2], bool)
    rest[30:130, 40:240] = False
    assert np.abs(made[rest] - small.mean(axis=(0, 1))).max() <= 1


WHOLE = (0, 0, 64, 48), (0, 0, 64, 48)


def changed(image: np.ndarray, **colors: Any) -> np.ndarray:
    """An image as a change of its colours alone makes it, in its own size."""
    change = Change(*WHOLE, **colors)
    return change.resize(torch.from_numpy(image).permute(2, 0, 1), 48, 64, "torchvision").astype(
        int
    )


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_those_of_pillow(name: str, factor: float) -> None:
    photograph = hostile.noise(48, 64, 3)
    kinds = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}
    enhance = getattr(ImageEnhance, kinds[name])(Image.fromarray(photograph)).enhance(factor)
    difference = changed(photograph, **{name: factor}) - np.array(enhance, int)
    assert np.abs(difference).max() <= 2  # Pillow rounds gray, and cuts off instead of rounding


def test_colours_turn_around_gray() -> None:
    image = np.zeros((48, 64, 3), np.uint8) + np.array([200, 50, 80], np.uint8)
    assert changed(image, hue=1 / 3)[0, 0].tolist() == [80, 200, 50]
    assert changed(image, hue=-1 / 3)[0, 0].tolist() == [50, 80, 200]
    gray = np.full((48, 64, 3), 77, np.uint8)
    assert (changed(gray, hue=0.04, saturation=1.7) == 77).all()


def test_jpeg_is_as_good_as_that_of_pillow() -> None:
    noise = hostile.noise(48, 64, 3)
    lost = []
    for quality in (5, 50, 95):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        made, expected = changed(noise, jpeg_quality=quality), np.array(Image.open(file), int)
        assert np.abs(made - expected).mean() < 2  # their encoders round in different places
        lost.append(np.abs(made - noise).mean())
    assert lost[0] > lost[1] + 2 > lost[2] + 4


def test_what_is_off_changes_nothing(plain_transform: Qwen2_5_VLTransform) -> None:
    sample = conversation(hostile.noise(90, 130, 3), box_of([13.5, 20, 77, 89]))
    plain = plain_transform(sample)
    assert "augmented" not in plain
    for off in (Augmentation(), Augmentation(crop=0, flip=0, scale=0, brightness=0, hue=0)):
        made = plain_transform.augmented(sample, off, epoch=0, number=0)
        (change,) = made.pop("augmented")
        assert (change["window"], change["refused"]) == ((0, 0, 130, 90), None)
        assert made["tokens"] == plain["tokens"]
        vision, same = made["encoder_input"]["vision"], plain["encoder_input"]["vision"]
        assert torch.equal(vision["patches"], same["patches"])
    text = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert (
        plain_transform.augmented(text, Augmentation(flip=1), 0, 0).keys()
        == plain_transform(text).keys()
    )


def test_normalized_patches_are_of_the_same_pixels() -> None:
    made = []
    for dtype in ("uint8", "float32"):
        transform = ImageTransform(GEOMETRY, patch_dtype=dtype)
        augmentation = Augmentation(**EVERYTHING)

        def draw(original: Any, resized: Any, augmentation: Any = augmentation) -> Change:
            random = np.random.default_rng(0)
            return augmentation.draw(random, original, resized, (9, 9, 50, 50))

        made.append(transform.changed({"image": hostile.noise(90, 130, 3)}, draw)["pixel_values"])
    first, second = made[1].reshape(-1, 3, 2, 196).unbind(2)
    assert torch.equal(first, second)
    means, deviations = (torch.tensor(x).view(3, 1) for x in (GEOMETRY.mean, GEOMETRY.std))
    pixel_values = made[0].reshape(-1, 3, 196) / 255
    assert torch.allclose((pixel_values - means) / deviations, first, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(30, 300), st.integers(30, 300)), min_size=1, max_size=3),
    st.integers(0, 9),
    st.integers(0, 9),
    st.one_of(st.none(), st.integers(60, 400)),
    st.sampled_from(["right", "left", "turns"]),
)
def test_a_sample_is_never_larger_than_measured(
    plain_transform: Qwen2_5_VLTransform,
    sizes: list[tuple[int, int]],
    epoch: int,
    number: int,
    limit: int | None,
    truncation: Any,
) -> None:
    """As large as without augmentation, but for the digits of boxes."""
    transform = copy(plain_transform)
    transform.max_seq_len, transform.truncation = limit, truncation
    messages = []
    for size in sizes:
        image = np.zeros((*size, 3), np.uint8)
        messages += conversation(image, box_of([1, 2, size[1] // 2, 25]), box_of([0, 0, 9, 9]))[
            "messages"
        ]
    sample = {"messages": messages}
    augmentation = Augmentation(crop=0.3, scale=0.3, flip=0.5)
    try:
        tokens, patches, _ = transform.examine(sample, augmented=True).size
    except ValueError:  # nothing would be left within the limit
        assert limit is not None
        return
    made = transform.augmented(sample, augmentation, epoch, number)
    assert len(made["tokens"]) <= tokens
    vision = made.get("encoder_input", {}).get(
        "vision", {"patches": [], "grid_thw": torch.empty(0, 3)}
    )
    assert len(vision["patches"]) <= patches
    if limit is None:
        plain = transform(sample)
        assert torch.equal(vision["grid_thw"], plain["encoder_input"]["vision"]["grid_thw"])
        assert len(vision["patches"]) == patches
        assert tokens - len(plain["tokens"]) < 4 * 3 * 2 * len(sizes)
    without = [{**m, "content": m["content"][:2]} for m in messages[::2]]
    answered = [m for q in without for m in (q, {"role": "assistant", "content": "Yes."})]
    if limit is None:
        made = transform.augmented({"messages": answered}, augmentation, epoch, number)
        assert (
            len(made["tokens"]) == transform.examine({"messages": answered}, augmented=True)[0][0]
        )


DIRECTIONS = [
    "to the left of",
    "rightmost",
    "top_left",
    "on the upperright side",
    "northeast",
    "turn clockwise",
    "at 3 o'clock",
    "left_click",
    "rechts oben",
    "der linke Hund",
    "das rechte Auge",
    "westlich",
    "nordöstlich",
    "im Uhrzeigersinn",
    "à gauche",
    "à droite",
    "à l’est",
    "a la izquierda",
    "derecha",
    "a destra",
    "sinistra",
    "à esquerda",
    "direita",
    "слева",
    "на правой стороне",
    "по часовой стрелке",
    "左边",
    "右上角",
    "东边",
    "顺时针",
    "左側",
    "右手",
    "時計回り",
    "왼쪽",
    "오른손",
    "على اليسار",
    "اليمين",
    "बाईं ओर",
    "दाएं",
    "दाहिने",
    "बाएँ",
]
WRITING = [
    "What does the sign say?",
    "Read it",
    "the word",
    "OCR",
    "a letter",
    "the chart",
    "the table",
    "the document",
    "a receipt",
    "license plate",
    "12.50",
    "$5",
    '"Stop" in red',
    "Schreibe den Text ab",
    "Was steht dort?",
    "Überschrift",
    "Que dit le panneau ?",
    "¿Qué dice?",
    "un letrero",
    "Cosa c'è scritto",
    "O que está escrito",
    "Что написано",
    "读出文字",
    "写着什么",
    "何と書いてありますか",
    "뭐라고 쓰여 있나요",
    "ما المكتوب",
    "क्या लिखा है",
]
COORDINATES = [
    "[12, 34, 56, 78]",
    "(12,34)",
    "<box>",
    "<|box_start|>",
    '"bbox_2d": [1',
    '{"x": 12, "y": 3}',
    "click(x=0.3, y=0.4)",
    "start_box='(100,200)'",
    '<point x="1"',
    "12, 34, 56, 78",
    "[[0.1 0.2]]",
    "<loc_12>",
    "left: 10",
    "120 px",
    "[1.5,2.]",
    "(12%, 34%)",
]
HARMLESS = [
    "What is in the image?",
    "How many dogs are there? Two.",
    "A brown dog runs over the bright grass.",
    "Ein Hund läuft über die Wiese.",
    "C'est un chien qui court dans l'herbe.",
    "Este perro corre por la hierba.",
    "Cosa c'è nell'immagine?",
    "O que há na imagem?",
    "Что изображено на картинке?",
    "图中有什么？",
    "这张图片里有一只狗在草地上奔跑。",
    "画像に何が写っていますか？",
    "犬が草の上を走っています。",
    "그림에 무엇이 있나요?",
    "ماذا ترى في الصورة؟",
    "तस्वीर में क्या है?",
    "तस्वीर में एक बिल्ली है।",
    'Locate all cats: {"bbox_2d": [x1, y1, x2, y2], "label": ...}',
]


@pytest.mark.parametrize(
    ("table", "what"),
    [(DIRECTIONS, "direction"), (WRITING, "writing"), (COORDINATES, "coordinates")],
)
def test_what_texts_speak_of(table: list[str], what: str) -> None:
    find = find_place if what == "coordinates" else find_sides
    for phrase in table:
        for text in (phrase, unicodedata.normalize("NFD", phrase.upper()), f"Well, {phrase} ..."):
            found = find(["Nothing.", text])
            assert found is not None, text
            assert what == "coordinates" or found.startswith((what, "writing")), text
            assert found.startswith(what) or what == "direction"


def test_harmless_texts() -> None:
    assert not [t for t in HARMLESS if find_sides([t]) or find_place([t])]


@pytest.mark.parametrize("text", ["1" * 20_000, "1 " * 10_000, "box_" * 5_000, "x" + " " * 20_000])
def test_no_text_takes_long(text: str) -> None:
    """Nor fails: a quadratic search would take minutes."""
    find_place([text])
    assert find_sides([text]) is None


MOVING = Augmentation(crop=0.5, flip=1, scale=0.5, jpeg_quality=(50, 50))
BOX = box_of([10, 10, 50, 40])
VIDEO = {"type": "video", "video": np.zeros((4, 56, 56, 3), np.uint8)}


@pytest.mark.parametrize(
    ("answer", "question", "refused"),
    [
        ([BOX], "Where?", None),
        ([BOX], "Where, left?", "flip: its texts speak of direction, 'left'"),
        ([box_of([1, 2, 3, 4]), VIDEO], "Where?", "flip: it has a video"),
        (
            [{"type": "boxes", "boxes": [{"bbox_2d": [1, 2, 3, 4], "label": "right hand"}]}],
            "Where?",
            "flip: its texts speak of direction, 'right'",
        ),
        (
            [{"type": "text", "text": "{a} says hi", "fields": {"a": {"point_2d": [1, 2]}}}],
            "Where?",
            "flip: its texts speak of writing, 'say'",
        ),
        (
            [{"type": "text", "text": "At [12, 34]."}],
            "Where?",
            "crop, scale, flip: its texts have coordinates, '[12, 34]'",
        ),
    ],
)
def test_what_is_refused(
    transform: Qwen2_5_VLTransform, answer: list[Any], question: str, refused: str | None
) -> None:
    sample = conversation(hostile.noise(60, 90, 3), *answer, question=question)
    made = [transform.augmented(sample, MOVING, 0, number)["augmented"][0] for number in range(8)]
    assert {change["refused"] for change in made} == {refused}
    assert {change["flip"] for change in made} == {refused is None}
    assert {change["jpeg_quality"] for change in made} == {50}
    moves = any(change["window"] != (0, 0, 90, 60) for change in made)
    assert moves == (refused is None or not refused.startswith("crop"))


def test_coordinates_of_tool_calls_are_refused(plain_transform: Qwen2_5_VLTransform) -> None:
    sample = conversation(hostile.noise(60, 90, 3), {"type": "text", "text": "I click."})
    for arguments in ({"x": 5, "y": 7}, {"coordinate": [12, 34]}):
        sample["messages"][1]["tool_calls"] = [
            {"function": {"name": "tap", "arguments": arguments}}
        ]
        (change,) = plain_transform.augmented(sample, MOVING, 0, 0)["augmented"]
        assert change["refused"].startswith("crop, scale, flip: its texts have coordinates")


def test_only_what_was_asked_for_is_refused(plain_transform: Qwen2_5_VLTransform) -> None:
    sample = conversation(hostile.noise(60, 90, 3), {"type": "text", "text": "Left, (1, 2)."})
    for augmentation, refused in (
        (Augmentation(jpeg_quality=(50, 60)), None),
        (Augmentation(crop=0.5), "crop: its texts have coordinates, '(1, 2)'"),
    ):
        (change,) = plain_transform.augmented(sample, augmentation, 0, 0)["augmented"]
        assert change["refused"] == refused


def test_wrong_boxes_are_still_located(plain_transform: Qwen2_5_VLTransform) -> None:
    for wrong in ([0, 0, 91, 5], [5, 5, 1, 9], [-1, 0, 5, 5], [1, 2], "abcd", [200, 100, 300, 200]):
        sample = conversation(hostile.noise(60, 90, 3), box_of(wrong)) | {"id": "a"}
        messages = []
        for make in (plain_transform, lambda s: plain_transform.augmented(s, MOVING, 0, 0)):
            with pytest.raises(
                ValueError, match=r"sample 'a': message 1 \(assistant\): item 0"
            ) as error:
                make(sample)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_images_of_a_sample_flip_together_and_all_else_differs(
    plain_transform: Qwen2_5_VLTransform,
) -> None:
    images = [{"type": "image", "image": hostile.noise(60, 90, 3)} for _ in range(3)]
    messages = [{"role": "user", "content": images}, {"role": "assistant", "content": "Dogs."}]
    sample = {"messages": messages}
    augmentation = Augmentation(flip=0.5, brightness=0.5, crop=0.3)

    def changes(epoch: int, number: int, seed: int = 0) -> list[dict[str, Any]]:
        drawn = plain_transform.augmented(sample, replace(augmentation, seed=seed), epoch, number)
        return drawn["augmented"]

    made = {(e, n, s): changes(e, n, s) for e in range(3) for n in range(8) for s in range(3)}
    assert all(len({change["flip"] for change in of_sample}) == 1 for of_sample in made.values())
    assert 20 < sum(of_sample[0]["flip"] for of_sample in made.values()) < 52
    factors = {change["brightness"] for of_sample in made.values() for change in of_sample}
    assert len(factors) == 3 * len(made)
    assert made[1, 2, 0] == changes(1, 2)  # in whichever order


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": 1.5}, r"crop is 1.5: make it a number, 0 <= crop <= 1"),
        ({"crop": "half"}, "crop is 'half'"),
        ({"flip": True}, "flip is True"),
        ({"flip": -0.1}, "0 <= flip <= 1"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"brightness": 1}, "brightness is 1: make it a number, 0 <= brightness <= 0.9"),
        ({"hue": 0.1}, "0 <= hue <= 0.05"),
        ({"jpeg_quality": 80}, "jpeg_quality is 80: make it two integers, 1 <= lowest <= highest"),
        ({"jpeg_quality": [90, 40]}, "jpeg_quality"),
        ({"jpeg_quality": [0, 40]}, "jpeg_quality"),
        ({"jpeg_quality": [40.0, 90]}, "jpeg_quality"),
        ({"seed": -1}, "seed is -1: make it an integer of at least 0"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^augmentation: .*{message}"):
        Augmentation(**wrong)


RECORDS = [
    {
        "messages": [
            {"role": "user", "content": "<image>Find <ref-object>."},
            {"role": "assistant", "content": "<bbox>"},
        ],
        "images": ["a.png"],
        "objects": {"ref": ["the cat"], "bbox": [[20, 30, 60, 55]]},
    },
    {
        "id": "dogs",
        "conversations": [
            {"from": "human", "value": "<image>What?"},
            {"from": "gpt", "value": "Two dogs."},
        ],
        "image": "a.png",
    },
]


@pytest.fixture
def build(transform: Qwen2_5_VLTransform, tmp_path: Path):
    """Makes datasets of records that show an image beside them."""
    Image.fromarray(hostile.noise(80, 120, 3)).save(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))

    def build(**settings: Any) -> Any:
        files = {"data_files": str(tmp_path / "data.json"), "cache_dir": str(tmp_path / "cache")}
        return vision_chat_dataset(transform, source="json", **files, **settings)

    return build


def assert_same(made: Any, expected: Any) -> None:
    assert made.keys() == expected.keys()
    assert made["tokens"] == expected["tokens"]
    vision, other = (x["encoder_input"]["vision"]["patches"] for x in (made, expected))
    assert torch.equal(vision, other)
    assert made.get("augmented") == expected.get("augmented")


SETTINGS = {"crop": 0.4, "flip": 0.5, "brightness": 0.3, "jpeg_quality": [40, 95], "seed": 5}


def test_a_dataset_augments_when_it_is_asked_to(build, transform: Qwen2_5_VLTransform) -> None:
    plain, dataset, stream = (
        build(),
        build(augmentation=SETTINGS),
        build(augmentation=SETTINGS, streaming=True),
    )
    for index in range(2):
        assert_same(plain.augmented(index, 3), plain[index])
        assert_same(dataset[index], plain[index])
        made = dataset.augmented(index, 3)
        augmentation = Augmentation(**SETTINGS)
        raw = list(stream)[index]
        expected = transform.augmented(raw, augmentation, 3, index)
        assert_same(made, {**expected, "labels": made["labels"]})
        assert_same(stream.transform(raw, epoch=3), made)
        assert_same(
            next(iter(stream.skip(index))) and stream.transform(next(iter(stream.skip(index))), 3),
            made,
        )
        assert_same(stream.transform(raw), plain[index])
        assert made["augmented"] != dataset.augmented(index, 4)["augmented"]
        tokens, patches, _ = dataset.measure(index)
        assert len(made["tokens"]) <= tokens
        assert patches == len(made["encoder_input"]["vision"]["patches"])
        assert stream.measure(raw) == dataset.measure(index)
    assert dataset.augmented(0, 0)["augmented"] != dataset.augmented(1, 0)["augmented"]
    assert dataset.measure(1) == plain.measure(1)  # has no box whose digits could change
    only_colours = build(augmentation={"hue": 0.05})
    assert only_colours.measure(0) == plain.measure(0)


def test_boxes_of_ms_swift_move(build, transform: Qwen2_5_VLTransform) -> None:
    dataset = build(augmentation=SETTINGS)
    for epoch in range(5):
        made = dataset.augmented(0, epoch)
        exact = moved([20, 30, 60, 55], made["augmented"][0], pixels(made).shape[1])
        assert max(abs(a - b) for a, b in zip(written(transform, made), exact, strict=True)) <= 0.5


class _InAnOrder(Dataset):
    def __init__(self, dataset: Any, order: list[int]) -> None:
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.order[index], self.dataset.augmented(self.order[index], 7)


def _as_it_is(item: Any) -> Any:
    return item


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_processes_nor_order_matter(build, workers: int) -> None:
    dataset = build(augmentation=SETTINGS)
    expected = [dataset.augmented(index, 7) for index in range(2)]
    items = _InAnOrder(dataset, [1, 0, 1])
    np.random.seed(3)
    torch.manual_seed(4)
    for index, made in DataLoader(
        items, batch_size=None, num_workers=workers, collate_fn=_as_it_is
    ):
        assert_same(made, expected[index])


def test_a_config_names_the_settings(build, transform: Qwen2_5_VLTransform, tmp_path: Path) -> None:
    component = "torchtune_vl.datasets.vision_chat_dataset"
    files = {
        "source": "json",
        "data_files": str(tmp_path / "data.json"),
        "cache_dir": str(tmp_path / "c"),
    }
    config = OmegaConf.create({"_component_": component, **files, "augmentation": SETTINGS})
    dataset = instantiate(config, transform)
    assert_same(dataset.augmented(0, 1), build(augmentation=SETTINGS).augmented(0, 1))
    with pytest.raises(ValueError, match=r"augmentation has \['flop'\]; known are crop, flip"):
        build(augmentation={"flop": 1})
    with pytest.raises(ValueError, match="augmentation: flip is 2"):
        build(augmentation={"flip": 2})


def test_validation_never_augments() -> None:
    given = [
        "--config",
        "qwen2_5_vl/full",
        "dataset.data_files=a.json",
        "dataset.augmentation.flip=0.5",
    ]
    config = read_config([*given, "dataset_val.data_files=b.json"])
    assert config.dataset.augmentation == {"flip": 0.5}
    assert config.dataset_val.data_files == "b.json"
    assert "augmentation" not in config.dataset_val
    with pytest.raises(ValueError, match=r"dataset_val.augmentation: validation never augments"):
        read_config([*given, "dataset_val.augmentation.flip=0.5"])
