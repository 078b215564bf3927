"""Runs all comparisons."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from torchtune_vl.validation import _compare_files as files
from torchtune_vl.validation._compare import Comparison
from torchtune_vl.validation._compare_media import compare_images, compare_videos
from torchtune_vl.validation._compare_models import compare_conversations, compare_models
from torchtune_vl.validation._compare_server import ServerComparison, compare_server
from torchtune_vl.validation._inputs import TEXTS, Inputs, builtin_inputs, conversation_of
from torchtune_vl.validation._ours_and_reference import Ours, Reference, Track
from torchtune_vl.validation._report import Report


def validate(
    checkpoint_dir: str | Path,
    *,
    reference_dir: str | Path | None = None,
    inputs: Inputs | None = None,
    max_pixels: int | None = None,
    weights: bool = False,
    logits: bool = False,
    dtype: torch.dtype = torch.float32,
    server: ServerComparison | None = None,
    track: Track = lambda sequence, description: sequence,
) -> Report:
    """Compare our side with transformers', on generated inputs and the user's; download nothing.

    Args:
        checkpoint_dir: directory that our side reads.
        reference_dir: directory that transformers reads, by default the same.
        inputs: the user's.
        max_pixels: largest area of images for both sides, in place of the directories'.
        weights: whether to compare the weights.
        logits: whether to compare weights and logits.
        dtype: of both models, and of ours beside a server.
        server: a server whose answers are compared with ours, if any.
        track: shows progress: takes a sequence and what it is of, and returns an iterable of it.
    """
    directory, user = Path(checkpoint_dir), inputs or Inputs()
    if server is not None:
        server.server.model  # noqa: B018  whether it is there, before all else
    reference = Reference(Path(reference_dir or directory), max_pixels)
    run = Comparison(Ours(directory, max_pixels), reference, track)
    with TemporaryDirectory(prefix="tune-vl-") as folder:
        builtin = builtin_inputs(Path(folder))
        conversations = [*builtin.conversations, *user.conversations]
        for name, path in user.videos.items():  # for its positions
            items = [{"type": "video"}, {"type": "text", "text": "What happens in this video?"}]
            sample = {"messages": [{"role": "user", "content": items}], "videos": [path]}
            conversations.append(conversation_of(f"{name}, one question", sample))
        names = {path: name for name, path in (user.images | builtin.images).items()}
        for conversation in conversations:
            for number, path in enumerate(conversation.values("image"), start=1):
                names.setdefault(path, f"{conversation.name}, image {number}")
        images = {name: path for path, name in names.items()}  # each file once
        texts = {"built-in": TEXTS, **{c.name: c.values("text") for c in user.conversations}}
        # The models run on those that are built in and 16 of the user
        keep = len(builtin.conversations) + 16 if logits else 0
        samples = compare_conversations(run, conversations, keep)
        files.compare_vocabularies(run)
        files.compare_special_tokens(run)
        files.compare_image_settings(run)
        files.compare_chat_templates(run)
        files.compare_texts(run, texts)
        compare_images(run, images)
        compare_videos(run, user.videos | builtin.videos)
        compare_models(run, samples, dtype, weights, logits)
        compare_server(run, conversations, server, dtype)
    facts = {"Python": platform.python_version()}
    for package in ("torchtune-vl", "transformers", "tokenizers", "torch", "torchvision", "Pillow"):
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    if reference.no_torchvision:
        facts["torchvision"] = f"none: {reference.no_torchvision}"
    facts["CPU threads"] = str(torch.get_num_threads())
    return Report(str(directory), str(reference.directory), facts, [*run.rows.values()])
