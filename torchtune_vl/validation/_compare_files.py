"""Compares the files of a checkpoint: vocabulary, added tokens, texts, settings, template."""

import hashlib
import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from torchtune_vl.chat import QwenTokenizer
from torchtune_vl.chat._processor_files import sizes_of_patches
from torchtune_vl.chat._prompt import VIDEO, VIDEO_ALONE
from torchtune_vl.validation._compare import Comparison, brief, compare, unreadable
from torchtune_vl.validation._ours_and_reference import attempt, failed
from torchtune_vl.validation._report import Case, Row, package_file

# What is the same in all published checkpoints, and what in those of a family, not taken from the
# code that it serves to check: an added token has its id, and whether skip_special_tokens leaves it
# out; hashes are of the lines "base64(token) id", and of the merges, one in a line. How large an
# image may be is anyone's choice
_PUBLISHED: dict[str, Any] = json.loads(package_file("published_settings.json"))
_BOTH = "ours beside transformers"


def compare_vocabularies(run: Comparison) -> None:
    """Compare the vocabularies token by token, and all of their files with the published ones."""
    row, (file, *_) = run.rows["vocabulary"], run.ours.vocabulary_files
    reference = run.reference.tokenizer
    ours, theirs = attempt(_tokens, run.ours.tokenizer), attempt(_reference_tokens, reference)
    text_of = partial(bytes.decode, errors="replace")
    row.add(compare(_BOTH, ours, theirs, text_of=text_of, must_read=True))
    contents = [
        (f"tokens of {file.name}", "vocabulary", attempt(_lines, ours)),
        ("merges that transformers reads", "merges", attempt(_reference_merges, reference)),
    ]
    vocab, merges = file.with_name("vocab.json"), file.with_name("merges.txt")
    if file != vocab and vocab.exists():  # other programs read these
        tokens = attempt(_tokens, attempt(QwenTokenizer, vocab, merges))
        if failed(tokens):
            detail = brief(tokens)
            row.add(Case("tokens of vocab.json", largest=math.inf, failed=True, detail=detail))
        else:
            lines = [line for line in merges.read_bytes().splitlines() if line]
            content = b"\n".join(line for line in lines if not line.startswith(b"#version"))
            contents.append(("tokens of vocab.json", "vocabulary", _lines(tokens)))
            contents.append(("merges.txt", "merges", content))
    for name, what, content in contents:
        if not failed(content):
            digests = hashlib.sha256(content).hexdigest(), _PUBLISHED[f"{what}_sha256"]
            sides = ({"their SHA-256": digest} for digest in digests)
            case = compare(f"{name} beside the published", *sides)
            if case.failed:
                case.detail += ": at least one of them is another. Take the published file"
            row.add(case)


def _published(run: Comparison, what: str) -> dict[str, Any]:
    """The published settings of a kind, of the family that is compared."""
    family = run.ours.family.package
    own = [some[what] for some in _PUBLISHED["of_families"] if family in some["families"]]
    return {**_PUBLISHED[what], **(own[0] if own else {})}


def _tokens(tokenizer: QwenTokenizer) -> list[bytes]:
    return tokenizer.token_bytes(range(tokenizer.base_vocab_size))


def _reference_tokens(tokenizer: Any) -> list[bytes]:
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    vocab = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return [bytes(map(to_byte.__getitem__, t)) for t in sorted(vocab, key=vocab.__getitem__)]


def _reference_merges(tokenizer: Any) -> bytes:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return "\n".join(m if isinstance(m, str) else " ".join(m) for m in merges).encode()


