"""A checkpoint's ``config.json`` to the dimensions of a decoder."""

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
}
_ROPE_DEFAULTS: dict[str, Any] = {"rope_theta": 1e6, "mrope_section": (16, 24, 24)}
_SPECIAL_TOKENS = {"image_token_id": 151655, "video_token_id": 151656}
_UNTIED = {"tie_word_embeddings": False}
# Ten times what the largest models have: beyond is damage, and could not be built
DEEPEST = 1_000
WIDEST = 10_000_000


def read_config(directory: str | Path) -> JsonObject:
    """Read the ``config.json`` of a checkpoint.

    Args:
        directory: of the checkpoint.

    Returns:
        Its content.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file: a checkpoint directory needs its config.json")
    return read_json_object(path)


def decoder_dimensions(config: JsonObject) -> dict[str, Any]:
    """Translate a config to the arguments of :func:`~torchtune_vl.models._builders.decoder`.

    Args:
        config: the whole config.

    Returns:
        The arguments, and ``image_token_id`` and ``video_token_id``.

    Raises:
        ValueError: if a value is impossible, or asks for what the decoder does not have.
    """
    given = text_config(config)
    text = given.over(TEXT_DEFAULTS)
    for key, supported in (("use_sliding_window", False), ("hidden_act", "silu")):
        supports_only(text, key, supported)
    vocab_size, width = text.whole("vocab_size", most=WIDEST), text.whole("hidden_size")
    num_heads = heads(text, "num_attention_heads", "hidden_size")
    special = config.over(_SPECIAL_TOKENS)
    return {
        "vocab_size": vocab_size,
        "num_layers": text.whole("num_hidden_layers", most=DEEPEST),
        "num_heads": num_heads,
        "num_kv_heads": _kv_heads(text, num_heads),
        "embed_dim": width,
        "intermediate_dim": text.whole("intermediate_size", most=WIDEST),
        "tie_word_embeddings": config.over(_UNTIED).flag("tie_word_embeddings")
        or text.over(_UNTIED).flag("tie_word_embeddings"),
        "max_seq_len": text.whole("max_position_embeddings"),
        "attn_dropout": text.number("attention_dropout", 0, 0.99),
        "norm_eps": text.number("rms_norm_eps", 1e-20, 0.1),
        **_rope(given, width // num_heads),
        **{name: special.whole(name, 0, vocab_size - 1) for name in _SPECIAL_TOKENS},
    }


def supports_only(part: JsonObject, key: str, supported: Any) -> None:
    """Raise ``ValueError`` if a setting has another value than the one that there is."""
    if part.content[key] != supported:
        raise part.error(key, f"{supported!r}: nothing else is supported")


def heads(part: JsonObject, key: str, width_key: str, axes: int = 1) -> int:
    """Return how many heads a width divides into, for rotary embeddings of one axis or of two."""
    width, count = part.whole(width_key), part.whole(key, most=WIDEST)
    divisor = count * 2 * axes
    if width % divisor or width > WIDEST:
        raise part.error(
            width_key,
            f"a number up to {WIDEST:,} that {key} x {2 * axes} = {divisor} divides",
        )
    return count


def whole_numbers(part: JsonObject, key: str, least: int, most: int) -> tuple[int, ...]:
    """Return a list of whole numbers between two bounds, both included."""
    items = part.each(key)
    return tuple(items.whole(place, least, most) for place in items.content)


def _kv_heads(text: JsonObject, num_heads: int) -> int:
    if "num_key_value_heads" not in text:
        return num_heads
    kv_heads = text.whole("num_key_value_heads")
    if num_heads % kv_heads:
        raise text.error("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    return kv_heads


def _rope(text: JsonObject, head_dim: int) -> dict[str, Any]:
    """Rotary parameters from ``rope_parameters`` or from ``rope_theta`` and ``rope_scaling``."""
    key = "rope_parameters" if "rope_parameters" in text.content else "rope_scaling"
    given = text.over({key: {}}).part(key)
    for name in ("rope_type", "type"):
        if given.content.get(name, "default") not in ("default", "mrope"):
            raise given.error(name, "'default' or 'mrope': rotary embeddings are not scaled here")
    theta = given if "rope_theta" in given.content else text
    sections = whole_numbers(given.over(_ROPE_DEFAULTS), "mrope_section", 1, head_dim)
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise given.over(_ROPE_DEFAULTS).error(
            "mrope_section", f"three numbers whose sum is half of a head's dimension, {head_dim}"
        )
    rope_base = theta.over(_ROPE_DEFAULTS).number("rope_theta", 1, 1e12)
    return {"rope_base": rope_base, "mrope_sections": sections}
