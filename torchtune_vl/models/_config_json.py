"""A checkpoint's ``config.json`` to the dimensions of its model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtune_vl.chat._processor_files import text_config
from torchtune_vl.files._json import JsonObject, read_json_object

# transformers 4 leaves out of a config.json whatever equals the defaults of its own classes, and
# these are not the values of the published checkpoints
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "rope_theta": 1e6,
    "mrope_section": (16, 24, 24),
    "mrope_interleaved": False,
}
# Likewise of all families' encoders
VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_SPECIAL_TOKENS = {"image_token_id": 151655, "video_token_id": 151656}
_UNTIED = {"tie_word_embeddings": False}
# Ten times what the largest models have: beyond is damage, and could not be built
DEEPEST = 1_000
WIDEST = 10_000_000
_LARGEST_PATCH = 1_000


def read_config(directory: str | Path) -> JsonObject:
    """Read the ``config.json`` of a checkpoint, or raise ``ValueError``."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file: a checkpoint directory needs its config.json")
    return read_json_object(path)


def common_dimensions(
    config: JsonObject,
    vision: JsonObject,
    defaults: Mapping[str, Any] = TEXT_DEFAULTS,
    *,
    width: str,
    out: str,
    channels: str = "in_channels",
) -> dict[str, Any]:
    """Translate a config, and its ``vision_config``, to what the models of all families have.

    ``defaults`` are what the decoder's config leaves out; where they have a ``head_dim``, heads
    need not divide the width. ``width``, ``out`` and ``channels`` are keys of the encoder by which
    families differ. Raises ``ValueError`` if a value is impossible, or asks for what the model does
    not have.
    """
    given = text_config(config)
    text = given.over(defaults)
    support_only(text, use_sliding_window=False, hidden_act="silu")
    vocab_size = text.whole("vocab_size", most=WIDEST)
    embed_dim = text.whole("hidden_size", most=WIDEST)
    if "head_dim" in defaults:
        num_heads = text.whole("num_attention_heads", most=WIDEST)
        head_dim = text.whole("head_dim", most=WIDEST)
    else:
        num_heads = _heads(text, "num_attention_heads", "hidden_size")
        head_dim = embed_dim // num_heads
    kv_heads = text.whole("num_key_value_heads") if "num_key_value_heads" in text else num_heads
    if num_heads % kv_heads:
        raise text.error("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    is_tied = any(part.over(_UNTIED).flag("tie_word_embeddings") for part in (config, text))
    special = config.over(_SPECIAL_TOKENS)
    if vision.content[out] != embed_dim:
        raise vision.error(out, f"the hidden_size of the decoder, {embed_dim}")
    return {
        "vocab_size": vocab_size,
        "num_layers": text.whole("num_hidden_layers", most=DEEPEST),
        "num_heads": num_heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "embed_dim": embed_dim,
        "intermediate_dim": text.whole("intermediate_size", most=WIDEST),
        "tie_word_embeddings": is_tied,
        "max_seq_len": text.whole("max_position_embeddings"),
        "attn_dropout": text.number("attention_dropout", 0, 0.99),
        "norm_eps": text.number("rms_norm_eps", 1e-20, 0.1),
        **_rope(given, head_dim, defaults),
        **{name: special.whole(name, 0, vocab_size - 1) for name in _SPECIAL_TOKENS},
        "vision_num_heads": _heads(vision, "num_heads", width, axes=2),
        "vision_embed_dim": vision.whole(width, most=WIDEST),
        "vision_num_layers": vision.whole("depth", most=DEEPEST),
        "vision_in_channels": vision.whole(channels, most=WIDEST),
        "patch_size": vision.whole("patch_size", most=_LARGEST_PATCH),
        "temporal_patch_size": vision.whole("temporal_patch_size", most=_LARGEST_PATCH),
    }


def _rope(text: JsonObject, head_dim: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters from ``rope_parameters`` or from ``rope_theta`` and ``rope_scaling``."""
    parts = [text.part(name) for name in ("rope_parameters", "rope_scaling") if name in text]
    given = parts[0] if parts else replace(text, content={})
    if any(part.content != given.content for part in parts):
        expected = "what rope_scaling says, or nothing: releases of transformers take either"
        raise text.error("rope_parameters", expected)
    for name in ("rope_type", "type"):
        if given.content.get(name, "default") not in ("default", "mrope"):
            raise given.error(name, "'default' or 'mrope': rotary embeddings are not scaled here")
    theta = given if "rope_theta" in given.content else text
    rope = given.over(defaults)
    support_only(rope, mrope_interleaved=defaults["mrope_interleaved"])
    sections = whole_numbers(rope, "mrope_section", 1, head_dim)
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        expected = f"three numbers whose sum is half of a head's dimension, {head_dim}"
        raise rope.error("mrope_section", expected)
    rope_base = float(theta.over(defaults).number("rope_theta", 1, 1e12))
    return {"rope_base": rope_base, "mrope_sections": sections}


def whole_numbers(part: JsonObject, key: str, least: int, most: int) -> tuple[int, ...]:
    """Return a list of whole numbers between two bounds, both included."""
    items = part.each(key)
    return tuple(items.whole(place, least, most) for place in items.content)


def support_only(part: JsonObject, **supported: Any) -> None:
    """Raise ``ValueError`` if a setting has another value than the one that there is."""
    for key, value in supported.items():
        if part.content[key] != value:
            raise part.error(key, f"{value!r}: nothing else is supported")


def _heads(part: JsonObject, key: str, width_key: str, axes: int = 1) -> int:
    """How many heads a width divides into, for rotary embeddings of one axis or of two."""
    width, count = part.whole(width_key), part.whole(key, most=WIDEST)
    divisor = count * 2 * axes
    if width % divisor or width > WIDEST:
        expected = f"a number up to {WIDEST:,} that {key} x {2 * axes} = {divisor} divides"
        raise part.error(width_key, expected)
    return count
