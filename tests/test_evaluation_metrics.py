"""Metrics beside the scripts that define them, or their rules written down a second time."""

import contextlib
import io
import itertools
import json
import math
import random
import re
import statistics
import sys

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sacrebleu.metrics import BLEU, CHRF

from torchtune_vl.evaluation import METRICS, Scores, compare, interval
from torchtune_vl.evaluation._metrics import _words

CASES = 200
NEAR = 1e-9
# Pieces of texts: what people write, and what breaks parsers
WRITTEN = """
yes no Yes cat cats the The a an A two ten none 2 10 1,000 1000 5% 0.05 -3 +3 3.5 0 0.0 1e3 nan inf
dont don't cant couldn'tve couldnt've lets let's somebody'd 'ow'sat ow's'at id've yall'll
on/off t-shirt (red) [x] {y} "quoted" why? wow! U.S. end. a,b ; : / - _ @home x=y 白猫 naïve café 🙂
"""
PIECES = WRITTEN.split()
SPACES = [" ", " ", " ", "  ", "\n", "\t", "", ", ", ". "]


def some_text(chance: random.Random) -> str:
    pieces = (chance.choice(PIECES) + chance.choice(SPACES) for _ in range(chance.randint(0, 12)))
    return "".join(pieces)


def like(text: str, chance: random.Random) -> str:
    """The same text, or nearly, or another."""
    changes = (
        lambda: text,
        text.upper,
        lambda: f" {text}\n",
        lambda: text[: chance.randint(0, len(text))],
        lambda: text + chance.choice(PIECES),
        lambda: "".join(letter for letter in text if chance.random() > 0.1),
        lambda: some_text(chance),
        lambda: "",
    )
    return chance.choice(changes)()


def some_texts(seed: int, most: int, least: int = 1) -> tuple[list[str], list[list[str]]]:
    """Answers, and the references of each."""
    chance = random.Random(seed)
    answers, truths = [], []
    for _ in range(CASES):
        truth = some_text(chance)
        count = chance.randint(least, most)
        truths.append([truth, *(like(truth, chance) for _ in range(count - 1))])
        chance.shuffle(truths[-1])
        answers.append(like(truth, chance))
    return answers, truths


def draws(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(count, size=count) for _ in range(10)]


def check_each(name: str, rule, answers: list, truths: list) -> None:
    """A metric of single samples beside a rule, and its totals beside their means."""
    expected = [float(rule(answer, truth)) for answer, truth in zip(answers, truths, strict=True)]
    scores = METRICS[name].scores(answers, truths)
    assert scores.samples == pytest.approx(expected, abs=NEAR)
    assert 0 < scores.total < 1  # the cases hold both kinds
    assert scores.total == pytest.approx(statistics.fmean(expected), abs=NEAR)
    for draw in draws(len(answers)):
        mean = statistics.fmean(expected[i] for i in draw)
        assert scores.total_of(draw) == pytest.approx(mean, abs=NEAR)


def one(name: str, answer, truths, choices=None) -> float:
    (score,) = METRICS[name].scores([answer], [truths], choices and [choices]).samples
    return score


@pytest.mark.parametrize(("option", "name"), [(BLEU, "bleu"), (CHRF, "chrf")])
def test_sacrebleu(option, name):
    answers, truths = some_texts(1, most=3)
    scores = METRICS[name].scores(answers, truths)

    def expected(numbers) -> float:
        columns = [*itertools.zip_longest(*(truths[i] for i in numbers))]
        return option().corpus_score([answers[i] for i in numbers], columns).score

    assert scores.total == pytest.approx(expected(range(CASES)), abs=NEAR)
    assert 20 < scores.total < 95
    for draw in draws(CASES):
        assert scores.total_of(draw) == pytest.approx(expected(draw), abs=NEAR)
    single = BLEU(effective_order=True) if option is BLEU else CHRF()
    each = [single.sentence_score(a, t).score for a, t in zip(answers, truths, strict=True)]
    assert scores.samples == pytest.approx(each, abs=NEAR)


