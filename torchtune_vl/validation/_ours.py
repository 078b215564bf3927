"""Our side of the comparison, from the files of one directory."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torchtune_vl.models.qwen2_5_vl import (
    Qwen2_5_VLImageTransform,
    Qwen2_5_VLTokenizer,
    Qwen2_5_VLTransform,
    Qwen2_5_VLVideoTransform,
)
from torchtune_vl.models.qwen2_5_vl._pretrained import image_settings, video_settings
from torchtune_vl.validation._reference import Processed
from torchtune_vl.validation._report import Outcome, attempt


class Ours:
    """Reads a directory, each part on its own, so that one may fail.

    Args:
        directory: a checkpoint's directory.
        max_pixels: largest area of images, in place of the directory's.

    Attributes:
        directory: as given.
    """

    def __init__(self, directory: Path, max_pixels: int | None = None) -> None:
        self.directory = directory
        self._limits = {} if max_pixels is None else {"max_pixels": max_pixels}
        self._videos: dict[str, tuple[list[int], float]] = {}

    @cached_property
    def tokenizer(self) -> Outcome[Qwen2_5_VLTokenizer]:
        """Outcome of reading the tokenizer."""
        return attempt(_read_tokenizer, self.directory)

    @cached_property
    def image_settings(self) -> Outcome[dict[str, Any]]:
        """Outcome of reading the settings of images."""
        return attempt(lambda: image_settings(self.directory) | self._limits)

    @cached_property
    def transform(self) -> Outcome[Qwen2_5_VLTransform]:
        """Outcome of reading it all; special tokens in texts are tokens, as in transformers."""
        return attempt(
            Qwen2_5_VLTransform.from_pretrained,
            self.directory,
            parse_special="all",
            **self._limits,
        )

    @cached_property
    def video_transform(self) -> Outcome[Qwen2_5_VLVideoTransform]:
        """Outcome of making a video transform with the directory's settings."""
        return attempt(_read_video_transform, self.directory)

    def image_transform(self, **settings: Any) -> Qwen2_5_VLImageTransform:
        """Make an image transform with the directory's settings and more."""
        return Qwen2_5_VLImageTransform(**self.image_settings.value, **settings)

    def video(self, path: str) -> Processed:
        """Process a video."""
        processed = self.video_transform.value({"video": path})
        self._videos[path] = processed["frame_indices"], processed["seconds_per_step"]
        return Processed(processed["pixel_values_videos"], processed["video_grid_thw"])

    def frames(self, path: str) -> list[int]:
        """Return the frames that our side chooses; the first one of a video that it refuses."""
        return self._facts(path)[0]

    def seconds_per_step(self, path: str) -> float:
        """Return the seconds between steps of a video's temporal grid."""
        return self._facts(path)[1]

    def _facts(self, path: str) -> tuple[list[int], float]:
        if path not in self._videos and attempt(self.video, path).error is not None:
            self._videos[path] = [0], 1.0
        return self._videos[path]


def _read_video_transform(directory: Path) -> Qwen2_5_VLVideoTransform:
    """Make the one that :meth:`Qwen2_5_VLTransform.from_pretrained` makes."""
    images = image_settings(directory)
    normalization = {k: v for k, v in images.items() if k in ("image_mean", "image_std")}
    videos = {k.removeprefix("video_"): v for k, v in video_settings(directory).items()}
    return Qwen2_5_VLVideoTransform(**normalization, **videos)


def _read_tokenizer(directory: Path) -> Qwen2_5_VLTokenizer:
    """Read the files that :meth:`Qwen2_5_VLTransform.from_pretrained` reads."""
    if (directory / "tokenizer.json").exists():
        return Qwen2_5_VLTokenizer(directory / "tokenizer.json")
    return Qwen2_5_VLTokenizer(directory / "vocab.json", directory / "merges.txt")
