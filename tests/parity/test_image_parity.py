"""Pixels and grids beside transformers' two image processors: no difference at all.

A folder of images of your own joins in: TORCHTUNE_VL_IMAGES=/my/images pytest tests/parity
"""

import os
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.qwen2_vl import image_processing_qwen2_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from tests.parity.figures import record
from torchtune_vl.models.qwen2_5_vl._image_transform import (
    CLIP_MEAN,
    Qwen2_5_VLImageTransform,
    smart_resize,
    to_rgb,
)

PROCESSORS = {"torchvision": Qwen2VLImageProcessor, "pil": Qwen2VLImageProcessorPil}
HUB = {"min_pixels": 3136, "max_pixels": 12845056}

SKIMAGE = Path(find_spec("skimage").origin).parent / "data"
PHOTOGRAPHS = sorted(path for path in SKIMAGE.iterdir() if path.suffix in {".png", ".jpg"})
USERS_FOLDER = os.environ.get("TORCHTUNE_VL_IMAGES")
USERS_IMAGES = sorted(Path(USERS_FOLDER).iterdir()) if USERS_FOLDER else []


@pytest.fixture(params=PROCESSORS)
def backend(request):
    return request.param


def assert_equal(backend, image, reference_image=None, **arguments):
    """Compares the transform of ``image`` with transformers' of it or of ``reference_image``."""
    arguments = HUB | arguments
    ours = Qwen2_5_VLImageTransform(backend=backend, **arguments)({"image": image})
    theirs = PROCESSORS[backend](**arguments)(
        image if reference_image is None else reference_image, return_tensors="pt"
    )
    assert ours["image_grid_thw"].tolist() == theirs["image_grid_thw"].tolist()
    pixels, reference_pixels = ours["pixel_values"], theirs["pixel_values"]
    assert torch.equal(pixels, reference_pixels), (pixels - reference_pixels).abs().max()
    difference = float((pixels - reference_pixels).abs().max())
    record(f"images: grids and pixels, {backend} backend", 1, difference)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@cache
def coffee():
    return Image.open(SKIMAGE / "coffee.png").convert("RGB")


def photograph(size=(90, 70)):
    return coffee().resize(size)


# Sizes, as (height, width)


def random_sizes(count):
    """Sides from 20 to 2,000 px, log-uniform: small images are many, large ones cost the time."""
    rng = np.random.default_rng(0)
    return [(int(h), int(w)) for h, w in np.exp(rng.uniform(*np.log([20, 2000]), (count, 2)))]


SIZES = [
    *random_sizes(300),
    *[(28 * height, 28 * width) for height, width in [(1, 1), (1, 9), (8, 8), (17, 23), (40, 2)]],
    *[(20, 20), (20, 21), (55, 55), (56, 57), (30, 100)],  # about min_pixels
    *[(20, 2000), (2000, 20), (21, 1999), (10, 2000), (2000, 10), (1, 200), (5, 400)],
    *[(1080, 1920), (2000, 2000), (1999, 1500), (14, 14), (42, 70), (13, 41)],
]


def test_sizes_are_many():
    assert len(set(SIZES)) >= 300


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_size(backend, size):
    height, width = size
    if (height + width) % 2:
        image = Image.fromarray(noise(height, width, 3, seed=height))
    else:
        image = photograph(size=(width, height))
    assert_equal(backend, image)


@given(
    st.integers(1, 20000),
    st.integers(1, 20000),
    st.sampled_from([28, 14, 32]),
    st.integers(1, 10**6),
    st.integers(1, 13 * 10**6),
)
# sizes where another order of the same float operations gives another multiple of 28
@example(2080, 8320, 28, HUB["min_pixels"], HUB["max_pixels"] - HUB["min_pixels"])
@example(1, 9, 28, HUB["min_pixels"], HUB["max_pixels"] - HUB["min_pixels"])
def test_smart_resize(height, width, factor, min_pixels, more_pixels):
    arguments = (height, width, factor, min_pixels, min_pixels + more_pixels)
    try:
        expected = image_processing_qwen2_vl.smart_resize(*arguments)
    except ValueError:
        with pytest.raises(ValueError, match="more than 200 times"):
            smart_resize(*arguments)
    else:
        assert smart_resize(*arguments) == expected