def test_cider():
    answers, truths = some_texts(2, most=5)
    written = {i: [" ".join(_words(answer))] for i, answer in enumerate(answers)}
    references = {i: [" ".join(_words(t)) for t in texts] for i, texts in enumerate(truths)}
    total, each = Cider().compute_score(references, written)
    scores = METRICS["cider"].scores(answers, truths)
    assert scores.samples == pytest.approx(each.tolist(), abs=NEAR)
    assert scores.total == pytest.approx(total, abs=NEAR)
    assert total > 1
    # Whatever is drawn, n-grams weigh as in the whole set
    for draw in draws(CASES):
        assert scores.total_of(draw) == pytest.approx(each[draw].mean(), abs=NEAR)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    # What PTBTokenizer of pycocoevalcap 1.2 makes of them
    [
        (
            "A man's dog doesn't like the cat, it runs away.",
            "a man 's dog does n't like the cat it runs away",
        ),
        (
            "Two people riding black-and-white horses on a beach!",
            "two people riding black-and-white horses on a beach",
        ),
        ("The dogs' bowls (red/blue) are empty: 3-4", "the dogs bowls red/blue are empty 3-4"),
        ("It's an 8-year-old; I'd say she'll be", "it 's an 8-year-old i 'd say she 'll be"),
        ("don’t use “smart” quotes – or dashes", None),
    ],
)
def test_words_of_captions(caption, tokens):
    # The script keeps the two quotes as `` and '', of which it removes the latter
    assert _words(caption) == (tokens or "do n't use smart quotes or dashes").split()


# Of the official table some of each kind; PIECES has no others
CONTRACTIONS = {
    "dont": "don't",
    "cant": "can't",
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "'ow'sat": "'ow's'at",
    "ow's'at": "'ow's'at",
    "yall'll": "y'all'll",
}
NUMBERS = {"none": "0", "two": "2", "ten": "10"}


def vqa_rule(answer: str, references: list[str]) -> float:
    """vqaEval.py of GT-Vision-Lab/VQA at a013f00."""

    def flat(text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    def plain(text: str) -> str:
        out = text
        for mark in [*';/[]"{}()=+\\_-><@`,?!']:
            if mark + " " in text or " " + mark in text or re.search(r"(\d)(\,)(\d)", text):
                out = out.replace(mark, "")
            else:
                out = out.replace(mark, " ")
        out = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, 32)
        words = []
        for word in out.lower().split():
            word = NUMBERS.get(word, word)
            if word not in ["a", "an", "the"]:
                words.append(word)
        return " ".join(CONTRACTIONS.get(word, word) for word in words)

    answer, references = flat(answer), [flat(text) for text in references]
    if len(set(references)) > 1:
        answer, references = plain(answer), [plain(text) for text in references]
    accuracies = []
    for left_out in range(len(references)):
        others = references[:left_out] + references[left_out + 1 :]
        accuracies.append(min(1, others.count(answer) / 3))
    return sum(accuracies) / len(accuracies)


def test_vqa_accuracy():
    answers, truths = some_texts(3, least=4, most=10)
    check_each("vqa_accuracy", vqa_rule, answers, truths)


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Two.", ["2"] * 9 + ["3"], 1),
        ("yes", ["Yes"] * 10, 0),  # unanimous references are taken at their letters
        ("1000", ["1,000"] * 9 + ["2"], 1),
        ("2", ["2"] * 3 + ["3"] * 7, 0.9),
        ("cat", ["cat"], 1),
        ("The cat", ["a cat", "dog"], 0.5),
        ("cat", ["cat", "cat"], 1),
        ("cat", ["cat", "cat", "dog"], (0.5 + 0.5 + 1) / 3),
    ],
)
def test_vqa_accuracy_of(answer, references, expected):
    assert one("vqa_accuracy", answer, references) == pytest.approx(expected, abs=NEAR)


def levenshtein(first: str, second: str) -> int:
    row = [*range(len(second) + 1)]
    for i, letter in enumerate(first):
        following = [i + 1]
        for j, other in enumerate(second):
            cost = min(row[j] + (letter != other), row[j + 1] + 1, following[j] + 1)
            following.append(cost)
        row = following
    return row[-1]


def test_anls():
    """The script of DocVQA's challenge, but for lengths, which there count white space twice."""

    def rule(answer: str, references: list[str]) -> float:
        values = []
        for reference in references:
            a, b = (" ".join(text.strip().lower().split()) for text in (answer, reference))
            length = max(len(a), len(b))
            values.append(levenshtein(a, b) / length if length else 0.0)
        result = 1 - min(values)
        return 0 if result < 0.5 else result

    check_each("anls", rule, *some_texts(4, most=3))
    assert one("anls", "abcd", ["abxy"]) == 0.5
    assert one("anls", "abcd", ["axyz"]) == 0


