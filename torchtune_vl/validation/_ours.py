"""Our side of the comparison, from the files of one directory."""

from pathlib import Path
from typing import Any

from torchtune_vl.models.qwen2_5_vl import (
    Qwen2_5_VLImageTransform,
    Qwen2_5_VLTokenizer,
    Qwen2_5_VLTransform,
    Qwen2_5_VLVideoTransform,
)
from torchtune_vl.models.qwen2_5_vl._pretrained import image_settings
from torchtune_vl.validation._reference import Processed
from torchtune_vl.validation._report import attempt


class Ours:
    """Reads a directory, each part on its own, so that one may fail.

    Args:
        directory: a checkpoint's directory.
        max_pixels: largest area of images, in place of the directory's.

    Attributes:
        directory: as given.
        tokenizer: outcome of reading the tokenizer.
        image_settings: outcome of reading the settings of images.
        transform: outcome of reading the whole transform, which reads special tokens in texts as
            transformers does.
    """

    def __init__(self, directory: Path, max_pixels: int | None = None) -> None:
        self.directory = directory
        self.tokenizer = attempt(read_tokenizer, directory)
        limits = {} if max_pixels is None else {"max_pixels": max_pixels}
        self.image_settings = attempt(lambda: image_settings(directory) | limits)
        self.transform = attempt(
            Qwen2_5_VLTransform.from_pretrained,
            directory,
            parse_special="all",
            image_settings=limits,
        )
        self._videos: dict[str, tuple[list[int], float]] = {}

    def image_transform(self, **settings: Any) -> Qwen2_5_VLImageTransform:
        """Make an image transform with the directory's settings and more."""
        return Qwen2_5_VLImageTransform(**self.image_settings.value, **settings)

    def video(self, path: str) -> Processed:
        """Process a video."""
        settings = self.image_settings.value
        normalization = {k: settings[k] for k in ("image_mean", "image_std") if k in settings}
        processed = Qwen2_5_VLVideoTransform(**normalization)({"video": path})
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


def read_tokenizer(directory: Path) -> Qwen2_5_VLTokenizer:
    """Read the files that :meth:`Qwen2_5_VLTransform.from_pretrained` reads.

    Args:
        directory: the checkpoint's directory.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: if the directory has no vocabulary.
        ValueError: if the vocabulary is damaged.
    """
    if (directory / "tokenizer.json").exists():
        return Qwen2_5_VLTokenizer(directory / "tokenizer.json")
    return Qwen2_5_VLTokenizer(directory / "vocab.json", directory / "merges.txt")
