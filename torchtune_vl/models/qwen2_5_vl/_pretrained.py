"""Settings from the files of a checkpoint directory."""

import math
from pathlib import Path
from typing import Any

from torchtune_vl.models._json import JsonObject, read_json_object
from torchtune_vl.models.qwen2_5_vl._chat_template import CHAT_TEMPLATE
from torchtune_vl.models.qwen2_5_vl._patches import PATCH_SIZE, TEMPORAL_PATCH_SIZE
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE
from torchtune_vl.models.qwen2_5_vl._tokenizer import Qwen2_5_VLTokenizer

_CHANNELS = 3
# What our image transform always does; the values that a file may state
_FIXED_IMAGE_SETTINGS = {
    "patch_size": PATCH_SIZE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "merge_size": MERGE_SIZE,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
}


def image_settings(directory: Path) -> dict[str, Any]:
    """Settings of images from the files of a checkpoint directory.

    transformers 5 writes them into ``processor_config.json``, and sizes as ``size``.
    """
    config = _read_if_there(directory / "preprocessor_config.json")
    if config is None:
        processor = _read_if_there(directory / "processor_config.json")
        if processor is not None and "image_processor" in processor:
            config = processor.part("image_processor")
    if config is None:
        raise ValueError(
            f"{directory} has no preprocessor_config.json, which holds the limits of image sizes: "
            "copy it from the published checkpoint"
        )
    for name, value in _FIXED_IMAGE_SETTINGS.items():
        if config.content.get(name, value) != value:
            raise config.error(name, f"{value!r}: nothing else is supported")
    settings: dict[str, Any] = {}
    size = config.part("size")
    for name, name_in_size in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if name in config:
            settings[name] = config.whole(name)
        elif name_in_size in size:
            settings[name] = size.whole(name_in_size)
    if settings.get("min_pixels", 0) > settings.get("max_pixels", math.inf):
        limits = f"{settings['min_pixels']} and {settings['max_pixels']}"
        raise ValueError(f"{config.file}: min_pixels and max_pixels are {limits}: no image fits")
    for name, least in (("image_mean", 0), ("image_std", 1e-6)):  # of values from 0 to 1
        if name in config:
            channels = config.each(name)
            settings[name] = [channels.number(c, least, 1) for c in channels.content]
            if len(settings[name]) != _CHANNELS:
                raise config.error(name, f"{_CHANNELS} numbers, one for each colour")
    return settings


def chat_template(directory: Path) -> str | None:
    """The template of a checkpoint, or None if it is the published one or there is none."""
    jinja = directory / "chat_template.jinja"
    template: str | None = None
    if jinja.exists():
        template = read_text(jinja)
    else:
        config = _read_if_there(directory / "chat_template.json")
        if config is not None and "chat_template" in config.content:
            template = config.text("chat_template")
    if template is None or template.strip() == CHAT_TEMPLATE:
        return None
    return template


def tokens_per_second(directory: Path) -> int:
    """As transformers reads it: 4 is the default of its config, 2 what is published."""
    config = _read_if_there(directory / "config.json")
    if config is None:
        return 2
    vision = config.part("vision_config").over({"tokens_per_second": 4})
    return vision.whole("tokens_per_second", most=1_000)


def text_config(config: JsonObject) -> JsonObject:
    """The settings of the decoder: in an object of their own, as transformers 5 writes, or not."""
    return config if config.content.get("text_config", {}) == {} else config.part("text_config")


def check_token_ids(vocabulary: Path, tokenizer: Qwen2_5_VLTokenizer) -> None:
    """Raise ``ValueError`` if the ``config.json`` beside a vocabulary is of a model without it."""
    config = _read_if_there(vocabulary.parent / "config.json")
    if config is None:
        return
    text = text_config(config)
    last = max(tokenizer.special_tokens.values())
    if "vocab_size" in text and text.whole("vocab_size") <= last:
        raise ValueError(
            f"{vocabulary}: a special token has the id {last}, beyond the model's vocabulary: "
            f"vocab_size in {config.file} is {text.whole('vocab_size')}"
        )
    for name, token_id in (
        ("image_token_id", tokenizer.image_pad_id),
        ("video_token_id", tokenizer.video_pad_id),
    ):
        if name in config and config.whole(name, 0) != token_id:
            raise config.error(name, f"{token_id}, as {vocabulary} has it")


def read_text(path: str | Path) -> str:
    """Read a text file, or raise ``ValueError``."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error


def _read_if_there(path: Path) -> JsonObject | None:
    return read_json_object(path) if path.exists() else None
