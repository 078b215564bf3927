"""Conversations as Qwen2.5-VL reads them."""

from pathlib import Path
from typing import Any

import torch

from torchtune_vl.chat import ChatTransform, ProcessorClasses, boxes_in_original
from torchtune_vl.chat._processor_files import read_if_there
from torchtune_vl.media import ImageTransform, VideoTransform
from torchtune_vl.models.qwen2_5_vl._geometry import GEOMETRY


class Qwen2_5_VLImageTransform(ImageTransform):
    """The transform of images with Qwen2.5-VL's sizes of patches.

    Args:
        **settings: of :class:`~torchtune_vl.media.ImageTransform`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(GEOMETRY, **settings)


class Qwen2_5_VLVideoTransform(VideoTransform):
    """The transform of videos with Qwen2.5-VL's sizes of patches.

    Args:
        **settings: of :class:`~torchtune_vl.media.VideoTransform`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(GEOMETRY, **settings)


class Qwen2_5_VLTransform(ChatTransform):
    """The transform of conversations for Qwen2.5-VL, whose positions of videos follow the clock.

    "Qwen2.5-VL Technical Report" (arXiv 2502.13923, section 2.1.3). Arguments are those of
    :class:`~torchtune_vl.chat.ChatTransform`; boxes are written in pixels of the resized image
    (section 2.2).
    """

    geometry = GEOMETRY
    processors = ProcessorClasses(
        processor="Qwen2_5_VLProcessor",
        images="Qwen2VLImageProcessor",
        videos="Qwen2VLVideoProcessor",
    )
    default_tokens_per_second = 2

    @classmethod
    def settings_of(cls, directory: Path) -> dict[str, Any]:
        """Read the settings of a checkpoint directory, ``tokens_per_second`` of its config too."""
        settings = super().settings_of(directory)
        config = read_if_there(directory / "config.json")
        if config is not None:
            # transformers' default of its config is not what is published
            vision = config.part("vision_config").over({"tokens_per_second": 4})
            settings["tokens_per_second"] = vision.whole("tokens_per_second", most=1_000)
        return settings


def boxes_of_answer(
    text: str, original_size: tuple[int, int], grid_thw: torch.Tensor
) -> list[dict[str, Any]]:
    """Find the boxes and points in a generated text, in pixels of the user's image.

    Args:
        text: what the model wrote.
        original_size: height and width of the user's upright image in pixels.
        grid_thw: patches of the image that the model saw, int64 [3], from the sample's
            ``encoder_input``.

    Returns:
        Each entry that has ``bbox_2d`` or ``point_2d``, with these as float pixels.
    """
    rows, columns = (int(side) * GEOMETRY.patch_size for side in grid_thw[1:])
    return boxes_in_original(text, original_size, (rows, columns))
