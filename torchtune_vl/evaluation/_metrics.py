"""The metrics by which answers are scored, each as its field computes it."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any, Literal

import numpy as np

from torchtune_vl.chat import ChatTransform
from torchtune_vl.evaluation._bootstrap import Scores
from torchtune_vl.evaluation._box_metrics import box_f1, box_iou, box_map, library

References = Sequence[str]  # texts of which each is a right answer
Takes = Literal["text", "boxes", "logprobs"]

# What says which choice it is, up to the end of its sentence
_STATEMENT = re.compile(r"\banswer\W{0,4}(?:is\b|:)[\s:*]*(.+?)(?=[.!?]\s|\n|$)", re.IGNORECASE)
_LETTER = re.compile(r"(?<![\w'’])(?<!\w\.)([A-Z])(?![\w'’])(?!-\w)")
# The whole text, or in front of a choice
_FIRST_LETTER = re.compile(r"\W*([A-Za-z])(?:\W*$|[).:]\s)")
# "A cat is here", "I see a cat", but not "A is right"
_WORD = re.compile(r"(?:(?<=[.!?:] )|^\W*)[AI](?= (?!(?:is|and|or|as|because|since)\b)[a-z…])")

# The official VQA evaluation's tables
_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_DIGITS = "zero one two three four five six seven eight nine ten"
_VQA_NUMBERS = {word: str(number) for number, word in enumerate(_VQA_DIGITS.split())}
_VQA_NUMBERS["none"] = "0"
_VQA_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
"""
# Each without one of its apostrophes, and one that goes the other way
_VQA_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _VQA_CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}

_CIDER_ORDERS = range(1, 5)
_CIDER_SIGMA = 6.0
_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))\b")


@dataclass(frozen=True)
class Metric:
    """A way to score answers.

    Args:
        name: by which a user asks for it.
        about: what it says, in one sentence.
        takes: whether answers are texts, and truths of each sample the texts of which each is
            right; or both are lists of boxes: entries with ``bbox_2d``, and perhaps ``label``; or
            answers are the logarithms of the probabilities of choices, by their texts, with truths
            that are texts.
        compute: from answers, truths, and choices if it needs these, to their scores.
        needs_choices: whether each sample has choices, of which the answer names one.
    """

    name: str
    about: str
    takes: Takes
    compute: Callable[..., Scores]
    needs_choices: bool = False

    def check_installed(self) -> None:
        """Raise ``ValueError`` if what it takes is not installed."""
        entry = [{"bbox_2d": [0, 0, 1, 1]}]
        pairs: dict[Takes, tuple[Any, Any]] = {
            "text": ("1", ["1"]),
            "boxes": (entry, entry),
            "logprobs": ({"1": 0.0}, ["1"]),
        }
        answers, truths = ([value] for value in pairs[self.takes])
        self.compute(answers, truths, *([[["1"]]] if self.needs_choices else []))

    def check_fits(self, transform: ChatTransform) -> None:
        """Raise ``ValueError`` if it is of choices, and answers begin with a reasoning instead."""
        if self.takes == "logprobs" and transform.writes_reasoning:
            problem = f"{self.name} needs answers without a reasoning, and the chat template asks"
            raise ValueError(f"{problem} for one: take a metric of answers, or another template")

    def scores(
        self,
        answers: Sequence[Any],
        truths: Sequence[Sequence[Any]],
        choices: Sequence[Sequence[str]] | None = None,
    ) -> Scores:
        """Score answers, one of each sample. A ``ValueError`` counts samples from 0."""
        if not answers:
            raise ValueError("there are no answers to score")
        columns = [answers, truths, *([choices or []] if self.needs_choices else [])]
        counts = [*map(len, columns)]
        if len({*counts}) > 1:
            needed = "answers, truths and choices" if self.needs_choices else "answers and truths"
            raise ValueError(f"{self.name} needs as many {needed}, not {counts}")
        for number, references in enumerate(() if self.takes == "boxes" else truths):
            if not references:
                raise ValueError(f"sample {number} has no truth")
        return self.compute(*columns)


def _best(score: Callable[[str, str], float]) -> Callable[..., Scores]:
    """Score each answer by the reference that fits best."""
    return partial(
        Scores.of_each, lambda answer, references: max(score(answer, text) for text in references)
    )


