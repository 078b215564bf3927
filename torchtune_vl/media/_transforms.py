"""One image or one video to the patches and the grid that a vision encoder reads.

Shapes: T frames, C channels (3), H height and W width in pixels.
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain, islice, repeat
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from torchtune_vl.media import _patches
from torchtune_vl.media._augment import Draw
from torchtune_vl.media._errors import check_choice, refusing
from torchtune_vl.media._images import Alpha, Backend, naming, rgb_size, to_rgb, uint8_tensor
from torchtune_vl.media._patches import CHANNELS, Geometry, Size
from torchtune_vl.media._sources import RemoteLimits
from torchtune_vl.media._videos import open_video

PatchDtype = Literal["float32", "uint8"]
Grid = tuple[int, int, int]  # patches along time, height and width
# Frames [C, H, W], how many there are, how many make a step, and what else a call adds
Frames = tuple[Iterator[torch.Tensor], int, int, dict[str, Any]]
Settings = Mapping[str, Any]

# After resizing, of all steps of a medium together: 342,392 tokens, more than any context holds,
# and larger than images that Pillow opens
LARGEST_AREA = 2**28

# Of qwen-vl-utils
FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
FRAME_FACTOR = 2  # what numbers of frames are multiples of

SIDES_TOKENS = (4, 16384)  # the least and most of a frame whose sides are given

# The settings that a sample may have
SIDES = ("resized_height", "resized_width")
SIZING = ("min_pixels", "max_pixels", *SIDES)
TIMES = ("video_start", "video_end")
SAMPLING = ("fps", "nframes", "min_frames", "max_frames", *TIMES)
# The least values of integers (of sides a unit), and what other numbers are above
LEAST = {"nframes": 1, "min_frames": 0, "max_frames": 1, "min_pixels": 1, "max_pixels": 1}
ABOVE = {"fps": 0, "sample_fps": 0, "total_pixels": 0, **dict.fromkeys(TIMES, -math.inf)}


@dataclass(eq=False)
class MediumTransform:
    """What the transforms of images and of videos share."""

    geometry: Geometry
    _: KW_ONLY
    backend: Backend = field(default="torchvision", init=False)
    alpha: Alpha = field(default="reference", init=False)
    # `| Any` for None, which `_defaults` replaces
    min_pixels: int | Any = None
    max_pixels: int | Any = None
    image_mean: Sequence[float] | Any = None
    image_std: Sequence[float] | Any = None
    patch_dtype: PatchDtype = "float32"
    remote: RemoteLimits | None = None

    _kind: ClassVar[str]  # of medium, by which a sample names it
    _pixels: ClassVar[str]  # the name that its patches get
    _settings: ClassVar[Sequence[str]]  # that a sample may have

    def __post_init__(self) -> None:
        for name, value in self._defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.image_mean, self.image_std = tuple(self.image_mean), tuple(self.image_std)
        for name, kind in (("backend", Backend), ("alpha", Alpha), ("patch_dtype", PatchDtype)):
            check_choice(name, getattr(self, name), kind)
        own, of_model = (self.image_mean, self.image_std), (self.geometry.mean, self.geometry.std)
        if self.patch_dtype == "uint8" and own != of_model:
            theirs = f"mean and deviation {of_model}, not {own}"
            raise ValueError(f"the model normalizes uint8 patches by {theirs}: use float32")
        given = {name: value for name, value in vars(self).items() if value is not None}
        _check_numbers(given, self.geometry.unit)
        _check_areas(self.min_pixels, given.get("max_pixels", math.inf))

    def _defaults(self) -> dict[str, Any]:
        """The settings that follow from the geometry."""
        g = self.geometry
        limits = {"min_pixels": g.min_pixels, "max_pixels": g.max_pixels}
        return {**limits, "image_mean": g.mean, "image_std": g.std}

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Give a sample with patches and grid of its image or video, as the class says.

        ``inference`` is part of torchtune's transform interface and makes no difference here.
        ``ValueError`` names the medium that cannot be read, or whose setting is unusable.
        """
        return self._transform(sample, decode=True)

    def measure(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Find what a call gives without decoding: with patches on the meta device, without values.

        Of videos that are turned by a quarter height and width of the grid change places. A video
        file whose timestamps do not put its frames in order is decoded after all, to count them.
        """
        return self._transform(sample, decode=False)

    def _transform(
        self, sample: Mapping[str, Any], decode: bool, draw: Draw | None = None
    ) -> dict[str, Any]:
        medium = sample[self._kind]
        with naming(self._kind, medium), ExitStack() as files:
            given = {name: sample[name] for name in self._settings if sample.get(name) is not None}
            _check_numbers(given, self.geometry.unit)
            frames_CHW, count, per_step, facts = self._frames(medium, given, decode, files)
            first = next(frames_CHW)
            _, height, width = first.shape
            grid = self._grid((height, width), count, per_step, given)
            resize = _patches.resize
            if draw is not None:
                _, *sides = (count * self.geometry.patch_size for count in grid)
                facts["change"] = change = draw((height, width), (sides[0], sides[1]))
                resize = change.resize
            patches = self._encode(chain([first], frames_CHW), grid, per_step, decode, resize)
        return {
            **sample,
            self._pixels: patches,
            f"{self._kind}_grid_thw": torch.from_numpy(np.array([grid])),
            f"num_{self._kind}_tokens": math.prod(grid) // self.geometry.merge_size**2,
            **facts,
        }

    def _frames(self, medium: Any, settings: Settings, decode: bool, files: ExitStack) -> Frames:
        raise NotImplementedError

    def _resized(self, size: Size, frames: int, settings: Settings) -> Size:
        """Height and width of each of so many frames after resizing."""
        areas = self._areas(settings, frames)
        _check_areas(*areas)
        return _patches.smart_resize(*size, self.geometry.unit, *areas)

    def _areas(self, settings: Settings, frames: int) -> tuple[float, float]:
        """Smallest and largest area of a frame after resizing."""
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels, **settings}
        return limits["min_pixels"], limits["max_pixels"]

    def _read(self, image: Any, decode: bool) -> torch.Tensor:
        """An image, on the meta device if it is not decoded [C, H, W]."""
        if decode:
            return to_rgb(image, self.backend, self.alpha, self.remote)
        return torch.empty(CHANNELS, *rgb_size(image, self.remote), device="meta")

    def _grid(self, size: Size, frames: int, per_step: int, settings: Settings) -> Grid:
        """The grid of frames: that of ``fetch_image`` and ``fetch_video`` of qwen-vl-utils."""
        if min(size) < 1:
            raise ValueError(f"has no pixels: height and width are {size}; remove it from the data")
        if (SIDES[0] in settings) != (SIDES[1] in settings):
            raise ValueError("has one of resized_height and resized_width: give both or none")
        if SIDES[0] in settings:
            size = (settings["resized_height"], settings["resized_width"])
            areas = (tokens * self.geometry.unit**2 for tokens in SIDES_TOKENS)
            height, width = _patches.smart_resize(*size, self.geometry.unit, *areas)
        else:
            height, width = self._resized(size, frames, settings)
        steps = math.ceil(frames / per_step)
        if steps * height * width > LARGEST_AREA:
            resized = f"resized to {steps} x {height} x {width} pixels"
            raise ValueError(f"{resized} it has more tokens than any context: lower min_pixels")
        return steps, height // self.geometry.patch_size, width // self.geometry.patch_size

    def _encode(
        self,
        frames_CHW: Iterator[torch.Tensor],
        grid: Grid,
        per_patch: int,
        decode: bool,
        resize: Callable[[torch.Tensor, int, int, Backend], np.ndarray],
    ) -> torch.Tensor:
        """Resizes frames and cuts them, a few at a time: no others are held."""
        steps, rows, columns = grid
        size = self.geometry.patch_size
        values, normalization = CHANNELS * per_patch * size**2, None
        if self.patch_dtype == "float32":
            values = self.geometry.values_per_patch
            normalization = _patches.normalization_by(self.image_mean, self.image_std, self.backend)
        if not decode:
            list(frames_CHW)  # looks at their sizes
            dtype = getattr(torch, self.patch_dtype)
            return torch.empty(steps * rows * columns, values, dtype=dtype, device="meta")
        patches = np.empty((steps, rows * columns, values), self.patch_dtype)
        height, width = rows * size, columns * size
        for step in patches:
            frames = [resize(f, height, width, self.backend) for f in islice(frames_CHW, per_patch)]
            frames += frames[-1:] * (per_patch - len(frames))  # the last of an odd number
            frames_THWC = np.stack(frames) if per_patch > 1 else frames[0][None]
            _patches.patchify(frames_THWC, self.geometry, normalization, step)
        return torch.from_numpy(patches.reshape(-1, values))


@dataclass(eq=False, kw_only=True)
class ImageTransform(MediumTransform):
    """Turns one image into normalized patches, as transformers' image processor does.

    They are bit-identical to those of transformers' ``Qwen2VLImageProcessor`` (``torchvision``) or
    ``Qwen2VLImageProcessorPil`` (``pil``), encoded images loaded by its ``load_image``.

    A sample's "image" is a PIL image of any mode; a uint8 array or tensor [H, W], [H, W, c] or
    [c, H, W] with c of 1, 3 or 4 (read as [c, H, W] where both fit); or an encoded image: bytes,
    path, ``file://``, ``data:`` or ``https://`` URL, or binary file handle, which stays open and
    where it is. The sample's own "min_pixels" and "max_pixels" go before those of the transform,
    and "resized_height" and "resized_width" before all of them, moved to multiples of a unit with
    an area of 4 to 16,384 tokens, as in qwen-vl-utils. None counts as absent.

    A call adds ``pixel_values`` float32 [grid_h * grid_w, 1176], or uint8 [grid_h * grid_w, 588];
    ``image_grid_thw`` int64 [1, 3] (patches along time, height and width); ``num_image_tokens``,
    of placeholders in the text; and ``original_size``, height and width of the upright image in
    pixels. No side may have more than 200 times the other's pixels.

    Args:
        geometry: sizes of patches, and defaults of ``min_pixels`` and ``max_pixels``, the smallest
            and largest area after resizing, and of ``image_mean`` and ``image_std``, of each RGB
            channel for values in [0, 1].
        backend: which of transformers' resizes, compositing of arrays and rounding to reproduce.
        alpha: "reference": what transformers makes of transparency, dropped in encoded images (but
            a single transparent colour becomes white), composited over white in PIL images, arrays
            and tensors; "white": composited over white in all of them, as in qwen-vl-utils.
        remote: limits of ``https://`` URLs, which are refused without.
        patch_dtype: "uint8" for patches before normalization and without their copy along time, an
            eighth of the bytes (of videos a quarter). The model does the rest, in the order of the
            ``torchvision`` backend; that of the ``pil`` backend rounds otherwise in the last bit.

    ``ValueError`` names a setting that is unknown or out of its range, and a mean or deviation of
    uint8 patches other than the model's.
    """

    backend: Backend = "torchvision"
    alpha: Alpha = "reference"

    _kind, _pixels, _settings = "image", "pixel_values", SIZING

    def changed(self, sample: Mapping[str, Any], draw: Draw, decode: bool = True) -> dict[str, Any]:
        """Give what a call gives of the image changed as is drawn for it, and the ``change``.

        Not decoded, patches are as :meth:`measure` gives them.
        """
        return self._transform(sample, decode, draw)

    def _frames(self, medium: Any, settings: Settings, decode: bool, files: ExitStack) -> Frames:
        rgb_CHW = self._read(medium, decode)
        _, *size = rgb_CHW.shape
        return iter([rgb_CHW]), 1, 1, {"original_size": tuple(size)}


@dataclass(eq=False, kw_only=True)
class VideoTransform(MediumTransform):
    """Turns one video into normalized patches, as qwen-vl-utils and transformers do together.

    Which frames are taken and the size they get are those of qwen-vl-utils 0.0.14's
    ``fetch_video``; the pixels are bit-identical to transformers' ``Qwen2VLVideoProcessor`` for the
    same frames. (``fetch_video`` resizes before, in float32: about a seventh of the values differ,
    by up to 15 levels of 255 at sharp edges. Frames that are given as images it resizes twice.)
    Only the chosen frames and those that they are predicted from are decoded, on the threads that
    torch has, and each is resized and cut into patches before the next.

    A sample's "video" is a video file, from all that an image comes from; or frames: a uint8 array
    or tensor [T, H, W, 3] or [T, 3, H, W] (read as the latter where both fit), or a list of images
    of one size. Settings of its own have the names and the meaning of qwen-vl-utils:

    - of a file, either "fps", with "min_frames" and "max_frames", or "nframes", a number of frames,
      which is rounded to an even one; and the part to take them from, "video_start" and "video_end"
      in seconds. Or "frame_indices", increasing numbers of frames as they are shown, from 0.
    - of frames, all of which are taken: "sample_fps", how many make a second (2 by default).
    - of both, "min_pixels", "max_pixels" (which ends where the transform's does), "total_pixels",
      and "resized_height" and "resized_width", as those of an image.

    A call adds ``pixel_values_videos`` float32 or uint8 [grid_t * grid_h * grid_w, 1176];
    ``video_grid_thw`` int64 [1, 3] (steps of two frames, of which the last may be a frame twice,
    and patches along height and width); ``num_video_tokens``, of placeholders in the text;
    ``seconds_per_step`` of the grid, transformers' ``second_per_grid_ts``: 2 / ``sample_fps``, of
    files by ``sample_fps`` = frames taken / frames in the part (with "frame_indices" the whole
    video) * frames per second of the file; ``frame_indices``; and ``step_times``, list[float], the
    mean of the times of each step's first and last frame, in seconds: their numbers in the file (or
    among those given) / its frames per second (or ``sample_fps``).

    Args:
        fps: frames to take of each second, ``min_frames`` to ``max_frames`` in all.
        min_pixels: smallest area of a frame after resizing, in pixels; None: 128 tokens.
        max_pixels: largest area of a frame, in pixels; None: 768 tokens.
        total_pixels: largest area of all steps of two frames together, in pixels; None: 115,200
            tokens. It limits the area of a frame, but not below 1.05 * ``min_pixels``.

    All other arguments and errors are as of :class:`ImageTransform`.
    """

    fps: float = FPS
    min_frames: int = MIN_FRAMES
    max_frames: int = MAX_FRAMES
    total_pixels: float | Any = None

    _kind, _pixels = "video", "pixel_values_videos"
    _settings = (*SIZING, "total_pixels", *SAMPLING, "frame_indices", "sample_fps")

    def _defaults(self) -> dict[str, Any]:
        # qwen-vl-utils': in all, nine tenths of a context of 128,000 tokens
        tokens = {"min_pixels": 128, "max_pixels": 768, "total_pixels": 115_200}
        limits = {name: count * self.geometry.unit**2 for name, count in tokens.items()}
        return {**super()._defaults(), **limits}

    def _frames(self, medium: Any, settings: Settings, decode: bool, files: ExitStack) -> Frames:
        frames: Iterable[torch.Tensor]
        is_given = isinstance(medium, list | tuple | np.ndarray | torch.Tensor)
        for name in settings:
            if is_given and name in (*SAMPLING, "frame_indices"):
                raise ValueError(f"{name} chooses among frames of a file: set sample_fps")
            if not is_given and name == "sample_fps":
                raise ValueError("sample_fps is of given frames: for a file, set fps")
        if is_given:
            frames = self._given_frames(medium, decode)
            indices = list(range(len(medium)))
            rate = fps = settings.get("sample_fps", FPS)
        else:
            file = files.enter_context(open_video(medium, self.remote))
            rate = file.fps
            indices, fps = self._sample(file.num_frames, rate, settings)
            frames = repeat(torch.empty(CHANNELS, *file.size, device="meta"), len(indices))
            if decode:
                frames = (torch.from_numpy(f).permute(2, 0, 1) for f in file.frames(indices))
        if not indices:
            raise ValueError("has no frames; remove it from the data")
        per_step = self.geometry.temporal_patch_size
        steps = [indices[start : start + per_step] for start in range(0, len(indices), per_step)]
        facts = {
            "seconds_per_step": per_step / fps,
            "frame_indices": indices,
            "step_times": [(step[0] / rate + step[-1] / rate) / 2 for step in steps],
        }
        return _of_one_size(frames, indices), len(indices), per_step, facts

    def _given_frames(self, video: Any, decode: bool) -> Iterator[torch.Tensor]:
        """The frames of a list of images or of an array [C, H, W]."""

        def read(number: int) -> torch.Tensor:
            with naming("image", video[number], f"frame {number}, "):
                return self._read(video[number], decode)

        if isinstance(video, list | tuple):
            return map(read, range(len(video)))
        if video.ndim != 4 or 3 not in (video.shape[1], video.shape[3]):
            raise ValueError("the shape must be [T, H, W, 3] or [T, 3, H, W]; convert it")
        frames = map(uint8_tensor, video)
        return frames if video.shape[1] == 3 else (frame.permute(2, 0, 1) for frame in frames)

    def _sample(self, num_frames: int, rate: float, settings: Settings) -> tuple[list[int], float]:
        """Chooses frames of a file, and finds how many of them make a second.

        Of the part that ``calculate_video_frame_range`` of qwen-vl-utils finds.
        """
        for one, others in (("frame_indices", SAMPLING), ("fps", ("nframes",))):
            for other in others:
                if one in settings and other in settings:
                    raise ValueError(f"has both {one} and {other}: give one of them")
        if "frame_indices" in settings:
            given = settings["frame_indices"]
            with refusing(f"frame_indices is {given!r}", "make it a list of integers", TypeError):
                indices = [operator.index(index) for index in given]
            if not indices or indices != sorted({i for i in indices if 0 <= i < num_frames}):
                wanted = f"increasing numbers from 0 to {num_frames - 1}"
                raise ValueError(f"frame_indices begins with {indices[:8]}: make it {wanted}")
            return indices, len(indices) / num_frames * rate
        duration = num_frames / rate
        start, end = settings.get("video_start", 0), settings.get("video_end", math.inf)
        first = math.ceil(max(0.0, min(start, duration)) * rate)
        last = min(num_frames - 1, math.floor(max(0.0, min(end, duration)) * rate))
        if first >= last:
            part, remedy = "", "for one frame pass an image, or set frame_indices to [0]"
            if settings.keys() & {"video_start", "video_end"}:
                part = f" from video_start {start} to video_end {end}"
                remedy = f"set them further apart, or {remedy}"
            raise ValueError(
                f"has of {num_frames} frames ({duration:.2f} s) less than the two of a step{part}: "
                f"{remedy}, which repeats it"
            )
        frames = last - first + 1
        count = self._count(frames, rate, settings)
        if not FRAME_FACTOR <= count <= frames:
            wanted = f"2 to {frames} by nframes, or by fps, min_frames and max_frames"
            raise ValueError(f"{count} of {frames} frames are asked for: ask for {wanted}")
        return self._spread(first, last, count), count / frames * rate

    def _count(self, frames: int, rate: float, settings: Settings) -> int:
        """How many of so many frames are taken, an even number: ``smart_nframes``."""
        if "nframes" in settings:
            return round(settings["nframes"] / FRAME_FACTOR) * FRAME_FACTOR
        fps, fewest, most = self._sampling(settings)
        even = math.ceil(fewest / FRAME_FACTOR) * FRAME_FACTOR
        count = min(max(frames / rate * fps, even), most, frames)
        return math.floor(count / FRAME_FACTOR) * FRAME_FACTOR

    def _sampling(self, settings: Settings) -> list[Any]:
        names = ("fps", "min_frames", "max_frames")
        return [settings.get(name, getattr(self, name)) for name in names]

    def _spread(self, first: int, last: int, count: int) -> list[int]:
        """Frames of even distances; qwen-vl-utils computes in float32, halves go to even ones."""
        return torch.linspace(first, last, count).round().long().tolist()

    def _areas(self, settings: Settings, frames: int) -> tuple[float, float]:
        """Those of ``fetch_video``, where a share of a pixel counts."""
        per_step = self.geometry.temporal_patch_size
        frames = math.ceil(frames / per_step) * per_step
        share = settings.get("total_pixels", self.total_pixels) / frames * FRAME_FACTOR
        least = settings.get("min_pixels", self.min_pixels)
        allowed = max(min(self.max_pixels, share), int(least * 1.05))
        limit = settings.get("max_pixels", math.inf)
        if allowed < limit < math.inf:
            own = "max_pixels and total_pixels of the transform allow"
            warnings.warn(f"max_pixels of a video is more than {own}: these hold", stacklevel=2)
        return least, min(limit, allowed)


def _check_numbers(settings: Settings, unit: int) -> None:
    for name, value in settings.items():
        if name in LEAST or name in SIDES:
            least = LEAST.get(name, unit)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}: make it an integer of at least {least}")
        elif name in ABOVE:
            is_finite = isinstance(value, Real) and math.isfinite(value)
            if not (is_finite and value > ABOVE[name]):
                limits = f"{ABOVE[name]} < {name} < inf"
                raise ValueError(f"{name} is {value!r}: make it a number, {limits}")


def _check_areas(least: float, most: float) -> None:
    if least > most:
        of_videos = "for videos a config has video_min_pixels and video_max_pixels"
        wrong = f"min_pixels is {least} and max_pixels {most}"
        raise ValueError(f"{wrong}: make them min_pixels <= max_pixels ({of_videos})")


def _of_one_size(frames: Iterable[torch.Tensor], indices: Sequence[int]) -> Iterator[torch.Tensor]:
    first = None
    for index, frame in zip(indices, frames, strict=True):
        first = first or frame.shape
        if frame.shape != first:
            raise ValueError(
                f"frame {index} is {frame.shape[2]} x {frame.shape[1]} pixels, "
                f"frame {indices[0]} {first[2]} x {first[1]}: give all one size"
            )
        yield frame
