"""Sequences that are decoded together, of which any may end, and others take their place."""

# Shape suffixes: P prompts, B sequences, V vocabulary

import codecs
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from random import Random
from typing import Any, Literal, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from torchtune_vl.data._collate import join_media
from torchtune_vl.generation._captured import (
    CapturedSteps,
    can_capture,
    step_logits,
    to_device,
)
from torchtune_vl.generation._sampling import Sampling
from torchtune_vl.modules.kv_cache import Cache, Continuations, Prefill, Step
from torchtune_vl.modules.layout import vision_index
from torchtune_vl.modules.vision import VisionLanguageModel

# Tokens of prompts that are read at once, but for a prompt that is longer
PREFILL_TOKENS = 4096
# What a step looks at is a multiple of so many tokens on a GPU, so that few shapes occur
_REACH = 256

Ended = Literal["stop token", "stop string", "length"]
# A conversation as a transform gives it, perhaps with ``choices``: lists of ids, each of a whole
# answer with its end, whose log-probabilities are wanted
Prompt = Mapping[str, Any]


class Tokenizer(Protocol):
    """What ends an answer, and what its tokens say."""

    @property
    def stop_tokens(self) -> Collection[int]:
        """Ids that end an answer."""

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids, of parts of a character too."""


@dataclass(frozen=True)
class Answer:
    """An answer to a conversation.

    Args:
        tokens: its ids, up to and with the one that ended it.
        text: what they say, without the stop token or stop string at its end.
        logprobs: of each token the logarithm of the probability that the model gave it, before
            temperature and whatever else decides what is drawn.
        ended: by a "stop token", a "stop string", or its "length", max_new_tokens.
        choice_logprobs: of each of the prompt's choices the logarithm of the probability of all of
            its tokens, if it has choices.
    """

    tokens: list[int]
    text: str
    logprobs: list[float]
    ended: Ended
    choice_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Rules:
    """How answers are chosen, and where they end.

    Args:
        max_new_tokens: the most tokens of an answer.
        sampling: how a token is chosen; the likeliest is by default.
        stop: texts that end an answer, beside the stop tokens, and are not part of it.
        seed: of what is drawn; each answer to each prompt draws numbers of its own.
        num_answers: answers to each prompt, which is read once.
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    seed: int = 0
    num_answers: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_answers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: make it at least 1")
        if self.num_answers > 1 and not self.sampling.draws:
            raise ValueError(f"{self.num_answers} answers would be the same: set temperature")
        if "" in self.stop:
            raise ValueError("a stop string is empty: every answer would end before it began")


@dataclass(eq=False)
class ReadPrompt:
    """A prompt that is in the cache, and what the model expects behind it.

    Args:
        number: counts prompts.
        length: of it, in tokens.
        position: the largest that its tokens have, of M-RoPE.
        logits: of its next token, float32 [V].
        seen: which tokens occur in it, bool [V], if that matters.
        unwritten: numbers of the answers that are not begun.
        choice_logprobs: as of :class:`Answer`.
    """

    number: int
    length: int
    position: int
    logits: torch.Tensor
    seen: torch.Tensor | None
    unwritten: list[int]
    choice_logprobs: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Draft:
    """An answer that is being written, in a slot that has its prompt too."""

    prompt: ReadPrompt
    answer_number: int
    chance: torch.Generator
    decoder: codecs.IncrementalDecoder
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    ended: Ended | None = None

    def answer(self) -> Answer:
        """What is written so far."""
        ended = self.ended or "length"
        return Answer(self.tokens, self.text, self.logprobs, ended, self.prompt.choice_logprobs)


