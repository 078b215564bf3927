"""Qwen2.5-VL's dimensions, its encoder, and the names of its tensors."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from torchtune_vl.files._json import JsonObject
from torchtune_vl.files._tensor_names import TensorNames
from torchtune_vl.models._builders import decoder, train_parts, vision_encoder
from torchtune_vl.models._config import (
    DEEPEST,
    WIDEST,
    decoder_dimensions,
    heads,
    supports_only,
    whole_numbers,
)
from torchtune_vl.models._family import Family, builders
from torchtune_vl.models.qwen2_5_vl._geometry import GEOMETRY
from torchtune_vl.models.qwen2_5_vl._transform import Qwen2_5_VLTransform
from torchtune_vl.modules.adapters import LinearBuilder, plain_linear
from torchtune_vl.modules.decoder import FeedForward
from torchtune_vl.modules.vision import VisionLanguageModel

NAMES = TensorNames(
    "Qwen2.5-VL",
    {
        "patch_embed.proj": "patch_embed.proj",
        "blocks.{}.norm1": "layers.{}.sa_norm",
        "blocks.{}.norm2": "layers.{}.mlp_norm",
        "blocks.{}.attn.qkv": "layers.{}.attn.qkv",
        "blocks.{}.attn.proj": "layers.{}.attn.output_proj",
        "blocks.{}.mlp.gate_proj": "layers.{}.mlp.w1",
        "blocks.{}.mlp.down_proj": "layers.{}.mlp.w2",
        "blocks.{}.mlp.up_proj": "layers.{}.mlp.w3",
        "merger.ln_q": "merger.norm",
        "merger.mlp.0": "merger.mlp.w1",
        "merger.mlp.2": "merger.mlp.w2",
    },
    without_bias=frozenset(
        {"patch_embed.proj", "blocks.{}.norm1", "blocks.{}.norm2", "merger.ln_q"}
    ),
)

_SIZES: dict[str, dict[str, Any]] = {
    "3b": {
        "vocab_size": 151936,
        "num_layers": 36,
        "num_heads": 16,
        "num_kv_heads": 2,
        "embed_dim": 2048,
        "intermediate_dim": 11008,
        "tie_word_embeddings": True,
        "vision_intermediate_dim": 3420,
    },
    "7b": {
        "vocab_size": 152064,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "embed_dim": 3584,
        "intermediate_dim": 18944,
        "tie_word_embeddings": False,
        "vision_intermediate_dim": 3420,
    },
    "32b": {
        "vocab_size": 152064,
        "num_layers": 64,
        "num_heads": 40,
        "num_kv_heads": 8,
        "embed_dim": 5120,
        "intermediate_dim": 27648,
        "tie_word_embeddings": False,
        "vision_intermediate_dim": 3456,
    },
    "72b": {
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

# transformers 4 leaves out of a config.json whatever equals the defaults of its own classes, and
# these are not the values of the published checkpoints.
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
_LARGEST_PATCH = 1_000


def qwen2_5_vl(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    tie_word_embeddings: bool,
    vision_intermediate_dim: int,
    max_seq_len: int = 128000,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1e6,
    mrope_sections: tuple[int, int, int] = (16, 24, 24),
    vision_embed_dim: int = 1280,
    vision_num_layers: int = 32,
    vision_num_heads: int = 16,
    vision_in_channels: int = 3,
    patch_size: int = GEOMETRY.patch_size,
    temporal_patch_size: int = GEOMETRY.temporal_patch_size,
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31),
    image_token_id: int = 151655,
    video_token_id: int = 151656,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
    decoder_linear: LinearBuilder = plain_linear,
    encoder_linear: LinearBuilder = plain_linear,
    merger_linear: LinearBuilder = plain_linear,
) -> VisionLanguageModel:
    """Build Qwen2.5-VL (arXiv 2502.13923) from its dimensions, with fresh weights.

    The defaults are what all published sizes share.

    Args:
        vocab_size: rows of the token embedding.
        num_layers: layers of the decoder.
        num_heads: its query heads.
        num_kv_heads: its key and value heads.
        embed_dim: its width.
        intermediate_dim: width of its feed-forward.
        tie_word_embeddings: whether the output layer is the token embedding.
        vision_intermediate_dim: width of the encoder's feed-forward.
        max_seq_len: tokens of the longest sequence that the decoder takes.
        attn_dropout: dropout of its attention weights.
        norm_eps: epsilon of its normalisations.
        rope_base: base of its rotary frequencies.
        mrope_sections: frequencies that turn with the temporal, height and width position.
        vision_embed_dim: width of the encoder.
        vision_num_layers: its layers.
        vision_num_heads: its heads.
        vision_in_channels: colour channels.
        patch_size: pixels along a side of a patch.
        temporal_patch_size: frames of a patch.
        full_attention_layers: indices of the encoder's layers that attend over whole frames.
        image_token_id: id of the placeholder of images.
        video_token_id: id of the placeholder of videos.
        decoder_trainable: whether the decoder, with its token embedding, is trained.
        encoder_trainable: whether the encoder without its merger is trained.
        fusion_trainable: whether the merger is trained.
        decoder_linear: builds the linear layers of the decoder.
        encoder_linear: likewise of the vision encoder.
        merger_linear: likewise of its merger.

    Returns:
        The model.

    Raises:
        ValueError: if the dimensions do not fit each other.
    """
    text = decoder(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        tie_word_embeddings=tie_word_embeddings,
        max_seq_len=max_seq_len,
        attn_dropout=attn_dropout,
        norm_eps=norm_eps,
        rope_base=rope_base,
        mrope_sections=mrope_sections,
        linear=decoder_linear,
    )
    geometry = replace(GEOMETRY, patch_size=patch_size, temporal_patch_size=temporal_patch_size)

    def mlp() -> FeedForward:
        width, hidden = vision_embed_dim, vision_intermediate_dim
        return FeedForward(
            w1=encoder_linear("w1", width, hidden, True),
            w2=encoder_linear("w2", hidden, width, True),
            w3=encoder_linear("w3", width, hidden, True),
        )

    encoder = vision_encoder(
        geometry=geometry,
        embed_dim=vision_embed_dim,
        num_layers=vision_num_layers,
        num_heads=vision_num_heads,
        in_channels=vision_in_channels,
        out_dim=embed_dim,
        full_attention_layers=full_attention_layers,
        norm=partial(nn.RMSNorm, eps=1e-6),
        mlp=mlp,
        linear=encoder_linear,
        merger_linear=merger_linear,
    )
    model = VisionLanguageModel(
        decoder=text, vision_encoder=encoder, placeholder_ids=(image_token_id, video_token_id)
    )
    return train_parts(
        model, decoder=decoder_trainable, encoder=encoder_trainable, merger=fusion_trainable
    )


def _dimensions(config: JsonObject) -> dict[str, Any]:
    """Translate a ``config.json`` to the arguments of :func:`qwen2_5_vl`."""
    vision = config.part("vision_config").over(_VISION_DEFAULTS)
    patch_size = vision.whole("patch_size", most=_LARGEST_PATCH)
    window = (GEOMETRY.window_size or 1) * GEOMETRY.merge_size * patch_size
    for key, supported in (
        ("hidden_act", "silu"),
        ("spatial_merge_size", GEOMETRY.merge_size),
        ("window_size", window),
    ):
        supports_only(vision, key, supported)
    text = decoder_dimensions(config)
    if vision.content["out_hidden_size"] != text["embed_dim"]:
        raise vision.error(
            "out_hidden_size", f"the hidden_size of the decoder, {text['embed_dim']}"
        )
    depth = vision.whole("depth", most=DEEPEST)
    return {
        **text,
        "vision_num_heads": heads(vision, "num_heads", "hidden_size", axes=2),
        "vision_embed_dim": vision.whole("hidden_size", most=WIDEST),
        "vision_num_layers": depth,
        "vision_intermediate_dim": vision.whole("intermediate_size", most=WIDEST),
        "vision_in_channels": vision.whole("in_channels", most=WIDEST),
        "patch_size": patch_size,
        "temporal_patch_size": vision.whole("temporal_patch_size", most=_LARGEST_PATCH),
        "full_attention_layers": whole_numbers(vision, "fullatt_block_indexes", 0, depth - 1),
    }


FAMILY = Family(
    name="Qwen2.5-VL",
    names=NAMES,
    geometry=GEOMETRY,
    dimensions=_dimensions,
    build=qwen2_5_vl,
    transform=Qwen2_5_VLTransform,
)
BUILDERS = builders("qwen2_5_vl", FAMILY, _SIZES)
