"""Our side of the comparison, from the files of one directory."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torchtune_vl.chat import QwenTokenizer
from torchtune_vl.chat._pretrained import image_settings, video_settings
from torchtune_vl.media import Geometry, ImageTransform, VideoTransform
from torchtune_vl.validation._reference import BACKENDS, Backend, Processed, family_in
from torchtune_vl.validation._report import Outcome, attempt


class Ours:
    """Reads a directory, each part on its own, so that one may fail.

    Args:
        directory: a checkpoint's directory.
        max_pixels: largest area of images, in place of the directory's.
    """

    def __init__(self, directory: Path, max_pixels: int | None = None) -> None:
        self.directory = directory
        self._limits = {} if max_pixels is None else {"max_pixels": max_pixels}
        self._timings: dict[str, tuple[list[int], float]] = {}

    @property
    def geometry(self) -> Geometry:
        """Sizes of patches."""
        return family_in(self.directory).geometry

    @cached_property
    def tokenizer(self) -> Outcome:
        """Outcome of reading the files that :meth:`ChatTransform.from_pretrained` reads."""
        has_one = (self.directory / "tokenizer.json").exists()
        names = ["tokenizer.json"] if has_one else ["vocab.json", "merges.txt"]
        return attempt(QwenTokenizer, *(self.directory / name for name in names))

    @cached_property
    def image_settings(self) -> Outcome:
        """Outcome of reading the settings of images."""
        return attempt(lambda: image_settings(self.directory, self.geometry) | self._limits)

    @cached_property
    def image_transforms(self) -> dict[Backend, ImageTransform]:
        """The transforms of readable settings, by whose pixels they reproduce."""
        settings = self.image_settings.value
        return {b: ImageTransform(self.geometry, backend=b, **settings) for b in BACKENDS}

    @cached_property
    def video_transform(self) -> Outcome:
        """Outcome of making the one that :meth:`ChatTransform.from_pretrained` makes."""

        def make() -> VideoTransform:
            images = image_settings(self.directory, self.geometry)
            normalization = {k: v for k, v in images.items() if k in ("image_mean", "image_std")}
            videos = video_settings(self.directory, self.geometry)
            limits = {name.removeprefix("video_"): value for name, value in videos.items()}
            return VideoTransform(self.geometry, **normalization, **limits)

        return attempt(make)

    @cached_property
    def transform(self) -> Outcome:
        """Outcome of reading it all; special tokens in texts are tokens, as in transformers."""

        def read() -> Any:
            transform = family_in(self.directory).transform
            return transform.from_pretrained(self.directory, parse_special="all", **self._limits)

        return attempt(read)

    def image(self, path: str, backend: Backend) -> Processed:
        """Process an image."""
        processed = self.image_transforms[backend]({"image": path})
        return Processed(processed["pixel_values"], processed["image_grid_thw"])

    def video(self, path: str) -> Processed:
        """Process a video."""
        processed = self.video_transform.value({"video": path})
        self._timings[path] = processed["frame_indices"], processed["seconds_per_step"]
        return Processed(processed["pixel_values_videos"], processed["video_grid_thw"])

    def timing(self, path: str) -> tuple[list[int], float]:
        """Return the frames of a video that our side takes, and the seconds between its steps.

        Of a video that it refuses these are the first frame, and one second.
        """
        if path not in self._timings and attempt(self.video, path).error is not None:
            self._timings[path] = [0], 1.0
        return self._timings[path]