def _exact_match(answer: str, truth: str) -> float:
    """1 if the answer is a reference, but for white space around it, else 0."""
    return float(answer.strip() == truth.strip())


def _choice(answer: str, references: References, choices: Sequence[str]) -> float:
    """1 if the answer names the right choice, by letter or text, and no other, else 0.

    It may say the letter ("B", "(b)", "B."), the text, or both, alone or in a sentence. Where it
    says "answer is" or "answer:", what it names there counts.
    """
    right = [_chosen(text, choices) for text in references]
    if None in right:
        truth = references[right.index(None)]
        raise ValueError(f"truth {truth!r} names none of the choices {[*choices]}, or several")
    return float(_chosen(answer, choices) in right)


def _chosen(text: str, choices: Sequence[str]) -> int | None:
    choices = [" ".join(choice.split()).rstrip(". ").lower() for choice in choices]
    stated = (_named(said, choices) for said in _STATEMENT.findall(text))
    named = {*chain.from_iterable(stated)} or _named(text, choices)
    return named.pop() if len(named) == 1 and max(named) < len(choices) else None


def _named(text: str, choices: Sequence[str]) -> set[int]:
    """The numbers of the choices that a text names by letter or by text."""
    text = " ".join(text.split())
    for number, choice in enumerate(choices[:26]):
        if re.fullmatch(rf"\W*{chr(97 + number)}\W+{re.escape(choice)}\W*", text.lower()):
            return {number}
    found: set[str] = set()

    def take(match: re.Match[str]) -> str:
        found.add(match[0].lower())
        return match[0] if len(match[0]) == 1 else "…"  # which hides no letter of another choice

    longest_first = sorted(filter(None, choices), key=len, reverse=True)
    any_choice = "|".join(map(re.escape, longest_first)) or "(?!)"
    rest = re.sub(rf"(?<![\w-])(?<!\d[.,])(?:{any_choice})(?!\w|[.,]\d)", take, text, flags=re.I)
    letters = {ord(letter) - ord("A") for letter in _LETTER.findall(_WORD.sub("", rest))}
    named = {number for number in range(len(choices)) if number in letters}
    if first := _FIRST_LETTER.match(text):
        named.add(ord(first[1].upper()) - ord("A"))
    return named | {number for number, choice in enumerate(choices) if choice in found}


def _choice_likelihood(logprobs: Mapping[str, float], references: References) -> float:
    """1 if the right choice is the likeliest answer, else 0."""
    return float(max(logprobs, key=logprobs.__getitem__) in references)


def _choice_likelihood_norm(logprobs: Mapping[str, float], references: References) -> float:
    """1 if the right choice is the likeliest answer for its length in bytes, else 0."""
    lengths = {text: max(1, len(text.encode())) for text in logprobs}
    by_byte = {text: logprob / lengths[text] for text, logprob in logprobs.items()}
    return _choice_likelihood(by_byte, references)


def _vqa_accuracy(answer: str, references: References) -> float:
    """Accuracy of VQA v2: 1 if four of ten people gave the answer, else less, to 0.

    As the official script has it (Goyal et al. 2017, arXiv 1612.00837): each reference is left out
    once, for min(1, matches among the others / 3), and the mean is taken. As there, texts are
    normalised only where references differ: unanimous ones want an answer in their own letters. Of
    fewer than four references, of which no three are left, all others have to match; a single one
    has to be equal.
    """
    texts = [" ".join(re.split(r"[\n\t]", text)).strip() for text in (answer, *references)]
    if len({*texts[1:]}) > 1:
        texts = [*map(_vqa_form, texts)]
    matches = [text == texts[0] for text in texts[1:]]
    wanted = min(3, len(matches) - 1)
    if not wanted:
        return float(matches[0])
    return sum(min(1, (sum(matches) - match) / wanted) for match in matches) / len(matches)


def _vqa_form(text: str) -> str:
    """A text with the official script's punctuation, numbers, articles and contractions."""
    result, has_thousands = text, re.search(r"\d,\d", text)
    for mark in _VQA_MARKS:
        vanishes = has_thousands or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if vanishes else " ")
    words = re.sub(r"\.(?!\d)", "", result).lower().split()
    words = [_VQA_NUMBERS.get(word, word) for word in words]
    kept = (word for word in words if word not in ("a", "an", "the"))
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in kept)


