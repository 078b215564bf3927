"""Rows about the files of a directory: vocabulary, added tokens, texts, settings, template.

What is the same in all published checkpoints is written down once more in published.json, not taken
from the code that it serves to check, and any directory is held against it.
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from torchtune_vl.chat import CHAT_TEMPLATE, QwenTokenizer
from torchtune_vl.chat._processor_files import sizes_of_patches
from torchtune_vl.validation import _report as report
from torchtune_vl.validation._report import Case, Outcome, Row, Track, attempt
from torchtune_vl.validation._sides import Ours, Reference, obstacle

# An added token has its id, and whether skip_special_tokens leaves it out; hashes are of the lines
# "base64(token) id", and of the merges, one in a line. How large images may be is anyone's choice
_PUBLISHED: dict[str, Any] = report.data("published.json")
_PIXEL_LIMITS, _IMAGE_SETTINGS = _PUBLISHED["pixel_limits"], _PUBLISHED["image_settings"]


def vocabulary_row(ours: Ours, reference: Reference) -> Row:
    """Compare the vocabularies token by token, and with the published one."""
    row = report.row("vocabulary")
    directory, mine, theirs = ours.directory, ours.tokenizer, reference.tokenizer
    row.add(report.unreadable(mine, theirs) or _beside_transformers(mine, reference))
    if mine.error is None:
        has_one = (directory / "tokenizer.json").exists()
        row.add(_vocabulary_case("tokenizer.json" if has_one else "vocab.json", mine.value))
    if theirs.error is None:
        merges = "\n".join(reference.merges()).encode()
        row.add(_digest_case("merges that transformers reads", merges, "merges"))
    files = directory / "vocab.json", directory / "merges.txt"
    if (directory / "tokenizer.json").exists() and files[0].exists():  # other programs read these
        second = attempt(QwenTokenizer, *files)
        if second.error is not None:
            detail = report.brief(second.error)
            row.add(Case("tokens of vocab.json", 0, 0, report.INFINITE, failed=True, detail=detail))
        else:
            lines = files[1].read_bytes().splitlines()
            merges = b"\n".join(line for line in lines if line and line[:8] != b"#version")
            row.add(_vocabulary_case("vocab.json", second.value))
            row.add(_digest_case("merges.txt", merges, "merges"))
    return row


def _tokens(tokenizer: QwenTokenizer) -> list[bytes]:
    decode = tokenizer._encoding.decode_single_token_bytes
    return [decode(i) for i in range(tokenizer.base_vocab_size)]


def _beside_transformers(ours: Outcome, reference: Reference) -> Case:
    a, b = ours.map(_tokens), reference.tokenizer.map(lambda _: reference.tokens())
    case = report.compare_sequences("ours beside transformers", a, b)
    places = [i for i, (x, y) in enumerate(zip(a.value, b.value, strict=False)) if x != y][:9]
    texts = [[(i, side.value[i].decode(errors="replace")) for i in places] for side in (a, b)]
    case.tokens = [report.TokenPair(*pair) for pair in zip(places, *texts, strict=True)]
    return case


def _vocabulary_case(file: str, tokenizer: QwenTokenizer) -> Case:
    lines = (b"%s %d\n" % (b64encode(token), i) for i, token in enumerate(_tokens(tokenizer)))
    return _digest_case(f"tokens of {file}", b"".join(lines), "vocabulary")


def _digest_case(name: str, content: bytes, what: str) -> Case:
    expected = _PUBLISHED[f"{what}_sha256"]
    digests = ({"their SHA-256": d} for d in (hashlib.sha256(content).hexdigest(), expected))
    case = report.compare_settings(f"{name} beside the published", *digests)
    if case.failed:
        case.detail += ": at least one of them is another. Take the published file"
    return case


def _add_settings(row: Row, ours: Outcome, reference: Outcome, published: dict[str, Any]) -> None:
    """Compare what could be read of each side with the published, and of both."""
    for side, settings in (("transformers", reference), ("ours", ours)):
        if settings.error is None:
            name = f"{side} beside the published"
            row.add(report.compare_settings(name, settings.value, published))
    if ours.error is None and reference.error is None:
        row.add(report.compare_settings("ours beside transformers", ours.value, reference.value))


def special_tokens_row(ours: Ours, reference: Reference) -> Row:
    """Compare ids and kinds of added tokens."""
    row = report.row("special tokens")
    if reference.tokenizer.error:
        row.skipped = "unreadable: see vocabulary"
        return row

    def of_ours(t: QwenTokenizer) -> dict[str, Any]:
        added = t.special_tokens.items()
        tokens = {name: [i, not t.decode([i], skip_special_tokens=True)] for name, i in added}
        return {**tokens, "end": t.decode([t.eos_id]), "padding": t.decode([t.pad_id])}

    def of_reference(t: Any) -> dict[str, Any]:
        tokens = {token.content: [i, token.special] for i, token in t.added_tokens_decoder.items()}
        return {**tokens, "end": t.eos_token, "padding": t.pad_token}

    sides = ours.tokenizer.map(of_ours), reference.tokenizer.map(of_reference)
    _add_settings(row, *sides, _PUBLISHED["added_tokens"])
    return row


def image_settings_row(ours: Ours, reference: Reference) -> Row:
    """Compare mean, deviation, sizes of patches and limits of areas."""
    row = report.row("image settings")
    processor = reference.image_processors["pil"]
    if (unread := report.unreadable(ours.settings, processor)) is not None:
        row.add(unread)

    def of_ours(_: Any) -> dict[str, Any]:
        images = ours.image_transforms["pil"]
        lists = {name: [*getattr(images, name)] for name in ("image_mean", "image_std")}
        # Our transform knows no others, and refuses a directory that asks for them
        fixed = {"rescale_factor": 1 / 255, "resample": 3, **sizes_of_patches(images.geometry)}
        return {**{name: getattr(images, name) for name in _PIXEL_LIMITS}, **lists, **fixed}

    def of_reference(p: Any) -> dict[str, Any]:
        limits = {"min_pixels": p.size["shortest_edge"], "max_pixels": p.size["longest_edge"]}
        lists = {"image_mean": [*p.image_mean], "image_std": [*p.image_std]}
        return {name: getattr(p, name) for name in _IMAGE_SETTINGS} | limits | lists

    mine = ours.settings.map(of_ours)
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
    row = report.row("chat template", obstacle(ours, reference))
    if not row.skipped:
        mine = ours.transform.value.chat_template
        theirs = reference.processor.value.chat_template or ""
        texts = Outcome(mine.strip()), Outcome(theirs.strip())
        row.add(report.compare_sequences("ours beside transformers", *texts))
        row.note = "" if mine == CHAT_TEMPLATE else "This template is not the published one"
    return row


def text_row(
    ours: Ours, reference: Reference, texts: Mapping[str, Sequence[str]], track: Track
) -> Row:
    """Compare the ids of texts, by the name of their source."""
    row = report.row("text ids")
    if ours.tokenizer.error or reference.tokenizer.error:
        row.skipped = "unreadable: see vocabulary"
        return row
    mine, theirs = ours.tokenizer.value, reference.tokenizer.value
    mine.encode("once before the time is taken"), theirs("once before the time is taken")
    for name, text in track([(name, t) for name, group in texts.items() for t in group], "texts"):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:60])
        name = f"{name}: {line}{'...' if len(text) > 60 else ''}"
        a = attempt(mine.encode, text, add_eos=False)
        b = attempt(lambda text: theirs(text).input_ids, text)
        row.add(report.compare_sequences(name, a, b, lambda token: mine.decode([token])))
    return row