def test_edit_similarity():
    def rule(answer: str, references: list[str]) -> float:
        answer, references = answer.strip(), [text.strip() for text in references]
        return max(1 - levenshtein(answer, t) / max(len(answer), len(t), 1) for t in references)

    check_each("edit_similarity", rule, *some_texts(5, most=2))


def test_exact_match():
    answers, truths = some_texts(6, most=3)
    check_each("exact_match", lambda a, t: a.strip() in [x.strip() for x in t], answers, truths)


def test_relaxed_accuracy():
    """relaxed_correctness of google-research/pix2struct, of texts without white space around."""

    def to_float(text: str) -> float | None:
        try:
            if text.endswith("%"):
                return float(text.rstrip("%")) / 100.0
            return float(text)
        except ValueError:
            return None

    def rule(answer: str, references: list[str]) -> float:
        prediction, target = answer.strip(), references[0].strip()
        prediction_float, target_float = to_float(prediction), to_float(target)
        if prediction_float is not None and target_float:
            return abs(prediction_float - target_float) / abs(target_float) <= 0.05
        return prediction.lower() == target.lower()

    chance = random.Random(7)
    numbers = [
        "100",
        "104.9",
        "105",
        "95",
        "94.9",
        "1,000",
        "1000",
        "5%",
        "0.05",
        "5",
        "-3",
        "-3.1",
    ]
    numbers += ["0", "0.0", "", "nan", "inf", "Yes", "yes", "%", "5%%", "1e2", "١٠٠", "½", " 100 "]
    answers, truths = zip(*itertools.product(numbers, numbers), strict=True)
    assert len(answers) > CASES
    check_each("relaxed_accuracy", rule, [*answers], [[truth] for truth in truths])
    assert one("relaxed_accuracy", chance.choice(["95", "105"]), ["7", "100"]) == 1


PETS = ["cat", "dog", "black cat", "None of these."]


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        *(
            (form, 1)
            for form in ("B", "(B)", "B.", "B)", " b\n", "(b)", "b.", "**B**", "[B]", "B:")
        ),
        *((form, 1) for form in ("B) dog", "B. Dog", "b) dog", "(B) dog.", "dog", "Dog.", "A dog")),
        *((form, 1) for form in ("The answer is B", "Answer: B", "**Answer:** B", r"\boxed{B}")),
        *((form, 1) for form in ("The answer is (B) dog. A is wrong.", "Answer:\n\nB", "Option B")),
        *((form, 1) for form in ("It is a dog", "A big dog is here, so B", "<answer>B</answer>")),
        ("the correct answer is: dog", 1),
        ("A", 0),
        ("A is right", 0),
        ("A cat", 0),
        ("I think A because it purrs", 0),
        ("black cat", 2),
        ("C) black  cat", 2),
        ("None of these", 3),
        *((form, None) for form in ("", "E", "E) dog?", "A or B", "A, B", "A) dog", "cat or dog")),
        *((form, None) for form in ("The answer is A or B", "B. cat", "A dog and a cat", "bird")),
        *((form, None) for form in ("dogs", "dogma", "hot-dog", "A big thing", "ab", "白猫", "1")),
    ],
)
def test_choice(answer, named):
    for number in range(4):
        assert one("choice", answer, ["ABCD"[number]], PETS) == (number == named)
        assert one("choice", answer, [PETS[number]], PETS) == (number == named)


