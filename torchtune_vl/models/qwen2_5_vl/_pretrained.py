"""Settings from the files of a checkpoint directory."""

import json
from pathlib import Path
from typing import Any

from torchtune_vl.models.qwen2_5_vl._chat_template import CHAT_TEMPLATE
from torchtune_vl.models.qwen2_5_vl._patches import PATCH_SIZE, TEMPORAL_PATCH_SIZE
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE

_IMAGE_SETTINGS = (
    "min_pixels",
    "max_pixels",
    "image_mean",
    "image_std",
)
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
    path = directory / "preprocessor_config.json"
    config = _read_json(path)
    if config is None:
        path = directory / "processor_config.json"
        config = (_read_json(path) or {}).get("image_processor")
    if config is None:
        raise ValueError(
            f"{directory} has no preprocessor_config.json, which holds the limits of image sizes: "
            "copy it from the published checkpoint"
        )
    for name, value in _FIXED_IMAGE_SETTINGS.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {config[name]!r}, only {value!r} is supported")
    size = config.get("size") or {}
    config = {
        "min_pixels": size.get("shortest_edge"),
        "max_pixels": size.get("longest_edge"),
        **config,
    }
    return {name: config[name] for name in _IMAGE_SETTINGS if config.get(name) is not None}


def chat_template(directory: Path) -> str | None:
    """The template of a checkpoint, or None if it is the published one or there is none."""
    jinja = directory / "chat_template.jinja"
    template: str | None
    if jinja.exists():
        template = read_text(jinja)
    else:
        template = (_read_json(directory / "chat_template.json") or {}).get("chat_template")
    if template is None or template.strip() == CHAT_TEMPLATE:
        return None
    return template


def tokens_per_second(directory: Path) -> int:
    """As transformers reads it: 4 is the default of its config, 2 what is published."""
    config = _read_json(directory / "config.json")
    return 2 if config is None else config.get("vision_config", {}).get("tokens_per_second", 4)


def read_text(path: str | Path) -> str:
    """Read a text file, or raise ``ValueError``."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
