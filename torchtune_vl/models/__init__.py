"""Models and transforms by the files of their checkpoints, whichever family these are of."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtune_vl.chat import ChatTransform
    from torchtune_vl.modules.vision import VisionLanguageModel

__all__ = ["lora_model_from_pretrained", "model_from_pretrained", "transform_from_pretrained"]

# What takes long to import is imported where it is used: transforms need no model, and configs are
# checked without either


def model_from_pretrained(
    checkpoint_dir: str | Path,
    *,
    weights: bool = True,
    decoder_trainable: bool = True,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
) -> "VisionLanguageModel":
    """Build the model that a checkpoint's ``config.json`` describes, and load its weights.

    Args:
        checkpoint_dir: directory with a ``config.json``, in the flat layout of the published
            checkpoints or the nested one of transformers 5.
        weights: whether to load the weights too, in the default dtype. Without, they are fresh:
            recipes say so, whose checkpointers load them.
        decoder_trainable: whether the decoder, with its token embedding, is trained.
        encoder_trainable: whether the encoder without its merger is trained.
        fusion_trainable: whether the merger is trained.

    Returns:
        The model.

    Raises:
        ValueError: if a file is missing or damaged, describes another architecture, or asks for
            what this model does not have.
    """
    from torchtune_vl.models._builders import train_parts
    from torchtune_vl.models._config import read_config
    from torchtune_vl.models._families import family_of
    from torchtune_vl.models._weights import with_weights

    family = family_of(checkpoint_dir)
    dimensions = family.dimensions(read_config(checkpoint_dir))

    def build() -> "VisionLanguageModel":
        return train_parts(
            family.build(**dimensions),
            decoder=decoder_trainable,
            encoder=encoder_trainable,
            merger=fusion_trainable,
        )

    return with_weights(build, Path(checkpoint_dir)) if weights else build()


def lora_model_from_pretrained(
    checkpoint_dir: str | Path,
    lora_attn_modules: list[str],
    *,
    weights: bool = True,
    **settings: Any,
) -> "VisionLanguageModel":
    """Build the model that a checkpoint's ``config.json`` describes, with adapters.

    Args:
        checkpoint_dir: as in :func:`model_from_pretrained`.
        lora_attn_modules: attention layers that get adapters.
        weights: as in :func:`model_from_pretrained`; adapters are fresh in any case.
        **settings: other arguments of :func:`~torchtune_vl.models._builders.with_adapters` but for
            dimensions.

    Returns:
        The model.

    Raises:
        ValueError: as in :func:`model_from_pretrained` and
            :func:`~torchtune_vl.models._builders.with_adapters`.
    """
    from torchtune_vl.models._builders import with_adapters
    from torchtune_vl.models._config import read_config
    from torchtune_vl.models._families import family_of
    from torchtune_vl.models._weights import with_weights

    family = family_of(checkpoint_dir)
    dimensions = family.dimensions(read_config(checkpoint_dir))

    def build() -> "VisionLanguageModel":
        return with_adapters(family.build, lora_attn_modules, **dimensions, **settings)

    return with_weights(build, Path(checkpoint_dir)) if weights else build()


def transform_from_pretrained(checkpoint_dir: str | Path, **settings: Any) -> "ChatTransform":
    """Read vocabulary, chat template and settings of media from a checkpoint directory.

    Args:
        checkpoint_dir: directory with ``tokenizer.json`` (or ``vocab.json`` and ``merges.txt``),
            ``preprocessor_config.json`` and ``config.json``.
        **settings: those of :class:`~torchtune_vl.chat.ChatTransform`, which go before the
            directory's. None counts as absent.

    Returns:
        The transform.

    Raises:
        ValueError: if a file is missing, asks for what the transform does not do, or a setting is
            unknown.
    """
    from torchtune_vl.models._families import family_of

    transform: ChatTransform = family_of(checkpoint_dir).transform.from_pretrained(
        checkpoint_dir, **settings
    )
    return transform