@pytest.mark.parametrize(
    ("answer", "choices", "named"),
    [
        ("1.5", ["1", "5", "1.5"], 2),
        ("1.5", ["1", "5", "2"], None),
        ("-3", ["3", "-3"], 1),
        ("-3", ["3", "4"], None),
        ("$5", ["5", "$5"], 1),
        ("B) Vitamin C", ["Vitamin A", "Vitamin C", "Vitamin D"], 1),
        ("Vitamin C", ["Vitamin A", "Vitamin C", "Vitamin D"], 1),
        ("The answer is St. Petersburg.", ["Moscow", "St. Petersburg"], 1),
        ("cat", ["cat", "cat"], None),
        ("B", ["B", "A"], None),  # the letter of one, the text of the other
        ("(B) A", ["B", "A"], 1),
        ("B", ["A", "B"], 1),
        ("x", [str(i) for i in range(30)], 23),
        ("29", [str(i) for i in range(30)], 29),
        ("(a+b)*", ["(a+b)*", "a|b"], 0),
        ("B", ["", "b"], 1),
        ("B", ["", ""], 1),
    ],
)
def test_choice_among(answer, choices, named):
    right = f"({chr(65 + named)}) {choices[named]}" if named in range(26) else None
    right = right or (f"(A) {choices[0]}" if named is None else choices[named])
    assert one("choice", answer, [right], choices) == (named is not None)


def test_choice_without_a_right_one():
    with pytest.raises(ValueError, match="sample 1: truth 'bird' names none of the choices"):
        METRICS["choice"].scores(["cat", "dog"], [["cat"], ["dog", "bird"]], [PETS, PETS])
    with pytest.raises(ValueError, match="sample 1: truth 'cat' names none of"):
        METRICS["choice"].scores(["cat", "cat"], [["cat"], ["cat"]], [PETS, []])
    with pytest.raises(ValueError, match=r"as many answers, truths and choices, not \[1, 1, 0\]"):
        METRICS["choice"].scores(["cat"], [["cat"]])


def test_choice_likelihood():
    chance = random.Random(9)
    texts = ["A", "1", "10", "a dog", "a dog and a cat", "白猫", "naïve café", ""]
    logprobs = [
        {text: -chance.expovariate(0.1) for text in chance.sample(texts, chance.randint(1, 6))}
        for _ in range(CASES)
    ]
    truths = [[chance.choice([*of_one])] for of_one in logprobs]

    def is_best(of_one, truth, length) -> bool:
        scores = {text: logprob / length(text) for text, logprob in of_one.items()}
        return sorted(scores, key=scores.get)[-1] == truth[0]

    check_each("choice_likelihood", lambda *pair: is_best(*pair, lambda _: 1), logprobs, truths)
    num_bytes = lambda text: len(text.encode()) or 1  # noqa: E731
    rule = lambda *pair: is_best(*pair, num_bytes)  # noqa: E731
    check_each("choice_likelihood_norm", rule, logprobs, truths)
    scores = [METRICS[f"choice_likelihood{n}"].scores(logprobs, truths) for n in ("", "_norm")]
    assert scores[0].samples != scores[1].samples
    with pytest.raises(ValueError, match="sample 0 has no truth"):
        METRICS["choice_likelihood"].scores(logprobs[:1], [[]])


def some_json(chance: random.Random, depth: int = 0):
    kinds = 2 if depth < 3 else 0
    kind = chance.randrange(kinds + 1)
    if kind == 0:
        return chance.choice([0, 1, 1.0, True, False, None, "", "1", "白猫", -3, [], {}])
    parts = [some_json(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    return parts if kind == 1 else dict(zip("abc", parts, strict=False))


def flat(value, path="$"):
    """Texts of leaves, each with its path, other than by the tuples of the code."""
    if isinstance(value, dict) and value:
        return {text for key in value for text in flat(value[key], f"{path}.{key}")}
    if isinstance(value, list) and value:
        return {text for i, part in enumerate(value) for text in flat(part, f"{path}[{i}]")}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {f"{path} {json.dumps(float(value) if is_number else value)}"}


def test_json_f1():
    chance = random.Random(8)
    answers, truths, values = [], [], []
    while len(answers) < CASES:
        truth = some_json(chance)
        answer = truth if chance.random() < 0.3 else some_json(chance)
        if isinstance(truth, dict) and chance.random() < 0.5:
            answer = {**truth, "a": some_json(chance)}
        values.append((answer, truth))
        truths.append([json.dumps(truth, indent=chance.choice([None, 2]))])
        written = json.dumps(answer)
        forms = (
            written,
            f"```json\n{written}\n```",
            f"Here:\n```\n{written}```\nDone.",
            written + "}",
        )
        answers.append(chance.choice(forms))
        if answers[-1] == forms[-1]:
            values[-1] = None

    def rule(answer, truth) -> float:
        pair = next(remaining)
        if pair is None:
            return 0
        found, expected = map(flat, pair)
        return 2 * len(found & expected) / (len(found) + len(expected))

    remaining = iter(values)
    check_each("json_f1", rule, answers, truths)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ('{"a": 1, "b": [2, 3]}', '{"b": [2, 4], "a": 1.0}', 2 / 3),
        ("[1, 2]", "[2, 1]", 0),
        ("{}", "[]", 0),
        ('{"a": {}}', '{"a": {}}', 1),
        ("true", "1", 0),
        ("NaN", "null", 0),
        ("", "null", 0),
        ('"```json x```"', '"```json x```"', 1),
        ("[" * 100_000, "[]", 0),
        ("9" * 5000, "9", 0),
        ('{"0": 1}', "[1]", 0),
    ],
)
def test_json_f1_of(answer, truth, expected):
    assert one("json_f1", answer, [truth]) == pytest.approx(expected, abs=NEAR)


