import contextlib
import io
import warnings

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from torchtune_vl.models.qwen2_5_vl._image_transform import (
    Qwen2_5_VLImageTransform,
    smart_resize,
    to_rgb,
)
from torchtune_vl.models.qwen2_5_vl._patches import patchify


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(file_format, image=None):
    file = io.BytesIO()
    (image or Image.fromarray(noise(40, 60, 3))).save(file, file_format)
    return file.getvalue()


@pytest.fixture(params=["torchvision", "pil"])
def transform(request):
    return Qwen2_5_VLImageTransform(backend=request.param)


def test_image_of_224_pixels_gives_64_tokens(transform):
    sample = transform({"image": Image.new("RGB", (224, 224))})
    assert sample["pixel_values"].shape == (256, 1176)
    assert sample["pixel_values"].dtype == torch.float32
    assert sample["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert sample["image_grid_thw"].dtype == torch.int64
    assert sample["num_image_tokens"] == 64


def test_keeps_the_sample_and_leaves_the_callers_alone(transform):
    image = noise(50, 60, 3)
    sample = {"image": image, "answer": 3}
    result = transform(sample, inference=True)
    assert result["image"] is image
    assert result["answer"] == 3
    assert sample == {"image": image, "answer": 3}


@pytest.mark.parametrize("shape", [(56, 56, 3), (40, 60, 3), (3, 56, 56), (56, 56, 4), (56, 56)])
def test_result_shares_no_memory_with_the_image(transform, shape):
    image = noise(*shape)
    before = image.copy()
    transform({"image": image})["pixel_values"].zero_()
    transform({"image": torch.from_numpy(image)})["pixel_values"].zero_()
    np.testing.assert_array_equal(image, before)


def test_reads_flipped_and_read_only_arrays_without_a_warning(transform):
    image = noise(40, 60, 3)
    expected = transform({"image": image})["pixel_values"]
    flipped = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (flipped, image):
            assert torch.equal(transform({"image": same})["pixel_values"], expected)


def test_patches_of_a_token_are_neighbours():
    image = noise(56, 84, 3)
    expected = [
        image[y : y + 14, x : x + 14].transpose(2, 0, 1).flatten()
        for token_y in (0, 28)
        for token_x in (0, 28, 56)
        for y in (token_y, token_y + 14)
        for x in (token_x, token_x + 14)
    ]
    assert np.array_equal(patchify(image[None]), expected)


def test_every_channel_of_a_patch_holds_both_frames(transform):
    sample = transform({"image": noise(84, 112, 3)})
    frames = sample["pixel_values"].view(-1, 3, 2, 196)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])


def test_same_pixels_from_every_source(transform, tmp_path):
    image = Image.fromarray(noise(40, 60, 3))
    path = tmp_path / "image.png"
    image.save(path)
    array = np.array(image)
    sources = [path, str(path), path.read_bytes(), array, torch.from_numpy(array)]
    expected = transform({"image": image})["pixel_values"]
    for source in sources:
        assert torch.equal(transform({"image": source})["pixel_values"], expected)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((5, 7), (5, 7)), ((5, 7, 1), (5, 7)), ((1, 5, 7), (5, 7)), ((4, 9, 3), (9, 3))],
)
def test_layout_of_arrays(shape, size):
    rgb = to_rgb(noise(*shape))
    assert rgb.shape == (3, *size)