def _anls(answer: str, truth: str) -> float:
    """ANLS of DocVQA: similarity of letters, of which less than 0.5 counts as 0, to 1.

    1 - normalised Levenshtein distance (Biten et al. 2019, arXiv 1905.13648), without regard to
    case and white space. 0.5 itself counts, as in DocVQA's official script; the paper has 0 there.
    """
    folded = (" ".join(text.lower().split()) for text in (answer, truth))
    similarity = _similarity(*folded)
    return similarity if similarity >= 0.5 else 0.0


def _edit_similarity(answer: str, truth: str) -> float:
    """1 less the Levenshtein distance as a share of the longer text, 0 to 1."""
    return _similarity(answer.strip(), truth.strip())


def _similarity(first: str, second: str) -> float:
    levenshtein = library("rapidfuzz.distance.Levenshtein")
    return 1 - float(levenshtein.normalized_distance(first, second))


def _relaxed_accuracy(answer: str, truth: str) -> float:
    """Accuracy of ChartQA: 1 for a number within 5 % or the same text, else 0.

    After arXiv 2203.10244, as in Pix2Struct's script, by which results are published: "5%" is
    0.05, "1,000" is no number, and 0 has to be written alike.
    """
    answer, truth = answer.strip(), truth.strip()
    number, expected = _number(answer), _number(truth)
    if number is not None and expected:
        return float(abs(number - expected) / abs(expected) <= 0.05)
    return float(answer.lower() == truth.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _json_f1(answer: str, truth: str) -> float:
    """F1 of the values of JSON, each with its path, 0 to 1; 0 if the answer is not JSON."""
    try:
        expected = {*_leaves(_parsed(truth))}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"truth {truth!r} is not JSON: {error}") from error
    try:
        found = {*_leaves(_parsed(answer))}
    except (ValueError, RecursionError):
        return 0.0
    return 2 * len(found & expected) / (len(found) + len(expected))


def _parsed(text: str) -> Any:
    """JSON, perhaps in a fence."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    fenced = re.search(r"```(?:json)?(.*?)```", text, re.DOTALL)
    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        if not fenced:
            raise
        return json.loads(fenced[1], parse_constant=refuse)


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path, type and value of what has nothing in it; 1 is the same as 1.0, and not as true."""
    if isinstance(value, dict | list) and value:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from _leaves(part, (*path, key))
    elif isinstance(value, dict | list):
        yield path, type(value), None
    else:
        yield path, float if type(value) is int else type(value), value


def _bleu(answers: Sequence[str], truths: Sequence[References]) -> Scores:
    """Corpus BLEU of sacrebleu, 0 to 100, in tokens 13a: 0 if no answer has four of them.

    A single sample is scored by the orders that it has, as sacrebleu advises.
    """
    bleu = library("sacrebleu.metrics").BLEU
    return _sacrebleu(bleu(), bleu(effective_order=True), answers, truths)


def _chrf(answers: Sequence[str], truths: Sequence[References]) -> Scores:
    """Corpus chrF2 of sacrebleu, by letters, 0 to 100."""
    chrf = library("sacrebleu.metrics").CHRF()
    return _sacrebleu(chrf, chrf, answers, truths)


def _sacrebleu(
    of_all: Any, of_one: Any, answers: Sequence[str], truths: Sequence[References]
) -> Scores:
    """Scores by metrics of sacrebleu (Post 2018, arXiv 1804.08771) from the sums of counts."""
    # As its own bootstrap does; its public methods would count anew in each resample
    counts = np.array(of_all._extract_corpus_statistics(answers, [*zip_longest(*truths)]))

    def score(metric: Any, summed: Any) -> float:
        return float(metric._compute_score_from_stats(summed.tolist()).score)

    samples = [score(of_one, row) for row in counts]
    return Scores(samples, lambda draw: score(of_all, counts[draw].sum(0)))