class Decoding:
    """A model that writes several answers at a time, ``drafts``, each in the slot of its place.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        rules: of the answers.
        num_slots: the most answers at a time.
    """

    def __init__(
        self, model: VisionLanguageModel, tokenizer: Tokenizer, rules: Rules, num_slots: int
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"the batch size is {num_slots}: make it at least 1")
        self.model = model
        self.rules = rules
        self.num_slots = num_slots
        self.drafts: list[Draft] = []
        self._cache = Cache(num_slots)
        self._bytes_of = tokenizer.bytes_of
        self._stop_tokens = frozenset(tokenizer.stop_tokens)
        self._device = _device_of(model.tok_embeddings.weight)
        self.captured: CapturedSteps | None = None
        if can_capture(model, self._device):
            self.captured = CapturedSteps(model, self._cache, self._device)
        # Which tokens occurred, by slot, if that matters
        self._seen_BV: torch.Tensor | None = None
        if rules.sampling.repetition_penalty != 1:
            shape = num_slots, model.tok_embeddings.weight.shape[0]
            self._seen_BV = torch.zeros(shape, dtype=torch.bool, device=self._device)

    def fork(self) -> None:
        """Begin further answers to prompts that are in a slot, as long as others are free."""
        while len(self.drafts) < self.num_slots:
            shared = (slot for slot, draft in enumerate(self.drafts) if draft.prompt.unwritten)
            slot = next(shared, None)
            if slot is None:
                return
            prompt = self.drafts[slot].prompt
            self._copy(slot, len(self.drafts), prompt.length)
            self._begin(len(self.drafts), prompt)

    def take(self, prompts: Iterator[tuple[int, Prompt]]) -> list[tuple[int, Prompt]]:
        """Take as many prompts with their numbers as are to be read now.

        ``ValueError`` if one leaves no room for an answer.
        """
        taken: list[tuple[int, Prompt]] = []
        total = 0
        slots = self.num_slots - len(self.drafts)
        most = min(slots, max(1, slots // self.rules.num_answers))
        while len(taken) < most and total < PREFILL_TOKENS:
            numbered = next(prompts, None)
            if numbered is None:
                break
            check_room(self.model, numbered[1], self.rules.max_new_tokens)
            taken.append(numbered)
            total += len(numbered[1]["tokens"]) + sum(map(len, numbered[1].get("choices", ())))
        return taken

    def read(self, prompts: Sequence[tuple[int, Prompt]], start: int = 0) -> None:
        """Read prompts and begin an answer to each, in the next slots.

        If these have the first ``start`` tokens already, only what is behind them is read. They
        do not after a step with fewer drafts, which may write to free slots.
        """
        slots = range(len(self.drafts), len(self.drafts) + len(prompts))
        unread = [_behind(prompt, start, self.model) for _, prompt in prompts]
        lengths = [len(prompt["tokens"]) for prompt in unread]
        tokens = torch.tensor([*chain.from_iterable(prompt["tokens"] for prompt in unread)])
        inputs = {
            "input_pos": torch.cat([prompt["input_pos"] for prompt in unread])[None],
            "output_positions": torch.tensor(lengths).cumsum(0) - 1,
            **join_media(unread),
        }
        # The lengths of the encoder's segments are keys, and stay on the host
        inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(self._device), inputs)
        mask = Prefill(self._cache, lengths, slots, [start] * len(prompts))
        logits_PV = self.model(tokens[None].to(self._device), mask=mask, **inputs)
        each = zip(slots, prompts, logits_PV, strict=True)
        for slot, (number, prompt), logits_V in each:
            seen_V = None
            if self._seen_BV is not None:
                seen_V = torch.zeros_like(self._seen_BV[slot])
                seen_V[prompt["tokens"]] = True
            length, position = len(prompt["tokens"]), int(prompt["input_pos"].max())
            answers = [*range(self.rules.num_answers)]
            self._begin(slot, ReadPrompt(number, length, position, logits_V, seen_V, answers))

    def score_choices(self, prompts: Sequence[tuple[int, Prompt]]) -> None:
        """Find the log-probabilities of choices, which some of the prompts have, just read."""
        first = len(self.drafts) - len(prompts)
        asked = [
            (slot, p["choices"]) for slot, (_, p) in enumerate(prompts, first) if "choices" in p
        ]
        read = [self.drafts[slot].prompt for slot, _ in asked]
        each = [(p, ids) for p, (_, choices) in zip(read, asked, strict=True) for ids in choices]
        # The first token is expected behind the prompt, and nothing behind the last
        positions = (range(p.position + 1, p.position + len(ids)) for p, ids in each)
        rows = ((ids[:-1] for _, ids in each), (ids[1:] for _, ids in each), positions)
        tokens_N, targets_N, positions_N = (
            torch.tensor([*chain.from_iterable(row)], dtype=torch.int64).to(self._device)
            for row in rows
        )
        lengths = [[len(ids) - 1 for ids in choices] for _, choices in asked]
        slots, starts = [slot for slot, _ in asked], [prompt.length for prompt in read]
        losses_N = self.model(
            tokens_N[None],
            mask=Continuations(self._cache, lengths, slots, starts),
            input_pos=positions_N[None],
            output_positions=torch.arange(len(tokens_N), device=self._device),
            targets=targets_N,
        )
        parts = losses_N.split([*chain.from_iterable(lengths)])
        for (prompt, ids), losses in zip(each, parts, strict=True):
            of_first = prompt.logits[ids[0]] - prompt.logits.logsumexp(0)
            # A sum of many has more digits than float32
            prompt.choice_logprobs.append(float(of_first - losses.sum(dtype=torch.float64)))
            _check_finite(prompt.choice_logprobs[-1], prompt)

    def step(self) -> None:
        """Write the next token of each draft."""
        lengths = [draft.prompt.length + len(draft.tokens) - 1 for draft in self.drafts]
        reach = max(lengths) + 1
        if self.captured or self._device.type != "cpu":
            reach = -(-reach // _REACH) * _REACH
        last = [
            (draft.tokens[-1], length, draft.prompt.position + len(draft.tokens))
            for draft, length in zip(self.drafts, lengths, strict=True)
        ]
        if self.captured:
            logits_BV = self.captured(last, reach)
        else:
            last_B3 = to_device(last, self._device)
            logits_BV = step_logits(self.model, self._cache, last_B3, reach)
        self._extend(range(len(self.drafts)), logits_BV)

    def take_ended(self) -> list[Draft]:
        """Take drafts that ended out; the next answer to a prompt goes where one of it was."""
        taken = []
        while any(draft.ended for draft in self.drafts):
            for slot, draft in [*enumerate(self.drafts)][::-1]:
                if draft.ended:
                    taken.append(draft)
                    self._free(slot)
            self.write_first_tokens()
        return taken

    def idle(self, reads: bool) -> None:
        """Run the model as others do who read, or else go on, and keep nothing of it."""
        one = torch.ones(1, 1, dtype=torch.int64, device=self._device)
        mask: Prefill | Step = Step(Cache(1), torch.zeros_like(one[0]), 1)
        if reads:
            mask = Prefill(Cache(1), [1], [0], [0])
        self.model(one, mask=mask, input_pos=one)

    def _free(self, slot: int) -> None:
        draft = self.drafts[slot]
        if draft.prompt.unwritten:
            self._begin(slot, draft.prompt)
            return
        # The last one takes its place, so that those who are left are the first
        last = self.drafts.pop()
        if last is not draft:
            self._copy(len(self.drafts), slot, last.prompt.length + len(last.tokens))
            self.drafts[slot] = last

    def _begin(self, slot: int, prompt: ReadPrompt) -> None:
        number = prompt.unwritten.pop(0)
        seed = Random(f"{self.rules.seed} {prompt.number} {number}").getrandbits(63)
        chance = torch.Generator(self._device).manual_seed(seed)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.drafts[slot : slot + 1] = [Draft(prompt, number, chance, decoder)]
        if self._seen_BV is not None and prompt.seen is not None:
            self._seen_BV[slot] = prompt.seen

    def _copy(self, source: int, target: int, length: int) -> None:
        self._cache.copy(source, target, length)
        if self._seen_BV is not None:
            self._seen_BV[target] = self._seen_BV[source]

    def write_first_tokens(self) -> None:
        """Write those of answers that have none."""
        fresh = [slot for slot, draft in enumerate(self.drafts) if not draft.tokens]
        if fresh:
            logits = torch.stack([self.drafts[slot].prompt.logits for slot in fresh])
            self._extend(fresh, logits)

    def _extend(self, slots: Sequence[int], logits_BV: torch.Tensor) -> None:
        sampling, drafts = self.rules.sampling, [self.drafts[slot] for slot in slots]
        seen_BV = None
        if self._seen_BV is not None:
            rows_B = to_device([*slots], self._device)
            seen_BV = self._seen_BV[rows_B]
        noise_BV = None
        if sampling.draws:
            noise_BV = torch.empty_like(logits_BV)
            for noise_V, draft in zip(noise_BV, drafts, strict=True):
                noise_V.exponential_(generator=draft.chance)
        chosen_B = sampling.choose(sampling.scores(logits_BV, seen_BV), noise_BV)
        if self._seen_BV is not None:
            # Made on the device, where Python's True would be copied to, and waited for
            self._seen_BV[rows_B, chosen_B] = torch.ones_like(chosen_B, dtype=torch.bool)
        logprobs_B = logits_BV.gather(1, chosen_B[:, None]).squeeze(1) - logits_BV.logsumexp(1)
        # Read together, for each read waits for the device; tokens are exact in float32
        tokens, logprobs = torch.stack([chosen_B.to(logprobs_B), logprobs_B]).tolist()
        for draft, token, logprob in zip(drafts, map(int, tokens), logprobs, strict=True):
            _check_finite(logprob, draft.prompt)
            draft.tokens.append(token)
            draft.logprobs.append(logprob)
            self._end(draft, token)

    def _end(self, draft: Draft, token: int) -> None:
        """Add the text of a draft's last token, and see whether it ends there."""
        is_last = len(draft.tokens) == self.rules.max_new_tokens
        is_stop = token in self._stop_tokens
        before = len(draft.text)
        new = b"" if is_stop else self._bytes_of([token])
        draft.text += draft.decoder.decode(new, final=is_stop or is_last)
        draft.ended = "stop token" if is_stop else "length" if is_last else None
        found = [
            place
            for stop in self.rules.stop
            if (place := draft.text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if found:
            draft.text, draft.ended = draft.text[: min(found)], "stop string"


def _check_finite(logprob: float, prompt: ReadPrompt) -> None:
    if not math.isfinite(logprob):
        problem = f"the model's logits for prompt {prompt.number} are not finite"
        raise ValueError(f"{problem}: its weights are damaged, or its dtype is too narrow")


def _device_of(weight: torch.Tensor) -> torch.device:
    """Where a weight is computed with, which may wait elsewhere until then."""
    if isinstance(weight, DTensor):
        return torch.device(weight.device_mesh.device_type)
    return weight.device


def media_spans(prompt: Prompt, model: VisionLanguageModel) -> list[tuple[int, int]]:
    """Where the placeholders of each medium of a prompt begin and end."""
    if "encoder_input" not in prompt:
        return []
    unit = model.encoders["vision"].geometry.merge_size ** 2
    ids = model.placeholder_ids
    places = (place for place, token in enumerate(prompt["tokens"]) if token in ids)
    sizes = prompt["encoder_input"]["vision"]["grid_thw"].prod(1).tolist()
    runs = [[*islice(places, size // unit)] for size in sizes]
    return [(run[0], run[-1] + 1) for run in runs]


def _behind(prompt: Prompt, start: int, model: VisionLanguageModel) -> Prompt:
    """What a prompt has behind its first tokens, which do not end in a medium."""
    if not start:
        return prompt
    rest: dict[str, Any] = {"tokens": prompt["tokens"][start:]}
    rest["input_pos"] = prompt["input_pos"][start:]
    spans = media_spans(prompt, model)
    first = sum(begin < start for begin, _ in spans)
    if first < len(spans):
        vision = prompt["encoder_input"]["vision"]
        grid_thw = vision["grid_thw"][first:]
        patches = vision["patches"][-int(grid_thw.prod(1).sum()) :]
        index = vision_index(grid_thw, model.encoders["vision"].geometry)
        rest["encoder_input"] = {"vision": {"patches": patches, "grid_thw": grid_thw, **index}}
    return rest


def check_room(model: VisionLanguageModel, prompt: Prompt, max_new_tokens: int) -> None:
    """Raise ``ValueError`` if a prompt with an answer is longer than a model's sequences."""
    length, most = len(prompt["tokens"]), model.decoder.max_seq_len
    new = max([max_new_tokens, *map(len, prompt.get("choices", ()))])
    if length + new > most:
        wanted = f"{length} tokens of prompt and {new} new ones"
        raise ValueError(f"{wanted} exceed the model's max_seq_len of {most}")


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, and then again as each module was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()  # FSDP cannot gather parameters in inference mode
def decode(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    prompts: Iterable[tuple[int, Prompt]],
    rules: Rules,
    batch_size: int,
    any_of: Callable[[bool], bool] = bool,
) -> Iterator[tuple[int, int, Answer]]:
    """Write answers to prompts, so many at a time: where one ends, the next one begins.

    Each prompt comes with its number, on which what is drawn depends. Processes that share a
    model's layers run them together: ``any_of`` tells each whether any of them has something to do.
    Yields the number of the prompt, that of the answer to it, and the answer, as they end.
    """
    waiting = iter(prompts)
    with evaluating(model):
        decoding = Decoding(model, tokenizer, rules, batch_size)
        is_busy = True
        while is_busy:
            decoding.fork()
            taken = decoding.take(waiting)
            if any_of(bool(taken)):
                decoding.read(taken) if taken else decoding.idle(reads=True)
                has_choices = any("choices" in prompt for _, prompt in taken)
                if any_of(has_choices):
                    decoding.score_choices(taken) if has_choices else decoding.idle(reads=False)
            decoding.fork()
            decoding.write_first_tokens()
            ended = decoding.take_ended()
            steps = any_of(bool(decoding.drafts))
            is_busy = steps or any_of(bool(ended))
            if decoding.drafts:
                decoding.step()
            elif steps:
                decoding.idle(reads=False)
            ended += decoding.take_ended()
            for draft in ended:
                yield draft.prompt.number, draft.answer_number, draft.answer()
