"""One image to the patches and the grid that Qwen2.5-VL's vision encoder reads.

The steps are separate functions, each of them equal to the transformers step it names:
``to_rgb`` -> ``smart_resize`` and ``resize`` -> ``normalized_patches``.

Shapes: C channels (3), H height and W width in pixels, T frames (1).
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional as F

from torchtune_vl.models.qwen2_5_vl._patches import (
    CLIP_MEAN,
    CLIP_STD,
    PATCH_SIZE,
    Backend,
    normalized_patches,
    patchify,
)
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE

PatchDtype = Literal["float32", "uint8"]
ImageInput = Image.Image | np.ndarray | torch.Tensor | bytes | str | os.PathLike

# preprocessor_config.json of every published Qwen2.5-VL; transformers' class default for
# MAX_PIXELS is smaller (1,003,520)
MIN_PIXELS = 3136
MAX_PIXELS = 12845056
SQUARE = PATCH_SIZE * MERGE_SIZE

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

MAX_ASPECT_RATIO = 200
CHANNELS = (1, 3, 4)


class Qwen2_5_VLImageTransform:
    """Turns one image into normalized patches, as transformers' image processor does.

    The result is bit-identical to transformers' ``Qwen2VLImageProcessor`` (``torchvision``) or
    ``Qwen2VLImageProcessorPil`` (``pil``) for PIL images, arrays and tensors. Encoded bytes and
    paths are decoded by Pillow and loaded as ``transformers.image_utils.load_image`` does: turned
    upright by their EXIF orientation, then converted to RGB, which drops an alpha channel, while a
    PIL image or array with one is composited over white.

    Args:
        backend (Backend): whose pixels to reproduce, "torchvision" or "pil". They resize,
            composite alpha channels of arrays and round differently.
        min_pixels (int): smallest area after resizing, in pixels.
        max_pixels (int): largest area after resizing, in pixels.
        image_mean (Sequence[float]): mean of each RGB channel, for values in [0, 1].
        image_std (Sequence[float]): standard deviation of each RGB channel, likewise.
        patch_dtype (PatchDtype): "float32", or "uint8" for patches before normalization and
            without their copy along time, an eighth of the bytes. The model does the rest on its
            device, with the default mean and deviation and in the order of the ``torchvision``
            backend; that of the ``pil`` backend rounds otherwise in the last bit.

    Raises:
        ValueError: if ``backend`` or ``patch_dtype`` is unknown, not 1 <= ``min_pixels`` <=
            ``max_pixels``, or uint8 patches are to have another mean or deviation.

    Examples:
        >>> transform = Qwen2_5_VLImageTransform()
        >>> sample = transform({"image": Image.new("RGB", (224, 224))})
        >>> sample["pixel_values"].shape, sample["image_grid_thw"], sample["num_image_tokens"]
        (torch.Size([256, 1176]), tensor([[ 1, 16, 16]]), 64)
    """

    def __init__(
        self,
        *,
        backend: Backend = "torchvision",
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        patch_dtype: PatchDtype = "float32",
    ) -> None:
        if backend not in get_args(Backend):
            raise ValueError(f"unknown backend {backend!r}: use one of {get_args(Backend)}")
        if not 1 <= min_pixels <= max_pixels:
            raise ValueError(
                f"min_pixels is {min_pixels} and max_pixels {max_pixels}: "
                "make them 1 <= min_pixels <= max_pixels"
            )
        if patch_dtype not in get_args(PatchDtype):
            raise ValueError(
                f"unknown patch_dtype {patch_dtype!r}: use one of {get_args(PatchDtype)}"
            )
        if patch_dtype == "uint8" and (*image_mean, *image_std) != (*CLIP_MEAN, *CLIP_STD):
            raise ValueError(
                f"the model normalizes uint8 patches by the mean {CLIP_MEAN} and the deviation "
                f"{CLIP_STD}, not by {tuple(image_mean)} and {tuple(image_std)}: use float32"
            )
        self.backend = backend
        self.patch_dtype = patch_dtype
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Adds patches, grid and number of tokens of ``sample["image"]`` to the sample.

        Args:
            sample (Mapping[str, Any]): its "image" is a PIL image of any mode; a uint8 array or
                tensor [H, W], [H, W, c] or [c, H, W] with c of 1, 3 or 4 (read as [c, H, W] where
                both fit); the bytes of an image file; or the path of one.
            inference (bool): part of torchtune's transform interface; makes no difference here.

        Returns:
            dict[str, Any]: a new dict, the sample plus ``pixel_values`` float32
            [grid_h * grid_w, 1176], or uint8 [grid_h * grid_w, 588]; ``image_grid_thw`` int64
            [1, 3] (patches along time, height and width); and ``num_image_tokens``, the number of
            placeholders that the image takes in the text.

        Raises:
            ValueError: if the image cannot be read, is no uint8 image of 1, 3 or 4 channels, has a
                side of 0, or has one side more than 200 times the other. Names the image. A
                program that sets ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` gets Pillow's filling in
                place of the missing part of a truncated file, and no error.
        """
        image = sample["image"]
        try:
            rgb_CHW = to_rgb(image, self.backend)
            _, height, width = rgb_CHW.shape
            height, width = smart_resize(height, width, SQUARE, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise ValueError(f"{_describe(image)}: {error}") from error

        resized_THWC = resize(rgb_CHW, height, width, self.backend).permute(1, 2, 0)[None].numpy()
        if self.patch_dtype == "uint8":
            patches = patchify(resized_THWC)
        else:
            patches = normalized_patches(
                resized_THWC, self.image_mean, self.image_std, self.backend
            )
        return {
            **sample,
            "pixel_values": torch.from_numpy(patches),
            "image_grid_thw": torch.tensor([[1, height // PATCH_SIZE, width // PATCH_SIZE]]),
            "num_image_tokens": len(patches) // MERGE_SIZE**2,
        }


def smart_resize(
    height: int,
    width: int,
    factor: int = SQUARE,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """Finds the size that an image is resized to: transformers' ``smart_resize``.

    Both sides become multiples of ``factor``, the area moves between ``min_pixels`` and
    ``max_pixels``, and the aspect ratio stays as near as these allow.

    Args:
        height (int): height of the image in pixels.
        width (int): width of the image in pixels.
        factor (int): what both sides must be a multiple of: patch_size * merge_size.
        min_pixels (int): smallest area, in pixels.
        max_pixels (int): largest area, in pixels. One ``factor`` per side is kept in any case.

    Returns:
        tuple[int, int]: new height and width in pixels.

    Raises:
        ValueError: if a side is 0 or one is more than 200 times the other.
    """
    if min(height, width) < 1:
        raise ValueError(
            f"height {height} and width {width}: an image needs at least one pixel each way; "
            "remove it from the data"
        )
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"height {height} and width {width}: one side is more than {MAX_ASPECT_RATIO} times "
            "the other; crop or pad the image"
        )
    sides = (height, width)
    area = height * width
    new_height, new_width = (round(side / factor) * factor for side in sides)
    # The order of the float operations decides between two multiples of factor in close cases
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        new_height, new_width = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in sides
        )
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / area)
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in sides)
    return new_height, new_width


def to_rgb(image: ImageInput, backend: Backend = "torchvision") -> torch.Tensor:
    """Decodes an image, whatever holds it, to RGB.

    Equal to ``process_image`` of transformers' ``TorchvisionBackend`` or ``PilBackend``, which
    bytes and paths reach by way of ``transformers.image_utils.load_image``.

    Args:
        image (ImageInput): PIL image; uint8 array or tensor [H, W], [H, W, c] or [c, H, W]; bytes
            of an image file; or the path of one.
        backend (Backend): which transformers backend's alpha compositing arrays get.

    Returns:
        torch.Tensor: uint8 [C, H, W], often a view of [H, W, C] memory, or of the input.

    Raises:
        ValueError: if the image cannot be read or is no uint8 image of 1, 3 or 4 channels. The
            message leaves it to the caller to name the image.
    """
    if isinstance(image, str | os.PathLike):
        image = _read(image)
    if isinstance(image, bytes):
        return _decode(image)
    if isinstance(image, Image.Image):
        return _pil_to_rgb(image)
    if isinstance(image, np.ndarray | torch.Tensor):
        return _array_to_rgb(image, backend)
    raise ValueError(
        "is no image; pass a PIL image, a uint8 array or tensor, the bytes of an image file, "
        "or its path"
    )


def resize(
    image_CHW: torch.Tensor, height: int, width: int, backend: Backend = "torchvision"
) -> torch.Tensor:
    """Resizes by bicubic interpolation with antialiasing, as the transformers backend does.

    Args:
        image_CHW (torch.Tensor): uint8 RGB [C, H, W], in any memory layout ([H, W, C] is fastest).
        height (int): new height in pixels.
        width (int): new width in pixels.
        backend (Backend): "torchvision" interpolates with torch, "pil" with Pillow.

    Returns:
        torch.Tensor: uint8 [C, height, width]; the input itself if it has that size.
    """
    if image_CHW.shape[1:] == (height, width):
        return image_CHW
    image_HWC = image_CHW.permute(1, 2, 0)
    if backend == "pil":
        resized = Image.fromarray(image_HWC.numpy()).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    # Only a batch dimension that was added in front of HWC has the strides by which torch
    # recognizes channels-last memory, where it needs half the time for the same pixels
    batch_NCHW = image_HWC.unsqueeze(0).permute(0, 3, 1, 2)
    return F.interpolate(batch_NCHW, (height, width), mode="bicubic", antialias=True)[0]


def _read(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot be read ({error.strerror}); correct the path or remove it from the data"
        ) from error


def _decode(data: bytes) -> torch.Tensor:
    if not data:
        raise ValueError("is empty (0 bytes); fetch it again or remove it from the data")
    try:
        with Image.open(BytesIO(data)) as image:
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                pixels = _decode_jpeg(data, image.getexif().get(ExifTags.Base.Orientation, 1))
                if pixels is not None:
                    return torch.from_numpy(pixels).permute(2, 0, 1)
            ImageOps.exif_transpose(image, in_place=True)
            return _pil_to_rgb(image.convert("RGB"))
    except Exception as error:  # each of Pillow's decoders raises what it likes
        raise _undecodable(error) from error


def _decode_jpeg(data: bytes, orientation: int) -> np.ndarray | None:
    """Pillow's pixels in two thirds of its time [H, W, C], or None where Pillow has to judge."""
    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    upright = _UPRIGHT.get(orientation)
    return np.ascontiguousarray(upright(pixels)) if upright else pixels


def _pil_to_rgb(image: Image.Image) -> torch.Tensor:
    try:
        rgb = _flatten(image)
    except Exception as error:  # images opened from a file are decoded only now
        raise _undecodable(error) from error
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _undecodable(error: Exception) -> ValueError:
    return ValueError(
        f"Pillow cannot decode it ({type(error).__name__}: {error}); the file is damaged, cut off "
        "or no image: fetch it again or remove it from the data"
    )


def _flatten(image: Image.Image) -> Image.Image:
    """Converts to RGB, over white: ``transformers.image_transforms.convert_to_rgb``."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _array_to_rgb(image: np.ndarray | torch.Tensor, backend: Backend) -> torch.Tensor:
    if image.dtype not in (torch.uint8, np.uint8):
        raise ValueError("the dtype must be uint8; scale the values to 0 ... 255 and convert them")
    if image.ndim not in (2, 3):
        raise ValueError("an image has 2 or 3 dimensions; pass the images of a batch one by one")
    if isinstance(image, np.ndarray):
        # torch takes neither negative strides (a flipped array) nor, silently, read-only memory
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    pixels_CHW = _channels_first(image)
    if len(pixels_CHW) == 4:
        return _composite_over_white(pixels_CHW, backend)
    return pixels_CHW.expand(3, -1, -1)


def _channels_first(pixels: torch.Tensor) -> torch.Tensor:
    """Guesses the layout like ``transformers.image_utils.infer_channel_dimension_format``."""
    if pixels.ndim == 2:
        return pixels.unsqueeze(0)
    if pixels.shape[0] in CHANNELS:
        return pixels
    if pixels.shape[2] in CHANNELS:
        return pixels.permute(2, 0, 1)
    raise ValueError(f"neither the first nor the last dimension is one of {CHANNELS} channels")


def _composite_over_white(rgba_CHW: torch.Tensor, backend: Backend) -> torch.Tensor:
    """Blends uint8 RGBA onto white: ``convert_to_rgb`` of the transformers backends."""
    if backend == "pil":
        alpha = rgba_CHW[3:].double() / 255
        return (alpha * rgba_CHW[:3] + (1 - alpha) * 255).round().to(torch.uint8)
    rgba = rgba_CHW.float() * (1 / 255)
    alpha = rgba[3:]
    # torchvision truncates, 1e-3 below 256 instead of rounding at 255
    return ((rgba[:3] * alpha + (1 - alpha)) * (256 - 1e-3)).to(torch.uint8)


def _describe(image: object) -> str:
    if isinstance(image, str | os.PathLike):
        return f"image file {os.fspath(image)!r}"
    if isinstance(image, bytes):
        return f"encoded image of {len(image)} bytes"
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "")
        return f"PIL image {name!r}, mode {image.mode}, {image.width} x {image.height} pixels"
    if isinstance(image, np.ndarray | torch.Tensor):
        return f"{type(image).__name__} of shape {tuple(image.shape)} and dtype {image.dtype}"
    return f"object of type {type(image).__name__}"
