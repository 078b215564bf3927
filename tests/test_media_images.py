import contextlib
import io
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from torchtune_vl.media import _images
from torchtune_vl.media._images import describe, rgb_size, to_rgb
from torchtune_vl.media._said import Said


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(file_format, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(noise(40, 60, 3))).save(file, file_format, **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def _new_process(monkeypatch):
    monkeypatch.setattr(_images, "_warned", Said("levels", "frames"))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((5, 7), (5, 7)), ((5, 7, 1), (5, 7)), ((1, 5, 7), (5, 7)), ((4, 9, 3), (9, 3))],
)
def test_layout_of_arrays(shape, size):
    rgb = to_rgb(noise(*shape))
    assert rgb.shape == (3, *size)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is cut off
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_anywhere_is_an_error_or_changes_nothing(file_format):
    data = encoded(file_format)
    expected = to_rgb(data)
    accepted = []
    for length in [*range(700), *range(700, len(data), 61)]:
        with contextlib.suppress(ValueError):
            accepted.append(to_rgb(data[:length]))
    assert all(torch.equal(rgb, expected) for rgb in accepted)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (b"1234", "image data of 4 bytes"),
        ("a/b.jpg", "image file 'a/b.jpg'"),
        (Path("a/b.jpg"), "image file 'a/b.jpg'"),
        ("https://a.org/b.jpg", "image URL 'https://a.org/b.jpg'"),
        (Image.new("L", (3, 2)), "PIL image '', mode L, 3 x 2 pixels"),
        (np.zeros((2, 3), bool), "image ndarray of shape (2, 3) and dtype bool"),
        (torch.zeros(2, 3), "image Tensor of shape (2, 3) and dtype torch.float32"),
        ("file:///a/b", "image URL 'file:///a/b'"),
        (io.BytesIO(b"a"), "image file handle 'BytesIO'"),
        ([1, 2], "image list of 2 images"),
        (None, "image object of type NoneType"),
    ],
)
def test_names(image, name):
    assert describe("image", image) == name


def test_names_are_short(tmp_path):
    url = f"data:image/png;base64,{'QUJD' * 300}"
    assert describe("video", url) == f"video data URL {url[:40]!r}... of {len(url)} characters"
    assert len(describe("video", "a" * 10**6)) < 600
    path = tmp_path / "clip"
    path.touch()
    with path.open("rb") as handle:
        assert describe("video", handle) == f"video file handle {str(path)!r}"


# What is said once


def warned(*images):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for image in images:
            to_rgb(image)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_lost_levels_are_told_once(tmp_path, mode):
    path = tmp_path / "x-ray.tiff"
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = Image.fromarray(noise(9, 9).astype(kind) * 100)
    image.save(path)
    (message,) = warned(path, path.read_bytes(), image)
    assert f"image file '{path}' has levels of more than 8 bits (mode {mode})" in message
    assert "scale them to 0 ... 255" in message
    assert to_rgb(path).max() == 255


def test_lost_levels_of_an_open_image_are_told():
    (message,) = warned(Image.fromarray(noise(9, 9).astype(np.uint16)))
    assert message.startswith("PIL image '', mode I;16, 9 x 9 pixels has levels of more")


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_lost_frames_are_told_once(tmp_path, file_format):
    path = tmp_path / "cat.img"
    frames = [Image.fromarray(noise(40, 60, 3) // (i + 1)) for i in range(3)]
    options = {"save_all": True, "append_images": frames[1:]}
    path.write_bytes(encoded(file_format, frames[0], **options))
    (message,) = warned(path, path, encoded("GIF", frames[1], **options))
    assert f"image file '{path}' has more frames than the first, which is taken" in message
    assert "pass an animation as a video" in message


def test_each_kind_is_told():
    pages = [Image.new("L", (9, 9), level) for level in (1, 2)]
    animation = encoded("GIF", pages[0], save_all=True, append_images=pages[1:])
    assert len(warned(Image.new("F", (9, 9)), animation, Image.new("I", (9, 9)), animation)) == 2


def test_nothing_is_told_of_other_images():
    pages = [Image.new("RGB", (9, 9), (level, 0, 0)) for level in (1, 2)]
    several_views = encoded("MPO", pages[0], save_all=True, append_images=pages[1:])
    with Image.open(io.BytesIO(several_views)) as image:
        assert image.n_frames == 2
    formats = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "ICO"]
    images = [encoded(file_format) for file_format in formats]
    modes = [Image.new(mode, (9, 9)) for mode in ("1", "L", "P", "RGBA", "CMYK", "LAB")]
    assert warned(several_views, *images, *modes) == []


def test_damage_after_the_first_frame_does_no_harm(monkeypatch):
    """Whatever it does to the number of frames."""
    pages = [Image.fromarray(noise(40, 60) // (i + 1)) for i in range(3)]
    for file_format in ("GIF", "TIFF"):
        options = {"save_all": True, "append_images": pages[1:]}
        data = encoded(file_format, pages[0], **options)
        expected = to_rgb(encoded(file_format, pages[0]))
        decoded = []
        for end in range(len(data) // 3, len(data), 100):
            monkeypatch.setattr(_images, "_warned", Said("levels", "frames"))
            with warnings.catch_warnings(), contextlib.suppress(ValueError):
                warnings.simplefilter("ignore")
                decoded.append(to_rgb(data[:end]))
        assert len(decoded) > 10
        assert all(torch.equal(rgb, expected) for rgb in decoded)


def test_warning_that_is_an_error_is_not_called_damage():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="more than 8 bits"):
            to_rgb(encoded("TIFF", Image.new("F", (9, 9))))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99


def test_photographs_of_phones_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read in (to_rgb, rgb_size):
        with pytest.raises(ValueError, match=r"is a HEIC file.* pip install pillow-heif, or conv"):
            read(HEIC)


def test_photographs_of_phones_are_decoded_by_the_plugin(monkeypatch):
    """One that stands for pillow-heif: it teaches Pillow the format."""

    class Photograph(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (3, 2), "RGB"

        def load(self):
            self.im = Image.new("RGB", self.size, "red").im
            return super().load()

    def register_heif_opener():
        Image.register_open("HEIF", Photograph, lambda head: head[4:12] == b"ftypheic")

    plugin = types.SimpleNamespace(register_heif_opener=register_heif_opener)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    assert rgb_size(HEIC) == (2, 3)
    assert to_rgb(HEIC)[:, 0, 0].tolist() == [255, 0, 0]
