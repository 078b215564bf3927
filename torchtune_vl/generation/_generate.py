"""Answers to conversations."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from torchtune_vl.chat import ChatTransform
from torchtune_vl.generation._decoding import Answer, Rules, decode
from torchtune_vl.generation._sampling import Sampling
from torchtune_vl.modules.vision import VisionLanguageModel

# How many answers are written at a time: more take more memory, and share the reading of weights
BATCH_SIZE = 16
Conversation = Sequence[Mapping[str, Any]] | Mapping[str, Any]
_A = TypeVar("_A")
_B = TypeVar("_B")


def generate(
    model: VisionLanguageModel,
    transform: ChatTransform,
    conversations: Iterable[Conversation],
    *,
    max_new_tokens: int,
    num_answers: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> list[Answer]:
    """Answer conversations.

    What an answer is depends on its conversation, its place among all of them and the settings
    alone, but for rounding, which depends on what else is decoded at the time.

    Args:
        model: on any device, of any dtype. It may be in training, and is left so.
        transform: of the model's family.
        conversations: lists of messages as :class:`~torchtune_vl.chat.ChatTransform` takes them, or
            whole samples, which have ``messages`` and perhaps ``tools``, ``images`` and ``videos``.
            An answer that is begun, by a last message of the assistant, is gone on with.
        max_new_tokens: the most tokens of an answer.
        num_answers: answers to each conversation, which is read once.
        temperature: as of :class:`~torchtune_vl.generation.Sampling`, with what follows; by default
            the likeliest token is taken.
        top_k: draws from so many of the likeliest tokens.
        top_p: draws from the likeliest tokens with so much of the probability.
        min_p: draws from tokens with so much of the likeliest one's probability.
        repetition_penalty: makes tokens that occurred less likely.
        stop: texts that end an answer, beside the stop tokens of the transform.
        seed: of what is drawn.
        batch_size: the most answers at a time. Where one ends the next begins.

    Returns:
        The answers in the order of the conversations, those to one of them side by side.

    Raises:
        ValueError: as the transform does, if a setting makes no sense, or if a conversation leaves
            no room for an answer in the model's ``max_seq_len``.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    rules = Rules(max_new_tokens, sampling, stop, seed, num_answers)
    prompts = ahead(lambda conversation: prompt_of(transform, conversation), conversations)
    answered = decode(model, transform, enumerate(prompts), rules, batch_size)
    found = sorted(answered, key=lambda numbered: numbered[:2])
    return [answer for _, _, answer in found]


def prompt_of(transform: ChatTransform, conversation: Conversation) -> dict[str, Any]:
    """Transform a conversation to what a model answers."""
    if isinstance(conversation, Mapping):
        return transform.to_answer(conversation)
    return transform.to_answer({"messages": conversation})


def ahead(convert: Callable[[_A], _B], items: Iterable[_A], by: int = BATCH_SIZE) -> Iterator[_B]:
    """Convert items in another thread, some before they are asked for."""
    # One: what it calls releases Python's lock, and a processor is enough for what a model reads
    with ThreadPoolExecutor(1, "prompts") as thread:
        waiting: deque[Future[_B]] = deque()
        try:
            for item in items:
                waiting.append(thread.submit(convert, item))
                if len(waiting) > by:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