def test_json_f1_names_a_wrong_truth():
    with pytest.raises(ValueError, match="sample 1: truth 'a cat' is not JSON"):
        METRICS["json_f1"].scores(["{}", "{}"], [["{}"], ["{}", "a cat"]])


def some_box(chance: random.Random) -> list[float]:
    if chance.random() < 0.1:
        return [5, 5, 5, 9]  # no area
    x, y = chance.randint(0, 20), chance.randint(0, 20)
    return [x, y, x + chance.randint(1, 20), y + chance.randint(1, 20)]


def some_boxes(chance: random.Random, labels: list) -> tuple[list[dict], list[dict]]:
    """Answers and truths of a sample, some of them twice, or nearly the same."""

    def entry(box: list[float]) -> dict:
        label = chance.choice(labels)
        return {"bbox_2d": box} if label is None else {"bbox_2d": box, "label": label}

    truths = [entry(some_box(chance)) for _ in range(chance.choice([0, 1, 1, 2, 3]))]
    if truths and chance.random() < 0.2:
        truths.append(dict(truths[0]))
    answers = []
    for truth in truths:
        for _ in range(chance.choice([0, 1, 1, 1, 2])):
            moved = [number + chance.choice([0, 0, 0, 1, -1]) for number in truth["bbox_2d"]]
            answers.append(truth | {"bbox_2d": moved})
    answers += [entry(some_box(chance)) for _ in range(chance.choice([0, 0, 1, 2]))]
    chance.shuffle(answers)
    return answers, truths


def xywh(entry: dict) -> list[float]:
    x1, y1, x2, y2 = entry["bbox_2d"]
    return [x1, y1, x2 - x1, y2 - y1]


def coco_map(answers: list[list[dict]], truths: list[list[dict]]) -> float:
    """AP of COCOeval; -1 if there is no truth."""
    labels = sorted({entry.get("label", "") for entries in truths for entry in entries})
    is_labelled = labels != [""]

    def dataset(samples: list[list[dict]]) -> COCO:
        coco, annotations = COCO(), []
        for image, entry in ((i, entry) for i, entries in enumerate(samples) for entry in entries):
            label = entry.get("label", "") if is_labelled else ""
            box = xywh(entry)
            # It would forgive a box whose corners are in the wrong order, of an area below 0
            area = max(0, box[2] * box[3])
            annotation = {"image_id": image, "bbox": box, "area": area, "iscrowd": 0}
            annotation["category_id"] = labels.index(label) if label in labels else len(labels)
            annotations.append(annotation | {"id": len(annotations) + 1, "score": 1.0})
        images = [{"id": i} for i in range(len(samples))]
        categories = [{"id": i} for i in range(len(labels))]
        coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(dataset(truths), dataset(answers), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean()) if (precision > -1).any() else -1.0


