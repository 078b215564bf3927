"""Any image, whatever holds it, to uint8 RGB.

Shapes: C channels (3), H height and W width in pixels.
"""

import os
import warnings
from collections.abc import Callable
from importlib import import_module
from io import BytesIO
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from torchtune_vl.media._sources import (
    RemoteLimits,
    Source,
    describe_source,
    open_bytes,
    read_bytes,
)

ImageSource = Source | Image.Image | np.ndarray | torch.Tensor
Backend = Literal["torchvision", "pil"]
Alpha = Literal["reference", "white"]

CHANNELS = (1, 3, 4)

# What turns an image [H, W, C] upright, by its EXIF orientation; 1 and unknown ones are upright
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: np.rot90,
}
_SIDEWAYS = (5, 6, 7, 8)

# Formats whose header says how large the decoded image is
_TOLD_BY_HEADER = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP")
_PLAIN_HEAD_BYTES = 4096  # more than the tables of a plain JPEG
_PNG_SIGNATURE_BYTES = 8
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# Files with further frames that are no more than views or layers of the first
_ONE_PICTURE = ("MPO", "PSD")
# Counting the frames of a GIF takes 0.1 s per MB
_COUNTED_BYTES = 2**24

_warned: set[str] = set()


def to_rgb(
    image: ImageSource,
    backend: Backend = "torchvision",
    alpha: Alpha = "reference",
    remote: RemoteLimits | None = None,
) -> torch.Tensor:
    """Decodes an image, whatever holds it, to RGB.

    Equal to ``process_image`` of transformers' ``TorchvisionBackend`` or ``PilBackend``, which
    encoded images reach by way of ``transformers.image_utils.load_image``: turned upright by their
    EXIF orientation, then converted by Pillow, which drops an alpha channel. Of an animation the
    first frame is taken, and levels of images of 16 and more bits are cut off at 0 and 255, each
    with a warning, once per process.

    Args:
        image (ImageSource): PIL image of any mode; uint8 array or tensor [H, W], [H, W, c] or
            [c, H, W] with c of 1, 3 or 4 (read as [c, H, W] where both fit); or an encoded image
            as :func:`read_bytes` takes it: bytes, a path, a ``file://``, ``data:`` or ``https://``
            URL, base64 or a binary file handle.
        backend (Backend): which transformers backend's alpha compositing arrays get.
        alpha (Alpha): "reference" for what transformers does with transparency: an alpha channel is
            dropped in encoded images, and composited over white in PIL images, arrays and tensors;
            a single transparent colour becomes white. "white" for
            compositing over white in all of them. qwen-vl-utils does so for mode RGBA only.
        remote (RemoteLimits | None): limits of ``https://`` URLs, which are refused without.

    Returns:
        torch.Tensor: uint8 [C, H, W], often a view of [H, W, C] memory, or of the input.

    Raises:
        ValueError: if the image cannot be read, is no uint8 image of 1, 3 or 4 channels, or has
            more than twice the pixels of ``PIL.Image.MAX_IMAGE_PIXELS``. The message leaves it to
            the caller to name the image.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        return _array_to_rgb(image, backend, alpha)
    if isinstance(image, Image.Image):
        return _pil_to_rgb(image, alpha)
    _check_source(image)
    return _decode(read_bytes(image, remote), alpha, image)


def rgb_size(image: ImageSource, remote: RemoteLimits | None = None) -> tuple[int, int]:
    """Finds the size of what :func:`to_rgb` returns, from a file's header where that tells it.

    So it is in JPEG, PNG, WebP, GIF and BMP files; others are decoded.

    Args:
        image (ImageSource): as in :func:`to_rgb`. A handle that cannot seek is read to its end.
        remote (RemoteLimits | None): as there.

    Returns:
        tuple[int, int]: height and width of the upright image in pixels.

    Raises:
        ValueError: as :func:`to_rgb` does, but for what only decoding shows.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        height, width = _checked_array(image).shape[1:]
        return height, width
    if isinstance(image, Image.Image):
        width, height = image.size if _header_tells(image) else _loaded(image).size
        return height, width
    _check_source(image)
    with open_bytes(image, remote) as file:
        return _encoded_size(file)


def _check_source(image: object) -> None:
    if not isinstance(image, get_args(Source)) and not hasattr(image, "read"):
        raise ValueError(
            "is no image; pass a PIL image, a uint8 array or tensor, the bytes of an image file, "
            "its path or URL, or a binary file handle"
        )


