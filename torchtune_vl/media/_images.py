"""Any image, whatever holds it, to uint8 RGB: C channels (3), H height and W width in pixels."""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from io import BytesIO
from typing import Any, BinaryIO, Literal

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from torchtune_vl.media._errors import refusing
from torchtune_vl.media._said import Said
from torchtune_vl.media._sources import RemoteLimits, Source, open_bytes, read_bytes, scheme_of

ImageSource = Source | Image.Image | np.ndarray | torch.Tensor
Backend = Literal["torchvision", "pil"]
Alpha = Literal["reference", "white"]

# Formats whose header says how large the decoded image is; None of images without a file
_TOLD_BY_HEADER = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", None)
_PLAIN_HEAD_BYTES = 4096  # more than the tables of a plain JPEG
# Markers of tables, comments, and baseline and progressive frames
_PLAIN_SEGMENTS = (b"\xff\xc4", b"\xff\xdb", b"\xff\xdd", b"\xff\xfe", b"\xff\xc0", b"\xff\xc2")
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
# Of the files that phones write (ISO/IEC 23008-12)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Files with further frames that are no more than views or layers of the first
_ONE_PICTURE = ("MPO", "PSD")

_warned = Said("levels", "frames")


def to_rgb(
    image: ImageSource,
    backend: Backend = "torchvision",
    alpha: Alpha = "reference",
    remote: RemoteLimits | None = None,
) -> torch.Tensor:
    """Decode an image, whatever holds it, to RGB: uint8 [C, H, W], perhaps a view of the input.

    Equal to ``process_image`` of transformers' ``TorchvisionBackend`` or ``PilBackend``, which
    encoded images reach by way of ``transformers.image_utils.load_image``: turned upright by their
    EXIF orientation, then converted by Pillow. Of an animation the first frame is taken, and levels
    of images of 16 and more bits are cut off at 0 and 255, each with a warning, once per process.
    Images and settings are those of :class:`ImageTransform`. ``ValueError`` if the image cannot be
    read, or is no uint8 image of 1, 3 or 4 channels, leaves it to the caller to name the image.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        return _array_to_rgb(image, backend, alpha)
    if isinstance(image, Image.Image):
        with decoding():  # images opened from a file are decoded only now
            pixels = np.array(_over_white(image, alpha))
        _warn_of_lost_levels(image, image)
    else:
        pixels = _decode(read_bytes(image, remote), alpha, image)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def rgb_size(image: ImageSource, remote: RemoteLimits | None = None) -> tuple[int, int]:
    """Find height and width of what :func:`to_rgb` returns, from a file's header if that tells it.

    So it is in JPEG, PNG, WebP, GIF and BMP files; others are decoded.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        height, width = _channels_first(image).shape[1:]
        return height, width
    if isinstance(image, Image.Image):
        with decoding():
            if image.format not in _TOLD_BY_HEADER:
                image.load()
            return image.height, image.width
    with open_bytes(image, remote) as file:
        size = _plain_jpeg_size(file.read(_PLAIN_HEAD_BYTES))
        if size:
            return size
        with _open(file) as opened, decoding():
            is_late = opened.format == "PNG" and _has_late_metadata(file)
            if is_late or opened.format not in _TOLD_BY_HEADER:
                ImageOps.exif_transpose(opened, in_place=True)
            elif _orientation(opened) > 4:
                return opened.width, opened.height
            return opened.height, opened.width


