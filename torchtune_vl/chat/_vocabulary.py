"""The files of a vocabulary, read to tokens."""

from base64 import b64decode
from collections import Counter
from collections.abc import Sequence
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from torchtune_vl.files._json import JsonObject, read_json_object

_WORDS_AND_LINE_BREAKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
)
_BLANKS = r"\s+(?!\S)|\s+"
# The published expression in a third less time: tiktoken's regex engine tries the alternatives of
# one with a lookahead one by one, but compiles a group without one into a single automaton
FAST_REGEX = f"(?:{_WORDS_AND_LINE_BREAKS})|{_BLANKS}"
PAD = "<|endoftext|>"
EOS = "<|im_end|>"
# What turns and media are made of; the other added tokens are content
STRUCTURAL_TOKENS = (
    *(PAD, "<|im_start|>", EOS, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# The published added tokens, whose ids follow those of the vocabulary. The plain ones are not
# flagged as special: they survive `skip_special_tokens`
_PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
_ADDED = (
    *(PAD, "<|im_start|>", EOS, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", *STRUCTURAL_TOKENS[3:], *_PLAIN),
)
SPECIAL_TOKENS = {name: 151643 + number for number, name in enumerate(_ADDED)}
_NUM_BYTES = 256
# GPT-2's character for each byte: the byte's own if printable, else the next from U+0100
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_others = count(0x100)
CHARACTERS = {i: chr(i if i in _PRINTABLE else next(_others)) for i in range(_NUM_BYTES)}
_BYTES = {ord(character): byte for byte, character in CHARACTERS.items()}

_OFF = ("add_prefix_space", "trim_offsets", "use_regex")
BYTE_LEVEL = {"type": "ByteLevel", **dict.fromkeys(_OFF, False)}
_REGEX = {"Regex": f"{_WORDS_AND_LINE_BREAKS}|{_BLANKS}"}
_SPLIT = {"type": "Split", "pattern": _REGEX, "behavior": "Isolated", "invert": False}
# tokenizer.json's description of the way from text to the pieces whose bytes BPE merges
STEPS: dict[str, Any] = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_SPLIT, BYTE_LEVEL]},
}
# ... and its settings of BPE, each with the values that change nothing, first the published one
BPE: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "unk_token": (None,),
    "continuing_subword_prefix": ("", None),
    "end_of_word_suffix": ("", None),
    "fuse_unk": (False, True, None),
    "byte_fallback": (False, None),
}
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_Token = TypeVar("_Token", bytes, str)
# Tokens in the order of their ids, added tokens with their ids, and which of these are plain
_Vocabulary = tuple[list[bytes], dict[str, int], frozenset[str]]


def read_vocabulary(
    path: Path,
    merges_file: str | Path | None,
    special_tokens: dict[str, int] | None,
    more: Sequence[str] = (),
) -> _Vocabulary:
    """Read ``vocab.json`` and ``merges.txt``, ``tokenizer.json`` or a ``.tiktoken`` rank file.

    ``tokenizer.json`` states its added tokens. With other files they are the 22 published ones and
    ``more``, plain ones that follow them. ``FileNotFoundError`` if a file is not there, and
    ``ValueError`` if it is damaged, holds another kind of tokenizer, or does not fit the added
    tokens, given or read.
    """
    behind = range(max(SPECIAL_TOKENS.values()) + 1, 2**31)
    added = SPECIAL_TOKENS | dict(zip(more, behind, strict=False))
    plain = frozenset((*_PLAIN, *more))
    try:
        if merges_file is not None:
            merges = Path(merges_file).read_text(encoding="utf-8").splitlines()
            has_header = merges[:1] and merges[0].startswith("#version")
            tokens = _merged_tokens(read_json_object(path), merges[1:] if has_header else merges)
        elif path.suffix == ".tiktoken":
            lines = map(bytes.split, path.read_bytes().splitlines())
            tokens = _in_id_order({b64decode(token): int(rank) for token, rank in lines})
        else:
            tokens, added, plain = _read_tokenizer_json(path)
        if sorted(tokens[:_NUM_BYTES]) != [bytes([i]) for i in range(_NUM_BYTES)]:
            raise ValueError("the first 256 ids are not the 256 bytes")
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "vocab.json and merges.txt, tokenizer.json, or a published .tiktoken file"
        raise FileNotFoundError(f"{error.filename} is no file; a tokenizer reads {what}") from error
    except ValueError as error:
        files = path if merges_file is None else f"{path} and {merges_file}"
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{files}: {reason}. Use the published file, unchanged") from error
    added = dict(added if special_tokens is None else special_tokens)
    first = min(added.values(), default=None)
    if first != len(tokens):
        reason = "the file is cut off, or special_tokens is another model's"
        found = f"{len(tokens):,} tokens, but the first special token has the id {first}"
        raise ValueError(f"{path} holds {found}: {reason}")
    counts = Counter(added.values())
    wrong = [name for name, token_id in added.items() if not name or counts[token_id] > 1]
    if wrong:
        name = f"the special token {wrong[0]!r} has the id {added[wrong[0]]}"
        raise ValueError(f"{path}: {name}: give each a content and an id of its own")
    # No message has this one
    missing = {*STRUCTURAL_TOKENS} - added.keys() - {"<|vision_pad|>"}
    if missing:
        raise ValueError(f"{path}: no special tokens are {sorted(missing)}, which messages need")
    return tokens, added, plain


