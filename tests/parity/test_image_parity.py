"""Pixels and grids beside transformers' two image processors: no difference at all.

A folder of images of your own joins in: TORCHTUNE_VL_IMAGES=/my/images pytest tests/parity
"""

import base64
import io
import os
import random
import struct
import zlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils import vision_process
from transformers.image_utils import load_image
from transformers.models.qwen2_vl import image_processing_qwen2_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from tests.parity.figures import record
from torchtune_vl.media import _sources
from torchtune_vl.media._images import to_rgb
from torchtune_vl.media._patches import smart_resize
from torchtune_vl.media._sources import RemoteLimits
from torchtune_vl.models.qwen2_5_vl import GEOMETRY, Qwen2_5_VLImageTransform

PROCESSORS = {"torchvision": Qwen2VLImageProcessor, "pil": Qwen2VLImageProcessorPil}
HUB = {"min_pixels": 3136, "max_pixels": 12845056}

SKIMAGE = Path(find_spec("skimage").origin).parent / "data"
PHOTOGRAPHS = sorted(path for path in SKIMAGE.iterdir() if path.suffix in {".png", ".jpg"})
USERS_FOLDER = os.environ.get("TORCHTUNE_VL_IMAGES")
USERS_IMAGES = sorted(Path(USERS_FOLDER).iterdir()) if USERS_FOLDER else []


@pytest.fixture(params=PROCESSORS)
def backend(request):
    return request.param


def assert_equal(backend, image, reference_image=None, *, ours=None, **arguments):
    """Compares the transform of ``image`` with transformers' of it or of ``reference_image``.

    ``arguments`` are those of both, ``ours`` those of the transform alone.
    """
    arguments = HUB | arguments
    transform = Qwen2_5_VLImageTransform(backend=backend, **arguments, **(ours or {}))
    theirs = PROCESSORS[backend](**arguments)(
        image if reference_image is None else reference_image, return_tensors="pt"
    )
    assert_same(backend, transform({"image": image}), theirs)


def assert_same(backend, ours, theirs):
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
        arguments = {"image_mean": [mean, *GEOMETRY.mean[1:]], "image_std": [std, std, 0.11]}
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
        return Image.fromarray(noise(70, 90).astype(np.uint16) * 3)  # some levels above 255
    if mode == "I":
        return Image.fromarray(noise(70, 90).astype(np.int32) * 3 - 100)
    if mode == "F":
        return Image.fromarray(noise(70, 90).astype(np.float32) * 1.5 - 50)
    if mode == "La":
        return image_of_mode("LA").convert("La")
    if mode == "RGBa":
        return image_of_mode("RGBA").convert("RGBa")
    if mode == "P, palette with alpha":
        return image_of_mode("RGBA").quantize(64)
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
        "P, palette with alpha",
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
@pytest.mark.filterwarnings("ignore:.*more than 8 bits")
def test_pil_mode(backend, mode):
    image = image_of_mode(mode)
    assert image.mode == mode.split(",")[0]
    assert_equal(backend, image)


def test_mode_that_nobody_converts(backend):
    image = image_of_mode("La")
    with pytest.raises(ValueError, match="conversion from La"):
        PROCESSORS[backend](**HUB)(image)
    with pytest.raises(ValueError, match="conversion from La"):
        to_rgb(image, backend)


