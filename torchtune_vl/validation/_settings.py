"""Rows about what a directory says of images and chats."""

from collections.abc import Mapping
from typing import Any

from torchtune_vl.chat import CHAT_TEMPLATE
from torchtune_vl.chat._pretrained import sizes_of_patches
from torchtune_vl.media import ImageTransform
from torchtune_vl.validation import _published as published
from torchtune_vl.validation._compare import compare_sequences, compare_settings
from torchtune_vl.validation._ours import Ours
from torchtune_vl.validation._reference import Reference
from torchtune_vl.validation._report import Outcome, Row, unreadable


def image_settings_row(ours: Ours, reference: Reference) -> Row:
    """Compare mean, deviation, sizes of patches and limits of areas.

    Args:
        ours: our side.
        reference: transformers' side.

    Returns:
        The row.
    """
    row = Row(
        "image settings",
        "What preprocessor_config.json says: mean, deviation, sizes of patches and limits of "
        "areas, ours beside transformers; and all but the limits beside the published values, "
        "which the encoder was trained with.",
        "values",
        timed_in="-",
    )
    processor = reference.image_processors["pil"]
    unread = unreadable(ours.image_settings, processor)
    if unread is not None:
        row.add(unread)
    if processor.error is None:
        theirs = _settings_of_reference(processor.value)
        row.add(
            compare_settings("transformers beside the published", theirs, published.IMAGE_SETTINGS)
        )
    if ours.image_settings.error is None:
        mine = _settings_of_ours(ours.image_transform())
        row.add(compare_settings("ours beside the published", mine, published.IMAGE_SETTINGS))
        row.note = _note_on_limits(mine)
        if processor.error is None:
            row.add(compare_settings("ours beside transformers", mine, theirs))
    return row


def _settings_of_ours(images: ImageTransform) -> dict[str, Any]:
    return {
        "min_pixels": images.min_pixels,
        "max_pixels": images.max_pixels,
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        **sizes_of_patches(images.geometry),
        # Our transform knows no others, and refuses a directory that asks for them
        "rescale_factor": 1 / 255,
        "resample": 3,
    }


def _settings_of_reference(processor: Any) -> dict[str, Any]:
    return {
        "min_pixels": processor.size["shortest_edge"],
        "max_pixels": processor.size["longest_edge"],
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        **{
            name: getattr(processor, name)
            for name in (
                "patch_size",
                "temporal_patch_size",
                "merge_size",
                "rescale_factor",
                "resample",
            )
        },
    }


def _note_on_limits(settings: Mapping[str, Any]) -> str:
    changed = [
        f"{name} is {settings[name]:,}, published {value:,}"
        for name, value in published.PIXEL_LIMITS.items()
        if settings[name] != value
    ]
    return f"Used here: {'; '.join(changed)}" if changed else ""


def chat_template_row(ours: Ours, reference: Reference) -> Row:
    """Compare the chat templates that both sides follow.

    Args:
        ours: our side.
        reference: transformers' side.

    Returns:
        The row.
    """
    row = Row(
        "chat template",
        "The template that turns conversations into text, as each side takes it from the "
        "directory. One that is not the published one is followed, and said here.",
        "characters",
        timed_in="-",
    )
    if reference.no_torchvision:
        row.skipped = reference.no_torchvision
    elif ours.transform.error or reference.processor.error:
        row.skipped = "unreadable: see vocabulary and image settings"
    else:
        mine = ours.transform.value.chat_template
        theirs = reference.processor.value.chat_template or ""
        row.add(
            compare_sequences(
                "ours beside transformers",
                Outcome(mine.strip(), None, 0.0),
                Outcome(theirs.strip(), None, 0.0),
            )
        )
        if mine != CHAT_TEMPLATE:
            row.note = "This template is not the published one"
    return row