@pytest.mark.parametrize(
    "limits",
    [(3136, 1003520), (200704, 1003520), (3136, 3136), (784, 784), (1, 1), (50000, 51000)],
)
@pytest.mark.parametrize("size", [(30, 40), (239, 381), (700, 61), (1200, 1603)])
def test_limits(backend, limits, size):
    min_pixels, max_pixels = limits
    assert_equal(backend, noise(*size, 3), min_pixels=min_pixels, max_pixels=max_pixels)


def test_default_limit_clips(backend):
    assert_equal(backend, photograph(size=(4001, 3500)))


def test_means(backend):
    assert_equal(backend, photograph(), image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3])


def test_every_level(backend):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(14, 0).repeat(14, 1)
    assert_equal(backend, np.stack([levels] * 3))


def test_levels_of_other_means(backend):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(14, 0).repeat(14, 1)
    for mean, std in [(0.1, 0.3), (0.7, 0.9), (1 / 3, 1 / 7)]:
        arguments = {"image_mean": [mean, *CLIP_MEAN[1:]], "image_std": [std, std, 0.11]}
        assert_equal(backend, np.stack([levels] * 3), **arguments)


# Photographs


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_photograph(backend, path):
    with Image.open(path) as image:
        assert_equal(backend, image)


@pytest.mark.parametrize("path", USERS_IMAGES, ids=lambda path: path.name)
def test_users_image(backend, path):
    with Image.open(path) as image:
        assert_equal(backend, image)
    assert_equal(backend, path, load_image(str(path)))


# PIL modes


def image_of_mode(mode):
    base = photograph()
    if mode == "I;16":
        return Image.fromarray(noise(70, 90).astype(np.uint16) * 257)
    if mode in ("LA", "RGBA", "PA"):
        image = base.convert(mode)
        image.putalpha(Image.fromarray(noise(70, 90)))
        return image
    if mode == "P, one transparent colour":
        image = base.quantize(64)
        image.info["transparency"] = 5
        return image
    if mode == "P, alpha for each colour":
        image = base.quantize(64)
        image.info["transparency"] = noise(64).tobytes()
        return image
    if mode == "L, one transparent level":
        image = base.convert("L")
        image.info["transparency"] = 100
        return image
    if mode == "RGB, one transparent colour":
        image = base.copy()
        image.info["transparency"] = image.getpixel((10, 10))
        return image
    if mode == "LAB":
        return Image.frombytes("LAB", (90, 70), noise(70, 90, 3).tobytes())
    return base.convert(mode)


@pytest.mark.parametrize(
    "mode",
    [
        "RGB",
        "RGB, one transparent colour",
        "L",
        "L, one transparent level",
        "LA",
        "P",
        "P, one transparent colour",
        "P, alpha for each colour",
        "PA",
        "RGBA",
        "RGBX",
        "RGBa",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
        "1",
        "I",
        "I;16",
        "F",
    ],
)
def test_pil_mode(backend, mode):
    image = image_of_mode(mode)
    assert image.mode == mode.split(",")[0]
    assert_equal(backend, image)


# Arrays and tensors


