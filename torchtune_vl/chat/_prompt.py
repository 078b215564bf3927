"""Turns to the token ids of a prompt, each medium's placeholders in their place."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torchtune_vl.chat._messages import ROLES, Kind
from torchtune_vl.chat._template import (
    Block,
    EncodedMedium,
    EncodedTurn,
    Part,
    blocks_of,
    hide,
    known_roles,
    number_media,
    render_template,
    reveal,
)
from torchtune_vl.chat._tokenizer import STRUCTURAL_TOKENS, QwenTokenizer

Special = Literal["content", "all"]

# Where a template puts a medium
_PLACES: dict[str, Kind] = {
    "<|vision_start|><|image_pad|><|vision_end|>": "image",
    "<|vision_start|><|video_pad|><|vision_end|>": "video",
}
_STRUCTURE = re.compile("(" + "|".join(map(re.escape, (*_PLACES, *STRUCTURAL_TOKENS))) + ")")


class PlacedMedium(NamedTuple):
    """A medium and its tokens: ``<|vision_start|>``, placeholders, ``<|vision_end|>``."""

    start: int
    stop: int
    medium: EncodedMedium


class Prompt(NamedTuple):
    """Token ids, for each whether the loss ignores it, and the media among them."""

    tokens: list[int]
    mask: list[bool]
    media: list[PlacedMedium]

    def part(self, start: int, stop: int) -> "Prompt":
        """The prompt between two positions, neither of them inside of a medium."""
        media = [
            m._replace(start=m.start - start, stop=m.stop - start)
            for m in self.media
            if start <= m.start and m.stop <= stop
        ]
        return Prompt(self.tokens[start:stop], self.mask[start:stop], media)


class PromptBuilder:
    """Applies a chat template and tokenizes what it gives.

    Args:
        tokenizer: the vocabulary.
        parse_special: "content" or "all" added tokens in messages become their ids.
        add_vision_id: whether to number media in the text.
        chat_template: Jinja source of a template, or None for the published ones.
    """

    def __init__(
        self,
        tokenizer: QwenTokenizer,
        *,
        parse_special: Special,
        add_vision_id: bool,
        chat_template: str | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.parse_special = parse_special
        self.add_vision_id = add_vision_id
        self.chat_template = chat_template
        self.roles = known_roles(chat_template)
        self._headers: dict[str, list[int]] = {}
        self._line_break = tokenizer.encode("\n", add_eos=False)

    def build(
        self, turns: Sequence[EncodedTurn], tools: Sequence[Mapping[str, Any]], inference: bool
    ) -> Prompt:
        """Apply the chat template.

        Args:
            turns: the conversation, media encoded.
            tools: JSON schemas of functions.
            inference: whether to end with the prompt for an answer.

        Returns:
            Ids, whether the loss ignores each, and where media are.

        Raises:
            ValueError: if the template cannot render the conversation.
        """
        if self.chat_template is not None:
            return self._render_custom(turns, tools, inference)
        numbered = number_media(turns) if self.add_vision_id else turns
        prompt = self.of_blocks(blocks_of(numbered, tools))
        if inference:
            header = self._header("assistant")
            prompt.tokens.extend(header)
            prompt.mask.extend([True] * len(header))
        return prompt

    def of_blocks(self, blocks: Sequence[Block]) -> Prompt:
        """Tokenize what a published template gives."""
        prompt = Prompt([], [], [])
        for block in blocks:
            self._append_block(prompt, block)
        return prompt

    def _append_block(self, prompt: Prompt, block: Block) -> None:
        tokens, mask, _ = prompt
        start = len(tokens)
        tokens.append(self.tokenizer.im_start_id)
        mask.append(True)
        for part in _joined([f"{block.role}\n", *block.parts]):
            if isinstance(part, EncodedMedium):
                self._append_medium(prompt, part)
            else:
                ids = self._encode_content(part)
                tokens.extend(ids)
                mask.extend([block.masked] * len(ids))
        if not block.masked:
            # An answer that begins with line breaks shares a token with the header
            header = self._header(block.role)
            count = _common_prefix_length(tokens[start : start + len(header)], header)
            mask[start : start + count] = [True] * count
        tokens.append(self.tokenizer.im_end_id)
        mask.append(block.masked)
        tokens.extend(self._line_break)
        mask.extend([True] * len(self._line_break))

    def _append_medium(self, prompt: Prompt, medium: EncodedMedium) -> None:
        t = self.tokenizer
        pad = t.image_pad_id if medium.kind == "image" else t.video_pad_id
        start = len(prompt.tokens)
        prompt.tokens.extend([t.vision_start_id, *[pad] * medium.num_tokens, t.vision_end_id])
        prompt.mask.extend([True] * (medium.num_tokens + 2))
        prompt.media.append(PlacedMedium(start, len(prompt.tokens), medium))

    def _encode_content(self, text: str) -> list[int]:
        if self.parse_special == "content":
            return self.tokenizer.encode_content(text)
        return self.tokenizer.encode(text, add_eos=False)

    def _header(self, role: str) -> list[int]:
        if role not in self._headers:
            ids = self._encode_content(f"{role}\n")
            self._headers[role] = [self.tokenizer.im_start_id, *ids]
        return self._headers[role]

    def _render_custom(
        self, turns: Sequence[EncodedTurn], tools: Sequence[Mapping[str, Any]], inference: bool
    ) -> Prompt:
        """Run a template of the user's and put tokens for its text and media."""
        assert self.chat_template is not None
        hidden = STRUCTURAL_TOKENS if self.parse_special == "content" else ()
        rendered = render_template(
            self.chat_template,
            hide([_as_dict(turn) for turn in turns], hidden),
            hide(tools, hidden),
            add_generation_prompt=inference,
            add_vision_id=self.add_vision_id,
        )
        answers = [turn for turn in turns if turn.role == "assistant"]
        if not inference and not rendered.spans and answers:
            raise ValueError(
                "the chat template marks no answer: put {% generation %} and {% endgeneration %} "
                "around what the loss is to be taken of, in a file that chat_template_file names"
            )
        others = {turn.role for turn in turns if turn.masked and turn.role not in ROLES}
        if rendered.spans and others:
            raise ValueError(
                f"messages of the role {min(others)!r} are to carry no loss (their weight, or "
                "train_on), which works for those of the role assistant alone: rename it in data "
                "and chat template"
            )
        spans = _trained_spans(rendered.spans, answers)
        return self._tokenize_rendered(rendered.text, spans, turns, hidden)

    def _tokenize_rendered(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        turns: Sequence[EncodedTurn],
        hidden: Sequence[str],
    ) -> Prompt:
        media = [part for turn in turns for part in turn.content if isinstance(part, EncodedMedium)]
        remaining = iter(media)
        prompt = Prompt([], [], [])
        position = 0
        for piece in _STRUCTURE.split(text):
            stop = position + len(piece)
            inside = [
                (max(a, position) - position, min(b, stop) - position)
                for a, b in spans
                if a < stop and b > position
            ]
            if piece in _PLACES:
                medium = next(remaining, None)
                if medium is None or _PLACES[piece] != medium.kind:
                    raise ValueError("the chat template's places are not those of the media")
                self._append_medium(prompt, medium)
            elif piece in ("<|image_pad|>", "<|video_pad|>"):
                raise ValueError(f"the chat template writes {piece} without its start and end")
            elif piece in STRUCTURAL_TOKENS:
                prompt.tokens.append(self.tokenizer.special_tokens[piece])
                prompt.mask.append(not inside)
            elif piece:
                ids = self._encode_content(reveal(piece, hidden))
                prompt.tokens.extend(ids)
                prompt.mask.extend(self._outside(ids, piece, inside, hidden))
            position = stop
        if next(remaining, None) is not None:
            raise ValueError(f"the chat template leaves out some of the {len(media)} media")
        return prompt

    def _outside(
        self,
        ids: Sequence[int],
        text: str,
        spans: Sequence[tuple[int, int]],
        hidden: Sequence[str],
    ) -> list[bool]:
        """For each token of a text, whether it has no part in the spans."""
        if not spans or spans == [(0, len(text))]:
            return [not spans] * len(ids)
        edges = [
            [self._num_bytes(self._encode_content(reveal(text[:edge], hidden))) for edge in span]
            for span in spans
        ]
        outside, position = [], 0
        for token in ids:
            stop = position + self._num_bytes([token])
            outside.append(not any(a < stop and b > position for a, b in edges))
            position = stop
        return outside

    def _num_bytes(self, ids: Sequence[int]) -> int:
        return sum(map(len, self.tokenizer.token_bytes(ids)))


def _joined(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbouring texts in one: BPE merges across their seams."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _as_dict(turn: EncodedTurn) -> dict[str, Any]:
    """A turn as transformers' templates expect it."""
    content: Any = [
        {"type": part.kind, part.kind: ""}
        if isinstance(part, EncodedMedium)
        else {"type": "text", "text": part}
        for part in turn.content
    ]
    if len(content) == 1 and content[0]["type"] == "text":
        content = content[0]["text"]
    return {**turn.given, "content": content}


def _trained_spans(
    spans: Sequence[tuple[int, int]], answers: Sequence[EncodedTurn]
) -> list[tuple[int, int]]:
    if not any(turn.masked for turn in answers):
        return list(spans)
    if len(spans) != len(answers):
        raise ValueError(
            f"the chat template marks {len(spans)} answers of {len(answers)} assistant messages, "
            "so that it is open which of them those without loss are"
        )
    return [span for span, turn in zip(spans, answers, strict=True) if not turn.masked]