def damaged_files():
    png, jpeg = encoded("PNG"), encoded("JPEG")
    return {
        "empty": (b"", "is empty"),
        "text": (b"<html>404 Not Found</html>", "no image"),
        "truncated png": (png[: len(png) // 2], "cut off"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "cut off"),
        "damaged png": (png[:100] + b"\0\0\0\0" + png[104:], "damaged"),
        "header alone": (jpeg[:20], "no image"),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_damaged_file(transform, kind, tmp_path):
    data, reason = damaged_files()[kind]
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"photo.jpg.*{reason}"):
        transform({"image": path})
    with pytest.raises(ValueError, match=f"encoded image of {len(data)} bytes.*{reason}"):
        transform({"image": data})


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_anywhere_is_an_error_or_changes_nothing(file_format):
    data = encoded(file_format)
    expected = to_rgb(data)
    accepted = []
    for length in range(0, len(data), 61):
        with contextlib.suppress(ValueError):
            accepted.append(to_rgb(data[:length]))
    assert all(torch.equal(rgb, expected) for rgb in accepted)


def test_truncated_image_that_pillow_has_opened_but_not_decoded(transform, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded("PNG")[:2000])
    with Image.open(path) as image, pytest.raises(ValueError, match=r"photo\.png.*cut off"):
        transform({"image": image})


@pytest.mark.parametrize("path", ["nowhere/photo.jpg", "https://example.com/photo.jpg", "."])
def test_path_without_a_file(transform, path):
    with pytest.raises(ValueError, match=f"image file '{path}'.*correct the path"):
        transform({"image": path})


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((0, 30, 3), np.uint8),
        torch.zeros(3, 30, 0, dtype=torch.uint8),
        np.zeros((0, 0), np.uint8),
        np.zeros((0, 30, 4), np.uint8),
        Image.new("RGB", (0, 30)),
        Image.new("RGBA", (30, 0)),
    ],
)
def test_side_of_0(transform, image):
    with pytest.raises(ValueError, match=r"(ndarray|Tensor|PIL image).*at least one pixel"):
        transform({"image": image})


def test_aspect_ratio_over_200(transform, tmp_path):
    path = tmp_path / "line.png"
    Image.new("L", (2001, 10)).save(path)
    with pytest.raises(ValueError, match=r"line\.png.*height 10 and width 2001.*more than 200"):
        transform({"image": path})
    transform({"image": Image.new("L", (2000, 10))})


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((30, 30, 3), np.float32), "ndarray.*float32.*must be uint8"),
        (np.zeros((30, 30), bool), "ndarray.*bool.*must be uint8"),
        (torch.zeros(3, 30, 30), "Tensor.*float32.*must be uint8"),
        (torch.zeros(3, 30, 30, dtype=torch.bfloat16), "bfloat16.*must be uint8"),
        (np.zeros((30, 30, 2), np.uint8), r"\(30, 30, 2\).*channels"),
        (torch.zeros(5, 30, 30, dtype=torch.uint8), r"\(5, 30, 30\).*channels"),
        (np.zeros((2, 30, 30, 3), np.uint8), r"\(2, 30, 30, 3\).*one by one"),
        (torch.zeros(30, dtype=torch.uint8), r"\(30,\).*2 or 3 dimensions"),
        (None, "NoneType.*pass a PIL image"),
        ([np.zeros((30, 30, 3), np.uint8)], "list.*pass a PIL image"),
        (io.BytesIO(), "BytesIO.*pass a PIL image"),
        (Image.new("La", (30, 30)), "mode La, 30 x 30.*conversion from La"),
    ],
)
def test_no_uint8_image(transform, image, reason):
    with pytest.raises(ValueError, match=reason):
        transform({"image": image})


def test_decompression_bomb(transform, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        transform({"image": encoded("PNG")})


def test_closes_every_file(transform, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded("PNG"))
    bad.write_bytes(encoded("PNG")[:2000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform({"image": good})
        with pytest.raises(ValueError, match=r"bad\.png"):
            transform({"image": bad})
    open_files = {file.path for file in psutil.Process().open_files()}
    assert open_files.isdisjoint({str(good), str(bad)})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"backend": "opencv"}, "unknown backend 'opencv'"),
        ({"min_pixels": 4000, "max_pixels": 3999}, "min_pixels is 4000 and max_pixels 3999"),
        ({"min_pixels": 0}, "min_pixels is 0"),
        ({"patch_dtype": "float16"}, "unknown patch_dtype 'float16'"),
        ({"patch_dtype": "uint8", "image_mean": (0.5, 0.5, 0.5)}, "use float32"),
    ],
)
def test_invalid_arguments(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Qwen2_5_VLImageTransform(**arguments)


def test_smart_resize_stays_within_the_limits():
    assert smart_resize(224, 224) == (224, 224)
    assert smart_resize(1, 1) == (56, 56)
    assert smart_resize(6000, 4000) == (4368, 2912)
