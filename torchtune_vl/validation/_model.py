"""Rows about the model: its weights, logits, and the tokens that they favour."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchtune_vl.data import padded_collate_vision
from torchtune_vl.files._names import published_name
from torchtune_vl.files._safetensors import weight_files
from torchtune_vl.models import model_from_pretrained
from torchtune_vl.models._families import family_of
from torchtune_vl.models._weights import load_weights
from torchtune_vl.validation._chat import Sample
from torchtune_vl.validation._reference import Reference
from torchtune_vl.validation._report import (
    Case,
    Outcome,
    Row,
    Track,
    attempt,
    compare_sequences,
    compare_tensors,
    counted,
    number,
    unreadable,
)

# How much further from transformers we may be than transformers is from itself, when it computes
# attention another way. Rounding that is no better than that is no error.
MARGIN = 10


def model_rows(
    directory: Path,
    reference: Reference,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    weights: bool,
    logits: bool,
    track: Track,
) -> list[Row]:
    """Compare weights, if asked to, and logits with weights."""
    rows = _rows(str(dtype).removeprefix("torch."))
    if not logits:
        rows[1].skipped = rows[2].skipped = "only with --logits"
    if not weights and not logits:
        rows[0].skipped = "only with --weights"
        return rows
    ours, theirs = attempt(_load, directory, dtype), attempt(reference.model, dtype)
    unread = unreadable("ours beside transformers", ours, theirs)
    if unread is not None:
        rows[0].add(unread)
    else:
        mine = ours.map(lambda m: family_of(directory).names.to_published(m.state_dict()))
        _compare_weights(mine, theirs, rows[0], track)
        if logits and samples:
            _compare_logits(ours.value, theirs.value, samples, rows[1:], track)
    for row in rows:
        row.skipped = row.skipped or "unreadable: see vocabulary, image settings and weights"
    return rows


def _rows(dtype: str) -> list[Row]:
    return [
        Row(
            "weights",
            f"Every tensor as each side loads it, in {dtype}: names, shapes and values. The time "
            "is that of loading.",
            "values",
            numeric=True,
        ),
        Row(
            "logits",
            f"Logits of every token of the conversations, in {dtype}.",
            "values",
            numeric=True,
        ),
        Row(
            "top-1",
            "The most likely next token after every token. One that differs where transformers' "
            "two best logits are closer together than the tolerance is rounding.",
            "tokens",
            timed_in="logits",
        ),
    ]


def _load(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    weights = load_weights(directory, weight_files(directory))
    with torch.device("meta"):
        model = model_from_pretrained(directory, weights=False)
    model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    return model.eval()


def _compare_weights(ours: Outcome, reference: Outcome, row: Row, track: Track) -> None:
    mine = ours.value
    theirs = {published_name(name): t for name, t in reference.value.state_dict().items()}
    if "lm_head.weight" not in mine and reference.value.config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    names = ours.map(sorted), reference.map(lambda _: sorted(theirs))
    row.add(compare_sequences("names of tensors", *names))
    for name in track(sorted(mine.keys() & theirs.keys()), "weights"):
        row.add(compare_tensors(name, Outcome(mine[name]), Outcome(theirs[name])))


@torch.inference_mode()
def _logits(model: torch.nn.Module, sample: Mapping[str, Any]) -> torch.Tensor:
    keys = [key for key in ("tokens", "input_pos", "encoder_input") if key in sample]
    return model(**padded_collate_vision([{key: sample[key] for key in keys}]))[0].float()


@torch.inference_mode()
def _reference_logits(model: Any, inputs: Mapping[str, Any], attention: str) -> torch.Tensor:
    model.set_attn_implementation(attention)
    return model(**inputs).logits[0].float()


def _spread(model: Any, inputs: Mapping[str, Any]) -> float:
    """How far transformers is from itself, relative to the largest logit."""
    usual, other = (_reference_logits(model, inputs, kind) for kind in ("sdpa", "eager"))
    return float((usual - other).abs().max() / usual.abs().max())


def _compare_logits(
    ours: torch.nn.Module,
    reference: Any,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    track: Track,
) -> None:
    logits, top = rows
    spreads = [attempt(_spread, reference, s.reference) for s in track(samples, "rounding")]
    # A model that does not run is told of by the cases below
    spread = max((s.value for s in spreads if s.error is None), default=0.0)
    relative = MARGIN * max(spread, torch.finfo(torch.float32).eps)
    logits.note = (
        f"Passes up to {number(relative)} of the largest logit: {MARGIN} times the difference "
        f"between transformers' own two implementations of attention, sdpa and eager, which was "
        f"{number(spread)} in this run"
    )
    for name, sample, inputs in track(samples, "logits"):
        a = attempt(_logits, ours, sample)
        b = attempt(_reference_logits, reference, inputs, "sdpa")
        tolerance = relative * float(b.value.abs().max()) if b.error is None else 0.0
        case = compare_tensors(name, a, b, tolerance)
        logits.add(case)
        if a.error is None and b.error is None and a.value.shape == b.value.shape:
            if case.failed:
                case.detail = f"the tolerance is {number(tolerance)}"
            top.add(_top_case(name, a.value, b.value, tolerance))
    agreeing = 1 - sum(case.differing for case in top.cases) / max(top.compared, 1)
    top.note = f"{agreeing:.2%} agree"


def _top_case(name: str, ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> Case:
    best = reference.topk(2, dim=-1)
    differs = ours.argmax(dim=-1) != best.indices[:, 0]
    clear = best.values[:, 0] - best.values[:, 1] > 2 * tolerance
    wrong, differing = int((differs & clear).sum()), int(differs.sum())
    case = counted(name, len(ours), differing)
    case.failed = wrong > 0
    case.detail = f"{differing - wrong} of {differing} are as good as equal" if differing else ""
    return case
