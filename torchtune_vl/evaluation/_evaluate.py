"""Scores of answers to the questions of a dataset, in groups, and beside those of others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from torchtune_vl.chat import ChatTransform
from torchtune_vl.evaluation._bootstrap import Draw, SampleError, Scores, compare, interval
from torchtune_vl.evaluation._metrics import METRICS, Metric
from torchtune_vl.evaluation._sources import Sources
from torchtune_vl.media._errors import naming_sample, shortened

Record = dict[str, Any]


def metrics_of(names: Sequence[str]) -> list[Metric]:
    """Find metrics by name; ``ValueError`` if there is none of a name."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"there is no metric {name!r}: there are {', '.join(METRICS)}")
    return [METRICS[name] for name in dict.fromkeys(names)]


def evaluate(
    records: Sequence[Record],
    dataset: Sources,
    transform: ChatTransform,
    metrics: Sequence[Metric],
    *,
    columns: Sequence[str] = (),
    others: Sequence[Record] | None = None,
) -> dict[str, Any]:
    """Score answers.

    Args:
        records: the answers, lines of :class:`~torchtune_vl.generation.AnswerFile`. Those with an
            ``error`` are not scored, but counted.
        dataset: of the questions.
        transform: of the model.
        metrics: by which answers are scored.
        columns: of the dataset's records, by whose values scores are grouped.
        others: answers of another model to the same questions, for a comparison.

    Returns:
        What JSON can hold, ``num_answers`` and ``num_errors``; ``metrics``, of each
        ``about``, ``total``, and ``low`` and ``high``, its 95 % interval; ``groups``, by column and
        value, the same with ``num_answers``; ``comparison``, by metric, how the answers differ from
        ``others``, of which samples have ``other_answer``, ``other_scores``, ``other_boxes``,
        ``other_choice_logprobs`` and ``other_ended``; and ``samples``, of each ``sample``, ``id``,
        ``question``, ``answer``, ``truths``, ``scores`` by metric, ``values`` of the columns, and
        perhaps ``choice_logprobs`` as the answers have them, ``boxes`` and ``truth_boxes`` in
        pixels of the image's file, or an ``error``.

    Raises:
        ValueError: if there is nothing to score, a metric needs what a sample lacks, or the other
            answers are to other questions.
    """
    for metric in metrics:
        metric.check_fits(transform)
    for column in columns:
        if all(dataset.column(n, column) is None for n in range(len(dataset))):
            raise ValueError(f"no record has a column {column!r}")
    samples = [_described(record, dataset, columns, transform) for record in records]
    scored = [sample for sample in samples if "error" not in sample]
    if not scored:
        raise ValueError("there is no answer to score: see the errors of the samples")
    scores = {m.name: _scores(m, scored, dataset, transform) for m in metrics}
    for name, of_metric in scores.items():
        for sample, score in zip(scored, of_metric.samples, strict=True):
            sample.setdefault("scores", {})[name] = score
    report: dict[str, Any] = {
        "num_answers": len(scored),
        "num_errors": len(samples) - len(scored),
        "metrics": {m.name: {"about": m.about, **_summary(scores[m.name])} for m in metrics},
        "groups": {column: _groups(column, scored, scores) for column in columns},
        "samples": samples,
    }
    if others is not None:
        described = [_described(record, dataset, (), transform) for record in others]
        report["comparison"] = _comparison(scored, described, metrics, dataset, transform)
    return report


def _described(
    record: Record, dataset: Sources, columns: Sequence[str], transform: ChatTransform
) -> Record:
    """A line of answers with its question, and with what the answer is compared with."""
    number = record["sample"]
    described = {key: record[key] for key in ("sample", "id")}
    if "error" in record:
        return {**described, "error": record["error"]}
    sample = dataset.read(number)
    truths = sample.get("references") or [record["truth"]] if "truth" in record else []
    return {
        **described,
        "question": _text_of(sample["messages"][:-1] or sample["messages"]),
        "answer": transform.final_answer(record["answer"]),
        "ended": record["ended"],
        "truths": truths,
        "choices": sample.get("choices") or [],
        **{key: record[key] for key in ("choice_logprobs",) if key in record},
        "values": {column: str(dataset.column(number, column)) for column in columns},
    }


