"""Our side of the comparison, from the files of one directory."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torchtune_vl.chat import ChatTransform, QwenTokenizer
from torchtune_vl.chat._pretrained import image_settings, video_settings
from torchtune_vl.media import ImageTransform, VideoTransform
from torchtune_vl.models._families import family_of_files
from torchtune_vl.models._family import Family
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
    def family(self) -> Family:
        """The family of the directory's config; without a config the first that there is."""
        return family_of_files(self.directory)

    @cached_property
    def tokenizer(self) -> Outcome[QwenTokenizer]:
        """Outcome of reading the tokenizer."""
        return attempt(_read_tokenizer, self.directory)

    @cached_property
    def image_settings(self) -> Outcome[dict[str, Any]]:
        """Outcome of reading the settings of images."""
        return attempt(lambda: image_settings(self.directory, self.family.geometry) | self._limits)

    @cached_property
    def transform(self) -> Outcome[ChatTransform]:
        """Outcome of reading it all; special tokens in texts are tokens, as in transformers."""
        return attempt(
            lambda: self.family.transform.from_pretrained(
                self.directory, parse_special="all", **self._limits
            )
        )

    @cached_property
    def video_transform(self) -> Outcome[VideoTransform]:
        """Outcome of making a video transform with the directory's settings."""
        return attempt(lambda: _read_video_transform(self.directory, self.family))

    def image_transform(self, **settings: Any) -> ImageTransform:
        """Make an image transform with the directory's settings and more."""
        return ImageTransform(self.family.geometry, **self.image_settings.value, **settings)

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


def _read_video_transform(directory: Path, family: Family) -> VideoTransform:
    """Make the one that :meth:`ChatTransform.from_pretrained` makes."""
    images = image_settings(directory, family.geometry)
    normalization = {k: v for k, v in images.items() if k in ("image_mean", "image_std")}
    videos = {
        k.removeprefix("video_"): v for k, v in video_settings(directory, family.geometry).items()
    }
    return VideoTransform(family.geometry, **normalization, **videos)


def _read_tokenizer(directory: Path) -> QwenTokenizer:
    """Read the files that :meth:`ChatTransform.from_pretrained` reads."""
    if (directory / "tokenizer.json").exists():
        return QwenTokenizer(directory / "tokenizer.json")
    return QwenTokenizer(directory / "vocab.json", directory / "merges.txt")
