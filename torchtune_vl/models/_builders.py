"""From dimensions to modules: the decoder, what of a model is trained, and adapters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torch import nn

from torchtune_vl._torchao import NF4Tensor
from torchtune_vl._torchtune import get_logger
from torchtune_vl.media import Geometry
from torchtune_vl.modules.adapters import (
    AdapterLinears,
    LinearBuilder,
    Trainable,
    is_adapter,
    train_with_adapters,
)
from torchtune_vl.modules.decoder import Attention, Decoder, DecoderLayer, FeedForward
from torchtune_vl.modules.rotary import MultimodalRotaryTable, VisionRotaryTable
from torchtune_vl.modules.summary import trained_parts
from torchtune_vl.modules.vision import (
    PatchEmbedding,
    PatchMerger,
    VisionAttention,
    VisionEncoder,
    VisionLanguageModel,
    VisionLayer,
)

_MLP = ("w1", "w2", "w3")
# Layers that can be adapted, by the argument that says how their part is trained
_LAYERS: dict[str, tuple[str, ...]] = {
    "decoder_trainable": ("q_proj", "k_proj", "v_proj", "output_proj", *_MLP, "output"),
    "encoder_trainable": ("qkv", "output_proj", *_MLP),
    "fusion_trainable": ("w1", "w2"),
}


def decoder(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    tie_word_embeddings: bool,
    max_seq_len: int = 32768,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1e6,
    mrope_sections: tuple[int, int, int] = (16, 24, 24),
    linear: LinearBuilder,
) -> Decoder:
    """Build a decoder; the defaults are what most published ones share.

    Args:
        vocab_size: rows of the token embedding.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        embed_dim: width.
        intermediate_dim: width of the feed-forward.
        tie_word_embeddings: whether the output layer is the token embedding.
        max_seq_len: tokens of the longest sequence that it takes.
        attn_dropout: dropout of attention weights.
        norm_eps: epsilon of normalisations.
        rope_base: base of rotary frequencies.
        mrope_sections: frequencies that turn with the temporal, height and width position.
        linear: builds linear layers.

    Returns:
        The decoder.

    Raises:
        ValueError: if the dimensions do not fit each other.
    """
    size = head_dim(embed_dim, num_heads)

    def layer() -> DecoderLayer:
        return DecoderLayer(
            attn=Attention(
                q_proj=linear("q_proj", embed_dim, num_heads * size, True),
                k_proj=linear("k_proj", embed_dim, num_kv_heads * size, True),
                v_proj=linear("v_proj", embed_dim, num_kv_heads * size, True),
                output_proj=linear("output_proj", num_heads * size, embed_dim, False),
                head_dim=size,
                dropout=attn_dropout,
            ),
            mlp=FeedForward(
                w1=linear("w1", embed_dim, intermediate_dim, False),
                w2=linear("w2", intermediate_dim, embed_dim, False),
                w3=linear("w3", embed_dim, intermediate_dim, False),
            ),
            sa_norm=nn.RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=nn.RMSNorm(embed_dim, eps=norm_eps),
        )

    return Decoder(
        tok_embeddings=nn.Embedding(vocab_size, embed_dim),
        layers=[layer() for _ in range(num_layers)],
        norm=nn.RMSNorm(embed_dim, eps=norm_eps),
        output=None if tie_word_embeddings else linear("output", embed_dim, vocab_size, False),
        rope=MultimodalRotaryTable(size, rope_base, mrope_sections),
        max_seq_len=max_seq_len,
    )


def vision_encoder(
    *,
    geometry: Geometry,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    in_channels: int,
    out_dim: int,
    full_attention_layers: Sequence[int],
    norm: Callable[[int], nn.Module],
    mlp: Callable[[], FeedForward],
    linear: LinearBuilder,
    merger_linear: LinearBuilder,
) -> VisionEncoder:
    """Build a vision encoder with its merger.

    Args:
        geometry: sizes of patches, units and windows.
        embed_dim: width.
        num_layers: layers.
        num_heads: heads.
        in_channels: colour channels.
        out_dim: width of the decoder.
        full_attention_layers: indices of the layers that attend over whole frames.
        norm: builds a normalisation of a width.
        mlp: builds a layer's feed-forward.
        linear: builds linear layers.
        merger_linear: likewise of the merger.

    Returns:
        The encoder.

    Raises:
        ValueError: if the dimensions do not fit each other.
    """
    size, unit_size = head_dim(embed_dim, num_heads), geometry.merge_size**2

    def layer() -> VisionLayer:
        attn = VisionAttention(
            qkv=linear("qkv", embed_dim, 3 * embed_dim, True),
            output_proj=linear("output_proj", embed_dim, embed_dim, True),
            head_dim=size,
        )
        return VisionLayer(attn=attn, mlp=mlp(), sa_norm=norm(embed_dim), mlp_norm=norm(embed_dim))

    unit_dim = embed_dim * unit_size
    return VisionEncoder(
        geometry=geometry,
        patch_embed=PatchEmbedding(geometry=geometry, in_channels=in_channels, embed_dim=embed_dim),
        layers=[layer() for _ in range(num_layers)],
        merger=PatchMerger(
            norm=norm(embed_dim),
            mlp=FeedForward(
                w1=merger_linear("w1", unit_dim, unit_dim, True),
                w2=merger_linear("w2", unit_dim, out_dim, True),
                activation=nn.GELU(),
            ),
            unit_size=unit_size,
        ),
        rope=VisionRotaryTable(size, geometry.merge_size),
        full_attention_layers=full_attention_layers,
    )


def head_dim(embed_dim: int, num_heads: int) -> int:
    """Return the dimension of a head, or raise ``ValueError``."""
    if embed_dim % num_heads:
        raise ValueError(f"a width of {embed_dim} does not divide into {num_heads} heads")
    return embed_dim // num_heads


def train_parts(
    model: VisionLanguageModel, *, decoder: bool, encoder: bool, merger: bool
) -> VisionLanguageModel:
    """Set which parameters require gradients.

    Args:
        model: the model.
        decoder: whether those of the decoder, with its token embedding, do.
        encoder: likewise, of the encoder without its merger.
        merger: likewise.

    Returns:
        The model.
    """
    trained = {"decoder": decoder, "encoder": encoder, "merger": merger}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[part_of(name)])
    return model


def part_of(name: str) -> str:
    """Return ``decoder``, ``encoder`` or ``merger``: where a parameter of this name is."""
    if name.startswith("encoders.vision.merger."):
        return "merger"
    return "encoder" if name.startswith("encoders.") else "decoder"


def with_adapters(
    build: Callable[..., VisionLanguageModel],
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
) -> VisionLanguageModel:
    """Build a model with low-rank adapters.

    Args:
        build: the family's builder, from dimensions.
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
        **dimensions: other arguments of the builder.

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
    linears = [
        AdapterLinears(
            trainable=trainable,
            names=names,
            rank=lora_rank,
            alpha=lora_alpha,
            dropout=lora_dropout,
            use_dora=use_dora,
            quantize_base=quantize_base,
            never_quantized=frozenset({"output"}),
        )
        for trainable in parts.values()
    ]
    model = build(
        **dimensions,
        decoder_linear=linears[0],
        encoder_linear=linears[1],
        merger_linear=linears[2],
    )
    in_full = [name for name, how in parts.items() if how == "full"]
    _train_adapters_and(model, in_full)
    if quantize_base:
        # State dicts, which checkpoints are made of, hold no NF4
        model._register_state_dict_hook(_dequantize)
    if trained_in_float32:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    log = get_logger("INFO")
    log.info("What is trained:\n%s", trained_parts(model, _shown_part))
    if in_full:
        log.info("%s 'full': save_adapter_weights_only would lose it", " and ".join(in_full))
    return model


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


