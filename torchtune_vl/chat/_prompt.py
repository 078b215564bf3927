"""Turns to the token ids of a prompt, each medium's placeholders in their place."""

import logging
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple

from torchtune_vl.chat import _chat_template as template
from torchtune_vl.chat._messages import LOSS_KEYS, ROLES, EncodedMedium, EncodedTurn, Tools, Turn
from torchtune_vl.chat._tokenizer import QwenTokenizer
from torchtune_vl.chat._vocabulary import STRUCTURAL_TOKENS
from torchtune_vl.media._said import Said

Special = Literal["content", "all"]
Truncation = Literal["right", "left", "turns"]
_Turns = Sequence[EncodedTurn]
# A text, token or medium, and whether the loss is taken of it; at the end there is none
_Piece = tuple[str | int | EncodedMedium | None, bool]
_END: _Piece = None, False
_log = logging.getLogger(__name__)

# Of messages, which no template reads but the first
_PLAIN_KEYS = {"role", *LOSS_KEYS}
_NAMES = {"image": "Picture", "video": "Video"}
# Where a template puts a medium
_PLACES = {f"<|vision_start|><|{kind}_pad|><|vision_end|>": kind for kind in _NAMES}
# A video there, and as a template has it where each of its steps gets such a pair of tokens
VIDEO, VIDEO_ALONE = "<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>"
_MARKS = (*_PLACES, template.START, template.LEFT_OUT, template.END, *STRUCTURAL_TOKENS)
_STRUCTURE = re.compile(f"({'|'.join(map(re.escape, _MARKS))})")
# By what a medium takes fewer tokens
_MAKES_SMALLER = {
    "image": "max_pixels",
    "video": "fps, max_frames or video_max_pixels (of one video nframes or max_pixels)",
}


class Prompt(NamedTuple):
    """Token ids, for each whether the loss ignores it, and the media by where they begin and end.

    The tokens of a medium are ``<|vision_start|>``, its placeholders and ``<|vision_end|>``; of a
    video perhaps so for each step, with the text before it. The first of these may share a token
    with what stands before the video, which is one of the video's then.
    """

    tokens: list[int]
    mask: list[bool]
    media: dict[tuple[int, int], EncodedMedium]

    def part(self, start: int, stop: int) -> "Prompt":
        """The prompt between two positions, neither of them inside of a medium."""
        spans = {(a - start, b - start): m for (a, b), m in self.media.items() if start <= a < stop}
        return Prompt(self.tokens[start:stop], self.mask[start:stop], spans)


class Plain(NamedTuple):
    """What code follows of a template that Jinja runs: conversations of plain messages.

    It writes those of some roles as the published template without tools does, but for a system
    prompt where there is none. ``opens`` is what a prompt for an answer has behind its header.
    """

    roles: frozenset[str]
    opens: str = ""

    def has(self, turn: EncodedTurn) -> bool:
        """Whether a message has nothing but texts and, of users, media."""
        texts = [part for part in turn.content if isinstance(part, str)]
        return (
            turn.role in self.roles
            and turn.given.keys() <= _PLAIN_KEYS
            and (turn.role == "user" or len(texts) == len(turn.content))
            and not any(map(template.has_noncharacter, texts))
        )


