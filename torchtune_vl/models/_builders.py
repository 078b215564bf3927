"""From dimensions to models, plain or with adapters."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

from torch import nn

from torchtune_vl._torchao import NF4Tensor
from torchtune_vl._torchtune import get_logger, log_rank_zero
from torchtune_vl.modules.adapters import Trainable, build_linear, is_adapter
from torchtune_vl.modules.decoder import Decoder
from torchtune_vl.modules.dimensions import Dimensions
from torchtune_vl.modules.vision import VisionEncoder, VisionLanguageModel

_MLP = {"w1", "w2", "w3"}
_EXPERTS = {"gate_up_proj", "down_proj"}
# Layers of each part that can be adapted
_LAYERS = {
    "decoder": {"q_proj", "k_proj", "v_proj", "output_proj", *_MLP, "output"},
    "encoder": {"qkv", "output_proj", *_MLP},
    "fusion": {"w1", "w2"},
}


def vision_language_model(
    *,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
    linear: Callable[..., nn.Module] = build_linear,
    **dimensions: Any,
) -> VisionLanguageModel:
    """Build a model with fresh weights from :class:`~torchtune_vl.modules.dimensions.Dimensions`.

    Each part is trained or not: the decoder, with its token embedding, the encoder without its
    merger, and the merger (``fusion``); adapters are. ``linear`` builds linear layers as
    :func:`~torchtune_vl.modules.adapters.build_linear` does. Raises ``ValueError`` if the
    dimensions do not fit each other.
    """
    dims = Dimensions(**dimensions)
    model = VisionLanguageModel(
        decoder=Decoder(dims, partial(linear, "decoder")),
        vision_encoder=VisionEncoder(dims, partial(linear, "encoder"), partial(linear, "fusion")),
        placeholder_ids=(dims.image_token_id, dims.video_token_id),
    )
    full = {"decoder": decoder_trainable, "encoder": encoder_trainable, "merger": fusion_trainable}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or full[part_of(name)])
    return model


def part_of(name: str) -> str:
    """Return ``decoder``, ``encoder`` or ``merger``: where a parameter of this name is."""
    if name.startswith(("encoders.vision.merger.", "encoders.vision.deepstack_mergers.")):
        return "merger"
    return "encoder" if name.startswith("encoders.") else "decoder"


def with_adapters(
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
    """Build a model in which only low-rank adapters, and parts that are "full", are trained.

    Parts and dimensions are those of
    :func:`~torchtune_vl.models._builders.vision_language_model`. Of parts that are "lora",
    attention layers get adapters that ``lora_attn_modules`` names: ``q_proj``, ``k_proj`` and
    ``v_proj`` of the decoder, ``qkv`` of the encoder, where these three are one layer, and
    ``output_proj`` of both. Feed-forwards, experts and the merger's too, and the output layer get
    them by flags of their own. Adapters' products are scaled by lora_alpha / lora_rank; DoRA trains
    magnitudes.

    With ``quantize_base`` the weights of linear layers are NF4 (QLoRA), unless they are trained in
    full. The output layer, as in the paper, keeps its dtype. With ``trained_in_float32`` what is
    trained is float32, whatever dtype the frozen weights have: updates of bfloat16 are lost where
    they are below half a unit in the last place. A layer then holds two dtypes, which our recipe
    computes with in one, and torchtune's recipes do not.

    Raises ``ValueError`` if nothing would be trained, a name matches no layer of a part with
    adapters, a part gets none, the output layer is the token embedding and is to get one, or a
    decoder's experts are to have DoRA or be trained beside adapters.
    """
    parts = {"decoder": decoder_trainable, "encoder": encoder_trainable, "fusion": fusion_trainable}
    names = {*lora_attn_modules, *(_MLP if apply_lora_to_mlp else ())}
    names |= {"output"} if apply_lora_to_output else set()
    _check_adapters(names, parts)
    if dimensions.get("num_experts"):
        has_dora = use_dora and apply_lora_to_mlp and decoder_trainable == "lora"
        _check_experts(has_dora, decoder_trainable)
        names |= _EXPERTS if apply_lora_to_mlp else set()
    if apply_lora_to_output and dimensions["tie_word_embeddings"]:
        problem = "the output layer of this size is its token embedding: no adapter can be merged"
        raise ValueError(f"{problem}; leave apply_lora_to_output out")
    adapter: Any = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout}
    linear = partial(build_linear, use_dora=use_dora, quantize_base=quantize_base, **adapter)
    linear = partial(linear, trainable=parts, adapted=names)
    full: Any = {f"{part}_trainable": how == "full" for part, how in parts.items()}
    model = vision_language_model(**dimensions, **full, linear=linear)
    # What torchtune's recipes train is what modules list by this method
    own = [n for n, p in model.named_parameters() if p.requires_grad and not is_adapter(n)]
    model.adapter_params = partial(list, own)  # type: ignore[assignment]
    if quantize_base:
        # State dicts, which checkpoints are made of, hold no NF4
        model._register_state_dict_hook(_dequantize)
    if trained_in_float32:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    log = get_logger("INFO")
    for part in ("decoder", "encoder", "merger"):
        parameters = [p for name, p in model.named_parameters() if part_of(name) == part]
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        log_rank_zero(log, f"{part}: {trained:,} of {total:,} parameters are trained")
    if own:
        in_full = " and ".join(name for name in full if full[name])
        log_rank_zero(log, f"{in_full} 'full': save_adapter_weights_only would lose it")
    return model


def _check_adapters(names: set[str], parts: Mapping[str, Trainable]) -> None:
    for part, how in parts.items():
        if how not in get_args(Trainable):
            raise ValueError(f"unknown {part}_trainable {how!r}: use one of {get_args(Trainable)}")
    if {*parts.values()} == {"frozen"}:
        raise ValueError("nothing would be trained: decoder, encoder and fusion are all 'frozen'")
    found = {part: _LAYERS[part] & names for part, how in parts.items() if how == "lora"}
    unmatched = names.difference(*found.values())
    if any(layers & _MLP for layers in found.values()):
        unmatched -= _MLP  # they are named together, and the merger has two of the three
    problems = [f"{part}_trainable is 'lora', but has none" for part in found if not found[part]]
    problems += [f"{name} is no layer of a part that is 'lora'" for name in sorted(unmatched)]
    if problems:
        layers = "; ".join(f"{part}: {', '.join(sorted(_LAYERS[part]))}" for part in _LAYERS)
        problem = f"adapters on {sorted(names)}: {'; '.join(problems)}. Name others, or make parts"
        raise ValueError(f"{problem} 'lora', 'frozen' or 'full'. There are {layers}")


def _check_experts(has_dora: bool, how: Trainable) -> None:
    refusals = {
        # Nor does peft know them
        "experts have no magnitudes: leave use_dora or apply_lora_to_mlp out": has_dora,
        # Files of adapters would have them in the layout of transformers 5
        "experts are not trained beside adapters: make decoder_trainable 'lora' or 'frozen', or "
        "train without adapters": how == "full",
    }
    for sentence, is_wrong in refusals.items():
        if is_wrong:
            raise ValueError(sentence)


def _dequantize(model: nn.Module, state_dict: dict[str, Any], *args: Any) -> None:
    dtype = model.decoder.tok_embeddings.weight.dtype  # type: ignore[union-attr]
    for name, tensor in state_dict.items():
        if isinstance(tensor, NF4Tensor):
            state_dict[name] = tensor.to(dtype).cpu()