def describe_image(image: object) -> str:
    """Names an image in an error message.

    Args:
        image (object): what :func:`to_rgb` takes, or anything else.

    Returns:
        str: such as ``image file 'cat.jpg'``, at most a few hundred characters.
    """
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "")
        return f"PIL image {name!r}, mode {image.mode}, {image.width} x {image.height} pixels"
    if isinstance(image, np.ndarray | torch.Tensor):
        return f"{type(image).__name__} of shape {tuple(image.shape)} and dtype {image.dtype}"
    return f"image {describe_source(image)}"


def _decode(data: bytes, alpha: Alpha, source: Any) -> torch.Tensor:
    pixels = _decode_jpeg(data) if _plain_jpeg_size(data) else None
    if pixels is None:
        pixels = _decode_any(data, alpha, source)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an RGB or gray JPEG to which Pillow has nothing to object or to add.

    So it is if before the first scan there are a JFIF header of the usual length, tables, comments
    and a frame, and nothing else, such as an EXIF orientation. Otherwise None is returned. Opening
    an image with Pillow takes 20 to 80 microseconds.
    """
    if not data.startswith(b"\xff\xd8\xff\xe0\x00\x10"):
        return None
    start, height, width = 20, 0, 0
    while data[start : start + 1] == b"\xff":
        marker = data[start + 1 : start + 2]
        if marker == b"\xda":  # scan
            pixels = height * width
            return (height, width) if 0 < pixels <= (Image.MAX_IMAGE_PIXELS or pixels) else None
        if marker in (b"\xc0", b"\xc2"):  # baseline or progressive frame
            if data[start + 9 : start + 10] not in (b"\x01", b"\x03"):  # channels
                return None
            height = int.from_bytes(data[start + 5 : start + 7], "big")
            width = int.from_bytes(data[start + 7 : start + 9], "big")
        elif marker not in (b"\xc4", b"\xdb", b"\xdd", b"\xfe"):  # tables, comment
            return None
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return None


def _decode_jpeg(data: bytes, orientation: int = 1) -> np.ndarray | None:
    """Pillow's pixels in two thirds of its time [H, W, C], or None where Pillow has to judge."""
    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    upright = _UPRIGHT.get(orientation)
    return np.ascontiguousarray(upright(pixels)) if upright else pixels


def _decode_any(data: bytes, alpha: Alpha, source: Any) -> np.ndarray:
    with _open(BytesIO(data)) as image:
        try:
            pixels = None
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                pixels = _decode_jpeg(data, _orientation(image))
            if pixels is None:
                ImageOps.exif_transpose(image, in_place=True)
                # The reference drops alpha here, but for a colour that stands for transparency
                image_or_rgb = image if alpha == "white" else image.convert("RGB")
                pixels = np.array(_over_white(image_or_rgb, alpha))
        except Exception as error:  # each of Pillow's decoders raises what it likes
            raise _undecodable(error) from error
        _warn_of_lost_levels(image, source)
        _warn_of_lost_frames(image, data, source)
    return pixels


def _orientation(image: Image.Image) -> int:
    exif = Image.Image.getexif(image)  # that of PngImageFile decodes the image
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    if orientation in _UPRIGHT and "exif" in image.info:
        exif.tobytes()  # what Pillow writes after turning an image; fails where EXIF is corrupt
    return orientation


def _encoded_size(file: BinaryIO) -> tuple[int, int]:
    size = _plain_jpeg_size(file.read(_PLAIN_HEAD_BYTES))
    if size:
        return size
    file.seek(0)
    with _open(file) as image:
        try:
            if not _header_tells(image) or (image.format == "PNG" and _has_late_metadata(file)):
                ImageOps.exif_transpose(image, in_place=True)
                return image.height, image.width
            turned = _orientation(image) in _SIDEWAYS
        except Exception as error:  # each of Pillow's decoders raises what it likes
            raise _undecodable(error) from error
        return (image.width, image.height) if turned else (image.height, image.width)


def _header_tells(image: Image.Image) -> bool:
    return image.format is None or image.format in _TOLD_BY_HEADER


def _has_late_metadata(png: BinaryIO) -> bool:
    """Whether texts or EXIF come after the pixels of a PNG, where Pillow sees them in decoding."""
    back = png.tell()
    png.seek(_PNG_SIGNATURE_BYTES)
    pixels = found = False
    while not found and len(head := png.read(8)) == 8:
        pixels |= head[4:] == b"IDAT"
        found = pixels and head[4:] in _PNG_METADATA
        png.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    png.seek(back)
    return found


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        if _is_heic(file):
            return _open_heic(file)
        raise _undecodable(error) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"is too large for Pillow ({error}); make it smaller, or if you trust it, raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # as above
        raise _undecodable(error) from error


def _is_heic(file: BinaryIO) -> bool:
    """Whether a file is of the kind that phones write (ISO/IEC 23008-12)."""
    file.seek(0)
    head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in _HEIC_BRANDS