def test_chosen_frame_of_an_open_animation(backend, tmp_path):
    path = tmp_path / "animated.gif"
    frames = [photograph(), photograph().rotate(180)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        for frame in (0, 1):
            image.seek(frame)
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


def assert_loaded(backend, path):
    """Compares a file with transformers' loader and processor."""
    assert_equal(backend, path, load_image(str(path)))


# What Pillow can write, by format
MODES_OF_FORMATS = {
    "avif": "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB HSV",
    "bmp": "1 L P RGB RGBA",
    "dds": "L LA RGB RGBA",
    "gif": "1 L LA P RGB RGBA",
    "icns": "L RGBA",  # written in many sizes, slowly
    "ico": "1 L LA P RGB RGBA I;16",
    "jp2": "L LA RGB RGBA CMYK YCbCr I;16",
    "jpg": "1 L RGB RGBX CMYK YCbCr",
    "pcx": "1 L P RGB",
    "pgm": "1 L RGB RGBA I I;16",
    "pfm": "F",
    "png": "1 L LA P RGB RGBA I;16",
    "qoi": "RGB RGBA",
    "sgi": "L RGB RGBA",
    "tga": "1 L LA P RGB RGBA",
    "tiff": "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB I I;16 F",
    "webp": "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB HSV",
}
FORMATS_AND_MODES = [
    *[(kind, mode) for kind, modes in MODES_OF_FORMATS.items() for mode in modes.split()],
    *[
        ("png", f"{mode}, one transparent {kind}")
        for mode, kind in [("L", "level"), ("P", "colour")]
    ],
    *[(kind, "P, alpha for each colour") for kind in ("png", "webp", "tga", "ico")],
    ("png", "RGB, one transparent colour"),
    ("gif", "P, one transparent colour"),
    ("webp", "P, one transparent colour"),
]


@pytest.mark.parametrize(("suffix", "mode"), FORMATS_AND_MODES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.filterwarnings("ignore:.*more than 8 bits")
def test_format_and_mode(backend, tmp_path, suffix, mode):
    path = tmp_path / f"image.{suffix}"
    image_of_mode(mode).save(path)
    assert_loaded(backend, path)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("progressive.jpg", "L", {"progressive": True}),
        ("progressive.jpg", "CMYK", {"progressive": True}),
        ("with_icc.jpg", "RGB", {"icc_profile": bytes(70000)}),
        ("pixels_as_rgb.jpg", "RGB", {"keep_rgb": True}),
        ("restarts.jpg", "RGB", {"restart_marker_rows": 1}),
        ("optimized.jpg", "RGB", {"optimize": True}),
        ("comment.jpg", "RGB", {"comment": b"x" * 60000}),
        ("lossless.webp", "RGBA", {"lossless": True}),
        ("lossless.webp", "RGBA", {"lossless": True, "exact": True}),
        ("interlaced.gif", "P", {"interlace": 1}),
        ("sequential.gif", "P", {"interlace": 0}),
        ("4_bits.png", "P, alpha for each colour", {"bits": 4}),
        *[
            (f"{compression}.tiff", mode, {"compression": compression})
            for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")
            for mode in ("L", "RGB", "CMYK")
        ],
        ("group4.tiff", "1", {"compression": "group4"}),
        ("16_bits.tiff", "I;16", {"compression": "tiff_lzw"}),
        ("big.tiff", "RGB", {"big_tiff": True}),
        ("run_lengths.tga", "RGBA", {"compression": "tga_rle"}),
        ("bottom_up.tga", "RGB", {"orientation": 1}),
        ("lossy.jp2", "RGB", {"irreversible": True, "quality_layers": [20]}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*more than 8 bits")
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_options_of_formats(backend, tmp_path, name, mode, options):
    path = tmp_path / name
    image_of_mode(mode).save(path, **options)
    assert_loaded(backend, path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff", "avif", "mpo"])
@pytest.mark.filterwarnings("ignore:.*more frames than the first")
def test_several_frames(backend, tmp_path, suffix):
    path = tmp_path / f"animated.{suffix}"
    frames = [photograph(), *(photograph().rotate(angle) for angle in (90, 180))]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert_loaded(backend, path)


# PNG as Pillow cannot write it

# First column and row, and the steps between columns and rows, of each pass
ADAM7 = [
    *[(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)],
    *[(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)],
]


def png(samples_HWC, depth, colour_type, interlaced=False, **chunks):
    """Encodes samples of 1 to 16 bits: gray (0), RGB (2), palette (3), LA (4) or RGBA (6)."""
    height, width, _ = samples_HWC.shape
    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    rows = [
        b"\0" + packed(row, depth)
        for x, y, step_x, step_y in passes
        for row in samples_HWC[y::step_y, x::step_x]
        if row.size
    ]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    chunks = {"IHDR": header, **chunks, "IDAT": zlib.compress(b"".join(rows)), "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name.encode() + data
        + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in chunks.items()
    )  # fmt: skip


def packed(row, depth):
    if depth == 16:
        return row.astype(">u2").tobytes()
    bits = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - depth :]
    return np.packbits(bits).tobytes()


PALETTE = {"PLTE": noise(256, 3).tobytes()}


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("depth", "colour_type", "chunks"),
    [
        *[(depth, 0, {}) for depth in (1, 2, 4, 8, 16)],
        *[(depth, 0, {"tRNS": b"\0\1"}) for depth in (1, 2, 4, 8, 16)],
        *[(depth, 2, {}) for depth in (8, 16)],
        *[(depth, 2, {"tRNS": b"\0\1\0\2\0\3"}) for depth in (8, 16)],
        *[(depth, 3, PALETTE) for depth in (1, 2, 4, 8)],
        *[(depth, 3, PALETTE | {"tRNS": noise(2**depth).tobytes()}) for depth in (1, 2, 4, 8)],
        *[(depth, colour_type, {}) for depth in (8, 16) for colour_type in (4, 6)],
    ],
)
@pytest.mark.filterwarnings("ignore:.*more than 8 bits")
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_png(backend, tmp_path, depth, colour_type, chunks, interlaced):
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    samples = np.random.default_rng(0).integers(0, 2**depth, (41, 67, channels))
    path = tmp_path / "image.png"
    path.write_bytes(png(samples, depth, colour_type, interlaced, **chunks))
    assert_loaded(backend, path)


# JPEG as Pillow cannot write it


def jpeg(mode="RGB", **options):
    file = io.BytesIO()
    image_of_mode(mode).save(file, "JPEG", **options)
    return file.getvalue()


def with_segment(marker, content, data=None, at=2):
    data = data or jpeg()
    segment = b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content
    return data[:at] + segment + data[at:]


def adobe(transform):
    """The segment that tells what 4 channels are: 0 for CMYK, 2 for YCCK; inverted levels."""
    return b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)


def cmyk(transform):
    """A CMYK JPEG with, or without, such a segment."""
    data = jpeg("CMYK")
    start = data.index(b"\xff\xee")
    assert data[start : start + 16] == b"\xff\xee\x00\x0e" + adobe(0)
    plain = data[:start] + data[start + 16 :]
    return plain if transform is None else with_segment(0xEE, adobe(transform), plain)


JFIF = jpeg()[2:20]
ODD_JPEGS = {
    "CMYK": cmyk(None),
    "CMYK after JFIF": cmyk(None)[:2] + JFIF + cmyk(None)[2:],
    "CMYK, Adobe after JFIF": cmyk(0)[:2] + JFIF + cmyk(0)[2:],
    "CMYK, Adobe": cmyk(0),
    "YCCK, Adobe": cmyk(2),
    "RGB, Adobe": with_segment(0xEE, adobe(0)),
    "RGB after JFIF, Adobe": with_segment(0xEE, adobe(0), at=20),
    "YCbCr, Adobe": with_segment(0xEE, adobe(1)),
    "no JFIF": jpeg().replace(JFIF, b""),
    "short JFIF": jpeg().replace(JFIF, b"\xff\xe0\x00\x08JFIF\x00\x01"),
    "shorter JFIF": jpeg().replace(JFIF, b"\xff\xe0\x00\x06JFIF"),
    "short JFIF, comment": jpeg().replace(
        JFIF, b"\xff\xe0\x00\x08JFIF\x00\x01" + b"\xff\xfe\x00\x06abcd"
    ),
    "second JFIF, short": with_segment(0xE0, b"JFIF", at=20),
    "JFIF extension": with_segment(0xE0, b"JFXX\0\x10", at=20),
    "JFIF thumbnail": with_segment(0xE0, JFIF[4:16] + b"\1\1abc").replace(JFIF, b""),
    "comment": with_segment(0xFE, b"", at=20),
    "fill bytes": jpeg().replace(JFIF, JFIF + b"\xff\xff\xff"),
    "junk between segments": jpeg().replace(JFIF, JFIF + b"junk"),
    "junk in front": b"\0" + jpeg(),
    "junk at the end": jpeg() + b"junk",
    "two in one file": jpeg() * 2,
    "long photoshop block": with_segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 30),
    "broken ICC profile": with_segment(0xE2, b"ICC_PROFILE\0\1", at=20),
    "broken MPF": with_segment(0xE2, b"MPF\0II*\0", at=20),
    "12 bits": jpeg().replace(b"\x00\x11\x08", b"\x00\x11\x0c"),
    "no height": jpeg().replace(b"\x00\x11\x08\x00\x46", b"\x00\x11\x08\x00\x00"),
    "no width": jpeg().replace(b"\x00\x46\x00\x5a\x03", b"\x00\x46\x00\x00\x03"),
    "2 channels": jpeg().replace(b"\x00\x46\x00\x5a\x03", b"\x00\x46\x00\x5a\x02"),
    "arithmetic coding": jpeg().replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"),
    "extended frame": jpeg().replace(b"\xff\xc0\x00\x11", b"\xff\xc1\x00\x11"),
    "two frames": with_segment(0xC0, b"\x08\x00\x46\x00\x5a\x01\x01\x11\x00", at=20),
    "table of another length": with_segment(0xDB, bytes(64), at=20),
    "restart interval of another length": with_segment(0xDD, bytes(3), at=20),
    "orientation in XMP": jpeg(xmp=b'<x tiff:Orientation="6"/>'),
}


