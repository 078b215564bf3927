"""The published sizes, and the model that a ``config.json`` describes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtune_vl.models._json import JsonObject, read_json_object
from torchtune_vl.models.qwen2_5_vl._component_builders import lora_qwen2_5_vl, qwen2_5_vl
from torchtune_vl.models.qwen2_5_vl._fusion import VisionFusionModel
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE, WINDOW_UNITS
from torchtune_vl.models.qwen2_5_vl._pretrained import text_config

_DIMENSIONS: dict[str, dict[str, Any]] = {
    "3B": {
        "vocab_size": 151936,
        "num_layers": 36,
        "num_heads": 16,
        "num_kv_heads": 2,
        "embed_dim": 2048,
        "intermediate_dim": 11008,
        "tie_word_embeddings": True,
        "vision_intermediate_dim": 3420,
    },
    "7B": {
        "vocab_size": 152064,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "embed_dim": 3584,
        "intermediate_dim": 18944,
        "tie_word_embeddings": False,
        "vision_intermediate_dim": 3420,
    },
    "32B": {
        "vocab_size": 152064,
        "num_layers": 64,
        "num_heads": 40,
        "num_kv_heads": 8,
        "embed_dim": 5120,
        "intermediate_dim": 27648,
        "tie_word_embeddings": False,
        "vision_intermediate_dim": 3456,
    },
    "72B": {
        "vocab_size": 152064,
        "num_layers": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
        "embed_dim": 8192,
        "intermediate_dim": 29568,
        "tie_word_embeddings": False,
        "vision_intermediate_dim": 3456,
    },
}


def qwen2_5_vl_3b(
    *,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
) -> VisionFusionModel:
    """Build Qwen2.5-VL 3B with fresh weights.

    Args:
        decoder_trainable: whether the decoder, with its token embedding, is trained.
        encoder_trainable: whether the encoder without its merger is trained.
        fusion_trainable: whether the merger is trained.

    Returns:
        The model.
    """
    return qwen2_5_vl(
        **_DIMENSIONS["3B"],
        decoder_trainable=decoder_trainable,
        encoder_trainable=encoder_trainable,
        fusion_trainable=fusion_trainable,
    )


def qwen2_5_vl_7b(
    *,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
) -> VisionFusionModel:
    """Build Qwen2.5-VL 7B with fresh weights.

    Args:
        decoder_trainable: whether the decoder, with its token embedding, is trained.
        encoder_trainable: whether the encoder without its merger is trained.
        fusion_trainable: whether the merger is trained.

    Returns:
        The model.
    """
    return qwen2_5_vl(
        **_DIMENSIONS["7B"],
        decoder_trainable=decoder_trainable,
        encoder_trainable=encoder_trainable,
        fusion_trainable=fusion_trainable,
    )


def qwen2_5_vl_32b(
    *,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
) -> VisionFusionModel:
    """Build Qwen2.5-VL 32B with fresh weights.

    Args:
        decoder_trainable: whether the decoder, with its token embedding, is trained.
        encoder_trainable: whether the encoder without its merger is trained.
        fusion_trainable: whether the merger is trained.

    Returns:
        The model.
    """
    return qwen2_5_vl(
        **_DIMENSIONS["32B"],
        decoder_trainable=decoder_trainable,
        encoder_trainable=encoder_trainable,
        fusion_trainable=fusion_trainable,
    )


def qwen2_5_vl_72b(
    *,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
) -> VisionFusionModel:
    """Build Qwen2.5-VL 72B with fresh weights.

    Args:
        decoder_trainable: whether the decoder, with its token embedding, is trained.
        encoder_trainable: whether the encoder without its merger is trained.
        fusion_trainable: whether the merger is trained.

    Returns:
        The model.
    """
    return qwen2_5_vl(
        **_DIMENSIONS["72B"],
        decoder_trainable=decoder_trainable,
        encoder_trainable=encoder_trainable,
        fusion_trainable=fusion_trainable,
    )


def lora_qwen2_5_vl_3b(lora_attn_modules: Sequence[str], **settings: Any) -> VisionFusionModel:
    """Build Qwen2.5-VL 3B with adapters, its output layer is tied and gets none.

    Args:
        lora_attn_modules: attention layers that get adapters.
        **settings: other arguments of :func:`lora_qwen2_5_vl` but for dimensions.

    Returns:
        The model.

    Raises:
        ValueError: if the adapters match no layer, or nothing would be trained.
    """
    return lora_qwen2_5_vl(lora_attn_modules, **_DIMENSIONS["3B"], **settings)


def lora_qwen2_5_vl_7b(lora_attn_modules: Sequence[str], **settings: Any) -> VisionFusionModel:
    """Build Qwen2.5-VL 7B with adapters.

    Args:
        lora_attn_modules: attention layers that get adapters.
        **settings: other arguments of :func:`lora_qwen2_5_vl` but for dimensions.

    Returns:
        The model.

    Raises:
        ValueError: if the adapters match no layer, or nothing would be trained.
    """
    return lora_qwen2_5_vl(lora_attn_modules, **_DIMENSIONS["7B"], **settings)


def lora_qwen2_5_vl_32b(lora_attn_modules: Sequence[str], **settings: Any) -> VisionFusionModel:
    """Build Qwen2.5-VL 32B with adapters.

    Args:
        lora_attn_modules: attention layers that get adapters.
        **settings: other arguments of :func:`lora_qwen2_5_vl` but for dimensions.

    Returns:
        The model.

    Raises:
        ValueError: if the adapters match no layer, or nothing would be trained.
    """
    return lora_qwen2_5_vl(lora_attn_modules, **_DIMENSIONS["32B"], **settings)


def lora_qwen2_5_vl_72b(lora_attn_modules: Sequence[str], **settings: Any) -> VisionFusionModel:
    """Build Qwen2.5-VL 72B with adapters.

    Args:
        lora_attn_modules: attention layers that get adapters.
        **settings: other arguments of :func:`lora_qwen2_5_vl` but for dimensions.

    Returns:
        The model.

    Raises:
        ValueError: if the adapters match no layer, or nothing would be trained.
    """
    return lora_qwen2_5_vl(lora_attn_modules, **_DIMENSIONS["72B"], **settings)


def qlora_qwen2_5_vl_3b(lora_attn_modules: Sequence[str], **settings: Any) -> VisionFusionModel:
    """Build Qwen2.5-VL 3B with adapters on weights in NF4.

    Args:
        lora_attn_modules: attention layers that get adapters.
        **settings: other arguments of :func:`lora_qwen2_5_vl` but for dimensions.

    Returns:
        The model.

    Raises:
        ValueError: if the adapters match no layer, or nothing would be trained.
    """
    return lora_qwen2_5_vl_3b(lora_attn_modules, quantize_base=True, **settings)


def qlora_qwen2_5_vl_7b(lora_attn_modules: Sequence[str], **settings: Any) -> VisionFusionModel:
    """Build Qwen2.5-VL 7B with adapters on weights in NF4.

    Args:
        lora_attn_modules: attention layers that get adapters.
        **settings: other arguments of :func:`lora_qwen2_5_vl` but for dimensions.

    Returns:
        The model.

    Raises:
        ValueError: if the adapters match no layer, or nothing would be trained.
    """
    return lora_qwen2_5_vl_7b(lora_attn_modules, quantize_base=True, **settings)


def qlora_qwen2_5_vl_32b(lora_attn_modules: Sequence[str], **settings: Any) -> VisionFusionModel:
    """Build Qwen2.5-VL 32B with adapters on weights in NF4.

    Args:
        lora_attn_modules: attention layers that get adapters.
        **settings: other arguments of :func:`lora_qwen2_5_vl` but for dimensions.

    Returns:
        The model.

    Raises:
        ValueError: if the adapters match no layer, or nothing would be trained.
    """
    return lora_qwen2_5_vl_32b(lora_attn_modules, quantize_base=True, **settings)


def qlora_qwen2_5_vl_72b(lora_attn_modules: Sequence[str], **settings: Any) -> VisionFusionModel:
    """Build Qwen2.5-VL 72B with adapters on weights in NF4.

    Args:
        lora_attn_modules: attention layers that get adapters.
        **settings: other arguments of :func:`lora_qwen2_5_vl` but for dimensions.

    Returns:
        The model.

    Raises:
        ValueError: if the adapters match no layer, or nothing would be trained.
    """
    return lora_qwen2_5_vl_72b(lora_attn_modules, quantize_base=True, **settings)


# transformers 4 leaves out of a config.json whatever equals the defaults of its own classes, and
# these are not the values of the published checkpoints.
_TEXT_DEFAULTS: dict[str, Any] = {
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
_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
_ROPE_DEFAULTS: dict[str, Any] = {"rope_theta": 1e6, "mrope_section": (16, 24, 24)}
_SPECIAL_TOKENS = {"image_token_id": 151655, "video_token_id": 151656}
_UNTIED = {"tie_word_embeddings": False}
# Ten times what the largest models have: beyond is damage, and could not be built
_DEEPEST = 1_000
_WIDEST = 10_000_000
_LARGEST_PATCH = 1_000


def qwen2_5_vl_from_config(
    checkpoint_dir: str | Path,
    *,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
) -> VisionFusionModel:
    """Build the model that a checkpoint's ``config.json`` describes, with fresh weights.

    Args:
        checkpoint_dir: directory with a ``config.json``, in the flat layout of the published
            checkpoints or the nested one of transformers 5.
        decoder_trainable: whether the decoder, with its token embedding, is trained.
        encoder_trainable: whether the encoder without its merger is trained.
        fusion_trainable: whether the merger is trained.

    Returns:
        The model.

    Raises:
        ValueError: if the file is missing, describes another architecture, or asks for what this
            model does not have.
    """
    return qwen2_5_vl(
        **_dimensions_of(checkpoint_dir),
        decoder_trainable=decoder_trainable,
        encoder_trainable=encoder_trainable,
        fusion_trainable=fusion_trainable,
    )


def lora_qwen2_5_vl_from_config(
    checkpoint_dir: str | Path, lora_attn_modules: Sequence[str], **settings: Any
) -> VisionFusionModel:
    """Build the model that a checkpoint's ``config.json`` describes, with adapters.

    Args:
        checkpoint_dir: as in :func:`qwen2_5_vl_from_config`.
        lora_attn_modules: attention layers that get adapters.
        **settings: other arguments of :func:`lora_qwen2_5_vl` but for dimensions.

    Returns:
        The model.

    Raises:
        ValueError: as in :func:`qwen2_5_vl_from_config` and :func:`lora_qwen2_5_vl`.
    """
    return lora_qwen2_5_vl(lora_attn_modules, **_dimensions_of(checkpoint_dir), **settings)


def _dimensions_of(checkpoint_dir: str | Path) -> dict[str, Any]:
    """Translate a ``config.json`` to the arguments of :func:`qwen2_5_vl`."""
    config = read_config(Path(checkpoint_dir) / "config.json")
    given_text = text_config(config)
    text = given_text.over(_TEXT_DEFAULTS)
    vision = config.part("vision_config").over(_VISION_DEFAULTS)
    special = config.over(_SPECIAL_TOKENS)
    _refuse_unsupported(text, vision)
    vocab_size, width = text.whole("vocab_size", most=_WIDEST), text.whole("hidden_size")
    num_heads = _heads(text, "num_attention_heads", width)
    vision_num_heads = _heads(vision, "num_heads", vision.whole("hidden_size"), even_halves=True)
    depth = vision.whole("depth", most=_DEEPEST)
    return {
        "vocab_size": vocab_size,
        "num_layers": text.whole("num_hidden_layers", most=_DEEPEST),
        "num_heads": num_heads,
        "num_kv_heads": _kv_heads(text, num_heads),
        "embed_dim": width,
        "intermediate_dim": text.whole("intermediate_size", most=_WIDEST),
        "tie_word_embeddings": config.over(_UNTIED).flag("tie_word_embeddings")
        or text.over(_UNTIED).flag("tie_word_embeddings"),
        "max_seq_len": text.whole("max_position_embeddings"),
        "attn_dropout": text.number("attention_dropout", 0, 0.99),
        "norm_eps": text.number("rms_norm_eps", 1e-20, 0.1),
        **_rope(given_text, width // num_heads),
        "vision_embed_dim": vision.whole("hidden_size", most=_WIDEST),
        "vision_num_layers": depth,
        "vision_num_heads": vision_num_heads,
        "vision_intermediate_dim": vision.whole("intermediate_size", most=_WIDEST),
        "vision_in_channels": vision.whole("in_channels", most=_WIDEST),
        "patch_size": vision.whole("patch_size"),
        "temporal_patch_size": vision.whole("temporal_patch_size", most=_LARGEST_PATCH),
        "full_attention_layers": _whole_numbers(vision, "fullatt_block_indexes", 0, depth - 1),
        **{name: special.whole(name, 0, vocab_size - 1) for name in _SPECIAL_TOKENS},
    }


def read_config(path: Path) -> JsonObject:
    """Read a ``config.json`` of Qwen2.5-VL.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        ValueError: if there is no such file, or it is of another model.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file: a checkpoint directory needs its config.json")
    config = read_json_object(path)
    if config.content.get("model_type") != "qwen2_5_vl":
        raise config.over({"model_type": None}).error(
            "model_type", "'qwen2_5_vl': this is a checkpoint of another model"
        )
    return config


