"""The processor files of a checkpoint that tell servers what the model saw in training."""

import json
import math
from typing import Any

from torchtune_vl.models.qwen2_5_vl._image_transform import Qwen2_5_VLImageTransform
from torchtune_vl.models.qwen2_5_vl._patches import SQUARE, TEMPORAL_PATCH_SIZE
from torchtune_vl.models.qwen2_5_vl._pretrained import SIZES_OF_PATCHES
from torchtune_vl.models.qwen2_5_vl._video_transform import Qwen2_5_VLVideoTransform

_PROCESSOR = {"processor_class": "Qwen2_5_VLProcessor"}


def processor_files(
    images: Qwen2_5_VLImageTransform, videos: Qwen2_5_VLVideoTransform, chat_template: str
) -> dict[str, str]:
    """Write settings in the files that all releases of transformers read.

    Args:
        images: settings of images.
        videos: settings of videos.
        chat_template: Jinja source.

    Returns:
        Text by name of file. ``processor_config.json``, where transformers 5 keeps all of them and
        looks first, names nothing but the processor.
    """
    contents = {
        "preprocessor_config.json": {
            **_settings(images),
            "image_processor_type": "Qwen2VLImageProcessor",
        },
        "video_preprocessor_config.json": {
            **_settings(videos),
            "video_processor_type": "Qwen2VLVideoProcessor",
            **_budget_and_sampling(videos),
        },
        "processor_config.json": _PROCESSOR,
        "chat_template.json": {"chat_template": chat_template},
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}


def _settings(transform: Qwen2_5_VLImageTransform | Qwen2_5_VLVideoTransform) -> dict[str, Any]:
    least, most = transform.min_pixels, transform.max_pixels
    return {
        # Limits by the names of old releases and of new ones
        "min_pixels": least,
        "max_pixels": most,
        "size": {"shortest_edge": least, "longest_edge": most},
        **SIZES_OF_PATCHES,
        "image_mean": list(transform.image_mean),
        "image_std": list(transform.image_std),
        **_PROCESSOR,
    }


def _budget_and_sampling(videos: Qwen2_5_VLVideoTransform) -> dict[str, Any]:
    """What transformers takes for qwen-vl-utils' rules.

    It does not choose frames unless it is asked to (``do_sample_frames``): servers and
    qwen-vl-utils have done so before, and it would choose among those that they chose.
    """
    pair = TEMPORAL_PATCH_SIZE
    return {
        "cap_pixels_per_frame": True,
        # transformers leaves videos nine tenths of a context of so many tokens
        "max_video_tokens": int(videos.total_pixels * 10) // (9 * SQUARE**2),
        "fps": videos.fps,
        "min_frames": math.ceil(videos.min_frames / pair) * pair,
        "max_frames": videos.max_frames // pair * pair,
    }