def _train_adapters_and(model: VisionLanguageModel, in_full: Sequence[str]) -> None:
    """Let gradients go to adapters and to these parts, for torchtune's recipes too."""
    encoder = model.encoders["vision"]
    parts: dict[str, tuple[nn.Module, str]] = {
        "decoder_trainable": (model.decoder, "decoder"),
        "encoder_trainable": (encoder, "encoder"),
        "fusion_trainable": (encoder.merger, "merger"),
    }
    for name in in_full:
        module, part = parts[name]
        # The merger is in the encoder, and a part of its own
        train_with_adapters(
            module,
            [n for n, _ in module.named_parameters() if part != "encoder" or "merger." not in n],
        )
    trained = {parts[name][1] for name in in_full}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or part_of(name) in trained)


def _shown_part(name: str) -> str:
    part = "token embedding" if "tok_embeddings" in name else part_of(name)
    part = "vision encoder" if part == "encoder" else part
    return f"{part}, adapters" if is_adapter(name) else part


def _dequantize(model: nn.Module, state_dict: dict[str, Any], *args: Any) -> None:
    dtype = model.decoder.tok_embeddings.weight.dtype  # type: ignore[union-attr]
    for name, tensor in state_dict.items():
        if isinstance(tensor, NF4Tensor):
            state_dict[name] = tensor.to(dtype).cpu()