def _heads(part: JsonObject, key: str, width: int, even_halves: bool = False) -> int:
    """How many heads a width divides into, for rotary embeddings of one axis or of two."""
    heads = part.whole(key, most=_WIDEST)
    divisor = heads * (4 if even_halves else 2)
    if width % divisor or width > _WIDEST:
        raise part.error(
            "hidden_size",
            f"a number up to {_WIDEST:,} that {key} x {divisor // heads} = {divisor} divides",
        )
    return heads


def _kv_heads(text: JsonObject, num_heads: int) -> int:
    if "num_key_value_heads" not in text:
        return num_heads
    kv_heads = text.whole("num_key_value_heads")
    if num_heads % kv_heads:
        raise text.error("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    return kv_heads


def _whole_numbers(part: JsonObject, key: str, least: int, most: int) -> tuple[int, ...]:
    items = part.each(key)
    return tuple(items.whole(place, least, most) for place in items.content)


def _rope(text: JsonObject, head_dim: int) -> dict[str, Any]:
    """Rotary parameters from ``rope_parameters`` or from ``rope_theta`` and ``rope_scaling``."""
    key = "rope_parameters" if "rope_parameters" in text.content else "rope_scaling"
    given = text.over({key: {}}).part(key)
    for name in ("rope_type", "type"):
        if given.content.get(name, "default") not in ("default", "mrope"):
            raise given.error(name, "'default' or 'mrope': rotary embeddings are not scaled here")
    theta = given if "rope_theta" in given.content else text
    sections = _whole_numbers(given.over(_ROPE_DEFAULTS), "mrope_section", 1, head_dim)
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise given.over(_ROPE_DEFAULTS).error(
            "mrope_section", f"three numbers whose sum is half of a head's dimension, {head_dim}"
        )
    rope_base = theta.over(_ROPE_DEFAULTS).number("rope_theta", 1, 1e12)
    return {"rope_base": rope_base, "mrope_sections": sections}


def _refuse_unsupported(text: JsonObject, vision: JsonObject) -> None:
    window_size = WINDOW_UNITS * MERGE_SIZE * vision.whole("patch_size", most=_LARGEST_PATCH)
    for part, key, supported in (
        (text, "use_sliding_window", False),
        (text, "hidden_act", "silu"),
        (vision, "hidden_act", "silu"),
        (vision, "spatial_merge_size", MERGE_SIZE),
        (vision, "window_size", window_size),
    ):
        if part.content[key] != supported:
            raise part.error(key, f"{supported!r}: nothing else is supported")
    if vision.content["out_hidden_size"] != text.content["hidden_size"]:
        raise vision.error(
            "out_hidden_size", f"the hidden_size of the decoder, {text.content['hidden_size']}"
        )
