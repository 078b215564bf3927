"""Compares conversations, their ids, pixels and positions, and models, their weights and logits."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchtune_vl.chat._vocabulary import STRUCTURAL_TOKENS
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.files._tensor_names import flat_name
from torchtune_vl.models import model_from_pretrained
from torchtune_vl.training._sharding import default_dtype
from torchtune_vl.validation._compare import Comparison, compare
from torchtune_vl.validation._inputs import Conversation
from torchtune_vl.validation._ours_and_reference import MEDIA_KEYS, attempt, failed
from torchtune_vl.validation._report import Case, number

# Longer conversations are not run through the models: logits, and eager attention, take gigabytes
MAX_TOKENS = 1024
# How much further from transformers we may be than it is from itself, when it computes attention
# another way. Rounding that is no better than that is no error.
MARGIN = 10


class Sample(NamedTuple):
    """What each model takes of a conversation."""

    name: str
    ours: dict[str, Any]
    reference: dict[str, torch.Tensor]


def compare_conversations(run: Comparison, chats: list[Conversation], keep: int) -> list[Sample]:
    """Compare ids, pixels and positions, and keep a number of short samples for the models."""
    reference, skipped = run.reference, run.obstacle
    if not skipped and failed(reference.rope):
        skipped = f"transformers cannot read config.json: {reference.rope}"
    if run.skip(skipped, "chat ids", "chat pixels", "positions"):
        return []
    ids, pixels, positions = (run.rows[n] for n in ("chat ids", "chat pixels", "positions"))
    transform = run.ours.transform
    # A template of another kind need not say where answers are, which training asks for
    asks = not transform.has_published_template
    samples: list[Sample] = []
    problems, moved = [], 0
    for conversation in run.track(chats, "conversations"):
        name, problem = conversation.name, conversation.problem
        if conversation.tools is not None and not reference.knows_tools:
            if not reference.tokenizer.chat_template:
                problem = "conversations with tools need a chat template in tokenizer_config.json"
            elif any(item["type"] != "text" for item in conversation.items):
                problem = "transformers' template with tools takes no images or videos"
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        frames = [run.ours.frames(path) for path in conversation.values("video")]
        a = attempt(transform, conversation.sample, asks)
        b = attempt(reference.chat, conversation, frames, asks)
        tokens = attempt(lambda s: s["tokens"], a), attempt(lambda s: s["input_ids"][0].tolist(), b)
        ids.add(compare(name, *tokens, text_of=lambda token: transform.decode([token])))
        if failed(a, b):
            continue
        kinds = [item["type"] for item in conversation.items if item["type"] != "text"]
        if kinds:
            patches = a["encoder_input"]["vision"]["patches"]
            pixels.add(compare(name, patches, _patches_in_order(kinds, b)))
        usual = attempt(reference.positions, b)
        behind = attempt(continue_behind_media, usual, b["mm_token_type_ids"][0])
        theirs = attempt(torch.Tensor.tolist, behind)
        positions.add(compare(name, a["input_pos"].tolist(), theirs))
        if failed(behind):
            continue
        moved += not torch.equal(usual, behind)
        if len(a["tokens"]) <= MAX_TOKENS and len(samples) < keep:
            samples.append(Sample(name, a, {**b, "position_ids": behind.T[:, None]}))
    texts = ["\n".join(conversation.values("text")) for conversation in chats]
    forged = sum(any(token in text for token in STRUCTURAL_TOKENS) for text in texts)
    some = f"Not compared: {len(problems):,}, among them {'; '.join(problems[:3])}"
    notes = [some] if problems else []
    if forged:
        notes.append(
            f"With tokens such as <|im_end|> in a text: {forged:,}. They are compared as tokens, "
            'parse_special="all", as in transformers; by default our transform takes them for text'
        )
    if any(c.values("video") for c in chats) and reference.keeps_pair_around_steps:
        notes.append(
            f"transformers {version('transformers')} leaves a pair of <|vision_start|> and "
            "<|vision_end|> around each video, whose steps have their own; compared is its text "
            "without, as the weights have learned it"
        )
    ids.note = ". ".join(notes)
    if moved:
        positions.note = (
            f"transformers {version('transformers')} begins the text behind videos of {moved:,} "
            "conversations before they end, at half the larger side of their frames; compared, and "
            "run for the logits, are its positions with this text behind the last position of the "
            "video, as the weights have learned it"
        )
    return samples


def _patches_in_order(kinds: Sequence[str], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The patches of images and videos, which transformers keeps apart, in one."""
    media = {
        kind: iter(inputs[patches].split(inputs[grids].prod(1).tolist()))
        for kind, (patches, grids) in MEDIA_KEYS.items()
        if patches in inputs
    }
    return torch.cat([next(media[kind]) for kind in kinds])