def _text_of(messages: Sequence[Any]) -> str:
    """What the last message says, media left out."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(item.get("text", "") for item in content if isinstance(item, Mapping))


def _scores(
    metric: Metric, samples: Sequence[Record], dataset: Sources, transform: ChatTransform
) -> Scores:
    for sample in samples:
        if not sample["truths"]:
            raise ValueError(f"sample {sample['id']!r} has no answer to compare with: leave it out")
        needs_choices = metric.needs_choices or metric.takes == "logprobs"
        if needs_choices and not sample["choices"]:
            raise ValueError(f"sample {sample['id']!r} has no choices, which {metric.name} needs")
        if metric.takes == "logprobs" and "choice_logprobs" not in sample:
            raise ValueError(
                f"the answer to sample {sample['id']!r} has no log-probabilities of its choices, "
                f"which {metric.name} needs: its truth, {sample['truths'][0]!r}, has to be the "
                "letter or the text of one, and answers of an earlier version have none"
            )
    try:
        return metric.scores(*_columns(metric, samples, dataset, transform))
    except SampleError as error:
        name = samples[error.number]["id"]
        raise ValueError(f"sample {name!r}: {error.reason}") from error


def _columns(
    metric: Metric, samples: Sequence[Record], dataset: Sources, transform: ChatTransform
) -> Iterator[list[Any]]:
    """Answers, truths and choices, as a metric takes them."""
    if metric.takes == "text":
        return ([sample[key] for sample in samples] for key in ("answer", "truths", "choices"))
    if metric.takes == "logprobs":
        return ([sample[key] for sample in samples] for key in ("choice_logprobs", "truths"))
    for sample in samples:
        if "boxes" not in sample:
            asked = dataset.read(sample["sample"])
            asked = {**asked, "messages": asked["messages"][:-1]}
            sample["boxes"] = transform.boxes_in_answer(asked, sample["answer"])
            sample["truth_boxes"] = transform.boxes_in_answer(asked, sample["truths"][0])
    # Where nothing is to be found, an answer without boxes is perfect: so would any text be
    if not any(sample["truth_boxes"] for sample in samples):
        example = f"such as {shortened(repr(samples[0]['truths'][0]))}"
        raise ValueError(
            f"no answer of the data has boxes, which {metric.name} needs, {example}: give them as "
            "values with bbox_2d, or take another metric"
        )
    return ([sample[key] for sample in samples] for key in ("boxes", "truth_boxes"))


def _summary(scores: Scores) -> dict[str, float]:
    low, high = interval(scores)
    return {"total": scores.total, "low": low, "high": high}


def _groups(
    column: str, samples: Sequence[Record], scores: Mapping[str, Scores]
) -> dict[str, dict[str, Any]]:
    values = np.array([sample["values"][column] for sample in samples])
    groups = {}
    for value in sorted({*values.tolist()}):
        (members,) = np.nonzero(values == value)
        summaries = {name: _summary(_part(s, members)) for name, s in scores.items()}
        groups[value] = {"num_answers": len(members), "metrics": summaries}
    return groups


def _part(scores: Scores, members: Draw) -> Scores:
    """The scores of some samples."""
    own = [scores.samples[member] for member in members]
    return Scores(own, lambda draw: scores.total_of(members[draw]))


def _comparison(
    samples: Sequence[Record],
    others: Sequence[Record],
    metrics: Sequence[Metric],
    dataset: Sources,
    transform: ChatTransform,
) -> dict[str, Any]:
    """How answers differ from others, in what both have answered."""
    by_number = {other["sample"]: other for other in others if "error" not in other}
    pairs = [(s, by_number[s["sample"]]) for s in samples if s["sample"] in by_number]
    for sample, other in pairs:
        with naming_sample(sample["id"]):
            if any(sample[key] != other[key] for key in ("id", "question", "truths")):
                raise ValueError("the answers to compare with are to another question")
    if not pairs:
        raise ValueError("the answers to compare with are to none of these questions")
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    found = {}
    for metric in metrics:
        first, second = (_scores(metric, side, dataset, transform) for side in (theirs, ours))
        found[metric.name] = {"other_total": first.total, **asdict(compare(first, second))}
        for (_, other), score in zip(pairs, first.samples, strict=True):
            other.setdefault("scores", {})[metric.name] = score
    for sample, other in pairs:
        known = ("answer", "scores", "boxes", "choice_logprobs", "ended")
        sample |= {f"other_{key}": other[key] for key in known if key in other}
    return {"num_answers": len(pairs), "metrics": found}
