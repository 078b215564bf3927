"""Compares models: weights, and logits of conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchtune_vl.data import padded_collate_vision
from torchtune_vl.files._names import published_name
from torchtune_vl.files._safetensors import weight_files
from torchtune_vl.models import model_from_pretrained
from torchtune_vl.models._weights import load_weights
from torchtune_vl.validation._compare_conversations import Sample
from torchtune_vl.validation._compare_values import Outcome, attempt, compare
from torchtune_vl.validation._ours_and_reference import Comparison
from torchtune_vl.validation._report import Case, number

# How much further from transformers we may be than transformers is from itself, when it computes
# attention another way. Rounding that is no better than that is no error.
MARGIN = 10


def compare_models(
    run: Comparison, samples: Sequence[Sample], dtype: torch.dtype, weights: bool, logits: bool
) -> None:
    """Compare weights, if asked to, and logits with weights."""
    rows = [run.rows[name] for name in ("weights", "logits", "top-1")]
    unread = "unreadable: see vocabulary, image settings and weights"
    for row in rows:
        row.about = row.about.replace("DTYPE", str(dtype).removeprefix("torch."))
        row.skipped = unread if logits else "only with --logits"
    if not weights and not logits:
        rows[0].skipped = "only with --weights"
        return
    directory = run.ours.directory
    ours, theirs = attempt(_load, directory, dtype), attempt(run.reference.model, dtype)
    if ours.error or theirs.error:
        rows[0].add(compare("ours beside transformers", ours, theirs, must_read=True))
        return
    a = run.ours.family.names.to_published(ours.value.state_dict())
    b = {published_name(name): tensor for name, tensor in theirs.value.state_dict().items()}
    if "lm_head.weight" not in a and theirs.value.config.tie_word_embeddings:
        del b["lm_head.weight"]
    names = replace(ours, value=sorted(a)), replace(theirs, value=sorted(b))
    rows[0].add(compare("names of tensors", *names))
    for name in run.track(sorted(a.keys() & b.keys()), "weights"):
        rows[0].add(compare(name, Outcome(a[name]), Outcome(b[name])))
    if logits and samples:
        _compare_logits(run, ours.value, theirs.value, samples)


def _load(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    weights = load_weights(directory, weight_files(directory))
    with torch.device("meta"):
        model = model_from_pretrained(directory, weights=False)
    model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    return model.eval()


@torch.inference_mode()
def _logits(model: torch.nn.Module, sample: Mapping[str, Any]) -> torch.Tensor:
    keys = [key for key in ("tokens", "input_pos", "encoder_input") if key in sample]
    return model(**padded_collate_vision([{key: sample[key] for key in keys}]))[0].float()


@torch.inference_mode()
def _reference_logits(model: Any, inputs: Mapping[str, Any], attention: str) -> torch.Tensor:
    model.set_attn_implementation(attention)
    return model(**inputs).logits[0].float()


def _compare_logits(run: Comparison, ours: Any, reference: Any, samples: Sequence[Sample]) -> None:
    logits, top = run.rows["logits"], run.rows["top-1"]

    def spread_of(sample: Sample) -> float:
        inputs = sample.reference
        usual, other = (_reference_logits(reference, inputs, kind) for kind in ("sdpa", "eager"))
        return float((usual - other).abs().max() / usual.abs().max())

    spreads = [attempt(spread_of, sample) for sample in run.track(samples, "rounding")]
    # A model that does not run is told of by the cases below
    spread = max((s.value for s in spreads if not s.error), default=0.0)
    relative = MARGIN * max(spread, torch.finfo(torch.float32).eps)
    logits.note = (
        f"Passes up to {number(relative)} of the largest logit: {MARGIN} times the difference "
        f"between transformers' own two implementations of attention, sdpa and eager, which was "
        f"{number(spread)} in this run"
    )
    for name, sample, inputs in run.track(samples, "logits"):
        a = attempt(_logits, ours, sample)
        b = attempt(_reference_logits, reference, inputs, "sdpa")
        tolerance = 0.0 if b.error else relative * float(b.value.abs().max())
        case = compare(name, a, b, tolerance=tolerance)
        logits.add(case)
        if not a.error and not b.error and a.value.shape == b.value.shape:
            if case.failed:
                case.detail = f"the tolerance is {number(tolerance)}"
            top.add(_top_case(name, a.value, b.value, tolerance))
    agreeing = 1 - sum(case.differing for case in top.cases) / max(top.compared, 1)
    top.note = f"{agreeing:.2%} agree"


def _top_case(name: str, ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> Case:
    best, case = reference.topk(2, dim=-1), Case(name)
    differs = ours.argmax(dim=-1) != best.indices[:, 0]
    clear = best.values[:, 0] - best.values[:, 1] > 2 * tolerance
    wrong, differing = int((differs & clear).sum()), int(differs.sum())
    case.count(len(ours), differing)
    case.failed = wrong > 0
    case.detail = f"{differing - wrong} of {differing} are as good as equal" if differing else ""
    return case
