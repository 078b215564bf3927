"""From dimensions to modules, plain and with adapters."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

from torch import nn
from torchtune.modules import (
    FeedForward,
    TiedLinear,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.common_utils import reparametrize_as_dtype_state_dict_post_hook
from torchtune.modules.model_fusion import register_fusion_module
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.utils import get_logger

from torchtune_vl.models.qwen2_5_vl._fusion import (
    DocumentAttention,
    MRoPEDecoder,
    VisionFusionModel,
)
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
from torchtune_vl.modules.adapters import (
    AdapterLinears,
    LinearBuilder,
    Trainable,
    is_adapter,
    plain_linear,
    train_with_adapters,
)
from torchtune_vl.modules.summary import trained_parts

_MLP = ("w1", "w2", "w3")
# Layers that can be adapted, by the argument that says how their part is trained
_LAYERS: dict[str, tuple[str, ...]] = {
    "decoder_trainable": ("q_proj", "k_proj", "v_proj", "output_proj", *_MLP, "output"),
    "encoder_trainable": ("qkv", "output_proj", *_MLP),
    "fusion_trainable": ("w1", "w2"),
}


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
    decoder_linear: LinearBuilder = plain_linear,
    encoder_linear: LinearBuilder = plain_linear,
    merger_linear: LinearBuilder = plain_linear,
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
        decoder_linear: builds the linear layers of the decoder.
        encoder_linear: likewise of the vision encoder.
        merger_linear: likewise of its merger.

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
            linear=decoder_linear,
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
            linear=encoder_linear,
            merger_linear=merger_linear,
        ),
        placeholder_ids=(image_token_id, video_token_id),
        decoder_trainable=decoder_trainable,
        encoder_trainable=encoder_trainable,
        fusion_trainable=fusion_trainable,
    )


def lora_qwen2_5_vl(
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    trained_in_float32: bool = False,
    decoder_trainable: Trainable = "lora",
    encoder_trainable: Trainable = "frozen",
    fusion_trainable: Trainable = "frozen",
    **dimensions: Any,
) -> VisionFusionModel:
    """Build Qwen2.5-VL with low-rank adapters.

    Args:
        lora_attn_modules: attention layers that get adapters: ``q_proj``, ``k_proj`` and
            ``v_proj`` of the decoder, ``qkv`` of the vision encoder, where these three are one
            layer, and ``output_proj`` of both.
        apply_lora_to_mlp: whether the layers of feed-forwards get adapters, the merger's too.
        apply_lora_to_output: whether the output layer gets one.
        lora_rank: rank of the adapters.
        lora_alpha: their products are scaled by lora_alpha / lora_rank.
        lora_dropout: dropout before them.
        use_dora: whether to train magnitudes of weights beside (DoRA).
        quantize_base: whether to store the weights of linear layers as NF4 (QLoRA), unless they
            are trained in full. The output layer, as in the paper, keeps its dtype.
        trained_in_float32: whether what is trained is float32, whatever dtype the frozen weights
            have: updates of bfloat16 are lost where they are below half a unit in the last place.
            A layer then holds two dtypes, which our recipe computes with in one, and torchtune's
            recipes do not.
        decoder_trainable: "frozen", "lora", or "full" for training of the decoder itself, with its
            token embedding.
        encoder_trainable: likewise for the vision encoder without its merger.
        fusion_trainable: likewise for the merger.
        **dimensions: arguments of :func:`qwen2_5_vl` but for its switches.

    Returns:
        The model, in which only adapters and parts that are "full" require gradients.

    Raises:
        ValueError: if nothing would be trained, a name matches no layer of a part with adapters, a
            part gets none, or the output layer is the token embedding and is to get one.
    """
    parts: dict[str, Trainable] = {
        "decoder_trainable": decoder_trainable,
        "encoder_trainable": encoder_trainable,
        "fusion_trainable": fusion_trainable,
    }
    names = frozenset(lora_attn_modules)
    if apply_lora_to_mlp:
        names |= {*_MLP}
    if apply_lora_to_output:
        names |= {"output"}
    _check_adapters(names, parts)
    if apply_lora_to_output and dimensions["tie_word_embeddings"]:
        raise ValueError(
            "apply_lora_to_output: the output layer of this size is its token embedding, and an "
            "adapter on one of both cannot be merged; leave it out"
        )
    linears = {
        part: AdapterLinears(
            trainable=trainable,
            names=names,
            rank=lora_rank,
            alpha=lora_alpha,
            dropout=lora_dropout,
            use_dora=use_dora,
            quantize_base=quantize_base,
            never_quantized=frozenset({"output"}),
        )
        for part, trainable in parts.items()
    }
    model = qwen2_5_vl(
        **dimensions,
        decoder_linear=linears["decoder_trainable"],
        encoder_linear=linears["encoder_trainable"],
        merger_linear=linears["fusion_trainable"],
    )
    _train_parts(model, parts)
    if quantize_base:
        # State dicts, which checkpoints are made of, hold no NF4
        dtype = model.tok_embeddings.weight.dtype
        model._register_state_dict_hook(
            partial(reparametrize_as_dtype_state_dict_post_hook, dtype=dtype)
        )
    if trained_in_float32:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    log = get_logger("INFO")
    log.info("What is trained:\n%s", trained_parts(model, _part_of))
    in_full = [part for part, trainable in parts.items() if trainable == "full"]
    if in_full:
        log.info("%s 'full': save_adapter_weights_only would lose it", " and ".join(in_full))
    return model


def _part_of(parameter: str) -> str:
    prefixes = {
        "decoder.": "decoder",
        "tok_embeddings.": "token embedding",
        "encoders.vision.merger.": "merger",
        "encoders.vision.": "vision encoder",
    }
    part = next(part for prefix, part in prefixes.items() if parameter.startswith(prefix))
    return f"{part}, adapters" if is_adapter(parameter) else part


def _check_adapters(names: frozenset[str], parts: Mapping[str, Trainable]) -> None:
    for part, trainable in parts.items():
        if trainable not in get_args(Trainable):
            raise ValueError(f"unknown {part} {trainable!r}: use one of {get_args(Trainable)}")
    if set(parts.values()) == {"frozen"}:
        raise ValueError(f"nothing would be trained: {', '.join(parts)} are all 'frozen'")
    adapted = [part for part, trainable in parts.items() if trainable == "lora"]
    for part in adapted:
        if names.isdisjoint(_LAYERS[part]):
            raise ValueError(
                f"{part} is 'lora', but of its layers {', '.join(_LAYERS[part])} none is among "
                f"{sorted(names)}: name some, or make it 'frozen' or 'full'"
            )
    layers_of_parts = frozenset[str]().union(*(_LAYERS[part] for part in adapted))
    unmatched = names - layers_of_parts
    if layers_of_parts & names & {*_MLP}:
        unmatched -= {*_MLP}  # they are named together, and the merger has two of the three
    if unmatched:
        layers = "; ".join(f"{part} {', '.join(_LAYERS[part])}" for part in _LAYERS)
        raise ValueError(
            f"{', '.join(sorted(unmatched))} match no layer of a part that is 'lora': leave them "
            f"out, or make their part 'lora'. There are: {layers}"
        )


def _train_parts(model: VisionFusionModel, parts: Mapping[str, Trainable]) -> None:
    encoder = model.encoders["vision"]
    if parts["decoder_trainable"] == "full":
        for module in (model.decoder, model.tok_embeddings):
            train_with_adapters(module, dict(module.named_parameters()))
    if parts["encoder_trainable"] == "full":
        names = [name for name, _ in encoder.named_parameters() if not name.startswith("merger.")]
        train_with_adapters(encoder, names)
    if parts["fusion_trainable"] == "full":
        train_with_adapters(encoder.merger, dict(encoder.merger.named_parameters()))
    set_trainable_params(model, get_adapter_params(model))


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
    linear: LinearBuilder,
) -> MRoPEDecoder:
    """Build the decoder; the arguments are those of :func:`qwen2_5_vl`.

    Returns:
        The decoder.

    Raises:
        ValueError: if the dimensions do not fit each other.
    """
    head_dim = _head_dim(embed_dim, num_heads)

    def layer() -> TransformerSelfAttentionLayer:
        attn = DocumentAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=linear("q_proj", embed_dim, num_heads * head_dim, True),
            k_proj=linear("k_proj", embed_dim, num_kv_heads * head_dim, True),
            v_proj=linear("v_proj", embed_dim, num_kv_heads * head_dim, True),
            output_proj=linear("output_proj", num_heads * head_dim, embed_dim, False),
            pos_embeddings=RotaryEmbedding(),
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
        )
        return TransformerSelfAttentionLayer(
            attn=attn,
            mlp=FeedForward(
                gate_proj=linear("w1", embed_dim, intermediate_dim, False),
                down_proj=linear("w2", intermediate_dim, embed_dim, False),
                up_proj=linear("w3", embed_dim, intermediate_dim, False),
            ),
            sa_norm=nn.RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=nn.RMSNorm(embed_dim, eps=norm_eps),
        )

    tok_embeddings = nn.Embedding(vocab_size, embed_dim)
    if tie_word_embeddings:
        output = TiedLinear(tok_embeddings)
    else:
        output = linear("output", embed_dim, vocab_size, False)
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
    linear: LinearBuilder,
    merger_linear: LinearBuilder,
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
                qkv=linear("qkv", embed_dim, 3 * embed_dim, True),
                output_proj=linear("output_proj", embed_dim, embed_dim, True),
                head_dim=head_dim,
            ),
            mlp=VisionFeedForward(
                gate_proj=linear("w1", embed_dim, intermediate_dim, True),
                down_proj=linear("w2", intermediate_dim, embed_dim, True),
                up_proj=linear("w3", embed_dim, intermediate_dim, True),
            ),
            sa_norm=nn.RMSNorm(embed_dim, eps=1e-6),
            mlp_norm=nn.RMSNorm(embed_dim, eps=1e-6),
        )

    unit_dim = embed_dim * MERGE_SIZE**2
    merger = PatchMerger(
        norm=nn.RMSNorm(embed_dim, eps=1e-6),
        mlp=FeedForward(
            gate_proj=merger_linear("w1", unit_dim, unit_dim, True),
            down_proj=merger_linear("w2", unit_dim, out_dim, True),
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
