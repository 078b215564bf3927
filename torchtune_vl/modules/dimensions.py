"""The dimensions of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from torchtune_vl.media import Geometry


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What a model is built from; the defaults all published ones have."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    tie_word_embeddings: bool
    max_seq_len: int
    attn_dropout: float = 0.0
    norm_eps: float = 1e-6
    rope_base: float = 1e6
    # Numbers of frequencies that turn with the temporal, height and width position, side by side or
    # in turns; twice their sum is the dimension of a head
    mrope_sections: tuple[int, int, int] = (16, 24, 24)
    mrope_interleaved: bool = False
    head_dim: int | None = None  # where heads need not divide the width
    attn_bias: bool = True  # of queries, keys and values
    qk_norm: bool = False  # of each head of queries and keys
    # Feed-forwards of which each token takes some, none if 0, in all layers but for the dense ones;
    # and how much of the loss is that of their balance
    num_experts: int = 0
    num_active_experts: int = 0
    expert_dim: int = 0
    dense_layers: Sequence[int] = ()
    router_aux_loss_coef: float = 0.0
    image_token_id: int = 151655
    video_token_id: int = 151656
    # The encoder's: sizes of units and windows, and how pixels are normalized; and its layers
    geometry: Geometry
    vision_norm: Callable[[int], nn.Module]
    vision_activation: Callable[[torch.Tensor], torch.Tensor]
    vision_gated: bool
    vision_intermediate_dim: int
    vision_embed_dim: int = 1280
    vision_num_layers: int = 32
    vision_num_heads: int = 16
    vision_in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    patch_bias: bool = False
    position_grid: int = 0  # learned positions along a side of a frame, none if 0
    # Indices of layers that attend over whole frames, where others attend in windows
    full_attention_layers: Sequence[int] = ()
    # Indices of layers whose hidden states are added to those of the first layers of the decoder
    deepstack_layers: Sequence[int] = ()
