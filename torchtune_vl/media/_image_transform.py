"""One image to the patches and the grid that a vision encoder reads.

The steps are separate functions, each of them equal to the transformers step it names:
``to_rgb`` -> ``smart_resize`` and ``resize`` -> ``normalized_patches``.

Shapes: C channels (3), H height and W width in pixels, T frames (1).
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from torchtune_vl.media._geometry import CHANNELS, Geometry
from torchtune_vl.media._images import Alpha, Backend, describe_image, rgb_size, to_rgb
from torchtune_vl.media._patches import normalized_patches, patchify
from torchtune_vl.media._sources import RemoteLimits

PatchDtype = Literal["float32", "uint8"]
Size = tuple[int, int]  # height and width in pixels

MAX_ASPECT_RATIO = 200

# After resizing, of all steps of a medium together: 342,392 tokens, more than any context holds,
# and larger than images that Pillow opens
_LARGEST_AREA = 2**28

# The limits that a sample may have
_LIMITS = ("min_pixels", "max_pixels", "resized_height", "resized_width")


class ImageTransform:
    """Turns one image into normalized patches, as transformers' image processor does.

    The result is bit-identical to transformers' ``Qwen2VLImageProcessor`` (``torchvision``) or
    ``Qwen2VLImageProcessorPil`` (``pil``), for encoded images after
    ``transformers.image_utils.load_image``: see :func:`~torchtune_vl.media._images.to_rgb`.

    Args:
        geometry (Geometry): sizes of patches, and defaults of the settings.
        backend (Backend): whose pixels to reproduce, "torchvision" or "pil". They resize,
            composite alpha channels of arrays and round differently.
        alpha (Alpha): what becomes of transparency. "reference": what transformers makes of it,
            dropped in encoded images, composited over white in PIL images, arrays and tensors.
            "white": composited over white in all of them, as qwen-vl-utils does with RGBA.
        remote (RemoteLimits | None): limits of ``https://`` URLs, which are refused without.
        min_pixels (int | None): smallest area after resizing, in pixels; None: the geometry's.
        max_pixels (int | None): largest area, likewise.
        image_mean (Sequence[float] | None): mean of each RGB channel, for values in [0, 1]; None:
            the geometry's.
        image_std (Sequence[float] | None): standard deviation of each, likewise.
        patch_dtype (PatchDtype): "float32", or "uint8" for patches before normalization and
            without their copy along time, an eighth of the bytes. The model does the rest on its
            device, with the geometry's mean and deviation and in the order of the ``torchvision``
            backend; that of the ``pil`` backend rounds otherwise in the last bit.

    Raises:
        ValueError: if ``backend``, ``alpha`` or ``patch_dtype`` is unknown, not 1 <=
            ``min_pixels`` <= ``max_pixels``, or uint8 patches are to have another mean or
            deviation.

    Examples:
        >>> from torchtune_vl.models.qwen2_5_vl import GEOMETRY
        >>> transform = ImageTransform(GEOMETRY)
        >>> sample = transform({"image": Image.new("RGB", (224, 224))})
        >>> sample["pixel_values"].shape, sample["image_grid_thw"], sample["num_image_tokens"]
        (torch.Size([256, 1176]), tensor([[ 1, 16, 16]]), 64)
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        backend: Backend = "torchvision",
        alpha: Alpha = "reference",
        remote: RemoteLimits | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        patch_dtype: PatchDtype = "float32",
    ) -> None:
        for name, value, known in (
            ("backend", backend, get_args(Backend)),
            ("alpha", alpha, get_args(Alpha)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: use one of {known}")
        self.geometry = geometry
        self.backend = backend
        self.alpha = alpha
        self.remote = remote
        self.min_pixels = geometry.min_pixels if min_pixels is None else min_pixels
        self.max_pixels = geometry.max_pixels if max_pixels is None else max_pixels
        self._check_integers({"min_pixels": self.min_pixels, "max_pixels": self.max_pixels})
        _check_limits(self.min_pixels, self.max_pixels)
        self.image_mean = geometry.mean if image_mean is None else tuple(image_mean)
        self.image_std = geometry.std if image_std is None else tuple(image_std)
        self.patch_dtype = patch_dtype
        check_normalization(patch_dtype, self.image_mean, self.image_std, geometry)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Adds patches, grid and number of tokens of ``sample["image"]`` to the sample.

        Args:
            sample (Mapping[str, Any]): its "image" is a PIL image of any mode; a uint8 array or
                tensor [H, W], [H, W, c] or [c, H, W] with c of 1, 3 or 4 (read as [c, H, W] where
                both fit); or an encoded image: bytes, path, ``file://``, ``data:`` or
                ``https://`` URL, or binary file handle, which stays open and where it is.
                Limits of its own have the names and the meaning of qwen-vl-utils:
                "min_pixels" and "max_pixels" go before those of the transform;
                "resized_height" and "resized_width", both at least 28, before all of them, and are
                themselves moved to multiples of 28 with an area of 3,136 to 12,845,056 pixels.
                None counts as absent.
            inference (bool): part of torchtune's transform interface; makes no difference here.

        Returns:
            dict[str, Any]: a new dict, the sample plus ``pixel_values`` float32
            [grid_h * grid_w, 1176], or uint8 [grid_h * grid_w, 588]; ``image_grid_thw`` int64
            [1, 3] (patches along time, height and width); ``num_image_tokens``, the number of
            placeholders that the image takes in the text; and ``original_size``, the height and
            width of the upright image in pixels.

        Raises:
            ValueError: if the image cannot be read, is no uint8 image of 1, 3 or 4 channels, has a
                side of 0, or has one side more than 200 times the other; or if a limit is no
                integer in its range. Names the image. A program that sets
                ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` gets Pillow's filling in place of the
                missing part of a truncated file, and no error.
        """
        image = sample["image"]
        try:
            rgb_CHW = to_rgb(image, self.backend, self.alpha, self.remote)
            original_size = (rgb_CHW.shape[1], rgb_CHW.shape[2])
            height, width = self._target_size(original_size, sample)
        except ValueError as error:
            raise ValueError(f"{describe_image(image)}: {error}") from error

        resized_THWC = resize(rgb_CHW, height, width, self.backend).permute(1, 2, 0)[None].numpy()
        if self.patch_dtype == "uint8":
            patches = patchify(resized_THWC, self.geometry)
        else:
            patches = normalized_patches(
                resized_THWC, self.geometry, self.image_mean, self.image_std, self.backend
            )
        return self._described(sample, torch.from_numpy(patches), height, width, original_size)

    def measure(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Finds what :meth:`__call__` returns but for the pixels, from headers of files.

        Args:
            sample (Mapping[str, Any]): as in :meth:`__call__`.

        Returns:
            dict[str, Any]: that of :meth:`__call__`, with ``pixel_values`` on the meta device:
            a shape and dtype without values.

        Raises:
            ValueError: as :meth:`__call__` does, but for what only decoding shows.
        """
        image = sample["image"]
        try:
            original_size = rgb_size(image, self.remote)
            height, width = self._target_size(original_size, sample)
        except ValueError as error:
            raise ValueError(f"{describe_image(image)}: {error}") from error
        size = self.geometry.patch_size
        values = self.geometry.values_per_patch
        if self.patch_dtype == "uint8":
            values = CHANNELS * size**2
        patches = torch.empty(
            height // size * (width // size),
            values,
            dtype=getattr(torch, self.patch_dtype),
            device="meta",
        )
        return self._described(sample, patches, height, width, original_size)

    def _target_size(self, original_size: Size, sample: Mapping[str, Any]) -> Size:
        """Size of the resized image: that of ``qwen_vl_utils.fetch_image``."""
        limits = {name: sample[name] for name in _LIMITS if sample.get(name) is not None}
        self._check_integers(limits)
        if "resized_height" in limits and "resized_width" in limits:
            _check_sides(*original_size)
            return exact_size(limits["resized_height"], limits["resized_width"], self.geometry)
        if "resized_height" in limits or "resized_width" in limits:
            raise ValueError("has one of resized_height and resized_width: give both or none")
        min_pixels = limits.get("min_pixels", self.min_pixels)
        max_pixels = limits.get("max_pixels", self.max_pixels)
        _check_limits(min_pixels, max_pixels)
        resized = smart_resize(*original_size, self.geometry.unit, min_pixels, max_pixels)
        check_area(1, *resized, self.geometry)
        return resized

    def _described(
        self,
        sample: Mapping[str, Any],
        patches: torch.Tensor,
        height: int,
        width: int,
        original_size: Size,
    ) -> dict[str, Any]:
        size = self.geometry.patch_size
        return {
            **sample,
            "pixel_values": patches,
            "image_grid_thw": torch.from_numpy(np.array([[1, height // size, width // size]])),
            "num_image_tokens": len(patches) // self.geometry.merge_size**2,
            "original_size": original_size,
        }

    def _check_integers(self, limits: Mapping[str, Any]) -> None:
        for name, value in limits.items():
            least = self.geometry.unit if name.startswith("resized") else 1
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}: make it an integer of at least {least}")


def check_normalization(
    patch_dtype: PatchDtype, mean: Sequence[float], std: Sequence[float], geometry: Geometry
) -> None:
    """Refuses a dtype of patches that is unknown, or that the model would normalize otherwise.

    Args:
        patch_dtype (PatchDtype): the dtype.
        mean (Sequence[float]): mean of each RGB channel.
        std (Sequence[float]): standard deviation of each.
        geometry (Geometry): by whose mean and deviation the model normalizes uint8 patches.

    Raises:
        ValueError: if it is so.
    """
    if patch_dtype not in get_args(PatchDtype):
        raise ValueError(f"unknown patch_dtype {patch_dtype!r}: use one of {get_args(PatchDtype)}")
    if patch_dtype == "uint8" and (*mean, *std) != (*geometry.mean, *geometry.std):
        raise ValueError(
            f"the model normalizes uint8 patches by the mean {geometry.mean} and the deviation "
            f"{geometry.std}, not by {tuple(mean)} and {tuple(std)}: use float32"
        )


def _check_limits(min_pixels: int, max_pixels: int) -> None:
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(
            f"min_pixels is {min_pixels} and max_pixels {max_pixels}: "
            "make them 1 <= min_pixels <= max_pixels"
        )


def check_area(steps: int, height: int, width: int, geometry: Geometry) -> None:
    """Refuses media that are to be made so large that their tokens could not even be counted.

    Args:
        steps (int): along time.
        height (int): height of a step after resizing, in pixels.
        width (int): width of a step after resizing, in pixels.
        geometry (Geometry): sizes of patches.

    Raises:
        ValueError: if they have more than 2**28 pixels together.
    """
    area = steps * height * width
    if area > _LARGEST_AREA:
        raise ValueError(
            f"resized to {steps} x {height} x {width} pixels it would have "
            f"{area // geometry.unit**2:,} tokens: lower min_pixels"
        )


def _check_sides(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(
            f"height {height} and width {width}: an image needs at least one pixel each way; "
            "remove it from the data"
        )


def exact_size(height: int, width: int, geometry: Geometry) -> Size:
    """Finds the size for one that a sample asks for, as qwen-vl-utils does.

    Args:
        height (int): the height, in pixels.
        width (int): the width, in pixels.
        geometry (Geometry): its unit divides the result, whose area is within its limits.

    Returns:
        Size: new height and width in pixels.

    Raises:
        ValueError: if one is more than 200 times the other.
    """
    return smart_resize(height, width, geometry.unit, geometry.min_pixels, geometry.max_pixels)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> Size:
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
        Size: new height and width in pixels.

    Raises:
        ValueError: if a side is 0 or one is more than 200 times the other.
    """
    _check_sides(height, width)
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
