"""Runs all comparisons."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from torchtune_vl.validation._builtin import write_builtin
from torchtune_vl.validation._chat import chat_rows
from torchtune_vl.validation._files import (
    chat_template_row,
    image_settings_row,
    special_tokens_row,
    text_row,
    vocabulary_row,
)
from torchtune_vl.validation._inputs import Conversation, Inputs, conversation_of
from torchtune_vl.validation._media import image_rows, video_rows
from torchtune_vl.validation._model import model_rows
from torchtune_vl.validation._ours import Ours
from torchtune_vl.validation._reference import Reference
from torchtune_vl.validation._report import Report, Track

# Conversations of the user that the models run on
_USER_SAMPLES = 16
_PACKAGES = ("torchtune-vl", "transformers", "tokenizers", "torch", "torchvision", "Pillow")


def validate(
    checkpoint_dir: str | Path,
    *,
    reference_dir: str | Path | None = None,
    inputs: Inputs | None = None,
    max_pixels: int | None = None,
    weights: bool = False,
    logits: bool = False,
    dtype: torch.dtype = torch.float32,
    track: Track = lambda sequence, description: sequence,
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
        track: shows progress: takes a sequence and its ``description``, and returns the items one
            after another.

    Returns:
        The report.
    """
    directory = Path(checkpoint_dir)
    user = inputs or Inputs()
    reference = Reference(Path(reference_dir or directory), max_pixels)
    sides = Ours(directory, max_pixels), reference
    with TemporaryDirectory(prefix="tune-vl-") as folder:
        builtin = write_builtin(Path(folder))
        about_videos = _about(user.videos)
        conversations = [*builtin.conversations, *user.conversations, *about_videos]
        names = {path: name for name, path in (user.images | builtin.images).items()}
        for conversation in conversations:
            for number, path in enumerate(conversation.sources("image"), start=1):
                names.setdefault(path, f"{conversation.name}, image {number}")
        images = {name: path for path, name in names.items()}  # each file once
        texts = builtin.texts | {c.name: c.texts for c in user.conversations}
        keep = len(builtin.conversations) + _USER_SAMPLES if logits else 0
        chat = chat_rows(*sides, conversations, keep, track)
        rows = [
            vocabulary_row(*sides),
            special_tokens_row(*sides),
            image_settings_row(*sides),
            chat_template_row(*sides),
            text_row(*sides, texts, track),
            chat.ids,
            *image_rows(*sides, images, track),
            *video_rows(*sides, user.videos | builtin.videos, track),
            chat.pixels,
            chat.positions,
            *model_rows(directory, reference, chat.samples, dtype, weights, logits, track),
        ]
    facts = {"Python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    if reference.no_torchvision:
        facts["torchvision"] = f"none: {reference.no_torchvision}"
    facts["CPU threads"] = str(torch.get_num_threads())
    return Report(str(directory), str(reference.directory), facts, rows)


def _about(videos: Mapping[str, str]) -> list[Conversation]:
    """A question about each video, for its positions."""
    question = {"type": "text", "text": "What happens in this video?"}
    return [
        conversation_of(
            f"{name}, one question",
            {"messages": [{"role": "user", "content": [{"type": "video", "video": p}, question]}]},
        )
        for name, p in videos.items()
    ]
