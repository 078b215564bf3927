"""Turns to the token ids of a prompt, each medium's placeholders in their place."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Literal, NamedTuple

from torchtune_vl.chat import _chat_template as template
from torchtune_vl.chat._messages import ROLES, EncodedMedium, EncodedTurn, Turn
from torchtune_vl.chat._tokenizer import QwenTokenizer
from torchtune_vl.chat._vocabulary import STRUCTURAL_TOKENS

Special = Literal["content", "all"]
# A text, token or medium, and whether the loss is taken of it
_Piece = tuple[str | int | EncodedMedium, bool]

_NAMES = {"image": "Picture", "video": "Video"}
# Where a template puts a medium
_PLACES = {f"<|vision_start|><|{kind}_pad|><|vision_end|>": kind for kind in _NAMES}
_MARKS = (*_PLACES, template.START, template.END, *STRUCTURAL_TOKENS)
_STRUCTURE = re.compile(f"({'|'.join(map(re.escape, _MARKS))})")


class Prompt(NamedTuple):
    """Token ids, for each whether the loss ignores it, and the media by where they begin.

    The tokens of a medium are ``<|vision_start|>``, its placeholders and ``<|vision_end|>``.
    """

    tokens: list[int]
    mask: list[bool]
    media: dict[int, EncodedMedium]

    def part(self, start: int, stop: int) -> "Prompt":
        """The prompt between two positions, neither of them inside of a medium."""
        media = {place - start: m for place, m in self.media.items() if start <= place < stop}
        return Prompt(self.tokens[start:stop], self.mask[start:stop], media)


class PromptBuilder:
    """Applies a chat template, None for the published ones, and tokenizes what it gives."""

    def __init__(
        self,
        tokenizer: QwenTokenizer,
        parse_special: Special,
        add_vision_id: bool,
        chat_template: str | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.parse_special = parse_special
        self.add_vision_id = add_vision_id
        self.chat_template = chat_template
        self.roles = template.known_roles(chat_template)
        (self._line_break,) = tokenizer.encode("\n", add_eos=False)

    def build(
        self, turns: Sequence[EncodedTurn], tools: Sequence[Mapping[str, Any]], inference: bool
    ) -> Prompt:
        """Apply the chat template to turns, with JSON schemas of functions.

        ``inference`` ends it with the prompt for an answer. ``ValueError`` if it cannot be applied.
        """
        if self.chat_template is not None:
            return self._tokenize(self._rendered(turns, tools, inference))
        has_tools = bool(tools) or any(turn.tool_calls or turn.role == "tool" for turn in turns)
        if turns[0].role == "system":
            system, turns = turns[0].content, turns[1:]
        else:
            system = [template.SYSTEM_PROMPTS[has_tools]]
        system = [*system, template.tools_prompt(tools)]
        pieces = [*self._published([Turn("system", system, True, {}), *turns], self.add_vision_id)]
        if inference:
            pieces += [(self.tokenizer.im_start_id, False), ("assistant\n", False)]
        return self._tokenize(pieces)

    def of_message(self, turn: EncodedTurn) -> Prompt:
        """Tokenize one message as the published template has it, without a system prompt."""
        return self._tokenize(self._published([turn], numbers_media=False))

    def _published(self, turns: Sequence[EncodedTurn], numbers_media: bool) -> Iterator[_Piece]:
        """What the published templates give of turns."""
        counts = dict.fromkeys(_NAMES, 0)
        roles = [turn.role for turn in turns]
        for turn, before, behind in zip(turns, [None, *roles], [*roles[1:], None], strict=False):
            is_tool = turn.role == "tool"
            is_trained = turn.role == "assistant" and not turn.masked
            if is_tool and before == "tool":
                yield "\n", False
            else:
                yield self.tokenizer.im_start_id, False
                yield f"{'user' if is_tool else turn.role}\n", False
            if is_tool:
                yield "<tool_response>\n", False
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

    def _rendered(
        self, turns: Sequence[EncodedTurn], tools: Sequence[Mapping[str, Any]], inference: bool
    ) -> Iterator[_Piece]:
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
        num_marked, num_answers = text.count(template.START), len(without_loss)
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
            raise ValueError(
                "the chat template's places are not those of the media: for each of them, in their "
                f"order, it has to write {' or '.join(_PLACES)}"
            )
        remaining = iter(media)
        masked_answers = iter(without_loss) if any(without_loss) else repeat(False)
        is_trained = False
        for piece in pieces:
            if piece in (template.START, template.END):
                is_trained = piece == template.START and not next(masked_answers)
            elif piece in _PLACES:
                yield next(remaining), False
            elif piece in STRUCTURAL_TOKENS:
                yield self.tokenizer.special_tokens[piece], is_trained
            else:
                yield template.reveal(piece), is_trained

    def _tokenize(self, pieces: Iterable[_Piece]) -> Prompt:
        t, prompt = self.tokenizer, Prompt([], [], {})
        texts: list[tuple[str, bool]] = []
        for part, is_trained in pieces:
            if isinstance(part, str):
                before = texts.pop()[0] if texts and texts[-1][1] == is_trained else ""
                texts.append((before + part, is_trained))
                continue
            if texts:
                self._append_texts(prompt, texts)
                texts = []
            if isinstance(part, int):
                prompt.tokens.append(part)
                prompt.mask.append(not is_trained)
            else:
                prompt.media[len(prompt.tokens)] = part
                pad = t.special_tokens[f"<|{part.kind}_pad|>"]
                prompt.tokens.extend([t.vision_start_id, *[pad] * part.num_tokens, t.vision_end_id])
                prompt.mask.extend([True] * (part.num_tokens + 2))
        if texts:
            self._append_texts(prompt, texts)
        return prompt

    def _append_texts(self, prompt: Prompt, texts: Sequence[tuple[str, bool]]) -> None:
        """Append texts as one, since BPE merges across their seams.

        A token across a seam is trained if one of its sides is: an answer that begins with line
        breaks shares one with its header.
        """
        ids = self._encode("".join(text for text, _ in texts))
        _, is_last_trained = texts[-1]
        mask = [not is_last_trained] * len(ids)
        trained: list[tuple[float, float]] = []
        before, start = "", 0
        for text, is_trained in texts[:-1]:
            before += text
            stop = len(before) if before.isascii() else self._num_bytes(self._encode(before))
            trained += [(start, stop)] if is_trained else []
            start = stop
        trained += [(start, math.inf)] if is_last_trained else []
        position = 0
        for i, token in enumerate(ids):
            if position >= start:
                break
            stop = position + self._num_bytes([token])
            mask[i] = not any(a < stop and b > position for a, b in trained)
            position = stop
        prompt.tokens.extend(ids)
        prompt.mask.extend(mask)

    def _encode(self, text: str) -> list[int]:
        if self.parse_special == "content":
            return self.tokenizer.encode_content(text)
        return self.tokenizer.encode(text, add_eos=False)

    def _num_bytes(self, ids: Sequence[int]) -> int:
        return sum(map(len, self.tokenizer.token_bytes(ids)))


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
