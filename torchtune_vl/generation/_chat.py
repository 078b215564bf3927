"""A conversation whose turns are answered one after another."""

from collections.abc import Generator
from typing import NamedTuple

import torch
import xxhash

from torchtune_vl.chat import ChatTransform
from torchtune_vl.generation._decoding import (
    Answer,
    Decoding,
    Draft,
    Prompt,
    Rules,
    check_room,
    evaluating,
    media_spans,
)
from torchtune_vl.generation._generate import Conversation, prompt_of
from torchtune_vl.modules.vision import VisionLanguageModel


class _Turn(NamedTuple):
    """What the cache has: a prompt, the digests of its media, and what was written to it."""

    prompt: Prompt
    media: list[tuple[int, int, bytes]]  # where each begins and ends, and its digest
    draft: Draft


class Chat:
    """Answers the turns of a conversation, and reads of each only what it has not read before.

    An answer is that to the whole conversation, to rounding; it may be another conversation at any
    time. Of what begins as the one before, keys and values are there: no medium of it is encoded
    again.

    Args:
        model: on any device, of any dtype.
        transform: of the model's family.
        rules: of the answers. Each draws numbers of its own.
    """

    def __init__(self, model: VisionLanguageModel, transform: ChatTransform, rules: Rules) -> None:
        self.model = model
        self.transform = transform
        self.num_answers = 0
        self.num_kept = 0
        self._longest_stop = max(map(len, rules.stop), default=1)
        self._decoding = Decoding(model, transform, rules, num_slots=1)
        self._last: _Turn | None = None

    @torch.no_grad()
    def stream(self, conversation: Conversation) -> Generator[str, None, Answer]:
        """Answer a conversation, as :func:`generate` takes it: yield its text, return the answer.

        It may be left at any time. ``num_kept`` is the number of tokens of the prompt that were
        not read again. Raises ``ValueError`` as :func:`generate` does.
        """
        prompt = prompt_of(self.transform, conversation)
        check_room(self.model, prompt, self._decoding.rules.max_new_tokens)
        media = _media_of(prompt, self.model)
        self.num_kept = _num_common(self._last, prompt, media) if self._last else 0
        self._last = None  # if what follows is left, nobody knows what the cache has
        self._decoding.drafts.clear()
        with evaluating(self.model):
            self._decoding.read([(self.num_answers, prompt)], self.num_kept)
            self.num_answers += 1
            (draft,) = self._decoding.drafts
            self._last = _Turn(prompt, media, draft)
            self._decoding.write_first_tokens()
            given = 0
            while True:
                # What may be the beginning of a stop string is held back
                end = len(draft.text) if draft.ended else len(draft.text) - self._longest_stop + 1
                if end > given:
                    yield draft.text[given:end]
                    given = end
                if draft.ended:
                    return draft.answer()
                self._decoding.step()


def _media_of(prompt: Prompt, model: VisionLanguageModel) -> list[tuple[int, int, bytes]]:
    if "encoder_input" not in prompt:
        return []
    vision = prompt["encoder_input"]["vision"]
    sizes = vision["grid_thw"].prod(1).tolist()
    digests = [xxhash.xxh3_128_digest(x.numpy()) for x in vision["patches"].split(sizes)]
    spans = media_spans(prompt, model)
    return [(*span, digest) for span, digest in zip(spans, digests, strict=True)]


def _num_common(last: _Turn, prompt: Prompt, media: list[tuple[int, int, bytes]]) -> int:
    """How many tokens at the beginning of a prompt the cache has, with their media."""
    # Its last token was not read, and of a prompt one is, for what follows it
    written = last.draft.tokens[:-1]
    had = [*last.prompt["tokens"], *written]
    most = min(len(had), len(prompt["tokens"]) - 1)
    pairs = enumerate(zip(had[:most], prompt["tokens"], strict=False))
    common = next((place for place, (a, b) in pairs if a != b), most)
    behind = last.draft.prompt.position + 1 + torch.arange(len(written))
    positions = torch.cat([last.prompt["input_pos"], behind[:, None].expand(-1, 3)])[:common]
    moved = (positions != prompt["input_pos"][:common]).any(1).nonzero()
    common = int(moved[0]) if len(moved) else common
    for start, end, digest in media:
        if start < common and (end > common or (start, end, digest) not in last.media):
            return start
    return common
