"""What a family of models has of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torchtune_vl.files._json import JsonObject
from torchtune_vl.files._tensor_names import TensorNames
from torchtune_vl.media import Geometry
from torchtune_vl.models import lora_model_from_pretrained, model_from_pretrained
from torchtune_vl.models._builders import with_adapters
from torchtune_vl.modules.parallelism import decoder_tp_plan
from torchtune_vl.modules.vision import VisionLanguageModel


@dataclass(frozen=True)
class Family:
    """A family, as checkpoints, reports and recipes ask for it.

    Args:
        name: its name, as people write it.
        names: of its tensors.
        geometry: how it sees images and videos.
        dimensions: from a ``config.json`` to the arguments of ``build``.
        build: from dimensions to a model with fresh weights.
        transform: its transform of conversations.
    """

    name: str
    names: TensorNames
    geometry: Geometry
    dimensions: Callable[[JsonObject], dict[str, Any]]
    build: Callable[..., VisionLanguageModel]
    transform: type[Any]


def builders(prefix: str, family: Family, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Make the functions that a family's package gives to others, by their names.

    Args:
        prefix: how their names begin, such as ``qwen2_5_vl``.
        family: the family.
        sizes: dimensions of the published sizes, by what their names end in.

    Returns:
        Builders from dimensions, from a checkpoint's config and of published sizes, each plain,
        with adapters (``lora_``) and, of sizes, with adapters of NF4 weights (``qlora_``);
        renaming of tensors from and to published checkpoints (``_hf_to_tune``) and peft's files
        (``_peft_to_tune``); and ``_tp_plan``, how the decoder divides over devices.
    """
    plain, adapted = family.build, partial(with_adapters, family.build)
    return {
        prefix: plain,
        f"lora_{prefix}": adapted,
        f"{prefix}_from_config": partial(model_from_pretrained, weights=False),
        f"lora_{prefix}_from_config": partial(lora_model_from_pretrained, weights=False),
        f"{prefix}_hf_to_tune": family.names.from_published,
        f"{prefix}_tune_to_hf": family.names.to_published,
        f"{prefix}_peft_to_tune": family.names.from_peft,
        f"{prefix}_tune_to_peft": family.names.to_peft,
        f"{prefix}_tp_plan": decoder_tp_plan,
        **{f"{prefix}_{size}": partial(plain, **d) for size, d in sizes.items()},
        **{f"lora_{prefix}_{size}": partial(adapted, **d) for size, d in sizes.items()},
        **{
            f"qlora_{prefix}_{size}": partial(adapted, quantize_base=True, **d)
            for size, d in sizes.items()
        },
    }