@pytest.mark.parametrize("labels", [[None], ["cat", "dog", "白猫"]])
def test_box_map(labels):
    chance = random.Random(9)
    for case in range(CASES // 2):
        pairs = [some_boxes(chance, labels) for _ in range(chance.randint(1, 5))]
        answers, truths = ([*side] for side in zip(*pairs, strict=True))
        for entries in answers:
            if labels == [None]:  # labels that nobody asked for do not matter
                entries[:] = [entry | {"label": "x"} for entry in entries]
            elif chance.random() < 0.2:  # nor does one that no truth has
                entries.append({"bbox_2d": [0, 0, 5, 5], "label": ["no", "text"]})
        scores = METRICS["box_map"].scores(answers, truths)
        numbers = [range(len(pairs)), [0], *([*np.sort(d)] for d in draws(len(pairs), case)[:1])]
        for drawn in numbers:
            drawn_answers, drawn_truths = ([side[i] for i in drawn] for side in (answers, truths))
            expected = coco_map(drawn_answers, drawn_truths)
            if expected < 0:
                expected = 0 if any(drawn_answers) else 1
            assert scores.total_of(np.array(drawn)) == pytest.approx(expected, abs=NEAR)
        assert scores.samples[0] == scores.total_of(np.array([0]))


def test_box_map_of_one_large_set():
    chance = random.Random(10)
    pairs = [some_boxes(chance, ["cat", "dog", "cow", "hen"]) for _ in range(CASES)]
    # COCO counts the first 100 of a label of a sample
    pairs[0] = ([{"bbox_2d": [0, 0, 1, 1], "label": "cat"}] * 100 + pairs[0][0], pairs[0][1])
    answers, truths = ([*side] for side in zip(*pairs, strict=True))
    total = METRICS["box_map"].scores(answers, truths).total
    assert 0.1 < total < 0.9
    assert total == pytest.approx(coco_map(answers, truths), abs=NEAR)


def ways(answers: list, truths: list):
    """All matchings, as lists of pairs."""
    if len(answers) > len(truths):
        return ([(b, a) for a, b in way] for way in ways(truths, answers))
    chosen = itertools.permutations(range(len(truths)), len(answers))
    return ([*zip(range(len(answers)), way, strict=True)] for way in chosen)


def overlaps(answers: list[dict], truths: list[dict]) -> list[list[float]]:
    """IoU by pycocotools, 0 for other labels."""
    result = []
    for answer in answers:
        row = []
        for truth in truths:
            fits = truth.get("label") in (None, answer.get("label"))
            # It divides 0 by 0 for two boxes without area
            has_area = all(math.prod(xywh(entry)[2:]) > 0 for entry in (answer, truth))
            value = mask.iou([xywh(answer)], [xywh(truth)], [0])[0, 0] if fits and has_area else 0
            row.append(float(value))
        result.append(row)
    return result


def box_samples() -> tuple[list[list[dict]], list[list[dict]]]:
    chance = random.Random(11)
    answers, truths = [], []
    while len(answers) < CASES:
        labels = chance.choice([[None], ["cat", "dog"], ["cat", "dog", None]])
        answer, truth = some_boxes(chance, labels)
        if max(len(answer), len(truth)) <= 5:
            answers.append(answer)
            truths.append(truth)
    return answers, truths


def test_box_iou():
    def rule(answers: list[dict], truths: list[dict]) -> float:
        if not answers and not truths:
            return 1
        iou = overlaps(answers, truths)
        best = max(sum(iou[a][t] for a, t in way) for way in ways(answers, truths))
        return best / max(len(answers), len(truths))

    check_each("box_iou", rule, *box_samples())


@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_box_f1(threshold):
    answers, truths = box_samples()
    counts = []
    for answer, truth in zip(answers, truths, strict=True):
        iou = overlaps(answer, truth)
        found = max(sum(iou[a][t] >= threshold for a, t in way) for way in ways(answer, truth))
        counts.append((found, len(answer) + len(truth)))
    scores = METRICS[f"box_f1@{threshold}"].scores(answers, truths)
    each = [2 * found / boxes if boxes else 1 for found, boxes in counts]
    assert scores.samples == pytest.approx(each, abs=NEAR)
    for draw in [np.arange(CASES), *draws(CASES)]:
        found, boxes = (sum(counts[i][part] for i in draw) for part in (0, 1))
        assert scores.total_of(draw) == pytest.approx(2 * found / boxes, abs=NEAR)


BOXES = [name for name, metric in METRICS.items() if metric.takes == "boxes"]


@pytest.mark.parametrize("name", BOXES)
def test_boxes_that_are_none(name):
    truth = {"bbox_2d": [0, 0, 4, 4]}
    assert one(name, [], []) == 1
    assert one(name, [truth], []) == 0
    assert one(name, [], [truth]) == 0
    # Points are no boxes, and corners in the wrong order enclose nothing
    assert one(name, [{"point_2d": [1, 1]}, truth], [truth]) == 1
    assert one(name, [{"bbox_2d": [4, 4, 0, 0]}], [truth]) == 0
    for box in ({}, {"bbox_2d": [1, 2]}, {"bbox_2d": [4, 0, 0, 4]}):
        with pytest.raises(ValueError, match=r"sample 0: truth .* has no bbox_2d"):
            METRICS[name].scores([[]], [[box]])


def test_box_map_wants_all_labels_or_none():
    truths = [[{"bbox_2d": [0, 0, 4, 4]}], [{"bbox_2d": [0, 0, 4, 4], "label": "cat"}]]
    with pytest.raises(ValueError, match="some boxes of truths have labels and some none"):
        METRICS["box_map"].scores([[], []], truths)


def test_interval_of_a_binomial_mean():
    count, right = 400, 120
    scores = Scores.of_each(float, [1.0] * right + [0.0] * (count - right))
    low, high = interval(scores, resamples=10_000)
    error = math.sqrt(0.3 * 0.7 / count)
    # A 2.5 % quantile of 10,000 normal numbers has a standard error of 0.027 of their deviation:
    # four of these, and the distance of two means, 0.11. 90 % would lie 0.31 further inside
    slack = (4 * 0.027 + 0.11) * error
    assert low == pytest.approx(0.3 - 1.96 * error, abs=slack)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=slack)