@dataclass(eq=False, repr=False)
class PromptBuilder:
    """Applies a chat template, None for the published ones, and tokenizes what it gives."""

    tokenizer: QwenTokenizer
    parse_special: Special
    add_vision_id: bool
    chat_template: str | None
    plain: Plain | None = None  # what code follows of the template

    def __post_init__(self) -> None:
        self.roles = template.known_roles(self.chat_template)
        (self._line_break,) = self.tokenizer.encode("\n", add_eos=False)
        self._told = Said("left out")

    def build(self, turns: _Turns, tools: Tools, inference: bool) -> Prompt:
        """Apply the chat template to turns, with JSON schemas of functions.

        ``inference`` ends it with the prompt for an answer. ``ValueError`` if it cannot be applied.
        """
        opens = ""
        if self.chat_template is None:
            turns = _with_system(turns, tools)
        elif self.plain and not tools and all(map(self.plain.has, turns)):
            opens = self.plain.opens
        else:
            return self._tokenize(self._rendered(turns, tools, inference))
        pieces = [*self._published(turns, self.add_vision_id)]
        if inference:
            pieces += [(self.tokenizer.im_start_id, False), (f"assistant\n{opens}", False)]
        return self._tokenize(pieces)

    def of_message(self, turn: EncodedTurn) -> Prompt:
        """Tokenize one message as the published template has it, without a system prompt."""
        return self._tokenize(self._published([turn], numbers_media=False))

    def answer(self, text: str) -> list[int]:
        """Tokenize an answer, with its end, as it stands behind a prompt."""
        return [*self._encode(text), self.tokenizer.im_end_id]

    def unended(self, whole: Prompt) -> Prompt:
        """Leave out what ends the last message."""
        tokens, t = whole.tokens, self.tokenizer
        end = max((i for i, token in enumerate(tokens) if token == t.im_end_id), default=-1)
        if end < 0 or t.im_start_id in tokens[end:]:
            ends = "the chat template does not end a message of the assistant with <|im_end|>"
            raise ValueError(f"{ends}: an answer that is begun cannot be gone on with")
        return whole.part(0, end)

    def truncate(
        self, whole: Prompt, limit: int, by: Truncation, turns: _Turns, tools: Tools
    ) -> Prompt:
        """Cut the prompt of turns that is longer than a limit, never in a medium.

        Its "right" or "left" end goes, or the oldest whole "turns", each a user's message with what
        follows it, but never the system's and never the last, which alone may still be too long.
        """
        length = len(whole.tokens)
        if by != "turns":
            cut = limit if by == "right" else length - limit
            for start, stop in whole.media:
                if start < cut < stop:
                    cut = start if by == "right" else stop
            return whole.part(0, cut) if by == "right" else whole.part(cut, length)
        first = int(turns[0].role == "system")
        starts = [i for i, t in enumerate(turns) if t.role == "user" and i > first] or [first]

        def after(count: int) -> Prompt:
            return self.build([*turns[:first], *turns[starts[count] :]], tools, inference=False)

        # As few as necessary; the last one stays
        counts = range(len(starts) - 1)
        return after(bisect_left(counts, True, key=lambda count: len(after(count).tokens) <= limit))

    def _published(self, turns: _Turns, numbers_media: bool) -> Iterator[_Piece]:
        """What the published templates give of turns."""
        counts = dict.fromkeys(_NAMES, 0)
        roles = [turn.role for turn in turns]
        for turn, before, behind in zip(turns, [None, *roles], [*roles[1:], None], strict=False):
            is_tool = turn.role == "tool"
            is_trained = turn.role == "assistant" and not turn.masked
            if not (is_tool and before == "tool"):
                yield self.tokenizer.im_start_id, False
                yield "user" if is_tool else turn.role, False
            yield "\n<tool_response>\n" if is_tool else "\n", False
            for part in turn.content:
                if numbers_media and isinstance(part, EncodedMedium):
                    counts[part.kind] += 1
                    yield f"{_NAMES[part.kind]} {counts[part.kind]}: ", is_trained
                yield part, is_trained
            for number, call in enumerate(turn.tool_calls if turn.role == "assistant" else ()):
                line_break = "\n" if number or any(turn.content) else ""
                yield f"{line_break}{template.call_text(call)}", is_trained
            if is_tool:
                yield "\n</tool_response>", False
            if not (is_tool and behind == "tool"):
                yield self.tokenizer.im_end_id, is_trained
                yield self._line_break, False

    def _rendered(self, turns: _Turns, tools: Tools, inference: bool) -> Iterator[_Piece]:
        """What a template of the user's gives."""
        text = template.render(
            self.chat_template or "",
            hides_structure=self.parse_special == "content",
            messages=[_as_dict(turn) for turn in turns],
            tools=tools or None,
            add_generation_prompt=inference,
            add_vision_id=self.add_vision_id,
        )
        without_loss = [turn.masked for turn in turns if turn.role == "assistant"]
        num_left_out = text.count(template.LEFT_OUT)
        num_marked, num_answers = text.count(template.START) + num_left_out, len(without_loss)
        is_unmarked = num_answers and not num_marked and not inference
        if is_unmarked or (any(without_loss) and num_marked != num_answers):
            raise ValueError(
                f"the chat template marks {num_marked} answers of {num_answers}: put "
                "{% generation %} and {% endgeneration %} around what the loss is to be taken of "
                "in each, in a file that chat_template_file names"
            )
        others = {turn.role for turn in turns if turn.masked and turn.role not in ROLES}
        if num_marked and others:
            raise ValueError(
                f"messages of the role {min(others)!r} are to carry no loss (their weight, or "
                "train_on), as those of assistant alone can: rename it in data and chat template"
            )
        pieces = _STRUCTURE.split(text)
        media = [part for turn in turns for part in turn.content if isinstance(part, EncodedMedium)]
        wanted = {**_PLACES, "<|image_pad|>": None, "<|video_pad|>": None}
        places = [wanted[piece] for piece in pieces if piece in wanted]
        if places != [medium.kind for medium in media]:
            needed = f"for each of them, in their order, it has to write {' or '.join(_PLACES)}"
            raise ValueError(f"the chat template's places are not those of the media: {needed}")
        remaining = iter(media)
        masked_answers = iter(without_loss) if any(without_loss) else repeat(False)
        is_trained = False
        for number, piece in enumerate(pieces):
            if number % 2 == 0:  # between what the pattern matches
                yield template.without_stand_ins(piece), is_trained
            elif piece == template.END:
                is_trained = False
            elif piece in (template.START, template.LEFT_OUT):
                is_masked = next(masked_answers)
                is_trained = piece == template.START and not is_masked
                if piece == template.LEFT_OUT and not is_masked and not inference:
                    self._tell_left_out()
            elif piece in _PLACES:
                yield next(remaining), False
            else:
                yield self.tokenizer.special_tokens[piece], is_trained

    def _tell_left_out(self) -> None:
        if self._told.is_new("left out"):
            _log.warning(
                "The chat template writes earlier answers otherwise than the model does, without "
                "their reasoning: these carry no loss. Train on them as samples of their own, each "
                "with the conversation before it, or set train_on to 'last'. This is said once."
            )

    def _tokenize(self, pieces: Iterable[_Piece]) -> Prompt:
        t, prompt = self.tokenizer, Prompt([], [], {})
        texts: list[str] = []
        trained: list[bool] = []
        for part, is_trained in chain(pieces, [_END]):
            steps = part.step_texts if isinstance(part, EncodedMedium) else ()
            text = part if isinstance(part, str) else "".join(steps[:1])
            if text or isinstance(part, str):
                if trained and trained[-1] == is_trained:
                    texts[-1] += text
                else:
                    texts.append(text)
                    trained.append(is_trained)
            if isinstance(part, str):
                continue
            if texts:
                ids, mask = self._tokens_of(tuple(texts), tuple(trained))
                prompt.tokens.extend(ids)
                prompt.mask.extend(mask)
                texts, trained = [], []
            if isinstance(part, int):
                prompt.tokens.append(part)
                prompt.mask.append(not is_trained)
            elif part is not None:
                start = len(prompt.tokens) - self._num_last(prompt.tokens, text)
                pads = [t.special_tokens[f"<|{part.kind}_pad|>"]] * part.num_tokens
                pads = pads[: part.num_tokens // (len(steps) or 1)]
                prompt.tokens.extend([t.vision_start_id, *pads, t.vision_end_id])
                for step in steps[1:]:
                    prompt.tokens.extend([*self._encode(step), t.vision_start_id, *pads])
                    prompt.tokens.append(t.vision_end_id)
                prompt.mask.extend([True] * (len(prompt.tokens) - len(prompt.mask)))
                prompt.media[start, len(prompt.tokens)] = part
        return prompt

    def _num_last(self, ids: Sequence[int], text: str) -> int:
        """How many ids at the end hold a text, which is of ASCII."""
        count = size = 0
        while size < len(text):
            count += 1
            size += self._num_bytes([ids[-count]])
        return count

    @lru_cache(64)  # noqa: B019 (most samples have the same system prompt, of a tenth of their time)
    def _tokens_of(
        self, texts: tuple[str, ...], trained: tuple[bool, ...]
    ) -> tuple[list[int], list[bool]]:
        """Ids and mask of texts as one, since BPE merges across their seams.

        A token across a seam is trained if one of its sides is: an answer that begins with line
        breaks shares one with its header.
        """
        ids = self._encode("".join(texts))
        before, starts = "", [0]  # of the texts, in bytes
        for text in texts[:-1]:
            before += text
            is_ascii = before.isascii()
            starts.append(len(before) if is_ascii else self._num_bytes(self._encode(before)))
        mask: list[bool] = []
        position = 0
        for token in ids:
            if position >= starts[-1]:
                break
            stop = position + self._num_bytes([token])
            first, behind = bisect_right(starts, position) - 1, bisect_left(starts, stop)
            mask.append(not any(trained[first:behind]))
            position = stop
        return ids, [*mask, *[not trained[-1]] * (len(ids) - len(mask))]

    def _encode(self, text: str) -> list[int]:
        if self.parse_special == "content":
            return self.tokenizer.encode_content(text)
        return self.tokenizer.encode(text, add_eos=False)

    def _num_bytes(self, ids: Sequence[int]) -> int:
        return sum(map(len, self.tokenizer.token_bytes(ids)))


def remedy(whole: Prompt, limit: int) -> str:
    """Tell by what a prompt would come within a limit."""
    kinds = {medium.kind for medium in whole.media.values()}
    smaller = [f"lower {_MAKES_SMALLER[kind]}, " for kind in sorted(kinds)]
    return f"raise max_seq_len (now {limit}), {''.join(smaller)}or shorten the sample"


def difference(whole: Prompt, part: Prompt) -> dict[str, int]:
    """Count the ``tokens``, ``images`` and ``videos`` that a part of a prompt lacks."""
    counts = [Counter(f"{m.kind}s" for m in p.media.values()) for p in (whole, part)]
    media = {kind: counts[0][kind] - counts[1][kind] for kind in ("images", "videos")}
    return {"tokens": len(whole.tokens) - len(part.tokens), **media}


def _with_system(turns: _Turns, tools: Tools) -> _Turns:
    """The turns with the published template's system prompt, and with what it says of tools."""
    has_tools = bool(tools) or any(turn.tool_calls or turn.role == "tool" for turn in turns)
    if turns[0].role == "system":
        system, turns = turns[0].content, turns[1:]
    else:
        system = [template.SYSTEM_PROMPTS[has_tools]]
    return [Turn("system", [*system, template.tools_prompt(tools)], True, {}), *turns]


def _as_dict(turn: EncodedTurn) -> dict[str, Any]:
    """A turn as transformers' templates expect it."""
    content: Any = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": p.kind, p.kind: ""}
        for p in turn.content
    ]
    if len(content) == 1 and content[0]["type"] == "text":
        content = content[0]["text"]
    return {**turn.given, "content": content}
