"""The published sizes, and the model that a ``config.json`` describes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtune_vl.models.qwen2_5_vl._component_builders import lora_qwen2_5_vl, qwen2_5_vl
from torchtune_vl.models.qwen2_5_vl._fusion import VisionFusionModel
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE, WINDOW_UNITS

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
    path = Path(checkpoint_dir) / "config.json"
    try:
        return _dimensions(read_config(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json`` of Qwen2.5-VL.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        ValueError: if there is no such file, or it is of another model.
    """
    if not path.is_file():
        raise ValueError("no such file: a checkpoint directory needs its config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"not a JSON file ({error})") from None
    if config.get("model_type") != "qwen2_5_vl":
        raise ValueError(
            f"model_type is {config.get('model_type')!r}, expected 'qwen2_5_vl': this is a "
            "checkpoint of another model"
        )
    return config


def _dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a config to the arguments of :func:`qwen2_5_vl`."""
    given_text = config.get("text_config") or config
    text = {**_TEXT_DEFAULTS, **given_text}
    vision = {**_VISION_DEFAULTS, **config.get("vision_config", {})}
    rope = _rope(given_text)
    _refuse_unsupported(text, vision)
    return {
        "vocab_size": text["vocab_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": text["num_attention_heads"],
        "num_kv_heads": text["num_key_value_heads"] or text["num_attention_heads"],
        "embed_dim": text["hidden_size"],
        "intermediate_dim": text["intermediate_size"],
        "tie_word_embeddings": bool(
            config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
        ),
        "max_seq_len": text["max_position_embeddings"],
        "attn_dropout": text["attention_dropout"],
        "norm_eps": text["rms_norm_eps"],
        "rope_base": rope["rope_theta"],
        "mrope_sections": tuple(rope["mrope_section"]),
        "vision_embed_dim": vision["hidden_size"],
        "vision_num_layers": vision["depth"],
        "vision_num_heads": vision["num_heads"],
        "vision_intermediate_dim": vision["intermediate_size"],
        "vision_in_channels": vision["in_channels"],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "full_attention_layers": tuple(vision["fullatt_block_indexes"]),
        "image_token_id": config.get("image_token_id", 151655),
        "video_token_id": config.get("video_token_id", 151656),
    }


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters from ``rope_parameters`` or from ``rope_theta`` and ``rope_scaling``."""
    scaling = text.get("rope_scaling") or {}
    given = text.get("rope_parameters") or scaling
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(
            f"rotary embeddings of type {kind!r} are not supported, only M-RoPE without scaling"
        )
    theta = {"rope_theta": text["rope_theta"]} if "rope_theta" in text else {}
    return {**_ROPE_DEFAULTS, **theta, **given}


def _refuse_unsupported(text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    if text["use_sliding_window"]:
        raise ValueError("use_sliding_window is not supported")
    for part, activation in (("text", text["hidden_act"]), ("vision", vision["hidden_act"])):
        if activation != "silu":
            raise ValueError(f"hidden_act of the {part} model is {activation!r}, expected 'silu'")
    window_size = WINDOW_UNITS * MERGE_SIZE * vision["patch_size"]
    for name, value in (("spatial_merge_size", MERGE_SIZE), ("window_size", window_size)):
        if vision[name] != value:
            raise ValueError(f"{name} of the vision model is {vision[name]}, expected {value}")
    if vision["out_hidden_size"] != text["hidden_size"]:
        raise ValueError(
            f"the vision encoder's out_hidden_size {vision['out_hidden_size']} is not the "
            f"decoder's hidden_size {text['hidden_size']}"
        )