@dataclass(frozen=True)
class _Weighted:
    """N-grams of a text: by order weights and their norm, and how many of two words."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    length: int


def _cider(answers: Sequence[str], truths: Sequence[References]) -> Scores:
    """CIDEr-D of captions, 0 to 10, where 1 is what papers call 100.

    As the script of COCO captions computes it (Vedantam et al. 2015, arXiv 1411.5726). An n-gram
    weighs the less the more samples have it in their references: all samples, whichever a total is
    of, and of a single one nothing weighs. The script's tokenizer needs Java; of captions as
    usually written, :func:`_words` makes the same tokens.
    """
    num_samples = len(truths)
    counted = [[_ngrams(text) for text in references] for references in truths]
    frequency = Counter(chain.from_iterable({*chain(*texts)} for texts in counted))

    def weigh(counts: Counter[tuple[str, ...]]) -> _Weighted:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in _CIDER_ORDERS]
        for ngram, count in counts.items():
            rarity = math.log(num_samples / max(1, frequency[ngram]))
            weights[len(ngram) - 1][ngram] = count * rarity
        norms = [math.hypot(*by_order.values()) for by_order in weights]
        return _Weighted(weights, norms, sum(counts[ngram] for ngram in weights[1]))

    def score(answer: str, texts: Sequence[Counter[tuple[str, ...]]]) -> float:
        written = weigh(_ngrams(answer))
        return 10 * sum(_cider_similarity(written, weigh(text)) for text in texts) / len(texts)

    return Scores.of_each(score, answers, counted)


def _cider_similarity(answer: _Weighted, reference: _Weighted) -> float:
    """The mean of the orders' cosines, where no n-gram counts more often than in the reference."""
    total = 0.0
    for order, (ours, theirs) in enumerate(zip(answer.weights, reference.weights, strict=True)):
        shared = ((ours[ngram], theirs[ngram]) for ngram in ours if ngram in theirs)
        product = sum(min(pair) * pair[1] for pair in shared)
        if product:
            total += product / (answer.norms[order] * reference.norms[order])
    difference = answer.length - reference.length
    return total / len(_CIDER_ORDERS) * math.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = _words(text)
    return Counter(
        tuple(words[start : start + order])
        for order in _CIDER_ORDERS
        for start in range(len(words) - order + 1)
    )


def _words(text: str) -> list[str]:
    """Words in small letters, without the punctuation around them, contractions apart."""
    words = (
        word.strip(".,:;?!'\"`“”‘()[]{}…–—-") for word in text.lower().replace("’", "'").split()
    )
    return _CONTRACTION.sub(r" \1", " ".join(words)).split()


def _entry(name: str, rule: Callable[..., Any], compute: Callable[..., Scores]) -> Metric:
    about = (rule.__doc__ or "").partition("\n")[0]
    takes: Takes = "boxes" if name.startswith("box") else "text"
    takes = "logprobs" if name.startswith("choice_likelihood") else takes
    return Metric(name, about, takes, compute, needs_choices=rule is _choice)


# What each says of itself is the first line of its docstring
METRICS = {
    metric.name: metric
    for metric in (
        _entry("exact_match", _exact_match, _best(_exact_match)),
        _entry("choice", _choice, partial(Scores.of_each, _choice)),
        *(
            _entry(rule.__name__.lstrip("_"), rule, partial(Scores.of_each, rule))
            for rule in (_choice_likelihood, _choice_likelihood_norm)
        ),
        _entry("vqa_accuracy", _vqa_accuracy, partial(Scores.of_each, _vqa_accuracy)),
        _entry("anls", _anls, _best(_anls)),
        _entry("relaxed_accuracy", _relaxed_accuracy, _best(_relaxed_accuracy)),
        _entry("bleu", _bleu, _bleu),
        _entry("chrf", _chrf, _chrf),
        _entry("cider", _cider, _cider),
        _entry("edit_similarity", _edit_similarity, _best(_edit_similarity)),
        _entry("json_f1", _json_f1, _best(_json_f1)),
        _entry("box_iou", box_iou, box_iou),
        _entry("box_f1@0.5", box_f1, partial(box_f1, 0.5)),
        _entry("box_f1@0.75", box_f1, partial(box_f1, 0.75)),
        _entry("box_map", box_map, box_map),
    )
}
