"""Compares the files of a checkpoint: vocabulary, added tokens, texts, settings, template."""

import hashlib
import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from torchtune_vl.chat import CHAT_TEMPLATE, QwenTokenizer
from torchtune_vl.chat._processor_files import sizes_of_patches
from torchtune_vl.validation._compare_values import Outcome, attempt, brief, compare
from torchtune_vl.validation._ours_and_reference import Comparison, unreadable
from torchtune_vl.validation._report import Case, Row, TokenPair, package_file

# What is the same in all published checkpoints, not taken from the code that it serves to check: an
# added token has its id, and whether skip_special_tokens leaves it out; hashes are of the lines
# "base64(token) id", and of the merges, one in a line. How large images may be is anyone's choice
_PUBLISHED: dict[str, Any] = json.loads(package_file("published.json"))
_PIXEL_LIMITS, _IMAGE_SETTINGS = _PUBLISHED["pixel_limits"], _PUBLISHED["image_settings"]
_BOTH = "ours beside transformers"


def compare_vocabularies(run: Comparison) -> None:
    """Compare the vocabularies token by token, and all of their files with the published ones."""
    row, (file, *_) = run.rows["vocabulary"], run.ours.vocabulary_files
    ours, tokenizer = run.ours.tokenizer.map(_tokens), run.reference.tokenizer
    theirs = tokenizer.map(_reference_tokens)
    case = compare(_BOTH, ours, theirs, must_read=True)
    if case.differing:
        pairs = enumerate(zip(ours.value, theirs.value, strict=False))
        different = [(i, pair) for i, pair in pairs if pair[0] != pair[1]][:9]
        texts = [(i, [token.decode(errors="replace") for token in pair]) for i, pair in different]
        case.tokens = [TokenPair(i, (i, a), (i, b)) for i, (a, b) in texts]
    row.add(case)
    contents = [
        (f"tokens of {file.name}", "vocabulary", ours.map(_lines)),
        ("merges that transformers reads", "merges", tokenizer.map(_reference_merges)),
    ]
    others = file.with_name("vocab.json"), file.with_name("merges.txt")
    if file not in others and others[0].exists():  # other programs read these
        second = attempt(QwenTokenizer, *others).map(_tokens)
        if second.error:
            detail = brief(second.error)
            row.add(Case("tokens of vocab.json", largest=math.inf, failed=True, detail=detail))
        else:
            lines = [line for line in others[1].read_bytes().splitlines() if line]
            merges = b"\n".join(line for line in lines if not line.startswith(b"#version"))
            contents.append(("tokens of vocab.json", "vocabulary", second.map(_lines)))
            contents.append(("merges.txt", "merges", Outcome(merges)))
    for name, what, content in contents:
        if not content.error:
            digests = hashlib.sha256(content.value).hexdigest(), _PUBLISHED[f"{what}_sha256"]
            sides = [Outcome({"their SHA-256": digest}) for digest in digests]
            case = compare(f"{name} beside the published", *sides)
            if case.failed:
                case.detail += ": at least one of them is another. Take the published file"
            row.add(case)


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


def _compare_settings(row: Row, ours: Outcome, theirs: Outcome, published: Mapping) -> None:
    """Compare what could be read of each side with the published, and of both."""
    for side, settings in (("transformers", theirs), ("ours", ours)):
        if not settings.error:
            row.add(compare(f"{side} beside the published", settings, Outcome(published)))
    if not ours.error and not theirs.error:
        row.add(compare(_BOTH, ours, theirs))


def compare_special_tokens(run: Comparison) -> None:
    """Compare ids and kinds of added tokens."""

    def of_ours(t: QwenTokenizer) -> dict[str, Any]:
        added = t.special_tokens.items()
        tokens = {name: [i, not t.decode([i], skip_special_tokens=True)] for name, i in added}
        return {**tokens, "end": t.decode([t.eos_id]), "padding": t.decode([t.pad_id])}

    def of_reference(t: Any) -> dict[str, Any]:
        tokens = {token.content: [i, token.special] for i, token in t.added_tokens_decoder.items()}
        return {**tokens, "end": t.eos_token, "padding": t.pad_token}

    if not run.skip(unreadable("vocabulary", run.reference.tokenizer), "special tokens"):
        sides = run.ours.tokenizer.map(of_ours), run.reference.tokenizer.map(of_reference)
        _compare_settings(run.rows["special tokens"], *sides, _PUBLISHED["added_tokens"])


def compare_image_settings(run: Comparison) -> None:
    """Compare mean, deviation, sizes of patches and limits of areas."""

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
        return {name: getattr(p, name) for name in _IMAGE_SETTINGS} | limits | lists

    row, processor = run.rows["image settings"], run.reference.image_processors["pil"]
    ours, theirs = run.ours.settings.map(of_ours), processor.map(of_reference)
    if ours.error or theirs.error:
        row.add(compare(_BOTH, ours, theirs, must_read=True))
    _compare_settings(row, ours, theirs, _IMAGE_SETTINGS)
    used = {} if ours.error else ours.value
    changed = [
        f"{name} is {used[name]:,}, published {value:,}"
        for name, value in _PIXEL_LIMITS.items()
        if used.get(name, value) != value
    ]
    row.note = f"Used here: {'; '.join(changed)}" if changed else ""


def compare_chat_templates(run: Comparison) -> None:
    """Compare the chat templates that both sides follow."""
    if not run.skip(run.obstacle, "chat template"):
        row, ours = run.rows["chat template"], run.ours.transform.value.chat_template
        theirs = run.reference.processor.value.chat_template or ""
        row.add(compare(_BOTH, Outcome(ours.strip()), Outcome(theirs.strip())))
        row.note = "" if ours == CHAT_TEMPLATE else "This template is not the published one"


def compare_texts(run: Comparison, texts: Mapping[str, Sequence[str]]) -> None:
    """Compare the ids of texts, by the name of their source."""
    sides = run.ours.tokenizer, run.reference.tokenizer
    if run.skip(unreadable("vocabulary", *sides), "text ids"):
        return
    ours, theirs = (side.value for side in sides)
    named = [(name, text) for name, group in texts.items() for text in group]
    for name, text in run.track(named, "texts"):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:60])
        name = f"{name}: {line}{'...' if len(text) > 60 else ''}"
        a = attempt(ours.encode, text, add_eos=False)
        b = attempt(theirs, text).map(lambda encoded: encoded.input_ids)
        run.rows["text ids"].add(compare(name, a, b, text_of=lambda token: ours.decode([token])))
