"""Text to Qwen's token ids and back, on tiktoken.

The reference is transformers' ``Qwen2Tokenizer`` on the ``tokenizers`` library, which splits text
at added tokens, normalizes each piece, splits it by a regular expression and merges bytes by
rank. The ids are equal; the byte-pair merging is tiktoken's.
"""

import json
import re
import unicodedata
from base64 import b64decode
from collections.abc import Iterable, Sequence
from itertools import chain, count, groupby, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tiktoken
import torch

from torchtune_vl.files._json import JsonObject, read_json_object

_WORDS_AND_LINE_BREAKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
)
_BLANKS = r"\s+(?!\S)|\s+"
PRETOKENIZE_REGEX = f"{_WORDS_AND_LINE_BREAKS}|{_BLANKS}"
# The same to a third less time: tiktoken's regex engine tries the alternatives of an expression
# with a lookahead one by one, but compiles a group without one into a single automaton.
_FAST_REGEX = f"(?:{_WORDS_AND_LINE_BREAKS})|{_BLANKS}"
PAD = "<|endoftext|>"
EOS = "<|im_end|>"
NUM_BYTES = 256

# The published added tokens, whose ids follow those of the vocabulary
_FIRST_ADDED = 151643
SPECIAL_TOKENS = {
    name: _FIRST_ADDED + number
    for number, name in enumerate(
        (
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|object_ref_start|>",
            "<|object_ref_end|>",
            "<|box_start|>",
            "<|box_end|>",
            "<|quad_start|>",
            "<|quad_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
            "<|image_pad|>",
            "<|video_pad|>",
            "<tool_call>",
            "</tool_call>",
            "<|fim_prefix|>",
            "<|fim_middle|>",
            "<|fim_suffix|>",
            "<|fim_pad|>",
            "<|repo_name|>",
            "<|file_sep|>",
        )
    )
}
# The published tokenizer does not flag the later ones as special: they survive
# `skip_special_tokens`
PLAIN_ADDED_TOKENS = frozenset([*SPECIAL_TOKENS][14:])

# What turns and media are made of; the other added tokens are content
STRUCTURAL_TOKENS = (
    PAD,
    "<|im_start|>",
    EOS,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_UNUSED = "<|vision_pad|>"

# The `tokenizers` library normalizes by the tables of Unicode 9. These are the characters since
# then that combine, compose or decompose: to it they are letters like any other, which no mark
# passes and which stay as they are.
_NEWER_THAN_UNICODE_9 = re.compile(
    "([\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715"
    "\u1abf-\u1af0\u1df6-\u1dfa\ua82c\U000105c9\U000105d2\U000105da\U000105e4"
    "\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab\U00010eac\U00010ecb-\U00010ecf"
    "\U00010ef0-\U00010efb\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85"
    "\U00011070\U0001133b\U00011382-\U00011385\U0001138b\U0001138e\U00011390\U00011391"
    "\U000113b8\U000113bb\U000113c2\U000113c5\U000113c7-\U000113c9\U000113ce-\U000113d0"
    "\U0001145e\U00011839\U0001183a\U00011930\U00011935\U00011938\U0001193d\U0001193e"
    "\U00011943\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42\U00011d44\U00011d45"
    "\U00011d97\U00011f41\U00011f42\U0001611e-\U00016129\U0001612f\U00016d63"
    "\U00016d67-\U00016d6a\U00016ff0\U00016ff1\U0001d127\U0001d128\U0001d250-\U0001d252"
    "\U0001d25b\U0001d25c\U0001d25f\U0001d280\U0001d281\U0001e08f\U0001e130-\U0001e136"
    "\U0001e2ae\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef\U0001e5ee\U0001e5ef\U0001e6e3"
    "\U0001e6e6\U0001e6ee\U0001e6ef\U0001e6f5])"
)

# Whatever combines is neither a word character nor a space to Python.
_MANY_MARKS = re.compile(r"[^\w\s]{100,}")

# From 999,999 blanks on, the backtracking of `\s+(?!\S)` makes tiktoken panic. The lookbehind
# keeps the search linear.
_MANY_BLANKS = 100_000
_BLANK = "\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BLANK_RUN = re.compile(f"(?<![{_BLANK}])[{_BLANK}]{{{_MANY_BLANKS},}}")

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}
_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": PRETOKENIZE_REGEX},
    "behavior": "Isolated",
    "invert": False,
}
# tokenizer.json's description of the way from text to the pieces whose bytes BPE merges
_STEPS: dict[str, Any] = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_SPLIT, _BYTE_LEVEL]},
}
# ... and its settings of BPE, each with the values that change nothing; absent is None
_BPE: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}

