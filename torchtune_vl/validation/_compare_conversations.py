"""Compares conversations: ids, pixels and positions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from torchtune_vl.chat._tokenizer import STRUCTURAL_TOKENS
from torchtune_vl.validation._compare_values import Outcome, attempt, compare
from torchtune_vl.validation._compared_inputs import Conversation
from torchtune_vl.validation._ours_and_reference import MEDIA_KEYS, Comparison

# Longer conversations are not run through the models: logits, and eager attention, take gigabytes
MAX_TOKENS = 1024


class Sample(NamedTuple):
    """What each model takes of a conversation."""

    name: str
    ours: dict[str, Any]
    reference: dict[str, torch.Tensor]


def compare_conversations(
    run: Comparison, conversations: Sequence[Conversation], keep: int
) -> list[Sample]:
    """Compare ids, pixels and positions, and keep a number of short samples for the models."""
    ids, pixels, positions = (run.rows[n] for n in ("chat ids", "chat pixels", "positions"))
    reference, skipped = run.reference, run.obstacle
    samples: list[Sample] = []
    if not skipped and reference.rope.error:
        skipped = f"transformers cannot read config.json: {reference.rope.error}"
    if run.skip(skipped, ids.name, pixels.name, positions.name):
        return samples
    transform = run.ours.transform.value
    # A template of another kind need not say where answers are, which training asks for
    asks = transform.prompts.chat_template is not None
    first = next(c for c in conversations if c.values("image"))
    # Compile and load codecs before the time is taken
    attempt(transform, first.sample, asks), attempt(reference.chat, first, [], asks)
    problems, moved = [], 0
    for conversation in run.track(conversations, "conversations"):
        name, problem = conversation.name, conversation.problem
        if conversation.tools is not None and not reference.tokenizer.value.chat_template:
            problem = "conversations with tools need a chat template in tokenizer_config.json"
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        timings = [run.ours.timing(path) for path in conversation.values("video")]
        a = attempt(transform, conversation.sample, asks)
        b = attempt(reference.chat, conversation, [frames for frames, _ in timings], asks)
        tokens = a.map(lambda s: s["tokens"]), b.map(lambda s: s["input_ids"][0].tolist())
        ids.add(compare(name, *tokens, text_of=lambda token: transform.decode([token])))
        if a.error or b.error:
            continue
        kinds = [item["type"] for item in conversation.items if item["type"] != "text"]
        vision = a.value.get("encoder_input", {}).get("vision", {})
        if kinds:
            theirs = Outcome(_patches_in_order(kinds, b.value))
            pixels.add(compare(name, Outcome(vision["patches"]), theirs))
        usual = attempt(reference.positions, b.value)
        behind = usual.map(partial(continue_behind_media, kinds=b.value["mm_token_type_ids"][0]))
        seconds = iter([seconds for _, seconds in timings])
        steps = [next(seconds) if kind == "video" else None for kind in kinds]
        grids = vision.get("grid_thw", torch.empty(0, 3, dtype=torch.long))
        timed = attempt(transform.positions, a.value["tokens"], grids, steps)
        given = replace(timed, value=a.value["input_pos"].tolist(), error=None)
        positions.add(compare(name, given, behind.map(torch.Tensor.tolist)))
        if behind.error:
            continue
        moved += not torch.equal(usual.value, behind.value)
        if len(a.value["tokens"]) <= MAX_TOKENS and len(samples) < keep:
            inputs = {**b.value, "position_ids": behind.value.T[:, None]}
            samples.append(Sample(name, a.value, inputs))
    texts = ["\n".join(conversation.values("text")) for conversation in conversations]
    forged = sum(any(token in text for token in STRUCTURAL_TOKENS) for text in texts)
    notes = [
        f"Not compared: {len(problems):,}, among them {'; '.join(problems[:3])}",
        f"With tokens such as <|im_end|> in a text: {forged:,}. These tokens are compared as "
        'transformers reads them (parse_special="all"); by default our transform takes them '
        "for text",
    ]
    ids.note = ". ".join(n for n, applies in zip(notes, (problems, forged), strict=True) if applies)
    if moved:
        positions.note = (
            f"transformers {version('transformers')} begins the text behind videos of {moved:,} "
            "conversations before they end, at half the larger side of their frames; compared, and "
            "run for the logits, are its positions with this text behind the last position of the "
            "video, as the weights have learned it"
        )
    return samples


def _patches_in_order(kinds: Sequence[str], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The patches of images and videos, which transformers keeps apart, in one."""
    media = {
        kind: iter(inputs[patches].split(inputs[grids].prod(1).tolist()))
        for kind, (patches, grids) in MEDIA_KEYS.items()
        if patches in inputs
    }
    return torch.cat([next(media[kind]) for kind in kinds])


def continue_behind_media(positions: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Let what follows a medium begin behind its largest position, as the weights have learned it.

    transformers >= 5.3 lets it begin at half the larger side of the medium's grid. Before a video
    has ended that is among its own temporal positions, and not where its ``generate`` goes on.
    """
    moved = positions.clone()
    behind_media = ((kinds[1:] == 0) & (kinds[:-1] != 0)).nonzero().flatten() + 1
    for start in behind_media.tolist():
        moved[start:] += moved[:start].max() + 1 - moved[start, 0]
    return moved
