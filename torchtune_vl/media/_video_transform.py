"""One video to the patches and the grid that a vision encoder reads.

Frames are chosen and sized by the rules of qwen-vl-utils 0.0.14 (``smart_nframes``,
``calculate_video_frame_range``, ``fetch_video``); their pixels are those of transformers'
``Qwen2VLVideoProcessor``.

Shapes: T frames, C channels (3), H height and W width in pixels.
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, repeat
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from torchtune_vl.media._geometry import CHANNELS, Geometry
from torchtune_vl.media._image_transform import (
    PatchDtype,
    Size,
    check_area,
    check_normalization,
    exact_size,
    resize,
    smart_resize,
)
from torchtune_vl.media._images import describe_image, rgb_size, to_rgb
from torchtune_vl.media._patches import normalized_patches, patchify
from torchtune_vl.media._sources import RemoteLimits, describe_source
from torchtune_vl.media._videos import Video, open_video
from torchtune_vl.media._webp import WebPAnimation

# Of qwen-vl-utils
FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
FRAME_FACTOR = 2  # what numbers of frames are multiples of
# Units of a frame, and of all frames together, of which two are counted once: nine tenths of a
# context of 128,000 tokens
MIN_UNITS = 128
MAX_UNITS = 768
TOTAL_UNITS = 128000 * 0.9

# The settings that a sample may have
SAMPLING = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
SIZING = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
SETTINGS = (*SAMPLING, *SIZING, "frame_indices", "sample_fps")
# The least values of integers, but for resized_height and resized_width
LEAST = {"nframes": 1, "min_frames": 0, "max_frames": 1, "min_pixels": 1, "max_pixels": 1}
POSITIVE = ("fps", "sample_fps", "total_pixels")
TIMES = ("video_start", "video_end")

_T = TypeVar("_T")


class _Frames(NamedTuple):
    """The chosen frames of a video, read one by one."""

    sizes: Iterator[Size]  # of each, without decoding; of a file as they are stored
    pixels: Iterator[torch.Tensor]  # uint8 [C, H, W]
    indices: list[int]
    fps: float

    def check_size(self, i: int, size: Size, first: Size) -> None:
        if size != first:
            raise ValueError(
                f"frame {self.indices[i]} is {size[1]} x {size[0]} pixels, "
                f"frame {self.indices[0]} {first[1]} x {first[0]}: give all one size"
            )


class VideoTransform:
    """Turns one video into normalized patches, as qwen-vl-utils and transformers do together.

    Which frames are taken and the size they get are those of qwen-vl-utils' ``fetch_video``; the
    pixels are bit-identical to transformers' ``Qwen2VLVideoProcessor`` for the same frames, which
    knows torchvision's operations only. (``fetch_video`` resizes before transformers does, in
    float32: about a seventh of the values differ, by up to 15 levels of 255 at sharp edges.
    Frames that are given as images it resizes twice.)

    Only the chosen frames and those that they are predicted from are decoded, and each is resized
    and cut into patches before the next: see :class:`~torchtune_vl.media._videos.Video`. Decoding
    and resizing take the threads that torch has, which is 1 inside a data worker.

    Args:
        geometry (Geometry): sizes of patches, and defaults of settings.
        fps (float): frames to take of each second.
        min_frames (int): fewest frames to take, if the video has as many.
        max_frames (int): most frames to take.
        min_pixels (int | None): smallest area of a frame after resizing, in pixels; None: 128
            tokens.
        max_pixels (int | None): largest area of a frame, in pixels; None: 768 tokens.
        total_pixels (float | None): largest area of all steps of the grid together, two frames
            each, in pixels; None: 115,200 tokens. It limits the area of a frame, but not below
            1.05 * ``min_pixels``.
        image_mean (Sequence[float] | None): mean of each RGB channel, for values in [0, 1]; None:
            the geometry's.
        image_std (Sequence[float] | None): standard deviation of each, likewise.
        patch_dtype (PatchDtype): "float32", or "uint8" for patches before normalization, a quarter
            of the bytes, which the model normalizes on its device by the geometry's mean and
            deviation.
        remote (RemoteLimits | None): limits of ``https://`` URLs, which are refused without.

    Raises:
        ValueError: if a number is out of its range, ``patch_dtype`` is unknown, or uint8 patches
            are to have another mean or deviation.

    Examples:
        >>> from torchtune_vl.models.qwen2_5_vl import GEOMETRY
        >>> transform = VideoTransform(GEOMETRY)
        >>> sample = transform({"video": np.zeros((8, 392, 392, 3), np.uint8), "sample_fps": 4})
        >>> sample["pixel_values_videos"].shape, sample["video_grid_thw"]
        (torch.Size([3136, 1176]), tensor([[ 4, 28, 28]]))
        >>> sample["num_video_tokens"], sample["seconds_per_step"]
        (784, 0.5)
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        fps: float = FPS,
        min_frames: int = MIN_FRAMES,
        max_frames: int = MAX_FRAMES,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: float | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        patch_dtype: PatchDtype = "float32",
        remote: RemoteLimits | None = None,
    ) -> None:
        area = geometry.unit**2
        self.geometry = geometry
        self.fps = fps
        self.min_frames = min_frames
        self.max_frames = max_frames
        self.min_pixels = MIN_UNITS * area if min_pixels is None else min_pixels
        self.max_pixels = MAX_UNITS * area if max_pixels is None else max_pixels
        self.total_pixels = int(TOTAL_UNITS * area) if total_pixels is None else total_pixels
        self.image_mean = geometry.mean if image_mean is None else tuple(image_mean)
        self.image_std = geometry.std if image_std is None else tuple(image_std)
        self.patch_dtype = patch_dtype
        self.remote = remote
        limits = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
        self._check_numbers({name: getattr(self, name) for name in limits})
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels of a video is {self.min_pixels} and max_pixels {self.max_pixels}: "
                "make them min_pixels <= max_pixels (in a config video_min_pixels and "
                "video_max_pixels)"
            )
        check_normalization(patch_dtype, self.image_mean, self.image_std, geometry)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Adds patches, grid, number of tokens and times of ``sample["video"]`` to the sample.

        Args:
            sample (Mapping[str, Any]): its "video" is a video file: path, ``file://``, ``data:``
                or ``https://`` URL, bytes, or binary file handle, which stays open and where it
                is; or frames: a uint8 array or tensor [T, H, W, 3] or [T, 3, H, W] (read as the
                latter where both fit), or a list of images of one size, each anything that the
                image transform takes.

                It may have settings of its own, with the names and the meaning of qwen-vl-utils;
                those of the transform hold for the rest. None counts as absent.

                - of a file, either "fps", with "min_frames" and "max_frames", or "nframes", a
                  number of frames, which is rounded to an even one; and the part to take them from,
                  "video_start" and "video_end" in seconds. Or "frame_indices", increasing numbers
                  of frames from 0, counted in the order in which they are shown.
                - of frames, all of which are taken: "sample_fps", how many of them make a second (2
                  by default).
                - of both, "min_pixels", "max_pixels" (which ends where the transform's does) and
                  "total_pixels"; or "resized_height" and "resized_width", both at least 28, which
                  go before them and are themselves moved to multiples of 28 with an area of 3,136
                  to 12,845,056 pixels.
            inference (bool): part of torchtune's transform interface; makes no difference here.

        Returns:
            dict[str, Any]: a new dict, the sample plus

            - ``pixel_values_videos``: float32 or uint8 [grid_t * grid_h * grid_w, 1176]
            - ``video_grid_thw``: int64 [1, 3], steps of two frames, and patches along height and
              width. The last of an odd number of frames is repeated.
            - ``num_video_tokens``: how many placeholders the video takes in the text
            - ``seconds_per_step``: seconds from a step of the grid to the next, transformers'
              ``second_per_grid_ts``: 2 / ``sample_fps``, of files by ``sample_fps`` =
              frames taken / frames in the part * frames per second of the file. With
              "frame_indices" the part is the whole video.
            - ``frame_indices``: the numbers of the frames, without a repeated one

        Raises:
            ValueError: if the video cannot be read or decoded; has no frames, or only 1 that is
                not asked for by "frame_indices"; its frames differ in size, are no uint8 RGB
                images, or have one side more than 200 times the other; or a setting is unusable.
                Names the video.
        """
        with self._chosen_frames(sample) as (frames, settings):
            return {**sample, **self._encode(frames, settings)}

    def measure(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Finds what :meth:`__call__` returns but for the pixels, without decoding frames.

        Height and width of the grid are those of the frames as they are stored: of recordings that
        are turned by a quarter they change places. A file whose timestamps do not put its frames in
        order is decoded after all, to count them.

        Args:
            sample (Mapping[str, Any]): as in :meth:`__call__`.

        Returns:
            dict[str, Any]: that of :meth:`__call__`, with ``pixel_values_videos`` on the meta
            device: a shape and dtype without values.

        Raises:
            ValueError: as :meth:`__call__` does, but for what only decoding shows.
        """
        with self._chosen_frames(sample) as (frames, settings):
            first = next(frames.sizes)
            layout = self._layout(frames, first, settings)
            for i, size in enumerate(frames.sizes, 1):
                frames.check_size(i, size, first)
            patches = torch.empty(
                layout["num_video_tokens"] * self.geometry.merge_size**2,
                self.geometry.values_per_patch,
                dtype=getattr(torch, self.patch_dtype),
                device="meta",
            )
            return {**sample, "pixel_values_videos": patches, **layout}

    @contextmanager
    def _chosen_frames(self, sample: Mapping[str, Any]) -> Iterator[tuple[_Frames, dict[str, Any]]]:
        """Opens a video, and names it in errors of whoever reads its frames."""
        video = sample["video"]
        settings = {name: sample[name] for name in SETTINGS if sample.get(name) is not None}
        try:
            self._check_numbers(settings)
            if isinstance(video, list | tuple | np.ndarray | torch.Tensor):
                yield self._given_frames(video, settings), settings
            else:
                if "sample_fps" in settings:
                    raise ValueError(
                        "sample_fps belongs to frames that are given: for a file, set fps"
                    )
                with open_video(video, self.remote) as file:
                    yield self._frames_of_file(file, settings), settings
        except ValueError as error:
            raise ValueError(f"{_describe(video)}: {error}") from error

    def _frames_of_file(self, file: Video | WebPAnimation, settings: Mapping[str, Any]) -> _Frames:
        indices, fps = self._sample(file.num_frames, file.fps, settings)
        # Turned frames have strides that torch does not take
        frames_CHW = (
            torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
            for frame in file.frames(indices)
        )
        return _Frames(repeat(file.size, len(indices)), frames_CHW, indices, fps)

    def _given_frames(self, video: Any, settings: Mapping[str, Any]) -> _Frames:
        for name in (*SAMPLING, "frame_indices"):
            if name in settings:
                raise ValueError(
                    f"{name} chooses among the frames of a file, but given frames are all taken: "
                    "leave it out, or set sample_fps"
                )
        if isinstance(video, list | tuple):
            sizes = _of_each(video, partial(rgb_size, remote=self.remote))
            frames_CHW = _of_each(video, partial(to_rgb, remote=self.remote))
        else:
            frames_CHW = _array_frames(video)
            sizes = map(_size_of, _array_frames(video))
        if not len(video):
            raise ValueError("has no frames; remove it from the data")
        fps = settings.get("sample_fps", FPS)
        return _Frames(sizes, frames_CHW, list(range(len(video))), fps)

    def _sample(
        self, num_frames: int, video_fps: float, settings: Mapping[str, Any]
    ) -> tuple[list[int], float]:
        """Chooses frames of a file, and finds how many of them make a second."""
        if "frame_indices" in settings:
            for name in SAMPLING:
                if name in settings:
                    raise ValueError(f"has both frame_indices and {name}: give one of them")
            indices = _check_indices(settings["frame_indices"], num_frames)
            return indices, len(indices) / num_frames * video_fps
        if "fps" in settings and "nframes" in settings:
            raise ValueError("has both fps and nframes: give one of them")
        first, last = frame_range(
            num_frames, video_fps, settings.get("video_start"), settings.get("video_end")
        )
        count = frame_count(
            last - first + 1,
            video_fps,
            settings.get("fps", self.fps),
            settings.get("min_frames", self.min_frames),
            settings.get("max_frames", self.max_frames),
            settings.get("nframes"),
        )
        # qwen-vl-utils computes in float32 and rounds halves to even numbers
        indices = torch.linspace(first, last, count).round().long().tolist()
        return indices, count / (last - first + 1) * video_fps

    def _encode(self, frames: _Frames, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Resizes frames and cuts them into patches, two at a time."""
        first = next(frames.pixels)
        layout = self._layout(frames, _size_of(first), settings)
        ((steps, rows, columns),) = layout["video_grid_thw"].tolist()
        per_step, size = self.geometry.temporal_patch_size, self.geometry.patch_size
        height, width, values = rows * size, columns * size, self.geometry.values_per_patch
        patches = np.empty((steps, rows * columns, values), np.dtype(self.patch_dtype))
        # Only the frames of a step are held besides the patches
        step_THWC = torch.empty(per_step, height, width, CHANNELS, dtype=torch.uint8)
        for i, frame_CHW in enumerate(chain([first], frames.pixels)):
            frames.check_size(i, _size_of(frame_CHW), _size_of(first))
            place, is_last = i % per_step, i == len(frames.indices) - 1
            step_THWC[place] = resize(frame_CHW, height, width).permute(1, 2, 0)
            if is_last:  # and fills the rest of its step
                step_THWC[place + 1 :] = step_THWC[place]
            if is_last or place == per_step - 1:
                patches[i // per_step] = self._cut(step_THWC.numpy())
        pixel_values = torch.from_numpy(patches.reshape(-1, values))
        return {"pixel_values_videos": pixel_values, **layout}

    def _layout(self, frames: _Frames, size: Size, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Finds everything but the pixels."""
        per_step, patch_size = self.geometry.temporal_patch_size, self.geometry.patch_size
        steps = math.ceil(len(frames.indices) / per_step)
        height, width = self._target_size(size, steps * per_step, settings)
        check_area(steps, height, width, self.geometry)
        grid_thw = (steps, height // patch_size, width // patch_size)
        return {
            "video_grid_thw": torch.tensor([grid_thw]),
            "num_video_tokens": math.prod(grid_thw) // self.geometry.merge_size**2,
            "seconds_per_step": per_step / frames.fps,
            "frame_indices": frames.indices,
        }

    def _target_size(self, size: Size, num_frames: int, settings: Mapping[str, Any]) -> Size:
        height, width = size
        if min(size) < 1:
            raise ValueError(
                f"height {height} and width {width}: a frame needs at least one pixel each way; "
                "remove the video from the data"
            )
        if "resized_height" in settings and "resized_width" in settings:
            return exact_size(settings["resized_height"], settings["resized_width"], self.geometry)
        if "resized_height" in settings or "resized_width" in settings:
            raise ValueError("has one of resized_height and resized_width: give both or none")
        return frame_size(
            height,
            width,
            num_frames,
            self.geometry.unit,
            settings.get("min_pixels", self.min_pixels),
            self.max_pixels,
            settings.get("total_pixels", self.total_pixels),
            settings.get("max_pixels", math.inf),
        )

    def _cut(self, frames_THWC: np.ndarray) -> np.ndarray:
        if self.patch_dtype == "uint8":
            return patchify(frames_THWC, self.geometry)
        return normalized_patches(frames_THWC, self.geometry, self.image_mean, self.image_std)

    def _check_numbers(self, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            is_integer = isinstance(value, Integral) and not isinstance(value, bool)
            is_finite = isinstance(value, Real) and math.isfinite(value)
            least = self.geometry.unit if name.startswith("resized") else LEAST.get(name)
            if least is not None and not (is_integer and value >= least):
                raise ValueError(f"{name} is {value!r}: make it an integer of at least {least}")
            if name in POSITIVE and not (is_finite and value > 0):
                raise ValueError(f"{name} is {value!r}: make it a number above 0")
            if name in TIMES and not is_finite:
                raise ValueError(f"{name} is {value!r}: make it a number of seconds")


def frame_range(
    num_frames: int, fps: float, start: float | None = None, end: float | None = None
) -> tuple[int, int]:
    """Finds the frames between two times: ``calculate_video_frame_range`` of qwen-vl-utils.

    Args:
        num_frames (int): frames of the video.
        fps (float): frames per second of the video.
        start (float | None): seconds to leave out at the beginning.
        end (float | None): second to end at. Both are moved into the video.

    Returns:
        tuple[int, int]: numbers of the first and the last frame.

    Raises:
        ValueError: if there are not two frames between the times.
    """
    if start is None and end is None:
        return 0, num_frames - 1
    duration = num_frames / fps
    first, last = 0, num_frames - 1
    if start is not None:
        first = math.ceil(max(0.0, min(start, duration)) * fps)
    if end is not None:
        last = min(last, math.floor(max(0.0, min(end, duration)) * fps))
    if first >= last:
        raise ValueError(
            f"video_start {start} and video_end {end} leave less than two of its {num_frames} "
            f"frames ({duration:.2f} s): set them further apart, within the video"
        )
    return first, last


def frame_count(
    num_frames: int,
    video_fps: float,
    fps: float = FPS,
    min_frames: int = MIN_FRAMES,
    max_frames: int = MAX_FRAMES,
    nframes: int | None = None,
) -> int:
    """Finds how many frames to take: ``smart_nframes`` of qwen-vl-utils.

    Args:
        num_frames (int): frames to choose from.
        video_fps (float): how many of them make a second.
        fps (float): frames to take of each second.
        min_frames (int): fewest to take, rounded up to an even number.
        max_frames (int): most to take, rounded down to an even number.
        nframes (int | None): how many to take, rounded to an even number, whatever the others say.

    Returns:
        int: an even number from 2 to ``num_frames``.

    Raises:
        ValueError: if there is none.
    """
    if num_frames < FRAME_FACTOR:
        raise ValueError(
            "has 1 frame, and a step of the grid takes 2: pass it as an image, or set "
            "frame_indices to [0], which repeats it"
        )
    if nframes is not None:
        asked = f"nframes {nframes} asks"
        count = round(nframes / FRAME_FACTOR) * FRAME_FACTOR
    else:
        asked = f"fps {fps}, min_frames {min_frames} and max_frames {max_frames} ask"
        fewest = math.ceil(min_frames / FRAME_FACTOR) * FRAME_FACTOR
        most = math.floor(max_frames / FRAME_FACTOR) * FRAME_FACTOR
        wanted = min(max(num_frames / video_fps * fps, fewest), most, num_frames)
        count = math.floor(wanted / FRAME_FACTOR) * FRAME_FACTOR
    if not FRAME_FACTOR <= count <= num_frames:
        remedy = "at most that many" if count > num_frames else "at least 2 of them"
        raise ValueError(f"{asked} for {count} of {num_frames} frames: ask for {remedy}")
    return count


def frame_size(
    height: int,
    width: int,
    num_frames: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    total_pixels: float,
    limit: float = math.inf,
) -> Size:
    """Finds the size that frames are resized to: the one of qwen-vl-utils' ``fetch_video``.

    Args:
        height (int): height of the frames in pixels.
        width (int): width of the frames in pixels.
        num_frames (int): number of frames, even.
        factor (int): what both sides must be a multiple of, in pixels.
        min_pixels (int): smallest area of a frame, in pixels.
        max_pixels (int): largest area of a frame, in pixels.
        total_pixels (float): largest area of all steps of two frames, in pixels. An area of
            1.05 * ``min_pixels`` is left to a frame in any case.
        limit (float): an area that makes ``max_pixels`` smaller, but not larger.

    Returns:
        Size: new height and width in pixels.

    Raises:
        ValueError: if ``limit`` is below ``min_pixels``, a side is 0 or one is more than 200 times
            the other.
    """
    share = total_pixels / num_frames * FRAME_FACTOR
    allowed = max(min(max_pixels, share), int(min_pixels * 1.05))
    if allowed < limit < math.inf:
        warnings.warn(
            "max_pixels of a video is more than max_pixels and total_pixels of the transform "
            "allow: these hold",
            stacklevel=2,
        )
    most = min(limit, allowed)
    if most < min_pixels:
        raise ValueError(
            f"min_pixels is {min_pixels} and max_pixels {most}: make them min_pixels <= "
            "max_pixels, where the first is video_min_pixels of the transform if not set here"
        )
    # A share of a pixel counts where qwen-vl-utils rounds the sides
    return smart_resize(height, width, factor, min_pixels, cast(int, most))


def _check_indices(indices: Sequence[int], num_frames: int) -> list[int]:
    try:
        numbers = [operator.index(index) for index in indices]
    except TypeError as error:
        raise ValueError(f"frame_indices is {indices!r}: make it a list of integers") from error
    if (
        not numbers
        or numbers != sorted(set(numbers))
        or numbers[0] < 0
        or numbers[-1] >= num_frames
    ):
        shown = f"{numbers[:8]}{'...' if len(numbers) > 8 else ''}"
        raise ValueError(
            f"frame_indices is {shown}: make it increasing numbers from 0 to {num_frames - 1}"
        )
    return numbers


def _array_frames(video: np.ndarray | torch.Tensor) -> Iterator[torch.Tensor]:
    """Reads the frames of an array as [C, H, W]."""
    if video.dtype not in (torch.uint8, np.uint8):
        raise ValueError("the dtype must be uint8; scale the values to 0 ... 255 and convert them")
    if video.ndim != 4 or 3 not in (video.shape[1], video.shape[3]):
        raise ValueError("the shape must be [T, H, W, 3] or [T, 3, H, W]; convert it")
    channels_first = video.shape[1] == 3
    # torch takes neither negative strides nor, silently, read-only memory
    frames = (
        torch.from_numpy(np.require(frame, requirements=["C", "W"]))
        if isinstance(frame, np.ndarray)
        else frame
        for frame in video
    )
    return (frame if channels_first else frame.permute(2, 0, 1) for frame in frames)


def _of_each(images: Sequence[Any], read: Callable[[Any], _T]) -> Iterator[_T]:
    """What a function makes of each image of a list."""
    for number, image in enumerate(images):
        try:
            yield read(image)
        except ValueError as error:
            raise ValueError(f"frame {number}, {describe_image(image)}: {error}") from error


def _size_of(frame_CHW: torch.Tensor) -> Size:
    return frame_CHW.shape[1], frame_CHW.shape[2]


def _describe(video: object) -> str:
    if isinstance(video, list | tuple):
        return f"video of {len(video)} images"
    if isinstance(video, np.ndarray | torch.Tensor):
        return f"video {type(video).__name__} of shape {tuple(video.shape)} and dtype {video.dtype}"
    return f"video {describe_source(video)}"