_Token = TypeVar("_Token", bytes, str)


class _Vocabulary(NamedTuple):
    tokens: list[bytes]
    added: dict[str, int]
    plain: frozenset[str]


class QwenTokenizer:
    """Encodes and decodes text as transformers' ``Qwen2Tokenizer`` does with Qwen's files.

    Args:
        path (str | Path): ``vocab.json``, ``tokenizer.json`` or a ``.tiktoken`` rank file.
        merges_file (str | Path | None): ``merges.txt``; required with ``vocab.json``, and with
            that alone.
        special_tokens (dict[str, int] | None): added tokens and their ids, which follow those of
            the vocabulary. Default: those of ``tokenizer.json``, or the 22 published ones.
        max_seq_len (int | None): longest sample, for the transforms that use this tokenizer;
            ``encode`` does not truncate.

    Attributes:
        special_tokens (dict[str, int]): every added token and its id.
        base_vocab_size (int): number of tokens without the added ones.
        vocab_size (int): number of tokens.
        pad_id (int): id of ``<|endoftext|>``.
        eos_id (int): id of ``<|im_end|>``.
        bos_id (None): Qwen has no such token.
        stop_tokens (list[int]): ids that end a generation.
        im_start_id, im_end_id, vision_start_id, vision_end_id, image_pad_id, video_pad_id (int):
            ids of the tokens that messages are made with.
        max_seq_len (int | None): as given.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is damaged or holds another kind of tokenizer, or if
            ``special_tokens`` does not fit the vocabulary.

    Examples:
        >>> tokenizer = QwenTokenizer("vocab.json", "merges.txt")
        >>> tokenizer.encode("Hello world", add_eos=False)
        [9707, 1879]
        >>> tokenizer.decode([9707, 1879])
        'Hello world'
    """

    def __init__(
        self,
        path: str | Path,
        merges_file: str | Path | None = None,
        *,
        special_tokens: dict[str, int] | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        tokens, added, plain = _read_vocabulary(Path(path), merges_file)
        self.special_tokens = dict(added if special_tokens is None else special_tokens)
        first_added = min(self.special_tokens.values(), default=None)
        if first_added != len(tokens):
            raise ValueError(
                f"{path} holds {len(tokens):,} tokens, but the first special token has the id "
                f"{first_added}: the file is cut off, or special_tokens is another model's"
            )
        _check_special_tokens(self.special_tokens, path)
        self._encoding = tiktoken.Encoding(
            "qwen",
            pat_str=_FAST_REGEX,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens=self.special_tokens,
        )
        self._added = _any_of(self.special_tokens)
        self._added_content = _any_of(self.special_tokens.keys() - {*STRUCTURAL_TOKENS})
        self._skippable = {
            name: token_id for name, token_id in self.special_tokens.items() if name not in plain
        }
        self.base_vocab_size = len(tokens)
        self.vocab_size = len(tokens) + len(self.special_tokens)
        self.max_seq_len = max_seq_len

        self.bos_id = None
        self.eos_id = self.im_end_id = self.special_tokens[EOS]
        self.pad_id = self.special_tokens[PAD]
        self.stop_tokens = [self.eos_id, self.pad_id]
        self.im_start_id = self.special_tokens["<|im_start|>"]
        self.vision_start_id = self.special_tokens["<|vision_start|>"]
        self.vision_end_id = self.special_tokens["<|vision_end|>"]
        self.image_pad_id = self.special_tokens["<|image_pad|>"]
        self.video_pad_id = self.special_tokens["<|video_pad|>"]

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Encode text; added tokens in it become their ids.

        Without the end token the ids are those of transformers' ``Qwen2Tokenizer`` on the
        ``tokenizers`` library.

        Args:
            text (str): any text.
            add_bos (bool): without effect, since Qwen has no such token; part of torchtune's
                interface.
            add_eos (bool): whether to append ``eos_id``.

        Returns:
            list[int]: token ids.

        Raises:
            ValueError: if the text holds a lone surrogate, which no UTF-8 can express.
        """
        ids = self._encode(text, self._added)
        return [*ids, self.eos_id] if add_eos else ids

    def encode_content(self, text: str) -> list[int]:
        """Encode the text of a message: tokens that carry structure are plain text in it.

        Args:
            text (str): any text. Tokens of grounding, tools and code become their ids.

        Returns:
            list[int]: token ids.

        Raises:
            ValueError: if the text holds a lone surrogate.
        """
        return self._encode(text, self._added_content)

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token.

        Args:
            ids (Sequence[int]): ids of known tokens.

        Returns:
            list[bytes]: UTF-8, of parts of characters too.
        """
        return [self._encoding.decode_single_token_bytes(i) for i in ids]

    def decode(
        self, token_ids: Sequence[int] | torch.Tensor, skip_special_tokens: bool = False
    ) -> str:
        """Decode ids to the text of transformers' ``Qwen2Tokenizer.decode``.

        Bytes that are not valid UTF-8 become U+FFFD, and ids without a token, such as those that
        pad the model's vocabulary, become nothing.

        Args:
            token_ids (Sequence[int] | torch.Tensor): ids, in one dimension.
            skip_special_tokens (bool): whether to leave out the tokens that the tokenizer flags as
                special. ``<tool_call>`` and the code tokens are not.

        Returns:
            str: the text.

        Raises:
            ValueError: if an id is negative.
        """
        ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else token_ids
        if min(ids, default=0) < 0:
            raise ValueError(f"token ids hold {min(ids)}: take ignored labels out before decoding")
        added = set(self.special_tokens.values())
        if skip_special_tokens:
            added -= set(self._skippable.values())
        known = [i for i in ids if i < self.base_vocab_size or i in added]
        return self._encoding.decode_bytes(known).decode("utf-8", errors="replace")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer files of a checkpoint, for transformers' ``Qwen2Tokenizer`` to read.

        These are ``vocab.json``, ``merges.txt``, ``tokenizer.json`` and ``tokenizer_config.json``,
        with the content of the published ones except for the chat template.

        Args:
            directory (str | Path): where to write; made if missing.

        Raises:
            ValueError: if the ranks are not those of byte-pair merges.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tokens = [self._encoding.decode_single_token_bytes(i) for i in range(self.base_vocab_size)]
        vocab = {_to_characters(token): i for i, token in enumerate(tokens)}
        merges = _merges(tokens)
        tokenizer = _tokenizer_json(vocab, merges, self._added_tokens())
        files = {
            "vocab.json": json.dumps(vocab, ensure_ascii=False, separators=(",", ":")),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=2),
            "tokenizer_config.json": json.dumps(self._config(), ensure_ascii=False, indent=2),
        }
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8", newline="\n")

    def _encode(self, text: str, added: re.Pattern[str]) -> list[int]:
        check_surrogates(text)
        ids: list[int] = []
        for i, piece in enumerate(added.split(text)):
            if i % 2:
                ids.append(self.special_tokens[piece])
            else:
                ids += self._encode_piece(_nfc(piece))
        return ids

    def _encode_piece(self, text: str) -> list[int]:
        """Ids of normalized text, with long runs of blanks kept from tiktoken's regex engine.

        The regular expression makes one piece of such a run, without its last blank if more text
        follows. Blanks before a line break are part of another piece, which is harmless.
        """
        if len(text) < _MANY_BLANKS:
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        done = 0
        for run in _BLANK_RUN.finditer(text):
            if text[run.end() : run.end() + 1] in ("\r", "\n"):
                continue
            end = run.end() if run.end() == len(text) else run.end() - 1
            ids += self._encoding.encode_ordinary(text[done : run.start()])
            ids += self._encoding._encode_single_piece(text[run.start() : end])
            done = end
        return ids + self._encoding.encode_ordinary(text[done:])

    def _added_tokens(self) -> dict[int, dict[str, Any]]:
        by_id = sorted(self.special_tokens.items(), key=lambda item: item[1])
        return {
            token_id: {
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": name in self._skippable,
            }
            for name, token_id in by_id
        }

    def _config(self) -> dict[str, Any]:
        return {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": self._added_tokens(),
            "additional_special_tokens": [name for name in self._skippable if name != PAD],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": PAD,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }


def check_surrogates(text: str) -> None:
    """Raise ``ValueError`` if a text holds a lone surrogate, which no UTF-8 can express."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate ({text[error.start]!r}) at position {error.start}: it was "
            "decoded wrongly; decode its bytes with errors='replace'"
        ) from error


def _nfc(text: str) -> str:
    """NFC as the ``tokenizers`` library has it, in less than quadratic time."""
    # What newer tables call normalized, Unicode 9's do too; the reverse does not hold.
    if unicodedata.is_normalized("NFC", text):
        return text
    pieces = _NEWER_THAN_UNICODE_9.split(text)
    ordered = (_MANY_MARKS.sub(_order_marks, piece) for piece in pieces)
    return "".join(unicodedata.normalize("NFC", piece) for piece in ordered)


def _order_marks(run: re.Match[str]) -> str:
    """Put marks in canonical order: unicodedata's own sort takes quadratic time."""
    decomposed = chain.from_iterable(unicodedata.normalize("NFD", c) for c in run[0])
    runs = groupby(decomposed, key=lambda c: unicodedata.combining(c) > 0)
    return "".join(
        "".join(sorted(marks, key=unicodedata.combining) if combines else marks)
        for combines, marks in runs
    )


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern whose split gives text and tokens in turn."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _read_vocabulary(path: Path, merges_file: str | Path | None) -> _Vocabulary:
    files = path if merges_file is None else f"{path} and {merges_file}"
    try:
        if merges_file is not None:
            vocabulary = _read_vocab_and_merges(path, Path(merges_file))
        elif path.suffix == ".tiktoken":
            vocabulary = _read_ranks(path)
        else:
            vocabulary = _read_tokenizer_json(path)
        if sorted(vocabulary.tokens[:NUM_BYTES]) != [bytes([i]) for i in range(NUM_BYTES)]:
            raise ValueError("the first 256 ids are not the 256 bytes")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"{error.filename} is no file; the tokenizer reads vocab.json and merges.txt, "
            "tokenizer.json, or a .tiktoken file of a published checkpoint"
        ) from error
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{files}: {reason}. Use the published file, unchanged") from error
    return vocabulary


