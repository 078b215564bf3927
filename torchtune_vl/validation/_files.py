"""Rows about the files of a directory: vocabulary, added tokens, texts, settings, template.

What is the same in all published checkpoints is written down here once more, not taken from the
code that it serves to check, and any directory is held against it.
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from torchtune_vl.chat import CHAT_TEMPLATE, QwenTokenizer
from torchtune_vl.chat._pretrained import sizes_of_patches
from torchtune_vl.validation._ours import Ours
from torchtune_vl.validation._reference import Reference
from torchtune_vl.validation._report import (
    Case,
    Outcome,
    Row,
    TokenPair,
    Track,
    attempt,
    brief,
    compare_sequences,
    compare_settings,
    unreadable,
)

# Of Qwen's qwen.tiktoken: a line "base64(token) id" for each token, in the order of ids
_VOCABULARY_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
# Of the lines of merges.txt without its "#version", joined by line breaks
_MERGES_SHA256 = "bbeef245f0b03a9613753068e5799c2496290005594c68f09eed68feedbe6d1f"
# Of the added tokens the id, and whether skip_special_tokens leaves it out; who ends and pads
_KINDS = {
    True: "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad",
    False: "<tool_call> </tool_call> fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep",
}
_NAMES = [
    (name if name.startswith("<") else f"<|{name}|>", kind)
    for kind, names in _KINDS.items()
    for name in names.split()
]
_ADDED_TOKENS = {
    **{name: (number, kind) for number, (name, kind) in enumerate(_NAMES, start=151_643)},
    "end": "<|im_end|>",
    "padding": "<|endoftext|>",
}
# How large images may be is a choice of whoever trains ...
_PIXEL_LIMITS = {"min_pixels": 3136, "max_pixels": 12_845_056}
# ... and what the encoder was trained with is not
_IMAGE_SETTINGS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "rescale_factor": 1 / 255,
    "resample": 3,
}
# Differing entries of the vocabulary that the report shows
_SHOWN = 9


def vocabulary_row(ours: Ours, reference: Reference) -> Row:
    """Compare the vocabularies token by token, and with the published one."""
    row = Row(
        "vocabulary",
        "Every token of the vocabulary, and every merge that makes it, by its id: ours beside "
        "transformers, and the files beside the published ones by their SHA-256.",
        "values",
    )
    directory, mine, theirs = ours.directory, ours.tokenizer, reference.tokenizer
    both = "ours beside transformers"
    row.add(unreadable(both, mine, theirs) or _tokens_case(both, mine, reference))
    first = "tokenizer.json" if (directory / "tokenizer.json").exists() else "vocab.json"
    if mine.error is None:
        row.add(_vocabulary_case(first, mine.value))
    if theirs.error is None:
        row.add(_merges_case("merges that transformers reads", reference.merges()))
    if first != "vocab.json" and (directory / "vocab.json").exists():  # other programs read it
        merges = directory / "merges.txt"
        second = attempt(QwenTokenizer, directory / "vocab.json", merges)
        if second.error is None:
            lines = merges.read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if line and not line.startswith("#version")]
            row.add(_vocabulary_case("vocab.json", second.value))
            row.add(_merges_case("merges.txt", lines))
        else:
            detail = brief(second.error)
            row.add(Case("tokens of vocab.json", largest=float("inf"), failed=True, detail=detail))
    return row


def _tokens(tokenizer: QwenTokenizer) -> list[bytes]:
    decode = tokenizer._encoding.decode_single_token_bytes
    return [decode(i) for i in range(tokenizer.base_vocab_size)]


def _tokens_case(name: str, ours: Outcome, reference: Reference) -> Case:
    a, b = ours.map(_tokens), reference.tokenizer.map(lambda _: reference.tokens())
    case = compare_sequences(name, a, b)
    pairs = [(i, *pair) for i, pair in enumerate(zip(a.value, b.value, strict=False))]
    case.tokens = [
        TokenPair(i, (i, x.decode(errors="replace")), (i, y.decode(errors="replace")))
        for i, x, y in [(i, x, y) for i, x, y in pairs if x != y][:_SHOWN]
    ]
    return case


def _vocabulary_case(file: str, tokenizer: QwenTokenizer) -> Case:
    lines = (b"%s %d\n" % (b64encode(token), i) for i, token in enumerate(_tokens(tokenizer)))
    return _digest_case(f"tokens of {file}", b"".join(lines), _VOCABULARY_SHA256)


def _merges_case(name: str, merges: Sequence[str]) -> Case:
    return _digest_case(name, "\n".join(merges).encode(), _MERGES_SHA256)


def _digest_case(name: str, content: bytes, expected: str) -> Case:
    digest = {"their SHA-256": hashlib.sha256(content).hexdigest()}
    case = compare_settings(f"{name} beside the published", digest, {"their SHA-256": expected})
    if case.failed:
        case.detail += ": at least one of them is another. Take the published file"
    return case


def special_tokens_row(ours: Ours, reference: Reference) -> Row:
    """Compare ids and kinds of added tokens."""
    row = Row(
        "special tokens",
        "The added tokens, their ids, which of them skip_special_tokens leaves out, and the tokens "
        "that end an answer and pad a batch: ours beside transformers and the published ones.",
        "values",
        timed_in="-",
    )
    if reference.tokenizer.error:
        row.skipped = "unreadable: see vocabulary"
        return row

    def of_ours(tokenizer: QwenTokenizer) -> dict[str, Any]:
        decode, ids = tokenizer.decode, tokenizer.special_tokens
        kinds = {n: (i, decode([i], skip_special_tokens=True) == "") for n, i in ids.items()}
        ends = {"end": decode([tokenizer.eos_id]), "padding": decode([tokenizer.pad_id])}
        return {**kinds, **ends}

    theirs = reference.tokenizer.map(lambda _: reference.added_tokens())
    _add_settings(row, ours.tokenizer.map(of_ours), theirs, _ADDED_TOKENS)
    return row


def _add_settings(row: Row, ours: Outcome, reference: Outcome, published: dict[str, Any]) -> None:
    """Compare what could be read of each side with the published, and both."""
    for side, settings in (("transformers", reference), ("ours", ours)):
        if settings.error is None:
            row.add(compare_settings(f"{side} beside the published", settings.value, published))
    if ours.error is None and reference.error is None:
        row.add(compare_settings("ours beside transformers", ours.value, reference.value))


def image_settings_row(ours: Ours, reference: Reference) -> Row:
    """Compare mean, deviation, sizes of patches and limits of areas."""
    row = Row(
        "image settings",
        "What preprocessor_config.json says: mean, deviation, sizes of patches and limits of "
        "areas, ours beside transformers; and all but the limits beside the published values, "
        "which the encoder was trained with.",
        "values",
        timed_in="-",
    )
    processor = reference.image_processors["pil"]
    unread = unreadable("ours beside transformers", ours.image_settings, processor)
    if unread is not None:
        row.add(unread)

    def of_ours(_: Any) -> dict[str, Any]:
        images = ours.image_transforms["torchvision"]
        return {
            **{name: getattr(images, name) for name in _PIXEL_LIMITS},
            **{name: list(getattr(images, name)) for name in ("image_mean", "image_std")},
            **sizes_of_patches(images.geometry),
            # Our transform knows no others, and refuses a directory that asks for them
            "rescale_factor": 1 / 255,
            "resample": 3,
        }

    def of_reference(processor: Any) -> dict[str, Any]:
        settings = {name: getattr(processor, name) for name in _IMAGE_SETTINGS}
        return {
            **{name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()},
            "min_pixels": processor.size["shortest_edge"],
            "max_pixels": processor.size["longest_edge"],
        }

    mine = ours.image_settings.map(of_ours)
    _add_settings(row, mine, processor.map(of_reference), _IMAGE_SETTINGS)
    changed = [
        f"{name} is {mine.value[name]:,}, published {value:,}"
        for name, value in _PIXEL_LIMITS.items()
        if mine.error is None and mine.value[name] != value
    ]
    row.note = f"Used here: {'; '.join(changed)}" if changed else ""
    return row


def chat_template_row(ours: Ours, reference: Reference) -> Row:
    """Compare the chat templates that both sides follow."""
    row = Row(
        "chat template",
        "The template that turns conversations into text, as each side takes it from the "
        "directory. One that is not the published one is followed, and said here.",
        "characters",
        timed_in="-",
    )
    if reference.no_torchvision:
        row.skipped = reference.no_torchvision
    elif ours.transform.error or reference.processor.error:
        row.skipped = "unreadable: see vocabulary and image settings"
    else:
        mine = ours.transform.value.chat_template
        theirs = reference.processor.value.chat_template or ""
        texts = Outcome(mine.strip()), Outcome(theirs.strip())
        row.add(compare_sequences("ours beside transformers", *texts))
        row.note = "" if mine == CHAT_TEMPLATE else "This template is not the published one"
    return row


def text_row(
    ours: Ours, reference: Reference, texts: Mapping[str, Sequence[str]], track: Track
) -> Row:
    """Compare the ids of texts, by the name of their source."""
    row = Row(
        "text ids",
        "Token ids of texts in many scripts, code, emoji and odd white space, and of every text "
        "of the given conversations.",
        "ids",
    )
    if ours.tokenizer.error or reference.tokenizer.error:
        row.skipped = "unreadable: see vocabulary"
        return row
    tokenizer, theirs = ours.tokenizer.value, reference.tokenizer.value
    tokenizer.encode("once before the time is taken"), theirs("once before the time is taken")
    for name, text in track([(name, t) for name, group in texts.items() for t in group], "texts"):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:60])
        case = compare_sequences(
            f"{name}: {line}{'...' if len(text) > 60 else ''}",
            attempt(tokenizer.encode, text, add_eos=False),
            attempt(lambda text: theirs(text).input_ids, text),
            lambda token_id: tokenizer.decode([token_id]),
        )
        row.add(case)
    return row
