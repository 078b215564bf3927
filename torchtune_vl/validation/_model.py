"""Rows about the model: its weights, logits, and the tokens that they favour."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchtune_vl.data import padded_collate_vision
from torchtune_vl.files._names import TensorNames, published_name
from torchtune_vl.files._safetensors import weight_files
from torchtune_vl.models import model_from_pretrained
from torchtune_vl.models._families import family_of
from torchtune_vl.models._weights import load_weights
from torchtune_vl.validation._chat import Sample
from torchtune_vl.validation._compare import compare_sequences, compare_tensors
from torchtune_vl.validation._reference import Reference
from torchtune_vl.validation._report import Case, Outcome, Row, Track, attempt, number, unreadable

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
    """Compare models.

    Args:
        directory: the checkpoint's directory.
        reference: transformers' side.
        samples: conversations.
        dtype: of both models.
        weights: whether to compare their weights.
        logits: whether to compare their weights and to run them.
        track: shows progress.

    Returns:
        The rows.
    """
    rows = _rows(dtype)
    if not weights and not logits:
        rows[0].skipped = "only with --weights"
    if not logits:
        rows[1].skipped = rows[2].skipped = "only with --logits"
    if weights or logits:
        _compare_models(directory, reference, samples if logits else [], dtype, rows, track)
    return rows


def _compare_models(
    directory: Path,
    reference: Reference,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    rows: Sequence[Row],
    track: Track,
) -> None:
    ours, theirs = attempt(_load, directory, dtype), attempt(reference.model, dtype)
    unread = unreadable(ours, theirs)
    if unread is not None:
        rows[0].add(unread)
    else:
        for case in _weight_cases(ours, theirs, family_of(directory).names, track):
            rows[0].add(case)
        if samples:
            _compare_logits(_Pair(ours.value, theirs.value), samples, rows[1:], track)
    for row in rows:
        row.skipped = row.skipped or "unreadable: see vocabulary, image settings and weights"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    weights = load_weights(directory, weight_files(directory))
    with torch.device("meta"):
        model = model_from_pretrained(directory, weights=False)
    model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    return model.eval()


def _weight_cases(
    ours: Outcome, reference: Outcome, names: TensorNames, track: Track
) -> Iterator[Case]:
    mine = names.to_published(ours.value.state_dict())
    theirs = {published_name(name): t for name, t in reference.value.state_dict().items()}
    if "lm_head.weight" not in mine and reference.value.config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    yield compare_sequences(
        "names of tensors",
        ours.map(lambda _: sorted(mine)),
        reference.map(lambda _: sorted(theirs)),
    )
    for name in track(sorted(mine.keys() & theirs.keys()), "weights"):
        yield compare_tensors(name, Outcome(mine[name]), Outcome(theirs[name]))


def _rows(dtype: torch.dtype) -> list[Row]:
    return [
        Row(
            "weights",
            f"Every tensor as each side loads it, in {_name(dtype)}: names, shapes and values. The "
            "time is that of loading.",
            "values",
            numeric=True,
        ),
        Row(
            "logits",
            f"Logits of every token of the conversations, in {_name(dtype)}.",
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


class _Pair:
    """Both models.

    Args:
        ours: our model.
        reference: that of transformers.
    """

    def __init__(self, ours: torch.nn.Module, reference: Any) -> None:
        self._ours = ours
        self._reference = reference

    @torch.inference_mode()
    def ours(self, sample: Mapping[str, Any]) -> torch.Tensor:
        """Return our logits, float32 [s, vocabulary]."""
        tokens = {key: sample[key] for key in ("tokens", "input_pos")}
        vision = {key: sample[key] for key in ("encoder_input",) if key in sample}
        return self._ours(**padded_collate_vision([{**tokens, **vision}]))[0].float()

    @torch.inference_mode()
    def reference(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return transformers' logits, float32 [s, vocabulary]."""
        return self._reference(**inputs).logits[0].float()

    def spread(self, inputs: Mapping[str, torch.Tensor]) -> float:
        """Return how far transformers is from itself, relative to the largest logit."""
        usual = self.reference(inputs)
        self._reference.set_attn_implementation("eager")
        other = self.reference(inputs)
        self._reference.set_attn_implementation("sdpa")
        return float((usual - other).abs().max() / usual.abs().max())


def _compare_logits(
    pair: _Pair, samples: Sequence[Sample], rows: Sequence[Row], track: Track
) -> None:
    logits, top = rows
    spreads = [attempt(pair.spread, sample.reference) for sample in track(samples, "rounding")]
    # A model that does not run is told of by the cases below
    spread = max((s.value for s in spreads if s.error is None), default=0.0)
    relative = MARGIN * max(spread, torch.finfo(torch.float32).eps)
    logits.note = (
        f"Passes up to {number(relative)} of the largest logit: {MARGIN} times the difference "
        f"between transformers' own two implementations of attention, sdpa and eager, which was "
        f"{number(spread)} in this run"
    )
    for name, sample, inputs in track(samples, "logits"):
        a, b = attempt(pair.ours, sample), attempt(pair.reference, inputs)
        tolerance = relative * float(b.value.abs().max()) if b.error is None else 0.0
        case = compare_tensors(name, a, b, tolerance)
        logits.add(case)
        if a.error is None and b.error is None and a.value.shape == b.value.shape:
            if case.failed and not case.detail:
                case.detail = f"the tolerance is {number(tolerance)}"
            top.add(_top_case(name, a.value, b.value, tolerance))
    agreeing = 1 - sum(case.differing for case in top.cases) / max(top.compared, 1)
    top.note = f"{agreeing:.2%} agree"


def _top_case(name: str, ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> Case:
    best = reference.topk(2, dim=-1)
    favoured = ours.argmax(dim=-1)
    differs = favoured != best.indices[:, 0]
    clear = best.values[:, 0] - best.values[:, 1] > 2 * tolerance
    wrong = int((differs & clear).sum())
    differing = int(differs.sum())
    case = Case(name, compared=len(favoured), differing=differing, failed=wrong > 0)
    case.largest = case.total = float(differing)
    if differing:
        case.detail = f"{differing - wrong} of {differing} are as good as equal"
    return case
