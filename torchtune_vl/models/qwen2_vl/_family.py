"""Qwen2-VL's dimensions, its encoder, and the names of its tensors."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
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
)
from torchtune_vl.models._family import Family, builders
from torchtune_vl.models.qwen2_vl._transform import GEOMETRY, Qwen2VLTransform
from torchtune_vl.modules.adapters import LinearBuilder, plain_linear
from torchtune_vl.modules.decoder import FeedForward
from torchtune_vl.modules.vision import VisionLanguageModel

NAMES = TensorNames(
    "Qwen2-VL",
    {
        "patch_embed.proj": "patch_embed.proj",
        "blocks.{}.norm1": "layers.{}.sa_norm",
        "blocks.{}.norm2": "layers.{}.mlp_norm",
        "blocks.{}.attn.qkv": "layers.{}.attn.qkv",
        "blocks.{}.attn.proj": "layers.{}.attn.output_proj",
        "blocks.{}.mlp.fc1": "layers.{}.mlp.w1",
        "blocks.{}.mlp.fc2": "layers.{}.mlp.w2",
        "merger.ln_q": "merger.norm",
        "merger.mlp.0": "merger.mlp.w1",
        "merger.mlp.2": "merger.mlp.w2",
    },
    without_bias=frozenset({"patch_embed.proj"}),
)

# What is not the same for all sizes
_SIZES: dict[str, dict[str, Any]] = {
    "2b": {
        "vocab_size": 151936,
        "num_layers": 28,
        "num_heads": 12,
        "num_kv_heads": 2,
        "embed_dim": 1536,
        "intermediate_dim": 8960,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 152064,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "embed_dim": 3584,
        "intermediate_dim": 18944,
        "tie_word_embeddings": False,
    },
    "72b": {
        "vocab_size": 152064,
        "num_layers": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
        "embed_dim": 8192,
        "intermediate_dim": 29568,
        "tie_word_embeddings": False,
    },
}
# transformers' defaults, which its releases leave out of a config.json
_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_LARGEST_PATCH = 1_000


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by a sigmoid (arXiv 1606.08415, section 2; transformers' ``QuickGELUActivation``)."""
    return x * torch.sigmoid(1.702 * x)


def qwen2_vl(
    *,
    embed_dim: int,
    vision_embed_dim: int = 1280,
    vision_num_layers: int = 32,
    vision_num_heads: int = 16,
    vision_intermediate_dim: int = 5120,
    vision_in_channels: int = 3,
    patch_size: int = GEOMETRY.patch_size,
    temporal_patch_size: int = GEOMETRY.temporal_patch_size,
    image_token_id: int = 151655,
    video_token_id: int = 151656,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
    decoder_linear: LinearBuilder = plain_linear,
    encoder_linear: LinearBuilder = plain_linear,
    merger_linear: LinearBuilder = plain_linear,
    **decoder_dimensions: Any,
) -> VisionLanguageModel:
    """Build Qwen2-VL (arXiv 2409.12191) from its dimensions, with fresh weights.

    The defaults are what all published sizes share. Each layer of the encoder (transformers'
    ``Qwen2VisionTransformerPretrainedModel``) attends over whole frames.

    Args:
        embed_dim: width of the decoder.
        vision_embed_dim: width of the encoder.
        vision_num_layers: its layers.
        vision_num_heads: its heads.
        vision_intermediate_dim: width of its feed-forward.
        vision_in_channels: colour channels.
        patch_size: pixels along a side of a patch.
        temporal_patch_size: frames of a patch.
        image_token_id: id of the placeholder of images.
        video_token_id: id of the placeholder of videos.
        decoder_trainable: whether the decoder, with its token embedding, is trained.
        encoder_trainable: whether the encoder without its merger is trained.
        fusion_trainable: whether the merger is trained.
        decoder_linear: builds the linear layers of the decoder.
        encoder_linear: likewise of the vision encoder.
        merger_linear: likewise of its merger.
        **decoder_dimensions: further arguments of :func:`~torchtune_vl.models._builders.decoder`.

    Returns:
        The model.

    Raises:
        ValueError: if the dimensions do not fit each other.
    """
    text = decoder(embed_dim=embed_dim, linear=decoder_linear, **decoder_dimensions)
    geometry = replace(GEOMETRY, patch_size=patch_size, temporal_patch_size=temporal_patch_size)

    def mlp() -> FeedForward:
        width, hidden = vision_embed_dim, vision_intermediate_dim
        return FeedForward(
            w1=encoder_linear("w1", width, hidden, True),
            w2=encoder_linear("w2", hidden, width, True),
            activation=quick_gelu,
        )

    encoder = vision_encoder(
        geometry=geometry,
        embed_dim=vision_embed_dim,
        num_layers=vision_num_layers,
        num_heads=vision_num_heads,
        in_channels=vision_in_channels,
        out_dim=embed_dim,
        full_attention_layers=range(vision_num_layers),
        norm=partial(nn.LayerNorm, eps=1e-6),
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
    """Translate a ``config.json`` to the arguments of :func:`qwen2_vl`."""
    vision = config.part("vision_config").over(_VISION_DEFAULTS)
    supports_only(vision, "hidden_act", "quick_gelu")
    supports_only(vision, "spatial_merge_size", GEOMETRY.merge_size)
    text = decoder_dimensions(config)
    if vision.content["hidden_size"] != text["embed_dim"]:
        raise vision.error("hidden_size", f"that of the decoder, {text['embed_dim']}")
    # The published files say in_chans, transformers' class in_channels
    channels = "in_chans" if "in_chans" in vision else "in_channels"
    width = vision.whole("embed_dim", most=WIDEST)
    return {
        **text,
        "vision_num_heads": heads(vision, "num_heads", "embed_dim", axes=2),
        "vision_embed_dim": width,
        "vision_num_layers": vision.whole("depth", most=DEEPEST),
        "vision_intermediate_dim": int(width * vision.number("mlp_ratio", 0.1, 100)),
        "vision_in_channels": vision.whole(channels, most=WIDEST),
        "patch_size": vision.whole("patch_size", most=_LARGEST_PATCH),
        "temporal_patch_size": vision.whole("temporal_patch_size", most=_LARGEST_PATCH),
    }


FAMILY = Family(
    name="Qwen2-VL",
    names=NAMES,
    geometry=GEOMETRY,
    dimensions=_dimensions,
    build=qwen2_vl,
    transform=Qwen2VLTransform,
)
BUILDERS = builders("qwen2_vl", FAMILY, _SIZES)
