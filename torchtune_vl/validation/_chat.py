"""Rows about conversations, ids, pixels, positions, and about the model that reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from torchtune_vl.chat._vocabulary import STRUCTURAL_TOKENS
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.files._safetensors import weight_files
from torchtune_vl.files._tensor_names import published_name
from torchtune_vl.models import model_from_pretrained
from torchtune_vl.models._registry import family_of
from torchtune_vl.models._weights import load_weights
from torchtune_vl.validation import _report as report
from torchtune_vl.validation._inputs import Conversation
from torchtune_vl.validation._report import Case, Outcome, Row, Track, attempt, number
from torchtune_vl.validation._sides import Ours, Reference, continue_behind_media, obstacle

# Longer conversations are not run through the models: logits, and eager attention, take gigabytes
MAX_TOKENS = 1024
# How much further from transformers we may be than transformers is from itself, when it computes
# attention another way. Rounding that is no better than that is no error.
MARGIN = 10
# Name, and what each model takes
Sample = tuple[str, dict[str, Any], dict[str, torch.Tensor]]


def chat_rows(
    ours: Ours, reference: Reference, conversations: Sequence[Conversation], keep: int, track: Track
) -> tuple[list[Row], list[Sample]]:
    """Compare ids, pixels and positions, and keep a number of short samples for the models."""
    skipped = obstacle(ours, reference)
    if not skipped and reference.rope.error:
        skipped = f"transformers cannot read config.json: {reference.rope.error}"
    rows = [report.row(name, skipped) for name in ("chat ids", "chat pixels", "positions")]
    samples: list[Sample] = []
    if skipped:
        return rows, samples
    ids, pixels, positions = rows
    transform = ours.transform.value
    # A template of another kind need not say where answers are, which training asks for
    asks = transform.prompts.chat_template is not None
    first = next(c for c in conversations if c.values("image"))
    # Compile and load codecs before the time is taken
    attempt(transform, first.sample, asks), attempt(reference.chat, first, [], asks)
    problems, moved = [], 0
    for conversation in track(conversations, "conversations"):
        name, problem = conversation.name, conversation.problem
        if conversation.tools is not None and not reference.tokenizer.value.chat_template:
            problem = "conversations with tools need a chat template in tokenizer_config.json"
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        timings = [ours.timing(path) for path in conversation.values("video")]
        a = attempt(transform, conversation.sample, asks)
        b = attempt(reference.chat, conversation, [frames for frames, _ in timings], asks)
        sides = a.map(lambda s: s["tokens"]), b.map(lambda inputs: inputs["input_ids"][0].tolist())
        ids.add(report.compare_sequences(name, *sides, lambda token: transform.decode([token])))
        if a.error is not None or b.error is not None:
            continue
        kinds = [item["type"] for item in conversation.items if item["type"] != "text"]
        vision = a.value.get("encoder_input", {}).get("vision", {})
        if kinds:
            patches = Outcome(vision["patches"]), Outcome(_patches_in_order(kinds, b.value))
            pixels.add(report.compare_tensors(name, *patches))
        usual = attempt(reference.positions, b.value)
        token_types = b.value["mm_token_type_ids"][0]
        behind = usual.map(partial(continue_behind_media, kinds=token_types))
        seconds = iter([seconds for _, seconds in timings])
        steps = [next(seconds) if kind == "video" else None for kind in kinds]
        grids = vision.get("grid_thw", torch.empty(0, 3, dtype=torch.long))
        timed = attempt(transform.positions, a.value["tokens"], grids, steps)
        given = replace(timed, value=a.value["input_pos"].tolist(), error=None)
        positions.add(report.compare_sequences(name, given, behind.map(torch.Tensor.tolist)))
        if behind.error is not None:
            continue
        moved += not torch.equal(usual.value, behind.value)
        if len(a.value["tokens"]) <= MAX_TOKENS and len(samples) < keep:
            inputs = {**b.value, "position_ids": behind.value.T[:, None]}
            samples.append((name, a.value, inputs))
    some = f"Not compared: {len(problems):,}, among them {'; '.join(problems[:3])}"
    notes = [some] if problems else []
    texts = ["\n".join(conversation.values("text")) for conversation in conversations]
    forged = sum(any(token in text for token in STRUCTURAL_TOKENS) for text in texts)
    if forged:
        notes.append(
            f"With tokens such as <|im_end|> in a text: {forged:,}. These tokens are compared as "
            'transformers reads them (parse_special="all"); by default our transform takes them '
            "for text"
        )
    ids.note = ". ".join(notes)
    if moved:
        positions.note = (
            f"transformers {version('transformers')} begins the text behind videos of {moved:,} "
            "conversations before they end, at half the larger side of their frames; compared, and "
            "run for the logits, are its positions with this text behind the last position of the "
            "video, as the weights have learned it"
        )
    return rows, samples


def _patches_in_order(kinds: Sequence[str], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The patches of images and videos, which transformers keeps apart, in one."""
    media = {
        kind: iter(inputs[key].split(inputs[f"{kind}_grid_thw"].prod(1).tolist()))
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos"))
        if key in inputs
    }
    return torch.cat([next(media[kind]) for kind in kinds])


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
    skipped = "" if logits else "only with --logits"
    rows = [report.row("weights"), report.row("logits", skipped), report.row("top-1", skipped)]
    for row in rows:
        row.about = row.about.replace("DTYPE", str(dtype).removeprefix("torch."))
    if not weights and not logits:
        rows[0].skipped = "only with --weights"
        return rows
    ours, theirs = attempt(_load, directory, dtype), attempt(reference.model, dtype)
    if (unread := report.unreadable(ours, theirs)) is not None:
        rows[0].add(unread)
    else:
        a = family_of(directory).names.to_published(ours.value.state_dict())
        b = {published_name(name): tensor for name, tensor in theirs.value.state_dict().items()}
        if "lm_head.weight" not in a and theirs.value.config.tie_word_embeddings:
            del b["lm_head.weight"]
        names = replace(ours, value=sorted(a)), replace(theirs, value=sorted(b))
        rows[0].add(report.compare_sequences("names of tensors", *names))
        for name in track(sorted(a.keys() & b.keys()), "weights"):
            rows[0].add(report.compare_tensors(name, Outcome(a[name]), Outcome(b[name])))
        if logits and samples:
            _compare_logits((ours.value, theirs.value), samples, rows[1:], track)
    for row in rows:
        row.skipped = row.skipped or "unreadable: see vocabulary, image settings and weights"
    return rows


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


def _compare_logits(
    models: tuple[Any, Any], samples: Sequence[Sample], rows: Sequence[Row], track: Track
) -> None:
    (ours, reference), (logits, top) = models, rows

    def spread_of(inputs: Mapping[str, Any]) -> float:
        usual, other = (_reference_logits(reference, inputs, kind) for kind in ("sdpa", "eager"))
        return float((usual - other).abs().max() / usual.abs().max())

    spreads = [attempt(spread_of, inputs) for *_, inputs in track(samples, "rounding")]
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
        case = report.compare_tensors(name, a, b, tolerance)
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
    case = report.counted(name, len(ours), differing)
    case.failed = wrong > 0
    case.detail = f"{differing - wrong} of {differing} are as good as equal" if differing else ""
    return case