@pytest.mark.parametrize("kind", ODD_JPEGS)
@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
def test_odd_jpeg(tmp_path, kind):
    path = tmp_path / "image.jpg"
    path.write_bytes(ODD_JPEGS[kind])
    assert_same_outcome(path)


def assert_same_outcome(path):
    """Decodes as transformers' loader does, or refuses what it refuses; returns which."""
    try:
        expected = to_rgb(load_image(str(path)))
    except Exception:
        with pytest.raises(ValueError, match=r"damaged|empty"):
            to_rgb(path)
        return "refused"
    assert torch.equal(to_rgb(path), expected)
    return "decoded"


def test_plain_jpegs_do_without_pillow(monkeypatch):
    """And only they: a condition of the comparisons above."""
    opened = []

    def spy(file, open=Image.open):
        opened.append(file)
        return open(file)

    monkeypatch.setattr(Image, "open", spy)
    for plain in (jpeg(), jpeg("L"), jpeg(progressive=True), jpeg(comment=b"a", optimize=True)):
        to_rgb(plain)
        assert not opened
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 70)
    to_rgb(jpeg())
    assert not opened
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    to_rgb(jpeg())
    assert not opened
    exif = Image.Exif()
    exif[0x0112] = 1
    for odd in (jpeg(exif=exif), jpeg("CMYK"), jpeg(keep_rgb=True), ODD_JPEGS["no JFIF"]):
        to_rgb(odd)
        assert opened
        opened.clear()