@contextmanager
def naming(kind: str, medium: object, before: str = "") -> Iterator[None]:
    """Name an image or a video in errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{before}{describe(kind, medium)}: {error}") from error


def describe(kind: str, medium: object) -> str:
    """Name an image or a video, such as ``image file 'cat.jpg'``, in a few hundred characters."""
    name = type(medium).__name__
    if isinstance(medium, Image.Image):
        file, size = getattr(medium, "filename", ""), f"{medium.width} x {medium.height}"
        return f"PIL image {file!r}, mode {medium.mode}, {size} pixels"
    if isinstance(medium, np.ndarray | torch.Tensor):
        return f"{kind} {name} of shape {tuple(medium.shape)} and dtype {medium.dtype}"
    if isinstance(medium, list | tuple):
        return f"{kind} {name} of {len(medium)} images"
    if isinstance(medium, bytes | bytearray | memoryview):
        return f"{kind} data of {memoryview(medium).nbytes} bytes"
    if isinstance(medium, str) and scheme_of(medium) == "data":
        return f"{kind} data URL {medium[:40]!r}... of {len(medium)} characters"
    if isinstance(medium, str | os.PathLike):
        path = os.fsdecode(medium)
        shown = path if len(path) <= 500 else f"{path[:500]}..."
        return f"{kind} {'URL' if scheme_of(path) else 'file'} {shown!r}"
    if hasattr(medium, "read"):
        return f"{kind} file handle {getattr(medium, 'name', name)!r}"
    return f"{kind} object of type {name}"


def decoding(what: str = "it") -> AbstractContextManager[None]:
    """Refuse what Pillow cannot decode: each of its decoders raises what it likes."""
    return refusing(
        f"Pillow cannot decode {what}",
        "the file is damaged, cut off, no image, or larger than PIL.Image.MAX_IMAGE_PIXELS allows: "
        "fetch it again, raise the limit if you trust it, or remove it from the data",
    )


def turned(image_HWC: np.ndarray, sideways: bool, flip_y: bool, flip_x: bool) -> np.ndarray:
    """Turn an image by a quarter and mirror it, in this order."""
    if sideways:
        image_HWC = image_HWC.transpose(1, 0, 2)
    return np.ascontiguousarray(image_HWC[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def uint8_tensor(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The tensor of uint8 pixels, without a copy where torch can do without."""
    if pixels.dtype not in (torch.uint8, np.uint8):
        raise ValueError("the dtype must be uint8; scale the values to 0 ... 255 and convert them")
    if isinstance(pixels, torch.Tensor):
        return pixels
    # torch takes neither negative strides (a flipped array) nor, silently, read-only memory
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))


def _decode(data: bytes, alpha: Alpha, source: Any) -> np.ndarray:
    pixels = _decode_jpeg(data) if _plain_jpeg_size(data) else None
    if pixels is not None:
        return pixels
    with _open(BytesIO(data)) as image:
        with decoding():
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                pixels = _decode_jpeg(data, _orientation(image))
            if pixels is None:
                ImageOps.exif_transpose(image, in_place=True)
                # The reference drops alpha here, but for a colour that stands for transparency
                image_or_rgb = image if alpha == "white" else image.convert("RGB")
                pixels = np.array(_over_white(image_or_rgb, alpha))
        _warn_of_lost_levels(image, source)
        _warn_of_lost_frames(image, source)
    return pixels


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an RGB or gray JPEG to which Pillow has nothing to object or to add.

    That has before its first scan a JFIF header of the usual length, tables, comments and a frame,
    and no EXIF orientation. Opening an image with Pillow takes 20 to 80 microseconds.
    """
    start = 20 if data.startswith(b"\xff\xd8\xff\xe0\x00\x10") else len(data)
    while data[start : start + 2] in _PLAIN_SEGMENTS:
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    if data[start : start + 2] != b"\xff\xda":  # scan
        return None
    with suppress(ValueError):
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if colors in ("YCbCr", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf):
            return height, width
    return None


def _decode_jpeg(data: bytes, orientation: int = 1) -> np.ndarray | None:
    """Pillow's pixels in two thirds of its time [H, W, C], or None where Pillow has to judge."""
    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return turned(pixels, orientation > 4, orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7))


