"""Rows about whole conversations: ids, pixels in their order, positions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from torchtune_vl.chat._tokenizer import STRUCTURAL_TOKENS
from torchtune_vl.validation._compare import compare_sequences, compare_tensors
from torchtune_vl.validation._inputs import Conversation
from torchtune_vl.validation._ours import Ours
from torchtune_vl.validation._reference import Reference, continue_behind_media, media_of
from torchtune_vl.validation._report import Case, Outcome, Row, Track, attempt

# Longer conversations are not run through the models: logits, and eager attention, take gigabytes
MAX_TOKENS = 1024


class Sample(NamedTuple):
    """A conversation as both models take it."""

    name: str
    ours: dict[str, Any]
    reference: dict[str, torch.Tensor]


@dataclass
class ChatRows:
    """The rows, and samples for the models.

    Args:
        ids: row of token ids.
        pixels: row of the media in their order.
        positions: row of M-RoPE positions.
        samples: those that both sides accept and that are short enough, up to a number.
    """

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
    """Compare conversations.

    Args:
        ours: our side.
        reference: transformers' side.
        conversations: the conversations.
        keep: samples to keep for the models.
        track: shows progress.

    Returns:
        The rows and the samples.
    """
    rows = ChatRows(
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
    skipped = _obstacle(ours, reference)
    if skipped:
        for row in (rows.ids, rows.pixels, rows.positions):
            row.skipped = skipped
        return rows
    comparison = _Comparison(ours, reference, rows)
    comparison.warm_up(next(c for c in conversations if media_of(c.messages, "image")))
    problems = []
    for conversation in track(conversations, "conversations"):
        problem = conversation.problem or comparison.problem(conversation)
        if problem:
            problems.append(f"{conversation.name}: {problem}")
            continue
        sample = comparison.compare(conversation)
        if sample is None or len(sample.ours["tokens"]) > MAX_TOKENS:
            continue
        if len(rows.samples) < keep:
            rows.samples.append(sample)
    rows.ids.note = _note(conversations, problems)
    if comparison.moved:
        rows.positions.note = (
            f"transformers {version('transformers')} begins the text behind videos of "
            f"{comparison.moved:,} conversations before they end, at half the larger side of their "
            "frames; compared, and run for the logits, are its positions with this text behind the "
            "last position of the video, as the weights have learned it"
        )
    return rows


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


def _obstacle(ours: Ours, reference: Reference) -> str:
    if reference.no_torchvision:
        return reference.no_torchvision
    if ours.transform.error or reference.processor.error:
        return "unreadable: see vocabulary and image settings"
    if reference.rope.error:
        return f"transformers cannot read config.json: {reference.rope.error}"
    return ""


class _Comparison:
    def __init__(self, ours: Ours, reference: Reference, rows: ChatRows) -> None:
        self.ours = ours
        self.transform = ours.transform.value
        self.reference = reference
        self.rows = rows
        self.moved = 0
        # A template of another kind need not say where answers are, which training asks for
        self.prompt = self.transform.prompts.chat_template is not None

    def warm_up(self, conversation: Conversation) -> None:
        """Run both sides once before the time is taken."""
        attempt(self.transform, {"messages": conversation.messages}, self.prompt)
        attempt(self.reference.chat, conversation.messages, None, [], self.prompt)

    def problem(self, conversation: Conversation) -> str:
        """Return why transformers has no answer for a conversation."""
        if conversation.tools is not None and not self.reference.tokenizer.value.chat_template:
            return "tokenizer_config.json has no chat template, which conversations with tools need"
        return ""

    def compare(self, conversation: Conversation) -> Sample | None:
        """Compare a conversation, and return it if both sides accept it."""
        name, messages = conversation.name, conversation.messages
        videos = media_of(messages, "video")
        sample = {"messages": messages, "tools": conversation.tools}
        indices = [self.ours.frames(path) for path in videos]
        ours = attempt(self.transform, sample, self.prompt)
        theirs = attempt(self.reference.chat, messages, conversation.tools, indices, self.prompt)

        self.rows.ids.add(
            compare_sequences(
                name,
                ours.map(lambda sample: sample["tokens"]),
                theirs.map(lambda inputs: inputs["input_ids"][0].tolist()),
                lambda token_id: self.transform.decode([token_id]),
            )
        )
        if ours.error is not None or theirs.error is not None:
            return None
        if "encoder_input" in ours.value:
            patches = ours.value["encoder_input"]["vision"]["patches"]
            expected = _patches_in_order(messages, theirs.value)
            self.rows.pixels.add(compare_tensors(name, Outcome(patches), Outcome(expected)))
        positions = attempt(self._positions_of_reference, theirs.value)
        self.rows.positions.add(
            self._positions(name, ours.value, positions, _videos_among_media(messages))
        )
        if positions.error is not None:
            return None
        inputs = {**theirs.value, "position_ids": positions.value.T[:, None]}
        return Sample(name, ours.value, inputs)

    def _positions_of_reference(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        given = self.reference.positions(inputs)
        positions = continue_behind_media(given, inputs["mm_token_type_ids"][0])
        self.moved += not torch.equal(given, positions)
        return positions

    def _positions(
        self,
        name: str,
        ours: dict[str, Any],
        reference: Outcome[torch.Tensor],
        media: Sequence[str | None],
    ) -> Case:
        vision = ours.get("encoder_input", {"vision": {"grid_thw": torch.empty(0, 3)}})["vision"]
        seconds = [None if p is None else self.ours.seconds_per_step(p) for p in media]
        timed = attempt(
            self.transform.positions, ours["tokens"], vision["grid_thw"].long(), seconds
        )
        a = replace(timed, value=ours["input_pos"].tolist(), error=None)
        return compare_sequences(name, a, reference.map(torch.Tensor.tolist))


def _videos_among_media(messages: Sequence[dict[str, Any]]) -> list[str | None]:
    """For each medium in order the path of a video, or None for an image."""
    items = [item for m in messages if isinstance(m["content"], list) for item in m["content"]]
    return [item.get("video") for item in items if item["type"] in ("image", "video")]


def _patches_in_order(
    messages: Sequence[dict[str, Any]], inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The patches of images and videos, which transformers keeps apart, in one."""
    media = {}
    for kind, patches, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if grids in inputs:
            media[kind] = iter(inputs[patches].split(inputs[grids].prod(1).tolist()))
    items = [item for m in messages if isinstance(m["content"], list) for item in m["content"]]
    return torch.cat([next(media[item["type"]]) for item in items if item["type"] in media])
