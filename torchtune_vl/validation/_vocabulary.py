"""Rows about the tokenizer: its vocabulary, its added tokens, and texts."""

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtune_vl.chat import QwenTokenizer
from torchtune_vl.validation import _published as published
from torchtune_vl.validation._compare import compare_sequences, compare_settings
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
    unreadable,
)

# Differing entries of the vocabulary that the report shows
_SHOWN = 9


def vocabulary_row(ours: Ours, reference: Reference) -> Row:
    """Compare the vocabularies token by token, and with the published one.

    Args:
        ours: our side.
        reference: transformers' side.

    Returns:
        The row.
    """
    row = Row(
        "vocabulary",
        "Every token of the vocabulary, and every merge that makes it, by its id: ours beside "
        "transformers, and the files beside the published ones by their SHA-256.",
        "values",
    )
    directory, mine, theirs = ours.directory, ours.tokenizer, reference.tokenizer
    unread = unreadable(mine, theirs)
    row.add(unread if unread is not None else _beside_transformers(mine, reference))
    if mine.error is None:
        row.add(_beside_published(_name_of_files(directory), _tokens(mine.value)))
    if theirs.error is None:
        row.add(_merges_beside_published(reference.merges()))
    if (directory / "tokenizer.json").exists() and (directory / "vocab.json").exists():
        for case in _second_form(directory):
            row.add(case)
    return row


def _name_of_files(directory: Path) -> str:
    first = "tokenizer.json"
    return first if (directory / first).exists() else "vocab.json"


def _beside_transformers(ours: Outcome[QwenTokenizer], reference: Reference) -> Case:
    a, b = _tokens(ours.value), reference.tokens()
    case = compare_sequences(
        "ours beside transformers",
        Outcome(a, None, ours.seconds),
        Outcome(b, None, reference.tokenizer.seconds),
    )
    differing = [i for i in range(min(len(a), len(b))) if a[i] != b[i]]
    case.tokens = [TokenPair(i, (i, _text(a[i])), (i, _text(b[i]))) for i in differing[:_SHOWN]]
    return case


def _beside_published(files: str, tokens: Sequence[bytes]) -> Case:
    lines = (b"%s %d\n" % (b64encode(token), i) for i, token in enumerate(tokens))
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    return _digest_case(f"tokens of {files}", digest, published.VOCABULARY_SHA256)


def _merges_beside_published(merges: Sequence[str]) -> Case:
    digest = hashlib.sha256("\n".join(merges).encode()).hexdigest()
    return _digest_case("merges that transformers reads", digest, published.MERGES_SHA256)


def _second_form(directory: Path) -> list[Case]:
    """vocab.json and merges.txt beside tokenizer.json are read by other programs."""
    name = "tokens of vocab.json"
    merges = directory / "merges.txt"
    second = attempt(QwenTokenizer, directory / "vocab.json", merges)
    if second.error is not None:
        return [Case(name, failed=True, largest=float("inf"), detail=brief(second.error))]
    lines = merges.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#version")]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return [
        _beside_published("vocab.json", _tokens(second.value)),
        _digest_case("merges.txt", digest, published.MERGES_SHA256),
    ]


def _digest_case(name: str, digest: str, expected: str) -> Case:
    case = compare_settings(
        f"{name} beside the published", {"their SHA-256": digest}, {"their SHA-256": expected}
    )
    if case.failed:
        case.detail += ": at least one of them is another. Take the published file"
    return case


def _tokens(tokenizer: QwenTokenizer) -> list[bytes]:
    decode = tokenizer._encoding.decode_single_token_bytes
    return [decode(i) for i in range(tokenizer.base_vocab_size)]


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="replace")


def special_tokens_row(ours: Ours, reference: Reference) -> Row:
    """Compare ids and kinds of added tokens.

    Args:
        ours: our side.
        reference: transformers' side.

    Returns:
        The row.
    """
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
    expected = {
        **published.ADDED_TOKENS,
        "end": published.END_TOKEN,
        "padding": published.PADDING_TOKEN,
    }
    theirs = reference.added_tokens()
    row.add(compare_settings("transformers beside the published", theirs, expected))
    if ours.tokenizer.error is None:
        added = _added_tokens(ours.tokenizer.value)
        row.add(compare_settings("ours beside the published", added, expected))
        row.add(compare_settings("ours beside transformers", added, theirs))
    return row


def _added_tokens(tokenizer: QwenTokenizer) -> dict[str, Any]:
    return {
        **{
            name: (token_id, tokenizer.decode([token_id], skip_special_tokens=True) == "")
            for name, token_id in tokenizer.special_tokens.items()
        },
        "end": tokenizer.decode([tokenizer.eos_id]),
        "padding": tokenizer.decode([tokenizer.pad_id]),
    }


def text_row(
    ours: Ours, reference: Reference, texts: Mapping[str, Sequence[str]], track: Track
) -> Row:
    """Compare the ids of texts.

    Args:
        ours: our side.
        reference: transformers' side.
        texts: from the name of a source to its texts.
        track: shows progress.

    Returns:
        The row.
    """
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
    named = [(name, text) for name, group in texts.items() for text in group]
    for name, text in track(named, "texts"):
        case = compare_sequences(
            f"{name}: {_shortened(text)}",
            attempt(tokenizer.encode, text, add_eos=False),
            attempt(reference.text_ids, text),
            lambda token_id: tokenizer.decode([token_id]),
        )
        row.add(case)
    return row


def _shortened(text: str) -> str:
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:60])
    return line if len(text) <= 60 else f"{line}..."
