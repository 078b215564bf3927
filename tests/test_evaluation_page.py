"""The page of an evaluation: it has all that was found, and nothing else gets in or out."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import torchtune_vl.evaluation
from tests.pages import Scripts
from torchtune_vl.evaluation._page import picture_of, to_html

# What must neither end the script that holds it nor be taken for markup
NASTY = "</script><script>document.title='taken'</script><!-- & \u2028 \u202e \x1b[2J \ud800 כלב"
TEMPLATE = Path(torchtune_vl.evaluation.__file__).parent / "evaluation.html"


def sample_of(number: int, **more: Any) -> dict[str, Any]:
    sample = {"sample": number, "id": number, "question": "What is it?", "ended": "length"}
    sample |= {"answer": "a dog", "truths": ["a dog", "dog"], "choices": []}
    return {**sample, "scores": {"anls": 0.5}, "values": {"split": "easy"}, **more}


def report_of(samples: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    summary = {"total": 0.5, "low": 0.25, "high": 0.75}
    errors = sum("error" in sample for sample in samples)
    return {
        "facts": [["checkpoint", NASTY]],
        "num_answers": len(samples) - errors,
        "num_errors": errors,
        "metrics": {"anls": {"about": "Similarity of letters, 0 to 1.", **summary}},
        "groups": {"split": {"easy": {"num_answers": 1, "metrics": {"anls": summary}}}},
        "samples": samples,
        **more,
    }


def data_in(page: str) -> Any:
    return json.loads(Scripts(page).scripts[0])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, np.uint8)


def opened(picture: dict[str, Any]) -> Image.Image:
    head, _, content = picture["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content, validate=True)))


@pytest.fixture
def report() -> dict[str, Any]:
    differing = {"other_total": 0.4, "difference": 0.1, "low": -0.1, "high": 0.3, "p_value": 0.4}
    return report_of(
        [
            sample_of(0, answer=NASTY, truths=[NASTY], id=NASTY, question=NASTY, choices=[NASTY]),
            sample_of(
                1,
                other_answer=NASTY,
                other_scores={"anls": 1.0},
                values={NASTY: NASTY},
                choice_logprobs={NASTY: -1.25, "B": -2.5},
                other_choice_logprobs={"A": -3.0, "B": float("-0.5")},
            ),
            {"sample": 2, "id": "bad", "error": NASTY},
        ],
        comparison={"num_answers": 1, "metrics": {"anls": differing}},
    )


def test_all_that_was_found_is_there(report: dict[str, Any]) -> None:
    page = to_html(report, {})
    data = data_in(page)
    assert {key: data[key] for key in report} == report
    # And the page reads each field
    shown = Scripts(page).scripts[1]
    named = {*report, *(key for sample in report["samples"] for key in sample)}
    named |= {*report["comparison"]["metrics"]["anls"], "num_answers", "boxes", "truth_boxes"}
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\b", shown)] == []


def test_data_stay_data(report: dict[str, Any]) -> None:
    found = Scripts(to_html(report, {}))
    assert len(found.scripts) == 2  # those of the template
    assert found.scripts[0].isascii()
    assert not {"<", ">", "&"} & {*found.scripts[0]}


def test_the_page_asks_nobody() -> None:
    template = TEMPLATE.read_text("utf-8")
    found = Scripts(template)
    assert found.asked == []
    assert {"default-src 'none'", "img-src data:"} <= {*found.policy.split("; ")}
    assert re.findall(r"\w+://[^\"' ]*", template) == ["http://www.w3.org/2000/svg"]  # a mere name
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", template)
    # Nothing is made of text but text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", template)
    assert template.count("{{data}}") == 1


def test_boxes_have_what_is_drawn_of_them(report: dict[str, Any]) -> None:
    boxes = [
        {"bbox_2d": [1.0, 2.04, float("inf"), float("nan")], "label": ["not", "text"]},
        {"point_2d": [3.25, -4.0], "label": "x" * 1000, "mask": [1] * 1000},
        {"bbox_2d": [1, 2, 3, 4], "label": None},
    ]
    sample = sample_of(0, boxes=boxes, truth_boxes=boxes[2:], other_boxes=[])
    page = data_in(to_html(report_of([sample]), {}))
    shown = page["samples"][0]
    assert shown["boxes"] == [
        {"bbox_2d": [1, 2, None, None], "label": "['not', 'text']"},
        {"point_2d": [3.2, -4], "label": "x" * 100},
        {"bbox_2d": [1, 2, 3, 4]},
    ]
    assert (shown["truth_boxes"], shown["other_boxes"]) == ([{"bbox_2d": [1, 2, 3, 4]}], [])
    assert sample["boxes"] is boxes


def test_numbers_that_json_has_not_become_null(report: dict[str, Any]) -> None:
    scores = {"anls": float("nan")}
    page = data_in(to_html(report_of([sample_of(0, scores=scores)]), {}))
    assert page["samples"][0]["scores"] == {"anls": None}


def test_a_picture_of_several_samples_is_there_once() -> None:
    picture, other = picture_of(noise(20, 30, 3)), picture_of(noise(20, 30, 3), kind="video")
    page = data_in(to_html(report_of([sample_of(0), sample_of(7)]), {0: [picture], 7: [other] * 2}))
    assert page["urls"] == [picture["url"]]
    about = {"url": 0, "width": 30, "height": 20}
    video = {**about, "kind": "video"}
    assert page["pictures"] == {"0": [{**about, "kind": "image"}], "7": [video, video]}


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((640, 480), (320, 240)),
        ((300, 1500), (64, 320)),
        ((3000, 2), (320, 1)),
        ((40, 30), (40, 30)),
        ((1, 1), (1, 1)),
    ],
)
def test_thumbnails_have_320_pixels_at_most(size: tuple[int, int], shown: tuple[int, int]) -> None:
    picture = picture_of(Image.new("RGB", size, "red"))
    assert (picture["width"], picture["height"]) == size
    assert opened(picture).size == shown


@pytest.mark.parametrize("orientation", range(1, 9))
def test_thumbnails_are_upright(orientation: int) -> None:
    """As boxes are: of the image that the transform turns."""
    stored = np.zeros((120, 160, 3), np.uint8)
    stored[:60, :80] = 255, 0, 0  # a corner that shows how it was turned
    stored[:60, 80:] = 0, 0, 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(stored).save(file, "JPEG", quality=95, exif=exif)
    picture = picture_of(file.getvalue())
    image = opened(picture)
    expected = (120, 160) if orientation > 4 else (160, 120)
    assert (picture["width"], picture["height"]) == expected == image.size
    assert image.getexif().get(0x0112, 1) == 1
    # Where the first row and the first column are, by EXIF
    ways = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    bottom, right = ways[orientation]
    seen = np.asarray(image)[60 * bottom + 30 if orientation < 5 else 80 * bottom + 40]
    red = seen[(80 * right + 40) if orientation < 5 else 60 * right + 30]
    assert (red > 200).tolist() == [True, False, False]


def test_pictures_of_any_mode_and_kind() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        assert opened(picture_of(Image.new(mode, (50, 40)))).mode == "RGB"
    clear = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
    file = io.BytesIO()
    clear.save(file, "PNG")
    for alpha, level in (("white", 255), ("reference", 0)):
        assert np.asarray(opened(picture_of(file.getvalue(), alpha=alpha))).min() == level
    frame = picture_of(noise(48, 64, 3), kind="video")
    assert (frame["width"], frame["height"], frame["kind"]) == (64, 48, "video")
    with pytest.raises(ValueError, match="Pillow cannot"):
        picture_of(b"no image")


def test_many_pictures_have_less_room_each() -> None:
    image = noise(480, 640, 3)  # than which none is harder to compress
    sizes = [len(picture_of(image, count)["url"]) for count in (1, 300, 1000, 100_000)]
    assert sizes == sorted(sizes, reverse=True)
    limits = (32_100, 32_100, 11_100, 2_800)
    assert all(size <= limit for size, limit in zip(sizes, limits, strict=True))


def test_size_of_a_thousand_results() -> None:
    url = picture_of(noise(480, 640, 3))["url"]
    assert len(url) > 5000
    samples = [
        sample_of(n, answer=f"{n} dogs " * 50, boxes=[{"bbox_2d": [1, 2, 3, 4]}])
        for n in range(1000)
    ]
    picture = {"width": 640, "height": 480, "kind": "image"}
    page = to_html(report_of(samples), {n: [{**picture, "url": f"{url}{n}"}] for n in range(1000)})
    assert len(page.encode()) < 15_000_000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_shows_it(report: dict[str, Any], tmp_path: Path) -> None:
    pictures = {1: [picture_of(noise(20, 30, 3))]}
    report["samples"][1] |= {"boxes": [{"bbox_2d": [1, 2, 30, 9], "label": NASTY}]}
    (tmp_path / "page.html").write_text(to_html(report, pictures), encoding="utf-8")
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    how += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    address = (tmp_path / "page.html").as_uri()
    done = subprocess.run(["chromium", *how, address], capture_output=True, text=True, timeout=120)
    assert "<title>Evaluation: &lt;/script&gt;" in done.stdout, done.stderr
    before = done.stdout.partition("<script type")[0]
    assert before.count("<article") == 3
    assert "‹U+202E› ‹U+001B›[2J" in before
    assert "document.title='taken'&lt;/script&gt;" in before
    assert before.count('class="box"') == 1
    assert "not told apart" in before
    likely = re.findall(r"<(?:strong|span)><bdi>.{0,999}?</bdi> -[\d.]+</(?:strong|span)>", before)
    assert [text.endswith("strong>") for text in likely] == [True, False, False, True]
    assert likely[1:] == [
        "<span><bdi>B</bdi> -2.50</span>",
        "<span><bdi>A</bdi> -3.00</span>",
        "<strong><bdi>B</bdi> -0.50</strong>",
    ]
