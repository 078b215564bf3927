"""From dimensions to modules."""

from torch import nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    TiedLinear,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.model_fusion import register_fusion_module

from torchtune_vl.models.qwen2_5_vl._fusion import MRoPEDecoder, VisionFusionModel
from torchtune_vl.models.qwen2_5_vl._position_embeddings import (
    MultimodalRotaryTable,
    RotaryEmbedding,
    VisionRotaryTable,
)
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE
from torchtune_vl.models.qwen2_5_vl._vision_encoder import (
    PatchEmbedding,
    PatchMerger,
    Qwen2_5_VLVisionEncoder,
    VisionAttention,
    VisionFeedForward,
    VisionLayer,
)


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
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31),
    image_token_id: int = 151655,
    video_token_id: int = 151656,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
) -> VisionFusionModel:
    """Build Qwen2.5-VL from its dimensions.

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

    Returns:
        The model.

    Raises:
        ValueError: if the dimensions do not fit each other.
    """
    return VisionFusionModel(
        decoder=qwen2_5_vl_decoder(
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
        ),
        vision_encoder=qwen2_5_vl_vision_encoder(
            embed_dim=vision_embed_dim,
            num_layers=vision_num_layers,
            num_heads=vision_num_heads,
            intermediate_dim=vision_intermediate_dim,
            out_dim=embed_dim,
            in_channels=vision_in_channels,
            patch_size=patch_size,
            temporal_patch_size=temporal_patch_size,
            full_attention_layers=full_attention_layers,
        ),
        placeholder_ids=(image_token_id, video_token_id),
        decoder_trainable=decoder_trainable,
        encoder_trainable=encoder_trainable,
        fusion_trainable=fusion_trainable,
    )


def qwen2_5_vl_decoder(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    tie_word_embeddings: bool,
    max_seq_len: int,
    attn_dropout: float,
    norm_eps: float,
    rope_base: float,
    mrope_sections: tuple[int, int, int],
) -> MRoPEDecoder:
    """Build the decoder; the arguments are those of :func:`qwen2_5_vl`.

    Returns:
        The decoder.

    Raises:
        ValueError: if the dimensions do not fit each other.
    """
    head_dim = _head_dim(embed_dim, num_heads)

    def layer() -> TransformerSelfAttentionLayer:
        attn = MultiHeadAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=nn.Linear(embed_dim, num_heads * head_dim),
            k_proj=nn.Linear(embed_dim, num_kv_heads * head_dim),
            v_proj=nn.Linear(embed_dim, num_kv_heads * head_dim),
            output_proj=nn.Linear(num_heads * head_dim, embed_dim, bias=False),
            pos_embeddings=RotaryEmbedding(),
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
        )
        return TransformerSelfAttentionLayer(
            attn=attn,
            mlp=FeedForward(
                gate_proj=nn.Linear(embed_dim, intermediate_dim, bias=False),
                down_proj=nn.Linear(intermediate_dim, embed_dim, bias=False),
                up_proj=nn.Linear(embed_dim, intermediate_dim, bias=False),
            ),
            sa_norm=nn.RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=nn.RMSNorm(embed_dim, eps=norm_eps),
        )

    tok_embeddings = nn.Embedding(vocab_size, embed_dim)
    if tie_word_embeddings:
        output = TiedLinear(tok_embeddings)
    else:
        output = nn.Linear(embed_dim, vocab_size, bias=False)
    return MRoPEDecoder(
        rope=MultimodalRotaryTable(head_dim, rope_base, mrope_sections),
        tok_embeddings=tok_embeddings,
        layers=[layer() for _ in range(num_layers)],
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=nn.RMSNorm(embed_dim, eps=norm_eps),
        output=output,
    )


def qwen2_5_vl_vision_encoder(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    intermediate_dim: int,
    out_dim: int,
    in_channels: int,
    patch_size: int,
    temporal_patch_size: int,
    full_attention_layers: tuple[int, ...],
) -> Qwen2_5_VLVisionEncoder:
    """Build the vision encoder; the arguments are those of :func:`qwen2_5_vl`.

    Returns:
        The encoder; its merger counts as the model's fusion parameters.

    Raises:
        ValueError: if the dimensions do not fit each other.
    """
    head_dim = _head_dim(embed_dim, num_heads)
    if head_dim % 4:
        raise ValueError(f"the encoder's heads need a dimension divisible by 4, got {head_dim}")

    def layer() -> VisionLayer:
        return VisionLayer(
            attn=VisionAttention(
                qkv=nn.Linear(embed_dim, 3 * embed_dim),
                output_proj=nn.Linear(embed_dim, embed_dim),
                head_dim=head_dim,
            ),
            mlp=VisionFeedForward(
                gate_proj=nn.Linear(embed_dim, intermediate_dim),
                down_proj=nn.Linear(intermediate_dim, embed_dim),
                up_proj=nn.Linear(embed_dim, intermediate_dim),
            ),
            sa_norm=nn.RMSNorm(embed_dim, eps=1e-6),
            mlp_norm=nn.RMSNorm(embed_dim, eps=1e-6),
        )

    unit_dim = embed_dim * MERGE_SIZE**2
    merger = PatchMerger(
        norm=nn.RMSNorm(embed_dim, eps=1e-6),
        mlp=FeedForward(
            gate_proj=nn.Linear(unit_dim, unit_dim),
            down_proj=nn.Linear(unit_dim, out_dim),
            activation=nn.GELU(),
        ),
    )
    register_fusion_module(merger)
    return Qwen2_5_VLVisionEncoder(
        patch_embed=PatchEmbedding(
            in_channels=in_channels,
            temporal_patch_size=temporal_patch_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
        ),
        layers=[layer() for _ in range(num_layers)],
        merger=merger,
        rope=VisionRotaryTable(head_dim),
        full_attention_layers=full_attention_layers,
    )


def _head_dim(embed_dim: int, num_heads: int) -> int:
    if embed_dim % num_heads:
        raise ValueError(f"a width of {embed_dim} does not divide into {num_heads} heads")
    return embed_dim // num_heads
