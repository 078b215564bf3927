"""Samples that are longer than ``max_seq_len``: what goes, never a part of a medium."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal

from torchtune_vl.chat._prompt import Prompt
from torchtune_vl.chat._template import EncodedTurn

Truncation = Literal["right", "left", "turns"]

# By what a medium takes fewer tokens
_MAKES_SMALLER = {
    "image": "max_pixels",
    "video": "fps, max_frames or video_max_pixels (of one video nframes or max_pixels)",
}


def remedy(whole: Prompt, limit: int) -> str:
    """Tell by what a prompt would come within a limit."""
    kinds = {placed.medium.kind for placed in whole.media}
    smaller = [f"lower {_MAKES_SMALLER[kind]}, " for kind in sorted(kinds)]
    return f"raise max_seq_len (now {limit}), {''.join(smaller)}or shorten the sample"


def truncate(
    whole: Prompt,
    limit: int,
    truncation: Truncation,
    turns: Sequence[EncodedTurn],
    build: Callable[[Sequence[EncodedTurn]], Prompt],
) -> Prompt:
    """Cut a prompt that is longer than a limit.

    Args:
        whole: the prompt.
        limit: most tokens.
        truncation: what goes: its "right" or "left" end, or the oldest whole "turns", each a
            user's message with what follows it, but never the system's and never the last.
        turns: what it was built of.
        build: makes a prompt of turns.

    Returns:
        What is left of it; it may still be too long where its last turn alone is.
    """
    length = len(whole.tokens)
    if truncation == "turns":
        return _drop_turns(turns, build, limit)
    if truncation == "right":
        stop = min((m.start for m in whole.media if m.start < limit < m.stop), default=limit)
        return whole.part(0, stop)
    cut = length - limit
    start = max((m.stop for m in whole.media if m.start < cut < m.stop), default=cut)
    return whole.part(start, length)


def _drop_turns(
    turns: Sequence[EncodedTurn], build: Callable[[Sequence[EncodedTurn]], Prompt], limit: int
) -> Prompt:
    """Drop as few of the oldest exchanges as necessary, the last one stays."""
    system = list(turns[:1]) if turns[0].role == "system" else []
    starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > len(system)]

    def after(count: int) -> Prompt:
        first = starts[count] if starts else len(system)
        return build([*system, *turns[first:]])

    counts = range(max(len(starts) - 1, 0))
    return after(bisect_left(counts, True, key=lambda count: len(after(count).tokens) <= limit))


def difference(whole: Prompt, part: Prompt) -> dict[str, int]:
    """Count the ``tokens``, ``images`` and ``videos`` that a part of a prompt lacks."""
    lost = {"tokens": len(whole.tokens) - len(part.tokens)}
    for kind in ("image", "video"):
        counts = [sum(m.medium.kind == kind for m in p.media) for p in (whole, part)]
        lost[f"{kind}s"] = counts[0] - counts[1]
    return lost