def _read_tokenizer_json(path: Path) -> _Vocabulary:
    tokenizer = read_json_object(path)
    if not isinstance(tokenizer.content.get("model"), dict):
        raise ValueError("it has no model, so if it is a vocab.json, merges_file is missing")
    bpe = tokenizer.part("model")
    steps = tokenizer.part("pre_tokenizer").content.get("pretokenizers")
    for step in steps if isinstance(steps, list) else []:
        # It moves offsets, not ids, and transformers writes it otherwise than it was published.
        if isinstance(step, dict) and "trim_offsets" in step:
            step["trim_offsets"] = False
    for name, expected in STEPS.items():
        if tokenizer.part(name).content != expected:
            raise tokenizer.error(name, "Qwen's steps before BPE, as published")
    for name, harmless in {**BPE, "ignore_merges": (False, None)}.items():
        if bpe.content.get(name) not in harmless:
            raise bpe.error(name, f"{harmless[0]!r}: nothing else is supported")
    merges = bpe.each("merges")
    for place, merge in merges.content.items():
        # `a b` or, as newer files have it, `["a", "b"]`
        parts = merge if isinstance(merge, list) else [merge]
        if len(parts) > 2 or not all(isinstance(part, str) for part in parts):
            raise merges.error(place, "two strings, or one with a space between both")
        merges.content[place] = "".join(parts)
    tokens = _merged_tokens(bpe.part("vocab"), [*merges.content.values()])
    ids: dict[str, int] = {}
    plain = set()
    added = tokenizer.each("added_tokens")
    for place in added.content:
        token = added.part(place)
        content, token_id = token.text("content"), token.whole("id", 0)
        for name in ADDED_TOKEN_FLAGS:
            if token.flag(name):
                raise token.error(name, f"false, since {content!r} is matched literally")
        if ids.setdefault(content, token_id) != token_id:
            raise token.error("id", f"{ids[content]}, which {content!r} has as well")
        if not token.flag("special"):
            plain.add(content)
    if not ids:
        raise tokenizer.error("added_tokens", "those that messages are made with")
    return tokens, ids, frozenset(plain)


def _merged_tokens(vocab: JsonObject, merges: Sequence[str]) -> list[bytes]:
    """Tokens in the order of their ids, which must be the order in which merges make them.

    tiktoken merges the pair whose token has the lowest id first, BPE the pair first in the list.
    """
    last = len(vocab.content) - 1
    tokens = _in_id_order({token: vocab.whole(token, 0, last) for token in vocab.content})
    made = (merge.replace(" ", "") for merge in merges)
    for i, (merge, token) in enumerate(zip_longest(made, tokens[_NUM_BYTES:])):
        if merge != token:
            place = _NUM_BYTES + i
            raise ValueError(f"merge {i} makes {merge!r}, but vocab has {token!r} at {place}")
    return [token.translate(_BYTES).encode("latin-1") for token in tokens]


def _in_id_order(ids: dict[_Token, int]) -> list[_Token]:
    tokens = sorted(ids, key=ids.__getitem__)
    for i, token in enumerate(tokens):
        if ids[token] != i:
            raise ValueError(f"its ids are not 0 to {len(ids) - 1}: {token!r} has {ids[token]}")
    return tokens