def continue_behind_media(positions: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Let what follows a medium begin behind its largest position, as the weights have learned it.

    transformers >= 5.3 lets it begin at half the larger side of the medium's grid. Before a video
    has ended that is among its own temporal positions, and not where its ``generate`` goes on.
    """
    moved = positions.clone()
    behind_media = ((kinds[1:] == 0) & (kinds[:-1] != 0)).nonzero().flatten() + 1
    for start in behind_media.tolist():
        moved[start:] += moved[:start].max() + 1 - moved[start, 0]
    return moved


def compare_models(
    run: Comparison, samples: Sequence[Sample], dtype: torch.dtype, weights: bool, logits: bool
) -> None:
    """Compare weights, if asked to, and logits with weights."""
    for row in run.rows.values():
        row.about = row.about.replace("DTYPE", str(dtype).removeprefix("torch."))
    unread = "unreadable: see vocabulary, image settings and weights"
    run.skip(unread if logits else "only with --logits", "logits", "top-1")
    if run.skip("" if weights or logits else "only with --weights", "weights"):
        return
    row, directory = run.rows["weights"], run.ours.directory
    ours, theirs = attempt(_load, directory, dtype), attempt(run.reference.model, dtype)
    if failed(ours, theirs):
        row.add(compare("ours beside transformers", ours, theirs, must_read=True))
        return
    published = run.ours.family.names.to_published(ours.state_dict())
    a = {flat_name(name): tensor for name, tensor in published.items()}
    b = {flat_name(name): tensor for name, tensor in theirs.state_dict().items()}
    if "lm_head.weight" not in a and theirs.config.tie_word_embeddings:
        del b["lm_head.weight"]
    row.add(compare("names of tensors", sorted(a), sorted(b)))
    for name in run.track(sorted(a.keys() & b.keys()), "weights"):
        # transformers 5 holds experts' matrices the other way round than they are published
        if b[name].ndim == 3 and b[name].shape != a[name].shape:
            b[name] = b[name].mT
        row.add(compare(name, a[name], b[name]))
    if logits and samples:
        _compare_logits(run, ours, theirs, samples)


def _load(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    with default_dtype(dtype):
        return model_from_pretrained(directory).eval()


@torch.inference_mode()
def _compare_logits(run: Comparison, ours: Any, reference: Any, samples: Sequence[Sample]) -> None:
    def of_ours(sample: Sample) -> torch.Tensor:
        return ours(**padded_collate_vision([sample.ours]))[0].float()

    def of_reference(sample: Sample, attention: str = "sdpa") -> torch.Tensor:
        reference.set_attn_implementation(attention)
        return reference(**sample.reference).logits[0].float()

    def spread_of(sample: Sample) -> float:
        usual, other = of_reference(sample), of_reference(sample, "eager")
        return float((usual - other).abs().max() / usual.abs().max())

    logits, top = run.rows["logits"], run.rows["top-1"]
    spreads = [attempt(spread_of, sample) for sample in run.track(samples, "rounding")]
    # A model that does not run is told of by the cases below
    spread = max((spread for spread in spreads if not failed(spread)), default=0.0)
    relative = MARGIN * max(spread, torch.finfo(torch.float32).eps)
    logits.note = (
        f"Passes up to {number(relative)} of the largest logit: {MARGIN} times the difference "
        f"between transformers' own two implementations of attention, sdpa and eager, which was "
        f"{number(spread)} in this run"
    )
    for sample in run.track(samples, "logits"):
        a, b = attempt(of_ours, sample), attempt(of_reference, sample)
        tolerance = 0.0 if failed(b) else relative * float(b.abs().max())
        case = compare(sample.name, a, b, tolerance=tolerance)
        logits.add(case)
        if not failed(a, b) and a.shape == b.shape:
            if case.failed:
                case.detail = f"the tolerance is {number(tolerance)}"
            top.add(_top_case(sample.name, a, b, tolerance))
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