def test_number_of_pixels(backend, tmp_path, monkeypatch):
    """Pillow warns from MAX_IMAGE_PIXELS on, and refuses twice as many."""
    for suffix in ("jpg", "png"):
        path = tmp_path / f"image.{suffix}"
        photograph().save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 70 // 2)
        with pytest.warns(Image.DecompressionBombWarning):
            reference_image = load_image(str(path))
        with pytest.warns(Image.DecompressionBombWarning):
            assert_equal(backend, path, reference_image)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 70 // 2 - 1)
        with pytest.raises(Image.DecompressionBombError):
            load_image(str(path))
        with pytest.raises(ValueError, match=r"larger than PIL\.Image\.MAX_IMAGE_PIXELS"):
            to_rgb(path)


# Orientation


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif", "mpo", "jp2"])
def test_exif_orientation(backend, tmp_path, orientation, suffix):
    path = tmp_path / f"photo.{suffix}"
    photograph().save(path, exif=exif_of(orientation))
    if suffix not in ("avif", "jp2"):  # which have means of their own
        assert (load_image(str(path)).size == (70, 90)) == (orientation in (5, 6, 7, 8))
    assert_loaded(backend, path)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_exif_orientation_of_other_jpegs(backend, tmp_path, mode):
    path = tmp_path / "photo.jpg"
    image_of_mode(mode).save(path, exif=exif_of(6))
    assert_loaded(backend, path)


def test_no_orientation_for_an_open_image(backend, tmp_path):
    """As transformers' processor, to which it is left to the user."""
    path = tmp_path / "photo.jpg"
    photograph().save(path, exif=exif_of(6))
    with Image.open(path) as image:
        assert_equal(backend, image)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is damaged
