"""Samples that are longer than ``max_seq_len``: what goes, never a part of a medium."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from torchtune_vl.chat._messages import EncodedTurn
from torchtune_vl.chat._prompt import Prompt

Truncation = Literal["right", "left", "turns"]
# By what a medium takes fewer tokens
_MAKES_SMALLER = {
    "image": "max_pixels",
    "video": "fps, max_frames or video_max_pixels (of one video nframes or max_pixels)",
}


def remedy(whole: Prompt, limit: int) -> str:
    """Tell by what a prompt would come within a limit."""
    kinds = {medium.kind for medium in whole.media.values()}
    smaller = [f"lower {_MAKES_SMALLER[kind]}, " for kind in sorted(kinds)]
    return f"raise max_seq_len (now {limit}), {''.join(smaller)}or shorten the sample"


def truncate(
    whole: Prompt,
    limit: int,
    truncation: Truncation,
    turns: Sequence[EncodedTurn],
    build: Callable[[Sequence[EncodedTurn]], Prompt],
) -> Prompt:
    """Cut a prompt of turns that is longer than a limit, ``build`` making one of fewer turns.

    Its "right" or "left" end goes, or the oldest whole "turns", each a user's message with what
    follows it, but never the system's and never the last, which alone may still be too long.
    """
    length = len(whole.tokens)
    if truncation != "turns":
        cut = limit if truncation == "right" else length - limit
        for start, medium in whole.media.items():
            stop = start + medium.num_tokens + 2
            if start < cut < stop:
                cut = start if truncation == "right" else stop
        return whole.part(0, cut) if truncation == "right" else whole.part(cut, length)
    first = int(turns[0].role == "system")
    starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > first] or [first]

    def after(count: int) -> Prompt:
        return build([*turns[:first], *turns[starts[count] :]])

    # As few as necessary; the last one stays
    counts = range(len(starts) - 1)
    return after(bisect_left(counts, True, key=lambda count: len(after(count).tokens) <= limit))


def difference(whole: Prompt, part: Prompt) -> dict[str, int]:
    """Count the ``tokens``, ``images`` and ``videos`` that a part of a prompt lacks."""
    counts = [Counter(f"{m.kind}s" for m in p.media.values()) for p in (whole, part)]
    media = {kind: counts[0][kind] - counts[1][kind] for kind in ("images", "videos")}
    return {"tokens": len(whole.tokens) - len(part.tokens), **media}
