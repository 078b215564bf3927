"""Names of what families give to others, without importing it."""

from collections.abc import Sequence


def builder_names(prefix: str, sizes: Sequence[str]) -> list[str]:
    """Return the keys of :func:`~torchtune_vl.models._family.builders`.

    Args:
        prefix: how their names begin.
        sizes: what names of published sizes end in.

    Returns:
        The names.
    """
    ends = ("hf_to_tune", "tune_to_hf", "peft_to_tune", "tune_to_peft", "tp_plan")
    return [
        prefix,
        f"lora_{prefix}",
        f"{prefix}_from_config",
        f"lora_{prefix}_from_config",
        *(f"{prefix}_{end}" for end in ends),
        *(f"{kind}{prefix}_{size}" for kind in ("", "lora_", "qlora_") for size in sizes),
    ]
