"""The processor's files of a checkpoint: settings read from them, and written for servers."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torchtune_vl.chat._tokenizer import QwenTokenizer
from torchtune_vl.files._json import JsonObject, read_json_object
from torchtune_vl.media import CHANNELS, Geometry, ImageTransform, VideoTransform
from torchtune_vl.media._transforms import FRAME_FACTOR

# Before a chat template, lets it number media
NUMBERS_MEDIA = "{% set add_vision_id = true %}"
# What our transforms always do; the values that a file may state
_FIXED_SETTINGS = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    "rescale_factor": 1 / 255,
    "resample": 3,
}


class ProcessorClasses(NamedTuple):
    """transformers' classes that read the files."""

    processor: str
    images: str
    videos: str
    # What a processor of videos is given where files state no limits of videos: the published
    # preprocessor_config.json states limits of images, which it would take; none where files do
    limits_of_videos: Mapping[str, Any] = MappingProxyType(
        {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28, "cap_pixels_per_frame": True}
    )


def sizes_of_patches(geometry: Geometry) -> dict[str, int]:
    """The sizes that processor files state, by the names that they have there."""
    names = ("patch_size", "temporal_patch_size", "merge_size")
    return {name: getattr(geometry, name) for name in names}


# From a video processor's settings, and the values that it may state, to those of a transform
ReadVideos = Callable[[JsonObject, Mapping[str, Any]], dict[str, Any]]


def read_settings(directory: Path, geometry: Geometry, videos: ReadVideos) -> dict[str, Any]:
    """Settings of a checkpoint directory, by the names of the transform's arguments."""
    fixed: dict[str, Any] = {**_FIXED_SETTINGS, **sizes_of_patches(geometry)}
    images = _processor(directory, "image_processor", "preprocessor_config.json")
    if images is None:
        raise ValueError(f"{directory} has no preprocessor_config.json: copy the published one")
    settings: dict[str, Any] = limits_of(images, fixed)
    settings["chat_template_file"] = _chat_template_file(directory)
    for name, least in (("image_mean", 0), ("image_std", 1e-6)):  # of values from 0 to 1
        if name in images:
            channels = images.each(name)
            fixed[name] = [channels.number(c, least, 1) for c in channels.content]
            if len(fixed[name]) != CHANNELS:
                raise images.error(name, f"{CHANNELS} numbers, one for each colour")
            settings[name] = fixed[name]
    config = _processor(directory, "video_processor", "video_preprocessor_config.json")
    return settings | (videos(config, fixed) if config is not None else {})