def _orientation(image: Image.Image) -> int:
    """By EXIF: 1 for upright, 2 to 4 for mirrored, 5 to 8 for these on their side."""
    exif = Image.Image.getexif(image)  # that of PngImageFile decodes the image
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    if orientation not in range(2, 9):
        return 1
    if "exif" in image.info:
        exif.tobytes()  # what Pillow writes after turning an image; fails where EXIF is corrupt
    return orientation


def _has_late_metadata(png: BinaryIO) -> bool:
    """Whether texts or EXIF come after the pixels of a PNG, where Pillow sees them in decoding."""
    back = png.tell()
    png.seek(8)  # behind the signature
    pixels = found = False
    while not found and len(head := png.read(8)) == 8:
        pixels |= head[4:] == b"IDAT"
        found = pixels and head[4:] in _PNG_METADATA
        png.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    png.seek(back)
    return found


def _open(file: BinaryIO) -> Image.Image:
    with decoding(), suppress(UnidentifiedImageError):
        return Image.open(file)
    file.seek(0)
    head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:] in _HEIC_BRANDS:
        problem = "is a HEIC file, which Pillow decodes with a plugin only"
        with refusing(problem, "pip install pillow-heif, or convert it to JPEG", ImportError):
            import_module("pillow_heif").register_heif_opener()
    with decoding():
        return Image.open(file)


def _over_white(image: Image.Image, alpha: Alpha) -> Image.Image:
    """``transformers.image_transforms.convert_to_rgb``, and ``to_rgb`` of qwen-vl-utils."""
    if alpha == "white":
        transparent = image.has_transparency_data
    else:  # transformers overlooks premultiplied alpha and that of palettes
        transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if not transparent:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _warn_of_lost_levels(image: Image.Image, source: Any) -> None:
    if image.mode[0] in "IF":
        lost = f"has levels of more than 8 bits (mode {image.mode}), which are cut off, not scaled"
        _warn_once("levels", source, f"{lost}, as in transformers: scale them to 0 ... 255 before")


def _warn_of_lost_frames(image: Image.Image, source: Any) -> None:
    if image.format in _ONE_PICTURE or "frames" in _warned:
        return
    has_more = False
    with suppress(Exception):  # a damaged later frame is of no concern to the first
        has_more = getattr(image, "is_animated", False)
    if has_more:
        remedy = "pass an animation as a video, or its frames one by one"
        _warn_once("frames", source, f"has more frames than the first, which is taken: {remedy}")


def _warn_once(kind: str, source: Any, text: str) -> None:
    if _warned.is_new(kind):
        warnings.warn(f"{describe('image', source)} {text}. This is said once.", stacklevel=3)


def _array_to_rgb(image: np.ndarray | torch.Tensor, backend: Backend, alpha: Alpha) -> torch.Tensor:
    pixels_CHW = _channels_first(image)
    if len(pixels_CHW) < 4:
        return pixels_CHW.expand(3, -1, -1)
    if alpha == "white":
        rgba_HWC = np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())
        return to_rgb(Image.fromarray(rgba_HWC), backend, alpha)
    # ``convert_to_rgb`` of the transformers backends
    if backend == "pil":
        opacity = pixels_CHW[3:].double() / 255
        return (opacity * pixels_CHW[:3] + (1 - opacity) * 255).round().to(torch.uint8)
    rgba = pixels_CHW.float() * (1 / 255)
    opacity = rgba[3:]
    # torchvision truncates, 1e-3 below 256 instead of rounding at 255
    return ((rgba[:3] * opacity + (1 - opacity)) * (256 - 1e-3)).to(torch.uint8)


def _channels_first(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Guesses the layout like ``transformers.image_utils.infer_channel_dimension_format``."""
    pixels = uint8_tensor(image)
    if pixels.ndim == 2:
        return pixels.unsqueeze(0)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
        return pixels
    if pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4):
        return pixels.permute(2, 0, 1)
    shapes = "[H, W], [H, W, c] or [c, H, W], with c of 1, 3 or 4 channels"
    raise ValueError(f"the shape must be {shapes}; pass the images of a batch one by one")