def test_damaged_exif_gives_what_the_reference_gives(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "photo.img"
    outcomes = []
    for _ in range(300):
        exif = exif_of(rng.randrange(10))
        exif[0x010F] = "a maker's name"
        exif.get_ifd(0x8769)[0x9286] = b"a comment"
        file = io.BytesIO()
        suffix = rng.choice(["JPEG", "JPEG", "PNG", "WEBP", "TIFF"])
        photograph((30, 20)).save(file, suffix, exif=exif)
        damaged = bytearray(file.getvalue())
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(20, min(150, len(damaged)))] = rng.randrange(256)
        path.write_bytes(damaged)
        outcomes.append(assert_same_outcome(path))
    assert min(outcomes.count("refused"), outcomes.count("decoded")) > 60


def test_exif_that_cannot_be_written_again(tmp_path):
    """Transformers' loader fails where it writes what is left of EXIF after turning the image."""
    tiff = b"II*\0" + struct.pack("<IH", 8, 2)
    tiff += struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x014A, 2, 1, 0x61)
    path = tmp_path / "photo.jpg"
    path.write_bytes(with_segment(0xE1, b"Exif\0\0" + tiff + bytes(4)))
    assert assert_same_outcome(path) == "refused"


# Sources

DATA_URL = "data:image/{};base64,{}"


def sources_of(path):
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    return {
        "path": path,
        "name": str(path),
        "file URL": f"file://{path}",
        "escaped file URL": path.as_uri(),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "data URL": f"data:image/{path.suffix[1:]};base64,{text}",
        "data URL without a type": f"data:;base64,{text}",
        "base64": text,
        "file in memory": io.BytesIO(data),
        "https URL": "https://images.test/photo",
    }


SUFFIXES = ["jpg", "png", "gif", "webp"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", [*sources_of(Path(__file__).resolve()), "file handle"])
def test_source(backend, tmp_path, monkeypatch, suffix, kind):
    path = tmp_path / f"a photo.{suffix}"
    image = photograph((160, 120))
    image.save(path, **({} if suffix == "gif" else {"exif": exif_of(6)}))
    sources = sources_of(path)
    monkeypatch.setattr(_sources, "_fetch", lambda url, limits: path.read_bytes())
    monkeypatch.setattr(PROCESSORS[backend], "fetch_images", lambda _, images: images)
    with path.open("rb") as handle:
        source = handle if kind == "file handle" else sources[kind]
        assert_equal(backend, source, load_image(str(path)), ours={"remote": RemoteLimits()})
    if kind in ("name", "data URL", "base64"):  # which transformers knows
        assert_equal(backend, source, load_image(source))


# Transparency over white


def white(image):
    """What qwen-vl-utils does for mode RGBA, for all."""
    return vision_process.to_rgb(image.convert("RGBA"))


TRANSPARENT = [
    "LA",
    "PA",
    "RGBA",
    "RGBa",
    "P, one transparent colour",
    "P, alpha for each colour",
    "P, palette with alpha",
    "L, one transparent level",
    "RGB, one transparent colour",
]


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_white_under_pil_images(backend, mode):
    image = image_of_mode(mode)
    assert_equal(backend, image, white(image), ours={"alpha": "white"})


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "I;16", "F", "YCbCr"])
@pytest.mark.filterwarnings("ignore:.*more than 8 bits")
def test_white_changes_no_opaque_image(backend, mode):
    assert_equal(backend, image_of_mode(mode), ours={"alpha": "white"})


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *[("png", mode) for mode in TRANSPARENT if mode not in ("PA", "RGBa")],
        *[(suffix, "RGBA") for suffix in ("webp", "tiff", "tga", "ico", "avif", "gif")],
        ("gif", "P, one transparent colour"),
        ("jpg", "RGB"),
        ("jpg", "CMYK"),
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_white_under_files(backend, tmp_path, suffix, mode):
    path = tmp_path / f"image.{suffix}"
    image_of_mode(mode).save(path)
    with Image.open(path) as image:
        assert_equal(backend, path, white(image), ours={"alpha": "white"})
        if mode == "RGBA" and suffix != "gif":
            assert_equal(backend, path, vision_process.to_rgb(image), ours={"alpha": "white"})


