import base64
import io
import pickle
import warnings

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from torchtune_vl.media import RemoteLimits, _sources
from torchtune_vl.media._patches import patchify, smart_resize
from torchtune_vl.models.qwen2_5_vl import GEOMETRY, Qwen2_5_VLImageTransform


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
    assert np.array_equal(patchify(image[None], GEOMETRY), expected)


def test_every_channel_of_a_patch_holds_both_frames(transform):
    sample = transform({"image": noise(84, 112, 3)})
    frames = sample["pixel_values"].view(-1, 3, 2, 196)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])


def test_same_pixels_from_every_source(transform, tmp_path):
    image = Image.fromarray(noise(40, 60, 3))
    path = tmp_path / "image.png"
    image.save(path)
    array = np.array(image)
    data = path.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    with path.open("rb") as handle:
        handle.seek(7)
        sources = [
            path,
            str(path),
            path.as_uri(),
            data,
            url,
            handle,
            array,
            torch.from_numpy(array),
        ]
        expected = transform({"image": image})
        for source in sources:
            result = transform({"image": source})
            assert torch.equal(result["pixel_values"], expected["pixel_values"])
            assert result["original_size"] == (40, 60)
        assert handle.tell() == 7


def test_original_size_is_that_of_the_upright_image(transform):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (90, 70)).save(file, "JPEG", exif=exif)
    assert transform({"image": file})["original_size"] == (90, 70)


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
    with pytest.raises(ValueError, match=f"image data of {len(data)} bytes.*{reason}"):
        transform({"image": data})


def test_truncated_image_that_pillow_has_opened_but_not_decoded(transform, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded("PNG")[:2000])
    with Image.open(path) as image, pytest.raises(ValueError, match=r"photo\.png.*cut off"):
        transform({"image": image})


@pytest.mark.parametrize("path", ["nowhere/photo.jpg", "."])
def test_path_without_a_file(transform, path):
    with pytest.raises(ValueError, match=f"image file '{path}'.*correct the path"):
        transform({"image": path})


def test_remote_images_are_refused_unless_enabled(transform, monkeypatch):
    url = "https://images.test/photo.png"
    with pytest.raises(ValueError, match=f"image URL '{url}': is a remote URL; download it first"):
        transform({"image": url})
    fetched = []
    monkeypatch.setattr(_sources, "_fetch", lambda *asked: fetched.append(asked) or encoded("PNG"))
    limits = RemoteLimits(max_bytes=9999)
    remote = Qwen2_5_VLImageTransform(backend=transform.backend, remote=limits)
    assert torch.equal(
        remote({"image": url})["pixel_values"], transform({"image": encoded("PNG")})["pixel_values"]
    )
    assert fetched == [(url, limits)]


def test_goes_to_data_workers():
    transform = Qwen2_5_VLImageTransform(alpha="white", remote=RemoteLimits())
    copy = pickle.loads(pickle.dumps(transform))
    assert vars(copy) == vars(transform)


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
@pytest.mark.parametrize("limits", [{}, {"resized_height": 280, "resized_width": 280}])
@pytest.mark.parametrize("alpha", ["reference", "white"])
def test_side_of_0(image, limits, alpha):
    transform = Qwen2_5_VLImageTransform(alpha=alpha)
    with pytest.raises(ValueError, match=r"(ndarray|Tensor|PIL image).*has no pixels"):
        transform({"image": image, **limits})


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
        (torch.zeros(30, dtype=torch.uint8), r"\(30,\).*the shape must be \[H, W\]"),
        (None, "NoneType.*is no image.* a PIL image"),
        ([np.zeros((30, 30, 3), np.uint8)], "list.*is no image.* a PIL image"),
        (io.BytesIO(), "image file handle 'BytesIO': is empty"),
        (io.StringIO("text"), "image file handle 'StringIO': cannot be read.*binary mode"),
        (Image.new("La", (30, 30)), "mode La, 30 x 30.*conversion from La"),
    ],
)
def test_no_uint8_image(transform, image, reason):
    with pytest.raises(ValueError, match=reason):
        transform({"image": image})


def test_decompression_bomb(transform, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for file_format in ("PNG", "JPEG"):
        with pytest.raises(ValueError, match=r"2400 pixels.*larger.*PIL\.Image\.MAX_IMAGE_PIXELS"):
            transform({"image": encoded(file_format)})


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
        ({"backend": "opencv"}, "backend is 'opencv': make it one of"),
        ({"min_pixels": 4000, "max_pixels": 3999}, "min_pixels is 4000 and max_pixels 3999"),
        ({"min_pixels": 0}, "min_pixels is 0"),
        ({"patch_dtype": "float16"}, "patch_dtype is 'float16': make it one of"),
        ({"alpha": "black"}, r"alpha is 'black': make it one of \('reference', 'white'\)"),
        ({"patch_dtype": "uint8", "image_mean": (0.5, 0.5, 0.5)}, "use float32"),
    ],
)
def test_invalid_arguments(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Qwen2_5_VLImageTransform(**arguments)


def test_smart_resize_stays_within_the_limits():
    limits = 28, GEOMETRY.min_pixels, GEOMETRY.max_pixels
    assert smart_resize(224, 224, *limits) == (224, 224)
    assert smart_resize(1, 1, *limits) == (56, 56)
    assert smart_resize(6000, 4000, *limits) == (4368, 2912)


# Limits of single images


def grid_of(transform, **limits):
    sample = transform({"image": Image.new("RGB", (280, 560)), **limits})
    return sample["image_grid_thw"].tolist()[0]


def test_limits_of_an_image_go_before_those_of_the_transform():
    transform = Qwen2_5_VLImageTransform(min_pixels=100000, max_pixels=120000)
    assert grid_of(transform) == [1, 34, 16]
    assert grid_of(transform, max_pixels=400000) == [1, 40, 20]
    assert grid_of(transform, min_pixels=784, max_pixels=10000) == [1, 10, 4]
    assert grid_of(transform, min_pixels=110000) == [1, 34, 16]
    # and sides, rounded to multiples of 28, before all limits
    assert grid_of(transform, resized_height=41, resized_width=99, max_pixels=100000) == [1, 2, 8]


def test_limits_may_be_none_or_of_numpy(transform):
    none = dict.fromkeys(["min_pixels", "max_pixels", "resized_height", "resized_width"])
    assert grid_of(transform, **none) == grid_of(transform) == [1, 40, 20]
    assert grid_of(transform, **(none | {"max_pixels": np.int64(10000)})) == [1, 10, 4]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        *[
            ({name: value}, f"{name} is {value!r}: make it an integer of at least 1$")
            for name in ("min_pixels", "max_pixels")
            for value in (0, -1, "400", 400.0, True)
        ],
        *[
            ({"resized_height": 280, "resized_width": value}, "make it an integer of at least 28$")
            for value in (0, -28, 27, "280", 280.0, False)
        ],
        *[
            ({name: 280}, "one of resized_height and resized_width: give both or none")
            for name in ("resized_height", "resized_width")
        ],
        ({"min_pixels": 500, "max_pixels": 400}, "min_pixels is 500 and max_pixels 400"),
        ({"max_pixels": 3135}, "min_pixels is 3136 and max_pixels 3135"),
        ({"resized_height": 28, "resized_width": 5656}, "more than 200 times"),
    ],
)
def test_invalid_limits_of_an_image(transform, limits, reason):
    with pytest.raises(ValueError, match=f"^PIL image.*: .*{reason}"):
        grid_of(transform, **limits)
