"""The processor files of a checkpoint that tell servers what the model saw in training."""

import json
import math
from typing import Any, NamedTuple

from torchtune_vl.chat._pretrained import sizes_of_patches
from torchtune_vl.media import ImageTransform, VideoTransform
from torchtune_vl.media._transforms import FRAME_FACTOR


class ProcessorClasses(NamedTuple):
    """transformers' classes that read the files."""

    processor: str
    images: str
    videos: str


def processor_files(
    images: ImageTransform, videos: VideoTransform, chat_template: str, classes: ProcessorClasses
) -> dict[str, str]:
    """Write settings in the files that all releases of transformers read.

    Args:
        images: settings of images.
        videos: settings of videos.
        chat_template: Jinja source.
        classes: what reads the files.

    Returns:
        Text by name of file. ``processor_config.json``, where transformers 5 keeps all of them and
        looks first, names nothing but the processor.
    """
    processor = {"processor_class": classes.processor}
    contents = {
        "preprocessor_config.json": {
            **_settings(images),
            **processor,
            "image_processor_type": classes.images,
        },
        "video_preprocessor_config.json": {
            **_settings(videos),
            **processor,
            "video_processor_type": classes.videos,
            **_budget_and_sampling(videos),
        },
        "processor_config.json": processor,
        "chat_template.json": {"chat_template": chat_template},
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}


def _settings(transform: ImageTransform | VideoTransform) -> dict[str, Any]:
    least, most = transform.min_pixels, transform.max_pixels
    return {
        # Limits by the names of old releases and of new ones
        "min_pixels": least,
        "max_pixels": most,
        "size": {"shortest_edge": least, "longest_edge": most},
        **sizes_of_patches(transform.geometry),
        "image_mean": list(transform.image_mean),
        "image_std": list(transform.image_std),
    }


def _budget_and_sampling(videos: VideoTransform) -> dict[str, Any]:
    """What transformers takes for qwen-vl-utils' rules.

    It does not choose frames unless it is asked to (``do_sample_frames``): servers and
    qwen-vl-utils have done so before, and it would choose among those that they chose.
    """
    pair = FRAME_FACTOR
    return {
        "cap_pixels_per_frame": True,
        # transformers leaves videos nine tenths of a context of so many tokens
        "max_video_tokens": int(videos.total_pixels * 10) // (9 * videos.geometry.unit**2),
        "fps": videos.fps,
        "min_frames": math.ceil(videos.min_frames / pair) * pair,
        "max_frames": videos.max_frames // pair * pair,
    }
