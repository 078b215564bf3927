"""Text to Qwen's token ids and back, on tiktoken, with the ids of the ``tokenizers`` library."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import tiktoken
from torch import Tensor

from torchtune_vl.chat import _vocabulary as vocabulary

# The `tokenizers` library normalizes by the tables of Unicode 9. In these ranges are the characters
# since then that combine, compose or decompose, and others that never do: to it all of them are
# letters like any other, which no mark passes and which stay as they are.
_NEWER_THAN_UNICODE_9 = re.compile(
    "([\u05c8\u05c9\u07fd\u0897-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0"
    "\u1df6-\u1dfa\ua82c\U000105c9-\U000105e4\U00010d24-\U00010d6d\U00010eab-\U00010f85"
    "\U00011070\U0001133b\U00011382-\U000113d0\U0001145e\U00011839-\U00011a99"
    "\U00011d42-\U00011d97\U00011f41\U00011f42\U0001611e-\U0001612f\U00016d63-\U00016d6a"
    "\U00016ff0\U00016ff1\U0001d127\U0001d128\U0001d250-\U0001d281\U0001e08f-\U0001e136"
    "\U0001e2ae-\U0001e2ef\U0001e4ec-\U0001e6f5])"
)

# From 999,999 blanks on, the backtracking of `\s+(?!\S)` makes tiktoken panic. It makes one piece
# of such a run, without its last blank if more text follows; before a line break, where they are
# part of another piece, blanks are harmless. The lookbehind keeps the search linear.
_MANY_BLANKS = 100_000
_BLANK = "\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BLANK_RUN = re.compile(
    rf"((?<![{_BLANK}])[{_BLANK}]{{{_MANY_BLANKS},}}(?:\Z|(?=[{_BLANK}][^{_BLANK}\r\n])))"
)


class QwenTokenizer:
    """Encodes and decodes text as transformers' ``Qwen2Tokenizer`` does with Qwen's files.

    Text is split at added tokens, each piece normalized and split by a regular expression, and
    bytes are merged by rank. ``special_tokens`` are the ids of added tokens by their content,
    ``base_vocab_size`` is the number of the others, ``vocab_size`` of all, and ``stop_tokens`` end
    a generation; ids of the tokens that messages are made with have their names.

    Args:
        path: ``vocab.json``, ``tokenizer.json`` or a ``.tiktoken`` rank file.
        merges_file: ``merges.txt``; required with ``vocab.json``, and with that alone.
        special_tokens: added tokens and their ids, which follow those of the vocabulary. Default:
            those of ``tokenizer.json``, or the published ones of the family.
        max_seq_len: longest sample, for the transforms that use this tokenizer; ``encode`` does
            not truncate.

    ``FileNotFoundError`` if a file does not exist, and ``ValueError`` if it is damaged, holds
    another kind of tokenizer, or does not fit ``special_tokens``.
    """

    # Added tokens of a family that follow the 22 of Qwen2.5, none of them special
    more_tokens: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        path: str | Path,
        merges_file: str | Path | None = None,
        *,
        special_tokens: dict[str, int] | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        tokens, added, self._plain = vocabulary.read_vocabulary(
            Path(path), merges_file, special_tokens, self.more_tokens
        )
        self._encoding = tiktoken.Encoding(
            "qwen",
            pat_str=vocabulary.FAST_REGEX,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens=added,
        )
        self._added = _any_of(added)
        self._added_content = _any_of(added.keys() - {*vocabulary.STRUCTURAL_TOKENS})
        self.special_tokens = added
        self.base_vocab_size = len(tokens)
        self.vocab_size = len(tokens) + len(added)
        self.max_seq_len = max_seq_len

        self.bos_id = None
        self.eos_id = self.im_end_id = added[vocabulary.EOS]
        self.pad_id = added[vocabulary.PAD]
        self.stop_tokens = [self.eos_id, self.pad_id]
        self.im_start_id = added["<|im_start|>"]
        self.vision_start_id = added["<|vision_start|>"]
        self.vision_end_id = added["<|vision_end|>"]
        self.image_pad_id = added["<|image_pad|>"]
        self.video_pad_id = added["<|video_pad|>"]

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Encode text; added tokens in it become their ids.

        ``add_bos`` is of torchtune's interface: Qwen has no such token. ``add_eos`` appends
        ``eos_id``. ``ValueError`` if the text holds a lone surrogate, which no UTF-8 can express.
        """
        ids = self._encode(text, self._added)
        return [*ids, self.eos_id] if add_eos else ids

    def encode_content(self, text: str) -> list[int]:
        """Encode the text of a message: tokens that carry structure are plain text in it."""
        return self._encode(text, self._added_content)

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each known token, UTF-8 of parts of characters too."""
        return [self._encoding.decode_single_token_bytes(i) for i in ids]

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids, of those of no token none."""
        added = {*self.special_tokens.values()}
        known = [i for i in ids if i < self.base_vocab_size or i in added]
        return self._encoding.decode_bytes(known)

    def decode(self, token_ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Decode ids to the text of transformers' ``Qwen2Tokenizer.decode``.

        Bytes that are not valid UTF-8 become U+FFFD, and ids without a token, such as those that
        pad the model's vocabulary, become nothing. ``skip_special_tokens`` leaves out the tokens
        that are flagged as special; ``<tool_call>`` and the code tokens are not. ``ValueError`` if
        an id is negative.
        """
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        if min(ids, default=0) < 0:
            raise ValueError(f"token ids hold {min(ids)}: take ignored labels out before decoding")
        names = self.special_tokens.keys() - self._plain if skip_special_tokens else ()
        skipped = {self.special_tokens[name] for name in names}
        return self.bytes_of([i for i in ids if i not in skipped]).decode("utf-8", errors="replace")

    def _encode(self, text: str, added: re.Pattern[str]) -> list[int]:
        check_surrogates(text)
        ids: list[int] = []
        encode_text = self._encoding.encode_ordinary
        for i, piece in enumerate(added.split(text)):
            if i % 2:
                ids.append(self.special_tokens[piece])
                continue
            normalized = _nfc(piece)
            is_short = len(normalized) < _MANY_BLANKS
            for j, part in enumerate([normalized] if is_short else _BLANK_RUN.split(normalized)):
                ids += self._encoding._encode_single_piece(part) if j % 2 else encode_text(part)
        return ids


def check_surrogates(text: str) -> None:
    """Raise ``ValueError`` if a text holds a lone surrogate, which no UTF-8 can express."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"a lone surrogate ({text[error.start]!r}) at position {error.start}"
        raise ValueError(f"text has {found}: decode its bytes with errors='replace'") from error


def _nfc(text: str) -> str:
    """NFC as the ``tokenizers`` library has it."""
    # What newer tables call normalized, Unicode 9's do too; the reverse does not hold.
    if unicodedata.is_normalized("NFC", text):
        return text
    pieces = _NEWER_THAN_UNICODE_9.split(text)
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern whose split gives text and tokens in turn."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