def _lines(tokens: Sequence[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (b64encode(token), i) for i, token in enumerate(tokens))


def _compare_settings(row: Row, ours: Any, theirs: Any, published: Mapping) -> None:
    """Compare what could be read of each side with the published, and of both."""
    for side, settings in (("transformers", theirs), ("ours", ours)):
        if not failed(settings):
            row.add(compare(f"{side} beside the published", settings, published))
    row.add(compare(_BOTH, ours, theirs, must_read=True))


def compare_special_tokens(run: Comparison) -> None:
    """Compare ids and kinds of added tokens."""
    ours, theirs = run.ours.tokenizer, run.reference.tokenizer
    if run.skip(unreadable("vocabulary", theirs), "special tokens"):
        return

    def of_ours(tokenizer: QwenTokenizer) -> dict[str, Any]:
        decode, added = tokenizer.decode, tokenizer.special_tokens.items()
        tokens = {name: [i, not decode([i], skip_special_tokens=True)] for name, i in added}
        return {**tokens, "end": decode([tokenizer.eos_id]), "padding": decode([tokenizer.pad_id])}

    tokens = {token.content: [i, token.special] for i, token in theirs.added_tokens_decoder.items()}
    used = {**tokens, "end": theirs.eos_token, "padding": theirs.pad_token}
    row = run.rows["special tokens"]
    _compare_settings(row, attempt(of_ours, ours), used, _published(run, "added_tokens"))


def compare_image_settings(run: Comparison) -> None:
    """Compare mean, deviation, sizes of patches and limits of areas."""
    published, published_limits = (
        _published(run, what) for what in ("image_settings", "pixel_limits")
    )

    def of_ours(_: Any) -> dict[str, Any]:
        images = run.ours.image_transforms["pil"]
        limits = {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels}
        lists = {"image_mean": [*images.image_mean], "image_std": [*images.image_std]}
        # Our transform knows no others, and refuses a directory that asks for them
        fixed = {"rescale_factor": 1 / 255, "resample": 3, **sizes_of_patches(images.geometry)}
        return limits | lists | fixed

    def of_reference(p: Any) -> dict[str, Any]:
        limits = {"min_pixels": p.size["shortest_edge"], "max_pixels": p.size["longest_edge"]}
        lists = {"image_mean": [*p.image_mean], "image_std": [*p.image_std]}
        return {name: getattr(p, name) for name in published} | limits | lists

    row, processor = run.rows["image settings"], run.reference.image_processors["pil"]
    ours, theirs = attempt(of_ours, run.ours.settings), attempt(of_reference, processor)
    _compare_settings(row, ours, theirs, published)
    used = {} if failed(ours) else ours
    limits = {name: (used.get(name, value), value) for name, value in published_limits.items()}
    words = [
        f"{n} is {own:,}, published {value:,}" for n, (own, value) in limits.items() if own != value
    ]
    row.note = f"Used here: {'; '.join(words)}" if words else ""


def compare_chat_templates(run: Comparison) -> None:
    """Compare the chat templates that both sides follow."""
    if not run.skip(run.obstacle, "chat template"):
        row, ours = run.rows["chat template"], run.ours.transform.chat_template
        theirs = run.reference.processor.chat_template or ""
        if run.ours.transform.has_timed_steps:  # either form, of which exports have the second
            ours, theirs = (text.replace(VIDEO, VIDEO_ALONE) for text in (ours, theirs))
        row.add(compare(_BOTH, ours.strip(), theirs.strip()))
        is_published = run.ours.transform.has_published_template
        row.note = "" if is_published else "This template is not the published one"


def compare_texts(run: Comparison, texts: Mapping[str, Sequence[str]]) -> None:
    """Compare the ids of texts, by the name of their source."""
    ours, theirs = run.ours.tokenizer, run.reference.tokenizer
    if run.skip(unreadable("vocabulary", ours, theirs), "text ids"):
        return
    named = [(name, text) for name, group in texts.items() for text in group]
    for name, text in run.track(named, "texts"):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:60])
        name = f"{name}: {line}{'...' if len(text) > 60 else ''}"
        a = attempt(ours.encode, text, add_eos=False)
        b = attempt(lambda text: theirs(text).input_ids, text)
        run.rows["text ids"].add(compare(name, a, b, text_of=lambda token: ours.decode([token])))