def _open_heic(file: BinaryIO) -> Image.Image:
    file.seek(0)
    try:
        import_module("pillow_heif").register_heif_opener()
        return Image.open(file)
    except ImportError as error:
        raise ValueError(
            "is a HEIC file, which Pillow decodes with a plugin only: pip install pillow-heif, or "
            "convert it to JPEG"
        ) from error
    except Exception as error:  # as above
        raise _undecodable(error) from error


def _loaded(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # as above
        raise _undecodable(error) from error
    return image


def _pil_to_rgb(image: Image.Image, alpha: Alpha) -> torch.Tensor:
    try:
        rgb = _over_white(image, alpha)
    except Exception as error:  # images opened from a file are decoded only now
        raise _undecodable(error) from error
    _warn_of_lost_levels(image, image)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _undecodable(error: Exception) -> ValueError:
    return ValueError(
        f"Pillow cannot decode it ({type(error).__name__}: {error}); the file is damaged, cut off "
        "or no image: fetch it again or remove it from the data"
    )


def _over_white(image: Image.Image, alpha: Alpha) -> Image.Image:
    """Converts to RGB: ``transformers.image_transforms.convert_to_rgb``.

    The pixels over white are also those of qwen-vl-utils' ``to_rgb``.
    """
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
    if image.mode[0] in "IF" and _first("levels"):
        warnings.warn(
            f"{describe_image(source)} has levels of more than 8 bits (mode {image.mode}), which "
            "are cut off at 0 and 255, not scaled, here as in transformers: scale such images to "
            "0 ... 255 before. This is said once.",
            stacklevel=2,
        )


def _warn_of_lost_frames(image: Image.Image, data: bytes, source: Any) -> None:
    if image.format in _ONE_PICTURE or "frames" in _warned:
        return
    try:
        if not getattr(image, "is_animated", False):
            return
        frames = image.n_frames if len(data) <= _COUNTED_BYTES else "many"  # type: ignore[attr-defined]
    except Exception:  # a damaged later frame is of no concern to the first
        return
    if _first("frames"):
        warnings.warn(
            f"{describe_image(source)} has {frames} frames, of which the first is taken: pass an "
            "animation as a video, or its frames one by one. This is said once.",
            stacklevel=2,
        )


def _first(kind: str) -> bool:
    """Whether this is the process's first warning of a kind."""
    new = kind not in _warned
    _warned.add(kind)
    return new


def _array_to_rgb(image: np.ndarray | torch.Tensor, backend: Backend, alpha: Alpha) -> torch.Tensor:
    pixels_CHW = _checked_array(image)
    if len(pixels_CHW) == 4 and alpha == "white":
        rgba_HWC = np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())
        return _pil_to_rgb(Image.fromarray(rgba_HWC), alpha)
    if len(pixels_CHW) == 4:
        return _blend_with_white(pixels_CHW, backend)
    return pixels_CHW.expand(3, -1, -1)


def _checked_array(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The array as [c, H, W], c of 1, 3 or 4."""
    if image.dtype not in (torch.uint8, np.uint8):
        raise ValueError("the dtype must be uint8; scale the values to 0 ... 255 and convert them")
    if image.ndim not in (2, 3):
        raise ValueError("an image has 2 or 3 dimensions; pass the images of a batch one by one")
    if isinstance(image, np.ndarray):
        # torch takes neither negative strides (a flipped array) nor, silently, read-only memory
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    return _channels_first(image)


def _channels_first(pixels: torch.Tensor) -> torch.Tensor:
    """Guesses the layout like ``transformers.image_utils.infer_channel_dimension_format``."""
    if pixels.ndim == 2:
        return pixels.unsqueeze(0)
    if pixels.shape[0] in CHANNELS:
        return pixels
    if pixels.shape[2] in CHANNELS:
        return pixels.permute(2, 0, 1)
    raise ValueError(f"neither the first nor the last dimension is one of {CHANNELS} channels")


def _blend_with_white(rgba_CHW: torch.Tensor, backend: Backend) -> torch.Tensor:
    """Blends uint8 RGBA: ``convert_to_rgb`` of the transformers backends."""
    if backend == "pil":
        opacity = rgba_CHW[3:].double() / 255
        return (opacity * rgba_CHW[:3] + (1 - opacity) * 255).round().to(torch.uint8)
    rgba = rgba_CHW.float() * (1 / 255)
    opacity = rgba[3:]
    # torchvision truncates, 1e-3 below 256 instead of rounding at 255
    return ((rgba[:3] * opacity + (1 - opacity)) * (256 - 1e-3)).to(torch.uint8)