@pytest.mark.parametrize(
    ("depth", "colour_type", "chunks"),
    [(1, 0, {"tRNS": b"\0\1"}), (16, 0, {"tRNS": b"\0\1"}), (8, 4, {}), (16, 4, {}), (16, 6, {})],
)
@pytest.mark.filterwarnings("ignore:.*more than 8 bits")
def test_white_under_png(backend, depth, colour_type, chunks):
    samples = np.random.default_rng(0).integers(
        0, 2**depth, (41, 67, {0: 1, 4: 2, 6: 4}[colour_type])
    )
    data = png(samples, depth, colour_type, **chunks)
    with Image.open(io.BytesIO(data)) as image:
        assert image.has_transparency_data
        assert_equal(backend, data, white(image), ours={"alpha": "white"})


def test_white_under_turned_files(backend, tmp_path):
    path = tmp_path / "image.png"
    image = image_of_mode("RGBA")
    image.save(path, exif=exif_of(6))
    turned = white(image.transpose(Image.Transpose.ROTATE_270))
    assert_equal(backend, path, turned, ours={"alpha": "white"})


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_white_under_arrays(backend, kind, layout):
    level, alpha = np.mgrid[:256, :256].astype(np.uint8)
    rgba = np.stack([level, level[::-1], level, alpha], axis=-1)
    image = kind(rgba if layout == "HWC" else np.moveaxis(rgba, -1, 0).copy())
    assert_equal(backend, image, white(Image.fromarray(rgba)), ours={"alpha": "white"})
    gray = kind(rgba[..., 0].copy())
    assert_equal(backend, gray, Image.fromarray(rgba[..., 0]), ours={"alpha": "white"})


# Limits of single images

LIMITS = [
    {"min_pixels": 200000},
    {"max_pixels": 20000},
    {"min_pixels": 784, "max_pixels": 1600},
    {"min_pixels": 50000, "max_pixels": 51000},
    {"resized_height": 280, "resized_width": 420},
    {"resized_height": 100, "resized_width": 99, "max_pixels": 784},
    {"resized_height": 28, "resized_width": 28},
    {"resized_height": 28, "resized_width": 2800},
    {"resized_height": 500, "resized_width": 300, "min_pixels": 10, "max_pixels": 20},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("size", [(30, 40), (239, 381), (300, 161)])
def test_limits_of_an_image(limits, size):
    """Grids, and pixels of the ``pil`` backend, which resizes as qwen-vl-utils does."""
    image = photograph(size[::-1])
    theirs = vision_process.fetch_image({"image": image, **limits})
    ours = Qwen2_5_VLImageTransform(backend="pil")({"image": image, **limits})
    assert_same("pil", ours, PROCESSORS["pil"](do_resize=False)(theirs, return_tensors="pt"))
    torchvision = Qwen2_5_VLImageTransform()({"image": image, **limits})
    assert torchvision["image_grid_thw"].tolist() == ours["image_grid_thw"].tolist()


@pytest.mark.parametrize("limits", LIMITS[:4], ids=str)
def test_limits_of_an_image_as_arguments_of_the_processor(backend, limits):
    both = HUB | limits
    size = {"shortest_edge": both["min_pixels"], "longest_edge": both["max_pixels"]}
    image = photograph((381, 239))
    ours = Qwen2_5_VLImageTransform(backend=backend)({"image": image, **limits})
    assert_same(backend, ours, PROCESSORS[backend](size=size)(image, return_tensors="pt"))


@given(st.integers(28, 20000), st.integers(28, 20000))
def test_resized_sides(height, width):
    transform = Qwen2_5_VLImageTransform()
    limits = {"resized_height": height, "resized_width": width}
    try:
        expected = vision_process.smart_resize(height, width, factor=28)
    except ValueError:
        with pytest.raises(ValueError, match="more than 200 times"):
            transform._grid((5, 7), 1, 1, limits)
    else:
        assert transform._grid((5, 7), 1, 1, limits) == (1, *(side // 14 for side in expected))


# JPEG in all variations


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [1, 50, 95])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (23, 3), (9, 4), (57, 64), (301, 199)])
def test_jpeg(backend, tmp_path, subsampling, quality, progressive, size):
    path = tmp_path / "image.jpg"
    options = {"subsampling": subsampling, "quality": quality, "progressive": progressive}
    photograph(size).save(path, **options)
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
        outcomes.append(assert_same_outcome(path))
    assert min(outcomes.count("refused"), outcomes.count("decoded")) > 40
