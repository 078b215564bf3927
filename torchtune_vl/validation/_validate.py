"""Runs all comparisons."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from torchtune_vl.validation._builtin import write_builtin
from torchtune_vl.validation._chat import chat_rows
from torchtune_vl.validation._images import image_rows
from torchtune_vl.validation._inputs import Conversation, Inputs
from torchtune_vl.validation._model import model_rows
from torchtune_vl.validation._ours import Ours
from torchtune_vl.validation._reference import Reference, media_of
from torchtune_vl.validation._report import Report, Track
from torchtune_vl.validation._settings import chat_template_row, image_settings_row
from torchtune_vl.validation._videos import video_rows
from torchtune_vl.validation._vocabulary import special_tokens_row, text_row, vocabulary_row

T = TypeVar("T")

# Conversations of the user that the models run on
_USER_SAMPLES = 16


def _silently(sequence: Sequence[T], description: str) -> Iterable[T]:
    return sequence


def validate(
    checkpoint_dir: str | Path,
    *,
    reference_dir: str | Path | None = None,
    inputs: Inputs | None = None,
    max_pixels: int | None = None,
    weights: bool = False,
    logits: bool = False,
    dtype: torch.dtype = torch.float32,
    track: Track = _silently,
) -> Report:
    """Compare our side with transformers', on generated inputs and those of the user.

    Nothing is downloaded.

    Args:
        checkpoint_dir: directory that our side reads.
        reference_dir: directory that transformers reads, by default the same.
        inputs: the user's.
        max_pixels: largest area of images for both sides, in place of the directories'.
        weights: whether to compare the weights.
        logits: whether to compare weights and logits.
        dtype: of both models.
        track: shows progress.

    Returns:
        The report.
    """
    directory = Path(checkpoint_dir)
    user = inputs or Inputs()
    reference = Reference(Path(reference_dir or directory), max_pixels)
    ours = Ours(directory, max_pixels)
    with TemporaryDirectory(prefix="tune-vl-") as folder:
        builtin = write_builtin(Path(folder))
        videos = user.videos | builtin.videos
        conversations = [*builtin.conversations, *user.conversations, *_about(user.videos)]
        images = _with_images_of(conversations, user.images | builtin.images)
        texts = builtin.texts | {c.name: c.texts for c in user.conversations}
        keep = len(builtin.conversations) + _USER_SAMPLES if logits else 0
        chat = chat_rows(ours, reference, conversations, keep, track)
        rows = [
            vocabulary_row(ours, reference),
            special_tokens_row(ours, reference),
            image_settings_row(ours, reference),
            chat_template_row(ours, reference),
            text_row(ours, reference, texts, track),
            chat.ids,
            *image_rows(ours, reference, images, track),
            *video_rows(ours, reference, videos, track),
            chat.pixels,
            chat.positions,
            *model_rows(directory, reference, chat.samples, dtype, weights, logits, track),
        ]
    return Report(str(directory), str(reference.directory), _facts(reference), rows)


def _about(videos: Mapping[str, str]) -> list[Conversation]:
    """A question about each video, for its positions."""
    question = {"type": "text", "text": "What happens in this video?"}
    return [
        Conversation(
            f"{name}, one question",
            [{"role": "user", "content": [{"type": "video", "video": path}, question]}],
        )
        for name, path in videos.items()
    ]


def _with_images_of(
    conversations: Sequence[Conversation], images: Mapping[str, str]
) -> dict[str, str]:
    """Images by name, each file once."""
    names = {path: name for name, path in images.items()}
    for conversation in conversations:
        for number, path in enumerate(media_of(conversation.messages, "image"), start=1):
            names.setdefault(path, f"{conversation.name}, image {number}")
    return {name: path for path, name in names.items()}


def _facts(reference: Reference) -> dict[str, str]:
    facts = {"Python": platform.python_version()}
    for package in ("torchtune-vl", "transformers", "tokenizers", "torch", "torchvision", "Pillow"):
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    if reference.no_torchvision:
        facts["torchvision"] = f"none: {reference.no_torchvision}"
    return {**facts, "CPU threads": str(torch.get_num_threads())}