def read_limits_of_frames(videos: JsonObject, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of videos in a file that limits the area of each frame, as qwen-vl-utils does."""
    # Others, as of the published checkpoints, hold the limits of images: nothing is taken from them
    if not videos.content.get("cap_pixels_per_frame"):
        return {}
    limits = {f"video_{name}": value for name, value in limits_of(videos, fixed).items()}
    settings: dict[str, Any] = {**limits, **sampling_of(videos)}
    if "max_video_tokens" in videos:
        # Nine tenths of a context of so many tokens, as transformers has it
        area = videos.whole("max_video_tokens") * (fixed["patch_size"] * fixed["merge_size"]) ** 2
        settings["video_total_pixels"] = area * 9 // 10
    return settings


def sampling_of(videos: JsonObject) -> dict[str, Any]:
    """How frames are chosen, as far as a file says it."""
    settings: dict[str, Any] = {}
    if "fps" in videos:
        settings["fps"] = videos.number("fps", 1e-6, 1e6)
    counts = {"min_frames": 0, "max_frames": 1}
    return settings | {n: videos.whole(n, least) for n, least in counts.items() if n in videos}


def _processor(directory: Path, part: str, name: str) -> JsonObject | None:
    """The settings of a processor, from where transformers looks first."""
    all_parts = read_if_there(directory / "processor_config.json")
    if all_parts is not None and part in all_parts:
        return all_parts.part(part)
    return read_if_there(directory / name)


def limits_of(config: JsonObject, fixed: Mapping[str, Any]) -> dict[str, int]:
    """Limits of the areas of images or frames, by the names of old releases or of new ones."""
    for name, value in fixed.items():
        if config.content.get(name, value) != value:
            raise config.error(name, f"{value!r}: nothing else is supported")
    limits = {}
    size = config.part("size")
    for name, name_in_size in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if name in config:
            limits[name] = config.whole(name)
        elif name_in_size in size:
            limits[name] = size.whole(name_in_size)
    if limits.get("min_pixels", 0) > limits.get("max_pixels", math.inf):
        raise ValueError(f"{config.file}: no size is within {limits}")
    return limits


def _chat_template_file(directory: Path) -> Path | None:
    """The file that servers take the chat template from: the processor's, or the tokenizer's."""
    for path in (directory / "chat_template.json", directory / "chat_template.jinja"):
        if path.exists():
            return path
    config = read_if_there(directory / "tokenizer_config.json")
    return config.file if config is not None and "chat_template" in config else None


def read_chat_template(path: str | Path) -> tuple[str | None, bool]:
    """A template, None if the file has none, and whether it numbers media by itself."""
    path = Path(path)
    if path.suffix == ".json":
        config = read_json_object(path)
        if "chat_template" not in config.content:
            return None, False
        template = config.text("chat_template")
    else:
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as text: {error}") from error
    numbers_media = template.startswith(NUMBERS_MEDIA)
    return template.removeprefix(NUMBERS_MEDIA), numbers_media


def text_config(config: JsonObject) -> JsonObject:
    """The settings of the decoder: in an object of their own, as transformers 5 writes, or not."""
    return config if config.content.get("text_config", {}) == {} else config.part("text_config")


def check_token_ids(vocabulary: Path, tokenizer: QwenTokenizer) -> None:
    """Raise ``ValueError`` if the ``config.json`` beside a vocabulary is of a model without it."""
    config = read_if_there(vocabulary.parent / "config.json")
    if config is None:
        return
    text, last = text_config(config), max(tokenizer.special_tokens.values())
    if "vocab_size" in text and text.whole("vocab_size") <= last:
        raise text.error("vocab_size", f"more than {last}, a special token's id in {vocabulary}")
    ids = {"image_token_id": tokenizer.image_pad_id, "video_token_id": tokenizer.video_pad_id}
    for name, token_id in ids.items():
        if name in config and config.whole(name, 0) != token_id:
            raise config.error(name, f"{token_id}, as {vocabulary} has it")


def read_if_there(path: Path) -> JsonObject | None:
    """Read a JSON file, or return None if there is none."""
    return read_json_object(path) if path.exists() else None


def processor_files(
    images: ImageTransform,
    videos: Mapping[str, Any],
    chat_template: str,
    classes: ProcessorClasses,
) -> dict[str, str]:
    """Write settings in the files that all releases of transformers read, as text by name.

    ``processor_config.json``, where transformers 5 keeps all of them and looks first, names nothing
    but the processor.
    """
    processor = {"processor_class": classes.processor}
    limits = {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels}
    of_images = {**limits, **config_of(images, *limits.values()), **processor}
    of_videos = {**videos, **processor, "video_processor_type": classes.videos}
    contents = {
        "preprocessor_config.json": {**of_images, "image_processor_type": classes.images},
        "video_preprocessor_config.json": of_videos,
        "processor_config.json": processor,
        "chat_template.json": {"chat_template": chat_template},
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}


def limits_of_frames(videos: VideoTransform) -> dict[str, Any]:
    """Write down what :func:`read_limits_of_frames` reads."""
    # qwen-vl-utils' rules. No frames are chosen unless a server asks for it (`do_sample_frames`):
    # it has chosen before, and this would choose among its choice
    limits = {"min_pixels": videos.min_pixels, "max_pixels": videos.max_pixels}
    return {
        **limits,
        **config_of(videos, *limits.values()),
        "cap_pixels_per_frame": True,
        # transformers leaves videos nine tenths of a context of so many tokens
        "max_video_tokens": int(videos.total_pixels * 10) // (9 * videos.geometry.unit**2),
        "fps": videos.fps,
        "min_frames": math.ceil(videos.min_frames / FRAME_FACTOR) * FRAME_FACTOR,
        "max_frames": videos.max_frames // FRAME_FACTOR * FRAME_FACTOR,
    }


def config_of(transform: ImageTransform | VideoTransform, least: int, most: int) -> dict[str, Any]:
    """Write down limits of areas, by the name of new releases, and what images and videos share."""
    return {
        "size": {"shortest_edge": least, "longest_edge": most},
        **sizes_of_patches(transform.geometry),
        "image_mean": list(transform.image_mean),
        "image_std": list(transform.image_std),
    }
