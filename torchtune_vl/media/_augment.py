"""Random changes of training images that leave the size which the model sees as it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps

from torchtune_vl.media import _patches
from torchtune_vl.media._images import Backend
from torchtune_vl.media._patches import CHANNELS, Size

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in whole pixels
Axis = tuple[float, float]  # a factor, and what is added behind it

# Of red, green and blue in brightness (ITU-R BT.601), as in Pillow's mode "L"
_LUMA = (0.299, 0.587, 0.114)
# Without brightness or contrast nothing is left to see, and names of colours should stay true
_HIGHEST = {"crop": 1, "scale": 1, "flip": 1, "hue": 0.05}
_HIGHEST |= dict.fromkeys(("brightness", "contrast", "saturation"), 0.9)


class Change(NamedTuple):
    """What is done to one image, in this order.

    Args:
        window: the part of the upright original that is kept.
        place: where it goes in the resized image, whose mean colour fills the rest.
        flip: whether left and right then change places.
        brightness, contrast, saturation: factors, of contrast between pixels and the mean gray.
        hue: how far colours turn around the gray axis, in turns, red towards green.
        jpeg_quality: of a JPEG file that the result was written to and read from.
        refused: which changes that were asked for were not made, and why.
    """

    window: Box
    place: Box
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    jpeg_quality: int | None = None
    refused: str | None = None

    def axes(self, original: Size, resized: Size) -> tuple[Axis, Axis]:
        """Tell where it takes points: a part of the original's width or height to the result's.

        ``original`` and ``resized`` are height and width of the images before and after.
        """
        axes = []
        for i, (old, new) in enumerate(zip(original[::-1], resized[::-1], strict=True)):
            (start, end), (new_start, new_end) = self.window[i::2], self.place[i::2]
            zoom = Fraction(new_end - new_start, end - start)
            factor, offset = zoom * old / new, (new_start - zoom * start) / new
            if self.flip and i == 0:
                factor, offset = -factor, 1 - offset
            axes.append((float(factor), float(offset)))
        return axes[0], axes[1]

    def resize(
        self, image_CHW: torch.Tensor, height: int, width: int, backend: Backend
    ) -> np.ndarray:
        """Resize uint8 pixels and change them, [H, W, C]; the backend is that of the resizing."""
        left, top, right, bottom = self.window
        x1, y1, x2, y2 = self.place
        window_CHW = image_CHW[:, top:bottom, left:right]
        image = Image.fromarray(_patches.resize(window_CHW, y2 - y1, x2 - x1, backend))
        if image.size != (width, height):
            canvas = Image.new("RGB", (width, height), _mean_color(image))
            canvas.paste(image, (x1, y1))
            image = canvas
        if self.flip:
            image = ImageOps.mirror(image)
        if (self.brightness, self.contrast, self.saturation, self.hue) != (1, 1, 1, 0):
            image = image.convert("RGB", self._color_matrix(image))
        pixels_HWC = np.array(image)
        if self.jpeg_quality is None:
            return pixels_HWC
        file = simplejpeg.encode_jpeg(pixels_HWC, self.jpeg_quality, colorsubsampling="420")
        return simplejpeg.decode_jpeg(file)

    def _color_matrix(self, image: Image.Image) -> Any:
        """The 12 numbers of Pillow's ``convert``: each channel's factors, and what is added."""
        luma, angle = np.array(_LUMA), 2 * math.pi * self.hue
        saturate = self.saturation * np.eye(CHANNELS) + (1 - self.saturation) * luma
        # The rotation around (1, 1, 1)
        across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
        turn = math.cos(angle) * np.eye(CHANNELS) + math.sin(angle) * across
        turn += (1 - math.cos(angle)) / CHANNELS
        mean = self.brightness * luma @ _mean_color(image)
        matrix = self.brightness * self.contrast * turn @ saturate
        offsets = np.full((CHANNELS, 1), (1 - self.contrast) * mean)
        return tuple(np.hstack([matrix, offsets]).flatten().tolist())


# Of height and width of the original and of the resized image
Draw = Callable[[Size, Size], Change]


def farthest(original: Size, resized: Size) -> Change:
    """Give the change by which boxes get the largest numbers: all is in the lower right corner."""
    height, width = resized
    return Change((0, 0, *original[::-1]), (width, height, width, height))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are changed at random, another way in each epoch; None and 0 are off.

    An image keeps the size that the model sees, and so its tokens and positions, and its boxes and
    points move along. One image is either cropped or scaled.

    Args:
        crop: the smallest window that is zoomed in on, in parts of each side. It has the image's
            aspect ratio and all of its boxes and points.
        flip: how probable it is that left and right change places, in all images of a sample.
        scale: the smallest size that an image is zoomed out to, in parts of each side. The rest is
            filled with its mean colour.
        jpeg_quality: the lowest and the highest quality, 1 to 100, of a JPEG file that the image is
            written to and read from.
        brightness, contrast, saturation: 0.2 for factors between 0.8 and 1.2; 0.9 at most.
        hue: by how much colours turn at most, in turns; 0.05 at most, as names of colours in texts
            would be wrong.
        seed: of all that is random, together with the epoch and the sample's number.

    ``ValueError`` names a setting that is out of its range.
    """

    crop: float | None = None
    flip: float | None = None
    scale: float | None = None
    jpeg_quality: tuple[int, int] | None = None
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, highest in _HIGHEST.items():
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 <= value <= highest):
                limits = f"0 <= {name} <= {highest}"
                raise ValueError(f"augmentation: {name} is {value!r}: make it a number, {limits}")
        if self.jpeg_quality is not None:
            given = self.jpeg_quality
            are_integers = isinstance(given, list | tuple) and {*map(type, given)} == {int}
            if not are_integers or len(given) != 2 or not 1 <= given[0] <= given[1] <= 100:
                wanted = "two integers, 1 <= lowest <= highest <= 100"
                raise ValueError(f"augmentation: jpeg_quality is {given!r}: make it {wanted}")
        if type(self.seed) is not int or self.seed < 0:
            problem = f"augmentation: seed is {self.seed!r}"
            raise ValueError(f"{problem}: make it an integer of at least 0")

    @property
    def moving(self) -> list[str]:
        """The settings that are on and move boxes."""
        return [name for name in ("crop", "scale", "flip") if getattr(self, name)]

    def draw(self, random: np.random.Generator, original: Size, resized: Size, kept: Box) -> Change:
        """Draw what is done to one image, but for a flip.

        Args:
            random: where chance comes from.
            original: height and width of the upright image.
            resized: height and width that the model sees.
            kept: what a window of the original has to contain; with x1 > x2 nothing.
        """
        height, width = original
        window, place = (0, 0, width, height), (0, 0, *resized[::-1])
        if self.crop and not (self.scale and random.random() < 0.5):
            window = _part(random, self.crop, original, kept)
        elif self.scale:
            place = _part(random, self.scale, resized, kept=(*resized[::-1], 0, 0))
        quality = None
        if self.jpeg_quality:
            quality = int(random.integers(*self.jpeg_quality, endpoint=True))
        return Change(
            window,
            place,
            brightness=_factor(random, self.brightness),
            contrast=_factor(random, self.contrast),
            saturation=_factor(random, self.saturation),
            hue=random.uniform(-self.hue, self.hue) if self.hue else 0.0,
            jpeg_quality=quality,
        )


def _factor(random: np.random.Generator, strength: float | None) -> float:
    return random.uniform(1 - strength, 1 + strength) if strength else 1.0


def _part(random: np.random.Generator, least: float, size: Size, kept: Box) -> Box:
    """A part of an image, of its aspect ratio, with at least so much of each side."""
    height, width = size
    x1, y1, x2, y2 = kept
    share = random.uniform(max(least, (x2 - x1) / width, (y2 - y1) / height), 1)
    part_width, part_height = math.ceil(share * width), math.ceil(share * height)
    left = random.integers(max(0, x2 - part_width), min(x1, width - part_width), endpoint=True)
    top = random.integers(max(0, y2 - part_height), min(y1, height - part_height), endpoint=True)
    return int(left), int(top), int(left) + part_width, int(top) + part_height


def _mean_color(image: Image.Image) -> Any:
    return image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
