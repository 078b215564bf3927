"""Models and transforms by the files of their checkpoints, whichever family these are of."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtune_vl.chat import ChatTransform
    from torchtune_vl.modules.vision import VisionLanguageModel

__all__ = ["lora_model_from_pretrained", "model_from_pretrained", "transform_from_pretrained"]

# Imports that take long are where they are used: transforms, and checks of configs, need no model


def model_from_pretrained(
    checkpoint_dir: str | Path,
    *,
    weights: bool = True,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
    router_aux_loss_coef: float = 0.0,
) -> "VisionLanguageModel":
    """Build the model that a checkpoint's ``config.json`` describes, and load its weights.

    Without ``weights``, whose dtype is the default one, they are fresh: recipes say so, whose
    checkpointers load them. Each part is trained or not: the decoder, with its token embedding, the
    encoder without its merger, and the merger (``fusion``). In training ``router_aux_loss_coef`` x
    the balance of a row's experts is added to its loss: transformers does so where a config says
    ``output_router_logits``, which counts for nothing here. Raises ``ValueError`` if a file is
    missing or damaged, describes another architecture, or asks for what this model does not have.
    """
    from torchtune_vl.models._builders import vision_language_model
    from torchtune_vl.models._weights import model_of

    return model_of(
        checkpoint_dir,
        vision_language_model,
        weights,
        decoder_trainable=decoder_trainable,
        encoder_trainable=encoder_trainable,
        fusion_trainable=fusion_trainable,
        router_aux_loss_coef=router_aux_loss_coef,
    )


def lora_model_from_pretrained(
    checkpoint_dir: str | Path,
    lora_attn_modules: list[str],
    *,
    weights: bool = True,
    **settings: Any,
) -> "VisionLanguageModel":
    """Build the model that a checkpoint's ``config.json`` describes, with adapters.

    As :func:`~torchtune_vl.models.model_from_pretrained`; adapters are fresh in any case.
    ``settings`` are arguments of :func:`~torchtune_vl.models._builders.with_adapters`, which raises
    ``ValueError`` too.
    """
    from torchtune_vl.models._builders import with_adapters
    from torchtune_vl.models._weights import model_of

    settings["lora_attn_modules"] = lora_attn_modules
    return model_of(checkpoint_dir, with_adapters, weights, **settings)


def transform_from_pretrained(checkpoint_dir: str | Path, **settings: Any) -> "ChatTransform":
    """Read vocabulary, chat template and settings of media from a checkpoint directory.

    ``settings``, those of :class:`~torchtune_vl.chat.ChatTransform`, go before the directory's;
    None counts as absent. Raises ``ValueError`` if a file is missing, asks for what the transform
    does not do, or a setting is unknown.
    """
    from torchtune_vl.models._registry import family_of

    return family_of(checkpoint_dir).transform.from_pretrained(checkpoint_dir, **settings)
