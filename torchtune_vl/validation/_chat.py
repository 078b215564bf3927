"""Rows about whole conversations: ids, pixels in their order, positions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from torchtune_vl.chat._tokenizer import STRUCTURAL_TOKENS
from torchtune_vl.validation._inputs import Conversation
from torchtune_vl.validation._ours import Ours
from torchtune_vl.validation._reference import Reference, continue_behind_media
from torchtune_vl.validation._report import (
    Outcome,
    Row,
    Track,
    attempt,
    compare_sequences,
    compare_tensors,
)

# Longer conversations are not run through the models: logits, and eager attention, take gigabytes
MAX_TOKENS = 1024


class Sample(NamedTuple):
    """A conversation as both models take it."""

    name: str
    ours: dict[str, Any]
    reference: dict[str, torch.Tensor]


class ChatRows(NamedTuple):
    """The rows, and the samples that both sides accept and that are short enough."""

    ids: Row
    pixels: Row
    positions: Row
    samples: list[Sample]


def chat_rows(
    ours: Ours,
    reference: Reference,
    conversations: Sequence[Conversation],
    keep: int,
    track: Track,
) -> ChatRows:
    """Compare conversations, and keep a number of samples for the models."""
    rows = _rows()
    if reference.no_torchvision:
        skipped = reference.no_torchvision
    elif ours.transform.error or reference.processor.error:
        skipped = "unreadable: see vocabulary and image settings"
    elif reference.rope.error:
        skipped = f"transformers cannot read config.json: {reference.rope.error}"
    else:
        _compare(ours, reference, conversations, keep, rows, track)
        return rows
    for row in rows[:3]:
        row.skipped = skipped
    return rows


def _rows() -> ChatRows:
    return ChatRows(
        Row(
            "chat ids",
            "Token ids of whole conversations, placeholders of images and videos expanded, beside "
            "transformers' processor with the directory's template.",
            "ids",
        ),
        Row(
            "chat pixels",
            "The patches of a conversation's images and videos, in the order of their "
            "placeholders.",
            "values",
            numeric=True,
            timed_in="chat ids",
        ),
        Row(
            "positions",
            "M-RoPE positions (temporal, height, width) of every token, beside transformers' "
            "get_rope_index, with what follows a medium behind its largest position.",
            "tokens",
        ),
        [],
    )


def _compare(
    ours: Ours,
    reference: Reference,
    conversations: Sequence[Conversation],
    keep: int,
    rows: ChatRows,
    track: Track,
) -> None:
    transform = ours.transform.value
    # A template of another kind need not say where answers are, which training asks for
    prompt = transform.prompts.chat_template is not None
    first = next(c for c in conversations if c.sources("image"))
    # Compile and load codecs before the time is taken
    attempt(transform, first.sample, prompt), attempt(reference.chat, first, [], prompt)
    problems, moved = [], 0
    for conversation in track(conversations, "conversations"):
        name, problem = conversation.name, conversation.problem
        if conversation.tools is not None and not reference.tokenizer.value.chat_template:
            problem = (
                "tokenizer_config.json has no chat template, which conversations with tools need"
            )
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        timings = [ours.timing(path) for path in conversation.sources("video")]
        a = attempt(transform, conversation.sample, prompt)
        b = attempt(reference.chat, conversation, [frames for frames, _ in timings], prompt)
        ids = a.map(lambda s: s["tokens"]), b.map(lambda inputs: inputs["input_ids"][0].tolist())
        rows.ids.add(compare_sequences(name, *ids, lambda token: transform.decode([token])))
        if a.error is not None or b.error is not None:
            continue
        grids = torch.empty(0, 3, dtype=torch.long)
        if "encoder_input" in a.value:
            vision = a.value["encoder_input"]["vision"]
            patches, grids = vision["patches"], vision["grid_thw"]
            expected = _patches_in_order(conversation, b.value)
            rows.pixels.add(compare_tensors(name, Outcome(patches), Outcome(expected)))
        usual = attempt(reference.positions, b.value)
        kinds = b.value["mm_token_type_ids"][0]
        positions = usual.map(partial(continue_behind_media, kinds=kinds))
        seconds = iter([seconds for _, seconds in timings])
        steps = [next(seconds) if kind == "video" else None for kind, _ in conversation.media]
        timed = attempt(transform.positions, a.value["tokens"], grids, steps)
        given = replace(timed, value=a.value["input_pos"].tolist(), error=None)
        rows.positions.add(compare_sequences(name, given, positions.map(torch.Tensor.tolist)))
        if positions.error is None:
            moved += not torch.equal(usual.value, positions.value)
            if len(a.value["tokens"]) <= MAX_TOKENS and len(rows.samples) < keep:
                inputs = {**b.value, "position_ids": positions.value.T[:, None]}
                rows.samples.append(Sample(name, a.value, inputs))
    rows.ids.note = _note(conversations, problems)
    if moved:
        rows.positions.note = (
            f"transformers {version('transformers')} begins the text behind videos of {moved:,} "
            "conversations before they end, at half the larger side of their frames; compared, and "
            "run for the logits, are its positions with this text behind the last position of the "
            "video, as the weights have learned it"
        )


def _note(conversations: Sequence[Conversation], problems: Sequence[str]) -> str:
    notes = []
    if problems:
        notes.append(f"Not compared: {len(problems):,}, among them {'; '.join(problems[:3])}")
    forged = sum(
        any(token in text for text in conversation.texts for token in STRUCTURAL_TOKENS)
        for conversation in conversations
    )
    if forged:
        notes.append(
            f"With tokens such as <|im_end|> in a text: {forged:,}. These tokens are compared as "
            'transformers reads them (parse_special="all"); by default our transform takes them '
            "for text"
        )
    return ". ".join(notes)


def _patches_in_order(conversation: Conversation, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The patches of images and videos, which transformers keeps apart, in one."""
    keys = {"image": "pixel_values", "video": "pixel_values_videos"}
    media = {
        kind: iter(inputs[key].split(inputs[f"{kind}_grid_thw"].prod(1).tolist()))
        for kind, key in keys.items()
        if key in inputs
    }
    return torch.cat([next(media[kind]) for kind, _ in conversation.media])
