"""Metrics of boxes: entries with ``bbox_2d``, [x1, y1, x2, y2], and perhaps a ``label``.

Where a truth has a label, only an answer with that label can match it. What an answer has beside
boxes, such as points, is not counted.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from torchtune_vl.evaluation._bootstrap import Draw, Scores, each

# Shape suffixes: A answers, T truths, D answers of all samples, U thresholds of IoU

Entries = Sequence[Mapping[str, Any]]
_Array = npt.NDArray[Any]
# Both as COCO's own evaluation has them: other floats could decide otherwise at the edge
_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MOST_ANSWERS = 100


def library(name: str) -> Any:
    """Import what the extra ``evaluate`` brings."""
    try:
        return import_module(name)
    except ImportError as error:
        wanted = f"{name.split('.')[0]} is not installed"
        raise ValueError(f"{wanted}: pip install 'torchtune-vl[evaluate]'") from error


def box_iou(answers: Sequence[Entries], truths: Sequence[Entries]) -> Scores:
    """Mean IoU of boxes, matched one to one so that it is largest, 0 to 1.

    A box without a partner, on either side, counts as 0; no boxes on both sides as 1.
    """
    return Scores.of_each(_mean_iou, answers, truths)


def box_f1(iou_threshold: float, answers: Sequence[Entries], truths: Sequence[Entries]) -> Scores:
    """F1 of boxes, which match from the IoU on that the name says, 0 to 1.

    As many match, one to one, as possible. Of several samples matches and boxes are added up first.
    No boxes on both sides are 1.
    """
    counts = np.array(each(partial(_count_matches, iou_threshold), answers, truths))
    return Scores([*map(_f1, counts)], lambda draw: _f1(counts[draw].sum(0)))


def box_map(answers: Sequence[Entries], truths: Sequence[Entries]) -> Scores:
    """COCO's mAP of boxes, over IoU .50:.05:.95 and labels, all answers equally confident, 0 to 1.

    Precision is interpolated at 101 recalls, and each answer takes the best free truth, as
    pycocotools' COCOeval does. Answers have no confidence, so they rank in the order of samples and
    in their own; only the first 100 of each label of a sample count. An
    answer whose label no truth has costs nothing, and of truths without labels there is one class.
    Where there are no truths, no answers score 1 and any 0.
    """
    boxes = each(_boxes, answers, truths)
    labels = dict.fromkeys(label for _, truth in boxes for label in _labels(truth))
    if None in labels and len(labels) > 1:
        raise ValueError("some boxes of truths have labels and some none: give each one, or none")
    numbers = {label: number for number, label in enumerate(labels)}
    found = [_find(answer, truth, numbers) for answer, truth in boxes]
    num_answers = np.array([len(answer) for answer, _ in boxes])

    def total_of(draw: Draw) -> float:
        labels_T, labels_D, hits_DU = (
            np.concatenate([found[sample][part] for sample in draw]) for part in range(3)
        )
        if not len(labels_T):
            return float(not num_answers[draw].any())
        num_truths = np.bincount(labels_T, minlength=len(numbers))
        return _mean_average_precision(num_truths, labels_D, hits_DU)

    return Scores([total_of(np.array([sample])) for sample in range(len(found))], total_of)


def _boxes(answers: Entries, truths: Entries) -> tuple[Entries, Entries]:
    """The boxes of an answer, and the truths, which have to be boxes."""
    for entry in truths:
        box = entry.get("bbox_2d") or []
        if len(box) != 4 or box[0] > box[2] or box[1] > box[3]:
            raise ValueError(f"truth {entry!r} has no bbox_2d [x1, y1, x2, y2], x1 <= x2, y1 <= y2")
    return [entry for entry in answers if "bbox_2d" in entry], truths


def _labels(entries: Entries) -> list[str | None]:
    """Labels as text: a model writes anything, such as lists."""
    labels = (entry.get("label") for entry in entries)
    return [None if label is None else str(label) for label in labels]


def _iou(answers: Entries, truths: Entries) -> _Array:
    """The IoU of each pair of boxes, 0 if one has no area or corners in the wrong order: [A, T]."""
    a, t = (
        np.array([e["bbox_2d"] for e in side], np.float64).reshape(-1, 4)
        for side in (answers, truths)
    )
    upper_AT2 = np.minimum(a[:, None, 2:], t[None, :, 2:])
    sides_AT2 = (upper_AT2 - np.maximum(a[:, None, :2], t[None, :, :2])).clip(0)
    common_AT = sides_AT2.prod(2)
    area_A, area_T = ((side[:, 2:] - side[:, :2]).prod(1) for side in (a, t))
    union_AT = area_A[:, None] + area_T - common_AT
    return np.divide(common_AT, union_AT, out=np.zeros_like(common_AT), where=common_AT > 0)


def _iou_of_fitting(answers: Entries, truths: Entries) -> _Array:
    """As :func:`_iou`, and 0 where the label of a truth is another: [A, T]."""
    answers, truths = _boxes(answers, truths)
    fits = [[truth in (None, answer) for truth in _labels(truths)] for answer in _labels(answers)]
    iou_AT = _iou(answers, truths)
    return np.where(np.array(fits, bool).reshape(iou_AT.shape), iou_AT, 0)


def _best_sum(worth: _Array) -> float:
    """The largest sum of the worths of pairs, each answer and each truth in one at most."""
    pairs = library("scipy.optimize").linear_sum_assignment(worth, maximize=True)
    return float(worth[pairs].sum())


def _mean_iou(answers: Entries, truths: Entries) -> float:
    iou_AT = _iou_of_fitting(answers, truths)
    return _best_sum(iou_AT) / max(iou_AT.shape) if max(iou_AT.shape) else 1.0


def _count_matches(iou_threshold: float, answers: Entries, truths: Entries) -> list[float]:
    iou_AT = _iou_of_fitting(answers, truths)
    return [_best_sum(iou_AT >= iou_threshold), *iou_AT.shape]


def _f1(counts: _Array) -> float:
    matches, num_answers, num_truths = counts.tolist()
    boxes = num_answers + num_truths
    return 2 * matches / boxes if boxes else 1.0


def _find(
    answers: Entries, truths: Entries, numbers: Mapping[str | None, int]
) -> tuple[_Array, _Array, _Array]:
    """Numbers of the labels of truths [T] and of answers [A], and what these find [A, U]."""
    labels_T, labels_A = _labels(truths), _labels(answers)
    if None in numbers:
        labels_A = [None] * len(answers)
    kept, hits = [], [np.zeros((0, len(_IOU_THRESHOLDS)), bool)]
    for label in {*labels_A} & numbers.keys():
        of_label = [
            [e for e, other in zip(entries, labels, strict=True) if other == label]
            for entries, labels in ((answers, labels_A), (truths, labels_T))
        ]
        hits.append(_hits(_iou(of_label[0][:_MOST_ANSWERS], of_label[1])))
        kept += [numbers[label]] * len(hits[-1])
    truth_numbers = [numbers[label] for label in labels_T]
    return np.array(truth_numbers, np.int64), np.array(kept, np.int64), np.concatenate(hits)


def _hits(iou_AT: _Array) -> _Array:
    """Which answers find a truth: each in turn takes the best that is free [A, U]."""
    hits_AU = np.zeros((len(iou_AT), len(_IOU_THRESHOLDS)), bool)
    if not iou_AT.size:
        return hits_AU
    for number, threshold in enumerate(_IOU_THRESHOLDS):
        free_AT = iou_AT.copy()
        for answer, free_T in enumerate(free_AT):
            best = len(free_T) - 1 - free_T[::-1].argmax()  # the last of equal ones, as COCO's
            if free_T[best] >= threshold:
                hits_AU[answer, number] = True
                free_AT[:, best] = 0
    return hits_AU


def _mean_average_precision(num_truths: _Array, labels_D: _Array, hits_DU: _Array) -> float:
    """The mean of all labels that have truths, computed for all of them at once."""
    order = np.argsort(labels_D, kind="stable")
    order = order[num_truths[labels_D[order]] > 0]
    labels_D, hits_DU = labels_D[order], hits_DU[order]
    first_D = np.searchsorted(labels_D, labels_D)  # where the answers of a label begin
    before_DU = np.concatenate([np.zeros_like(hits_DU[:1], np.int64), hits_DU.cumsum(0)])
    found_DU = before_DU[1:] - before_DU[first_D]
    precision_DU = found_DU / (np.arange(len(order)) - first_D + 1)[:, None]
    # The best precision from here to the end of the label: labels lie 2 apart, and never mix
    apart_D1 = 2.0 * labels_D[:, None]
    best_DU = np.maximum.accumulate((precision_DU - apart_D1)[::-1])[::-1] + apart_D1
    recall_DU = found_DU / num_truths[labels_D][:, None]
    reached_DU = np.searchsorted(_RECALLS, recall_DU, side="right")
    new_DU = np.diff(reached_DU, axis=0, prepend=0)
    is_first_D = first_D == np.arange(len(order))
    new_DU[is_first_D] = reached_DU[is_first_D]
    weight = len(_RECALLS) * len(_IOU_THRESHOLDS) * np.count_nonzero(num_truths)
    return float((best_DU * new_DU).sum() / weight)
