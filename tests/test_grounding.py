"""Boxes and points between the original and the resized image."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchtune_vl.chat._boxes import rescaled, to_json
from torchtune_vl.media._patches import smart_resize
from torchtune_vl.models.qwen2_5_vl import boxes_in_original

SIDES = st.integers(1, 5000)
PARTS = st.floats(0, 1)
EXTENTS = {"0..1": (1.0, 1.0), "0..1000": (1000.0, 1000.0)}


@given(SIDES, SIDES, st.lists(PARTS, min_size=4, max_size=4), st.sampled_from(["pixels", *EXTENTS]))
def test_there_and_back(height, width, parts, unit):
    if max(height, width) > 200 * min(height, width):
        return
    resized = smart_resize(height, width, 28, 3136, 1003520)
    extent = EXTENTS.get(unit, (height, width))
    xs, ys = sorted(parts[:2]), sorted(parts[2:])
    relative = [xs[0], ys[0], xs[1], ys[1]]
    box = [part * extent[1 - i % 2] for i, part in enumerate(relative)]
    entry = rescaled({"bbox_2d": box, "label": "x"}, unit, (height, width), resized)
    assert all(isinstance(value, int) for value in entry["bbox_2d"])

    grid = torch.tensor([1, resized[0] // 14, resized[1] // 14])
    (back,) = boxes_in_original(to_json([entry]), (height, width), grid)
    assert back["label"] == "x"
    for i, value in enumerate(back["bbox_2d"]):
        original, side = relative[i] * (height, width)[1 - i % 2], 1 - i % 2
        # Half a pixel of the image with the fewer pixels: whole coordinates hold no more
        half = 0.5 * max(1.0, (height, width)[side] / resized[side])
        assert math.isclose(value, original, abs_tol=half + 1e-6)


def test_units_are_the_same_box():
    boxes = {
        "pixels": [100, 50, 400, 200],
        "0..1": [0.25, 0.25, 1.0, 1.0],
        "0..1000": [250, 250, 1000, 1000],
    }
    for unit, box in boxes.items():
        entry = rescaled({"bbox_2d": box}, unit, (200, 400), (196, 392))
        assert entry["bbox_2d"] == [98, 49, 392, 196]


def test_points_and_other_keys():
    entry = {"point_2d": [10, 20], "label": "\u732b", "score": 0.5}
    resized = rescaled(entry, "pixels", (100, 100), (56, 112))
    assert resized == {"point_2d": [11, 11], "label": "\u732b", "score": 0.5}
    assert to_json([resized, resized]) == (
        '```json\n[\n\t{"point_2d": [11, 11], "label": "\u732b", "score": 0.5},\n'
        '\t{"point_2d": [11, 11], "label": "\u732b", "score": 0.5}\n]\n```'
    )


@pytest.mark.parametrize(
    "other",
    [
        {"keypoints": [[1, 2], [3, 4]]},
        {"polygon": (1.5, 2, 3, 4)},
        {"segmentation": {"counts": [1, 2]}},
        {"parts": [{"bbox_2d": [1, 2, 3, 4]}]},
        {"anything": [1, 2]},
        {"x": 3},
        {"box_width": 3.0},
        {"center": {"x": 1, "y": 2}},
    ],
)
@pytest.mark.parametrize("shape", [{"bbox_2d": [1, 2, 3, 4]}, {"point_2d": [1, 2]}])
def test_other_coordinates_beside_are_not_left_as_they_are(shape, other):
    message = f"the numbers of '{next(iter(other))}' would stay those of the original"
    with pytest.raises(ValueError, match=message):
        rescaled({**shape, **other}, "pixels", (100, 100), (112, 112))


def test_what_is_no_coordinate_stays():
    others = {"label": "x", "id": 7, "score": 0.25, "tags": ["left", "top"], "position": "left"}
    entry = rescaled({"bbox_2d": [0, 0, 50, 50], **others}, "pixels", (100, 100), (112, 112))
    assert entry == {"bbox_2d": [0, 0, 56, 56], **others}


@pytest.mark.parametrize(
    ("entry", "unit", "message"),
    [
        ({"bbox_2d": [1, 2, 3]}, "pixels", "expected 4 numbers"),
        ({"bbox_2d": "1234"}, "pixels", "expected 4 numbers"),
        ({"bbox_2d": [0, 0, math.nan, 1]}, "pixels", "expected 4 numbers"),
        ({"bbox_2d": [0, 0, True, 1]}, "pixels", "expected 4 numbers"),
        ({"point_2d": [1, 2, 3, 4]}, "pixels", "expected 2 numbers"),
        ({"bbox_2d": [0, 0, 101, 50]}, "pixels", "outside of the image.*clip"),
        ({"bbox_2d": [-1, 0, 10, 50]}, "pixels", "outside"),
        ({"bbox_2d": [0, 0, 50, 20]}, "0..1", "outside.*'unit'"),
        ({"point_2d": [1001, 0]}, "0..1000", "outside"),
        ({"bbox_2d": [50, 0, 10, 20]}, "pixels", "x1 <= x2"),
        ({"bbox_2d": [0, 30, 10, 20]}, "pixels", "y1 <= y2"),
        ({"point_2d": [1, 2]}, "percent", "unknown unit 'percent'"),
    ],
)
def test_wrong_boxes(entry, unit, message):
    with pytest.raises(ValueError, match=message):
        rescaled(entry, unit, (100, 100), (112, 112))


def test_generated_text_around_boxes():
    text = (
        'Two {of} them: ```json\n[{"bbox_2d": [0, 28, 56, 56], "label": "a {b}"},'
        '{"point_2d": [14, 14]}, {"bbox_2d": [1, 2]}, {"label": "none"}, {"bbox_2d": [1, 2, 3'
    )
    assert boxes_in_original(text, (112, 28), torch.tensor([1, 4, 4])) == [
        {"bbox_2d": [0.0, 56.0, 28.0, 112.0], "label": "a {b}"},
        {"point_2d": [7.0, 28.0]},
    ]
    assert boxes_in_original("no boxes", (112, 28), torch.tensor([1, 4, 4])) == []
    assert boxes_in_original("{" * 3000, (112, 28), torch.tensor([1, 4, 4])) == []


def test_an_object_within_another_is_not_told_twice() -> None:
    text = '{"bbox_2d": [0, 0, 28, 28], "part": {"bbox_2d": [1, 1, 2, 2]}}'
    (found,) = boxes_in_original(text, (56, 56), torch.tensor([1, 4, 4]))
    assert found == {"bbox_2d": [0, 0, 28, 28], "part": {"bbox_2d": [1, 1, 2, 2]}}
