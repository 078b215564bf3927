"""The choice of the next token, by the rules of transformers' logits processors."""

# Shape suffixes: B sequences, V vocabulary

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    The rules apply in the order of transformers, that of the arguments but for ``temperature``,
    which follows ``repetition_penalty``.

    Args:
        temperature: 0 takes the likeliest token, more makes unlikely ones likelier.
        top_k: only so many of the likeliest tokens are drawn from.
        top_p: only the likeliest tokens are drawn from that together have this probability.
        min_p: only tokens are drawn from that have this part of the likeliest one's probability.
        repetition_penalty: what logits of tokens of the prompt and of the answer so far are divided
            by, or multiplied with where they are negative; also where the likeliest is taken.

    ``ValueError`` if a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (is_right, expected) in check.items():
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)}: make it {expected}")
        for name in ("top_k", "top_p", "min_p"):
            if getattr(self, name) is not None and not self.draws:
                raise ValueError(f"{name} is of what is drawn, and nothing is: set temperature")

    @property
    def draws(self) -> bool:
        """Whether chance decides."""
        return self.temperature > 0

    def scores(self, logits_BV: torch.Tensor, seen_BV: torch.Tensor | None) -> torch.Tensor:
        """Apply the rules to logits, float32 [B, V]: what is never chosen becomes -inf.

        ``seen_BV``, bool, are the tokens that occurred; it is there if they are to be penalized.
        """
        scores = logits_BV
        if seen_BV is not None:
            factor = self.repetition_penalty
            penalized = torch.where(scores < 0, scores * factor, scores / factor)
            scores = torch.where(seen_BV, penalized, scores)
        if not self.draws:
            return scores
        scores = scores / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p is not None:
            ascending, order = scores.sort()
            is_left_out = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            is_left_out[:, -1] = False
            scores = scores.masked_fill(is_left_out.scatter(1, order, is_left_out), -torch.inf)
        if self.min_p is not None:
            probabilities = scores.softmax(-1)
            best = probabilities.amax(-1, keepdim=True)
            scores = scores.masked_fill(probabilities < self.min_p * best, -torch.inf)
        return scores

    def choose(self, scores_BV: torch.Tensor, noise_BV: torch.Tensor | None) -> torch.Tensor:
        """Choose a token of each sequence, int64 [B], by numbers that are drawn from Exp(1).

        The probability of each divided by its number is largest for the one that is chosen, which
        happens as often as its probability says, and hardly depends on rounding. Without numbers
        it is the likeliest.
        """
        return (scores_BV if noise_BV is None else scores_BV - noise_BV.log()).argmax(-1)