def _read_ranks(path: Path) -> _Vocabulary:
    lines = path.read_bytes().splitlines()
    ranks = {b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    return _Vocabulary(_in_id_order(ranks), SPECIAL_TOKENS, PLAIN_ADDED_TOKENS)


def _read_vocab_and_merges(path: Path, merges_file: Path) -> _Vocabulary:
    vocab = read_json_object(path)
    merges = merges_file.read_text(encoding="utf-8").splitlines()
    has_header = merges[:1] and merges[0].startswith("#version")
    tokens = _merged_tokens(_ids(vocab), merges[1:] if has_header else merges)
    return _Vocabulary(tokens, SPECIAL_TOKENS, PLAIN_ADDED_TOKENS)


def _read_tokenizer_json(path: Path) -> _Vocabulary:
    tokenizer = read_json_object(path)
    if not isinstance(tokenizer.content.get("model"), dict):
        raise ValueError("it has no model, so if it is a vocab.json, merges_file is missing")
    _check_steps(tokenizer)
    bpe = tokenizer.part("model")
    tokens = _merged_tokens(_ids(bpe.part("vocab")), _merges_of(bpe))
    items = tokenizer.each("added_tokens")
    added = [items.part(place) for place in items.content]
    if not added:
        raise tokenizer.error("added_tokens", "those that messages are made with")
    ids: dict[str, int] = {}
    for token in added:
        content, token_id = token.text("content"), token.whole("id", 0)
        for name in ("normalized", "lstrip", "rstrip", "single_word"):
            if token.flag(name):
                raise token.error(name, f"false, since {content!r} is matched literally")
        if ids.setdefault(content, token_id) != token_id:
            raise token.error("id", f"{ids[content]}, which {content!r} has as well")
    plain = frozenset(token.text("content") for token in added if not token.flag("special"))
    return _Vocabulary(tokens, ids, plain)


def _ids(vocab: JsonObject) -> dict[str, int]:
    last = len(vocab.content) - 1
    return {token: vocab.whole(token, 0, last) for token in vocab.content}


def _merges_of(bpe: JsonObject) -> list[str]:
    """What each merge makes, from ``a b`` or, as newer files have it, ``["a", "b"]``."""
    merges = bpe.each("merges")
    for place, merge in merges.content.items():
        parts = merge if isinstance(merge, list) else [merge]
        if len(parts) > 2 or not all(isinstance(part, str) for part in parts):
            raise merges.error(place, "two strings, or one with a space between both")
    return [m if isinstance(m, str) else " ".join(m) for m in merges.content.values()]


def _check_special_tokens(special_tokens: dict[str, int], path: str | Path) -> None:
    names: dict[int, str] = {}
    for name, token_id in special_tokens.items():
        if not name:
            raise ValueError(f"{path}: the special token with the id {token_id} has no content")
        if names.setdefault(token_id, name) != name:
            raise ValueError(
                f"{path}: the special tokens {names[token_id]!r} and {name!r} have the same id, "
                f"{token_id}: give each its own"
            )
    missing = [name for name in STRUCTURAL_TOKENS if name not in {*special_tokens, _UNUSED}]
    if missing:
        raise ValueError(
            f"{path}: no special token has the content {' or '.join(missing)}, which messages need"
        )


def _check_steps(tokenizer: JsonObject) -> None:
    steps = tokenizer.part("pre_tokenizer").content.get("pretokenizers")
    for step in steps if isinstance(steps, list) else []:
        # It moves offsets, not ids, and transformers writes it otherwise than it was published.
        if isinstance(step, dict) and "trim_offsets" in step:
            step["trim_offsets"] = False
    for name, expected in _STEPS.items():
        if tokenizer.part(name).content != expected:
            raise tokenizer.error(name, "Qwen's steps before BPE, as published")
    bpe = tokenizer.part("model")
    for name, harmless in _BPE.items():
        if bpe.content.get(name) not in harmless:
            raise bpe.error(name, f"{harmless[-1]!r}: nothing else is supported")


def _merged_tokens(vocab: dict[str, int], merges: Sequence[str]) -> list[bytes]:
    """Tokens in the order of their ids, which must be the order in which merges make them.

    tiktoken merges the pair whose token has the lowest id first, BPE the pair first in the list.
    """
    tokens = _in_id_order(vocab)
    made = [merge.replace(" ", "") for merge in merges]
    if made != tokens[NUM_BYTES:]:
        pairs = enumerate(zip_longest(made, tokens[NUM_BYTES:]))
        i, (merge, token) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"merge {i} makes {merge!r}, but the vocabulary has {token!r} at {NUM_BYTES + i}"
        )
    return [token.translate(_BYTES).encode("latin-1") for token in tokens]


