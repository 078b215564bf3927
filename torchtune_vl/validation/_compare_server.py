"""Compares a server's answers to conversations with ours, and what it makes of their prompts."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import torch

from torchtune_vl.data._collate import join_media
from torchtune_vl.generation import Answer, Rules, decode, load_model
from torchtune_vl.generation._decoding import check_room
from torchtune_vl.validation._compare import Comparison, compare, unreadable
from torchtune_vl.validation._compare_models import MARGIN
from torchtune_vl.validation._inputs import Conversation
from torchtune_vl.validation._ours_and_reference import attempt, failed
from torchtune_vl.validation._report import Case, number
from torchtune_vl.validation._server import Served, Server

ROWS = ("served prompts", "served answers", "served logprobs")
# Requests that are under way, and answers of ours that are written, at a time
_AT_A_TIME = 8
PEER = "the server"


@dataclass(frozen=True)
class ServerComparison:
    """What a server is asked.

    Args:
        url: its address, such as http://localhost:8000.
        model: what it calls the model or adapter; None is the first that it lists.
        adapter: directory of the adapter that it serves with the checkpoint, if it does.
        max_new_tokens: the most tokens of an answer.
    """

    url: str
    model: str | None = None
    adapter: Path | None = None
    max_new_tokens: int = 32

    @cached_property
    def server(self) -> Server:
        """The server, whose model is asked for once."""
        return Server(self.url, self.model)


@dataclass
class _Pair:
    """Our answer to a conversation and the server's, up to where they differ.

    ``agreeing`` is the number of equal tokens from the first on, ``logprobs`` are those of our
    tokens when prompt and answer are read at once, ``summing`` is by how much a softmax in float32
    misses one of them, and ``gap`` by how much our token is likelier where they differ.
    """

    name: str
    has_video: bool
    ours: Answer
    served: Served
    agreeing: int
    logprobs: list[float]
    summing: float
    gap: float


def compare_server(
    run: Comparison, chats: Sequence[Conversation], how: ServerComparison | None, dtype: torch.dtype
) -> None:
    """Compare ids of prompts, greedy answers and their log-probabilities.

    Without a server, the report has none of these rows.
    """
    if how is None:
        for name in ROWS:
            del run.rows[name]
        return
    skipped = unreadable("vocabulary and image settings", run.ours.served_transform)
    if run.skip(skipped, *ROWS):
        return
    prompts_row, answers_row, _ = (run.rows[name] for name in ROWS)
    load = partial(load_model, run.ours.directory, adapter=how.adapter, dtype=dtype)
    model = attempt(load)
    if failed(model):
        answers_row.add(compare("our model", model, [], must_read=True, peer=PEER))
        run.skip("our model does not load", ROWS[0], ROWS[2])
        return
    transform = run.ours.served_transform
    asked = [question for chat in chats if (question := _question(chat)) is not None]

    def read(chat: Conversation) -> Any:
        prompt = transform.to_answer(chat.sample)
        check_room(model, prompt, how.max_new_tokens)
        return prompt

    prompts = [attempt(read, chat) for chat in asked]
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        answer = partial(how.server.answer, max_new_tokens=how.max_new_tokens)
        replies = threads.map(partial(attempt, answer), asked)
        ours = _answers(model, transform, prompts, how.max_new_tokens)
        pairs = []
        each = zip(run.track(asked, "served answers"), prompts, replies, strict=True)
        for i, (chat, prompt, served) in enumerate(each):
            if (case := _compare_prompt(chat.name, prompt, served, transform)) is not None:
                prompts_row.add(case)
            if not failed(prompt, served):
                named = chat.name, bool(chat.values("video"))
                pairs.append(_pair(named, model, prompt, ours[i], served))
    if not prompts_row.cases:
        run.skip("the server tells neither ids nor their number", prompts_row.name)
    left = len(chats) - len(asked)
    unasked = "Not compared, for they ask nothing, or cannot be read"
    notes = [f"{unasked}: {left}"] if left else []
    if _keeps_pair_around_steps(pairs, transform):
        notes.append(
            "The server leaves a pair of <|vision_start|> and <|vision_end|> around each video, "
            "whose steps have their own, which the weights have not learned: serve a chat template "
            "that has <|video_pad|> alone"
        )
    prompts_row.note = ". ".join(notes)
    _judge(run, pairs, transform)


def _question(chat: Conversation) -> Conversation | None:
    """A conversation without the answer at its end; None if it asks nothing, or cannot be read."""
    messages, given = [*chat.messages], [*chat.sample.get("messages", [])]
    if chat.problem or len(messages) != len(given):
        return None
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
        given.pop()
    if not messages:
        return None
    kept = replace(chat, messages=messages, sample={**chat.sample, "messages": given})
    # Media that stand beside the messages count them by their placeholders
    for kind in ("image", "video"):
        if len(kept.values(kind)) != len(chat.values(kind)):
            return None
    return kept


def _answers(
    model: Any, transform: Any, prompts: Sequence[Any], max_new_tokens: int
) -> dict[int, Answer]:
    readable = [(i, prompt) for i, prompt in enumerate(prompts) if not failed(prompt)]
    answered = decode(model, transform, readable, Rules(max_new_tokens), _AT_A_TIME)
    return {i: answer for i, _, answer in answered}


def _compare_prompt(name: str, prompt: Any, served: Any, transform: Any) -> Case | None:
    ours, theirs = attempt(lambda p: p["tokens"], prompt), attempt(lambda s: s.prompt, served)
    if theirs is None:  # it tells no more than their number, or not that
        if served.prompt_length is None:
            return None
        ours, theirs = attempt(lambda p: [len(p["tokens"])], prompt), [served.prompt_length]
    return compare(name, ours, theirs, text_of=lambda t: transform.decode([t]), peer=PEER)


def _keeps_pair_around_steps(pairs: Sequence[_Pair], transform: Any) -> bool:
    """Whether prompts of the server have a pair of tokens around others, and end two at once."""
    ends = (transform.vision_end_id,) * 2
    prompts = [pair.served.prompt or () for pair in pairs if transform.has_timed_steps]
    return any(ends in pairwise(prompt) for prompt in prompts)


@torch.no_grad()
def _pair(
    named: tuple[str, bool], model: Any, prompt: dict[str, Any], ours: Answer, served: Served
) -> _Pair:
    logits_TV = _logits_at_once(model, prompt, ours.tokens)
    chosen_T1 = torch.tensor(ours.tokens)[:, None]
    # A sum over the vocabulary in float32 has an error that servers have, too
    logprobs_TV = logits_TV.double().log_softmax(-1)
    exact_T1 = logprobs_TV.gather(1, chosen_T1)
    summing = float((logits_TV.log_softmax(-1).gather(1, chosen_T1) - exact_T1).abs().max())
    of_ours = exact_T1[:, 0].tolist()
    theirs, gap = served.tokens, math.inf
    if theirs is None:  # texts alone tell not where tokens differ
        return _Pair(*named, ours, served, len(ours.tokens), of_ours, summing, gap)
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(ours.tokens, theirs, strict=False))
    agreeing = len([*equal])
    ends = agreeing >= min(len(ours.tokens), len(theirs))  # one is the beginning of the other
    if not ends and theirs[agreeing] < logprobs_TV.shape[1]:
        gap = of_ours[agreeing] - float(logprobs_TV[agreeing, theirs[agreeing]])
    return _Pair(*named, ours, served, agreeing, of_ours, summing, gap)


def _logits_at_once(model: Any, prompt: dict[str, Any], answer: Sequence[int]) -> torch.Tensor:
    """Compute the logits of each token of an answer by reading it with its prompt: [T, V]."""
    length, more = len(prompt["tokens"]), len(answer) - 1
    tokens = torch.tensor([[*prompt["tokens"], *answer[:more]]])
    behind = prompt["input_pos"].max() + 1 + torch.arange(more)
    input_pos = torch.cat([prompt["input_pos"], behind[:, None].expand(-1, 3)])
    places = torch.arange(length - 1, length + more)
    inputs = {"input_pos": input_pos[None], "output_positions": places, **join_media([prompt])}
    return model(tokens, **inputs)


def _judge(run: Comparison, pairs: Sequence[_Pair], transform: Any) -> None:
    """Enter answers and log-probabilities, with the rounding of this run as their tolerance."""
    _, answers_row, logprobs_row = (run.rows[name] for name in ROWS)
    differences = [
        abs(a - b) for pair in pairs for a, b in zip(pair.ours.logprobs, pair.logprobs, strict=True)
    ]
    spread = max(differences, default=0.0)
    rounding = MARGIN * max(spread, torch.finfo(torch.float32).eps)
    summing = max((pair.summing for pair in pairs), default=0.0)
    logprobs_row.note = (
        f"Passes up to {number(rounding + summing)}: {MARGIN} times the difference between our own "
        f"answers, written token by token, and read at once, which was {number(spread)} in this "
        f"run, and {number(summing)}, by which a softmax in float32 misses"
    )
    for pair in pairs:
        case = _compare_answer(pair, transform)
        if case.failed and pair.gap <= 2 * rounding:
            case.failed = False
            case.detail = f"as good as equal, {number(pair.gap)} apart, at {pair.agreeing}"
        answers_row.add(case)
        if pair.agreeing and pair.served.logprobs is not None and pair.served.tokens is not None:
            ours, theirs = pair.ours.logprobs, pair.served.logprobs
            sides = (torch.tensor(side[: pair.agreeing]) for side in (ours, theirs))
            logprobs_row.add(compare(pair.name, *sides, tolerance=rounding + summing, peer=PEER))
    wrong = {case.name for row in (answers_row, logprobs_row) for case in row.failed}
    all_videos = all(pair.has_video for pair in pairs if pair.name in wrong)
    if wrong and all_videos and not _keeps_pair_around_steps(pairs, transform):
        answers_row.note = (
            "All that differ have videos: servers may take other frames of them than "
            "qwen-vl-utils, as many but at other places"
        )
    if not pairs:
        run.skip("nothing was answered by both sides", answers_row.name, logprobs_row.name)
    elif not logprobs_row.cases:
        run.skip("the server tells none of tokens that agree", logprobs_row.name)


def _compare_answer(pair: _Pair, transform: Any) -> Case:
    if pair.served.tokens is None:
        return compare(pair.name, [pair.ours.text], [pair.served.text], peer=PEER)
    # Servers tell the token that ended an answer, or not
    stops = transform.stop_tokens
    sides = [pair.ours.tokens, pair.served.tokens]
    a, b = (side[:-1] if side and side[-1] in stops else side for side in sides)
    return compare(pair.name, a, b, text_of=lambda t: transform.decode([t]), peer=PEER)