def test_interval_is_that_of_its_seed():
    scores = Scores.of_each(float, [*np.random.default_rng(14).random(50)])
    assert interval(scores) == interval(scores) != interval(scores, seed=1)


def test_comparison():
    generator = np.random.default_rng(12)
    first = generator.random(300)
    # 1.5 standard errors better, of which a normal distribution has 6.7 % on either side
    better = generator.normal(size=300)
    better = (better - better.mean()) / better.std() + 1.5 / math.sqrt(300)
    scores = [Scores.of_each(float, [*samples]) for samples in (first, first + better / 10)]
    comparison = compare(*scores)
    assert comparison.difference == pytest.approx(0.15 / math.sqrt(300), abs=NEAR)
    assert comparison.low < 0 < comparison.difference < comparison.high
    # Four standard errors of twice a share of 1,000
    slack = 4 * 2 * math.sqrt(0.067 * 0.933 / 1000)
    assert comparison.p_value == pytest.approx(2 * 0.0668, abs=slack)
    mirrored = compare(*scores[::-1])
    assert mirrored.difference == -comparison.difference
    assert mirrored.p_value == comparison.p_value


def test_comparison_of_the_same_and_of_always_better():
    answers, truths = some_texts(13, most=2)
    same = METRICS["chrf"].scores(answers, truths)
    comparison = compare(same, METRICS["chrf"].scores(answers, truths), resamples=50)
    assert comparison.difference == comparison.low == comparison.high == 0
    assert comparison.p_value == 1
    right = METRICS["chrf"].scores([texts[0] for texts in truths], truths)
    assert compare(same, right, resamples=50).p_value == 2 / 51
    with pytest.raises(ValueError, match="200 samples cannot be compared with 1"):
        compare(same, METRICS["chrf"].scores(["a"], [["a"]]))


def test_every_metric_says_what_it_is():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.about.endswith(".")
        with pytest.raises(ValueError, match="there are no answers"):
            metric.scores([], [])
        with pytest.raises(ValueError, match=f"{name} needs as many .* not"):
            metric.scores([""], [[""], [""]])
        if metric.takes == "text":
            with pytest.raises(ValueError, match="sample 1 has no truth"):
                metric.scores(["", ""], [[""], []], [PETS, PETS])


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("bleu", "sacrebleu.metrics"),
        ("anls", "rapidfuzz.distance.Levenshtein"),
        ("box_iou", "scipy.optimize"),
    ],
)
def test_missing_library(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    is_text = METRICS[name].takes == "text"
    answer, truth = (
        ("a", "a") if is_text else ([{"bbox_2d": [0, 0, 1, 1]}], {"bbox_2d": [0, 0, 1, 1]})
    )
    with pytest.raises(ValueError, match=r"not installed: pip install 'torchtune-vl\[evaluate\]'"):
        one(name, answer, [truth])