@pytest.mark.parametrize(
    "shape",
    [
        *[(70, 90, channels) for channels in (1, 3, 4)],
        *[(channels, 70, 90) for channels in (1, 3, 4)],
        # both ends could be channels
        *[(1, 50, 3), (3, 50, 4), (4, 50, 1), (3, 3, 3), (1, 4, 1)],
        (56, 84, 3),
        (3, 56, 84),
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_array(backend, shape, kind):
    assert_equal(backend, kind(noise(*shape)))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_array_without_channels(backend, kind):
    """Which transformers takes with a channel dimension only."""
    image = kind(noise(70, 90))
    assert_equal(backend, image, image[None])


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_every_level_and_alpha(backend, layout):
    level, alpha = np.mgrid[:256, :256].astype(np.uint8)
    rgba = np.stack([level, level[::-1], level, alpha])
    # multiples of 28, so that no resizing smooths the differences
    rgba = np.pad(rgba, ((0, 0), (0, 24), (0, 24)), mode="wrap")
    assert_equal(backend, rgba if layout == "CHW" else np.moveaxis(rgba, 0, -1))


# Encoded images


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("colour.jpg", "RGB", {}),
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("gray.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("colour.png", "RGB", {}),
        ("alpha.png", "RGBA", {}),
        ("gray_alpha.png", "LA", {}),
        ("palette.png", "P", {}),
        ("transparent_palette.png", "P, alpha for each colour", {}),
        ("bilevel.png", "1", {}),
        ("16_bit.png", "I;16", {}),
        ("colour.webp", "RGB", {"lossless": True}),
        ("alpha.webp", "RGBA", {}),
        ("colour.bmp", "RGB", {}),
        ("cmyk.tiff", "CMYK", {}),
        ("float.tiff", "F", {}),
        ("palette.gif", "P", {}),
        ("transparent.gif", "P, one transparent colour", {}),
        (
            "animated.gif",
            "P",
            {
                "save_all": True,
                "append_images": [Image.new("P", (90, 70), colour) for colour in (3, 9)],
            },
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_encoded(backend, tmp_path, name, mode, options):
    path = tmp_path / name
    image_of_mode(mode).save(path, **options)
    reference_image = load_image(str(path))
    for image in (path, str(path), path.read_bytes()):
        assert_equal(backend, image, reference_image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(backend, tmp_path, orientation, suffix):
    path = tmp_path / f"photo.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph().save(path, exif=exif)
    reference_image = load_image(str(path))
    assert (reference_image.size == (70, 90)) == (orientation >= 5)
    for image in (path, path.read_bytes()):
        assert_equal(backend, image, reference_image)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [1, 50, 95])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (23, 3), (9, 4), (57, 64), (301, 199)])
def test_jpeg(backend, tmp_path, subsampling, quality, progressive, size):
    path = tmp_path / "image.jpg"
    options = {"subsampling": subsampling, "quality": quality, "progressive": progressive}
    photograph(size).save(path, **options)
    assert_equal(backend, path.read_bytes(), load_image(str(path)))


@pytest.mark.parametrize(
    "options",
    [{"keep_rgb": True}, {"restart_marker_rows": 1}, {"optimize": True}, {"comment": b"x" * 60000}],
    ids=lambda options: next(iter(options)),
)
def test_uncommon_jpeg(backend, tmp_path, options):
    path = tmp_path / "image.jpg"
    photograph((131, 77)).save(path, **options)
    assert_equal(backend, path.read_bytes(), load_image(str(path)))


def test_damaged_jpegs_give_what_the_reference_gives(tmp_path):
    """Pillow decodes many damaged files, and so do we: to the same pixels."""
    path = tmp_path / "image.jpg"
    photograph((120, 90)).save(path, quality=90)
    whole = path.read_bytes()
    rng = random.Random(0)
    outcomes = []
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(2, len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        try:
            expected = to_rgb(load_image(str(path)))
        except (OSError, ValueError, SyntaxError):
            outcomes.append("refused")
            with pytest.raises(ValueError, match=r"damaged|empty"):
                to_rgb(path)
        else:
            outcomes.append("decoded")
            assert torch.equal(to_rgb(path), expected)
    assert min(outcomes.count("refused"), outcomes.count("decoded")) > 40