def _in_id_order(ids: dict[_Token, int]) -> list[_Token]:
    tokens = sorted(ids, key=ids.__getitem__)
    for i, token in enumerate(tokens):
        if ids[token] != i:
            raise ValueError(
                f"the ids of its {len(tokens):,} tokens are not 0 to {len(tokens) - 1}: {token!r} "
                f"has {ids[token]}, in place of {i}"
            )
    return tokens


def _merges(tokens: list[bytes]) -> list[str]:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = (_last_merge(token, ranks) for token in tokens[NUM_BYTES:])
    return [f"{_to_characters(left)} {_to_characters(right)}" for left, right in pairs]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that merge into this one, found by merging its bytes by rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    rank = ranks[token]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        i = candidates.index(min(candidates))
        if candidates[i] >= rank:
            raise ValueError(f"no merges of lower rank lead to the token {token!r} (id {rank})")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _to_characters(token: bytes) -> str:
    return token.decode("latin-1").translate(_CHARACTERS)


def _byte_alphabet() -> str:
    """GPT-2's character for each byte: the byte's own if printable, else the next from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return "".join(chr(i if i in printable else next(others)) for i in range(NUM_BYTES))


_CHARACTERS = dict(enumerate(_byte_alphabet()))
_BYTES = {ord(character): byte for byte, character in _CHARACTERS.items()}


def _tokenizer_json(
    vocab: dict[str, int], merges: list[str], added_tokens: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added_tokens.items()],
        **_STEPS,
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
