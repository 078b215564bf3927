"""What a check finds of one sample."""

import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import xxhash
from PIL import Image

from torchtune_vl.chat import ChatTransform
from torchtune_vl.chat._boxes import coordinates_of
from torchtune_vl.chat._messages import Medium, Objects, Part, Turn, read_conversation
from torchtune_vl.chat._vocabulary import STRUCTURAL_TOKENS
from torchtune_vl.data import Size
from torchtune_vl.data._training_rows import is_as_measured, size_of
from torchtune_vl.datasets._box_units import READINGS, UnitEvidence
from torchtune_vl.datasets._near_duplicates import TEXT_NUMBERS
from torchtune_vl.datasets._preview_sample import TAGS, frame_of
from torchtune_vl.media._errors import naming_sample
from torchtune_vl.media._sources import read_bytes, scheme_of

# What the extra "check" installs, by the names of modules
LIBRARIES = {"datasketch": "datasketch", "imagehash": "ImageHash", "py3langid": "py3langid"}
_PIECE = 5  # characters
# Of UTF-8, in letters: of shorter texts the language is a guess
_LEAST_LETTERS = 20
_LONGEST_WORD = 20
# In scripts that put no spaces between words, those of more characters are several words
_LONGEST_CJK = 4
_NO_SPACES = re.compile("CJK|HIRAGANA|KATAKANA|THAI|LAO|KHMER|MYANMAR")


class Found(NamedTuple):
    """What was found of a sample; of one that cannot be trained on, no more than is known.

    Args:
        reason: why it cannot be trained on, or None.
        counts: as :class:`~torchtune_vl.datasets._sample_sizes.Measured` has them.
        content: digest of all that it says and shows.
        text: MinHash of what is said, but for the system's message, uint32 [64] as bytes.
        media: hash of each medium, uint64 [media] as bytes.
        special: special tokens and tags of media that its texts spell out.
        answers: how many answers that carry loss are ``"empty"``, of ``"one word"``, and ``"any"``.
        language: of what is said, as ISO 639-1 has it; "" if that is too short to tell.
        boxes: for each unit that boxes are said to be in, what they tell of it.
    """

    reason: str | None
    counts: Sequence[int] = (0,) * 7
    content: bytes = b""
    text: bytes = b""
    media: bytes = b""
    special: Sequence[str] = ()
    answers: Mapping[str, int] = Counter()
    language: str = ""
    boxes: Mapping[str, UnitEvidence] = {}

    def to_bytes(self) -> bytes:
        """Write it for a cache."""
        hashes = (self.content.hex(), self.text.hex(), self.media.hex())
        return json.dumps([*self[:2], *hashes, *self[5:]]).encode()

    @classmethod
    def from_bytes(cls, written: bytes) -> "Found":
        """Read what :meth:`to_bytes` wrote."""
        reason, counts, *hashes, special, answers, language, boxes = json.loads(written)
        content, text, media = map(bytes.fromhex, hashes)
        evidence = {
            unit: UnitEvidence(number, tuple(fits), tuple(reach))
            for unit, (number, fits, reach) in boxes.items()
        }
        return cls(reason, counts, content, text, media, special, answers, language, evidence)


def load_libraries() -> None:
    """Import what finds near duplicates and languages, which forks then have.

    A ``ValueError`` tells how to install what is missing.
    """
    for module in LIBRARIES:
        try:
            import_module(module)
        except ImportError as error:
            problem = f"a check needs {', '.join(LIBRARIES.values())}, and {error}"
            raise ValueError(f"{problem}: pip install 'torchtune-vl[check]'") from error
    _language("the first text loads the model of languages")


@dataclass
class SampleCheck:
    """Looks at samples of a dataset; with ``decodes``, each is made as for training."""

    dataset: Any
    transform: ChatTransform
    decodes: bool

    def __call__(self, index: int) -> tuple[Found, Sequence[str], bytes | None]:
        """What is found of a sample, with the files of its media and their state."""
        turns: list[Turn[Part]] = []
        try:
            with naming_sample(index):
                sample = self.dataset.read(index)
                with suppress(ValueError):  # which measuring tells
                    turns = self._turns(sample)
                counts, files, state = self.dataset.measure_to_keep(index)
                made = self.dataset[index] if self.decodes else None
                if made is not None:
                    self._check_size(made, counts)
                # Media that cannot be read again are told as well
                identities = [self._identity(medium.source) for medium in _media(turns)]
        except ValueError as error:
            return Found(str(error), boxes=self._boxes(turns)), [], None
        said = " ".join(text for turn in turns if turn.role != "system" for text in _texts(turn))
        found = Found(
            None,
            counts,
            _content(turns, identities, sample.get("tools")),
            _min_hash(said),
            self._hashes(turns, identities, made),
            self._special(turns),
            _answers(turns),
            _language(said),
            self._boxes(turns),
        )
        return found, files, state

    def _turns(self, sample: Mapping[str, Any]) -> list[Turn[Part]]:
        media = sample.get("images"), sample.get("videos")
        return read_conversation(sample["messages"], *media, self.transform.prompts.roles)

    def _check_size(self, made: Mapping[str, Any], counts: Sequence[int]) -> None:
        """Raise a ``ValueError`` if a sample is larger than what was measured, or smaller."""
        size, measured = size_of(made), Size(*counts[:3])
        if not is_as_measured(size, measured, not getattr(self.dataset, "augments", False)):
            problem = f"it has {size}, but {measured}"
            raise ValueError(f"{problem} by the headers of its media: write them again")

    def _identity(self, source: Any) -> str:
        """What tells a medium from others: its content, or of one not to be decoded its address."""
        if isinstance(source, list | tuple):
            return " ".join(map(self._identity, source))
        if isinstance(source, str) and (
            not self.decodes or scheme_of(source) not in ("", "file", "data")
        ):
            return source
        is_encoded = isinstance(source, str | bytes | bytearray | memoryview | io.IOBase)
        data = read_bytes(source) if is_encoded else np.asarray(source).tobytes()
        return xxhash.xxh3_128_hexdigest(data)

    def _hashes(self, turns: Sequence[Turn[Part]], identities: Sequence[str], made: Any) -> bytes:
        """A hash of each medium: of images that were decoded, one that is alike for like ones."""
        kinds = [medium.kind for medium in _media(turns)]
        hashes = [xxhash.xxh3_64_digest(identity.encode()) for identity in identities]
        if made is not None and kinds and "truncated" not in made:
            import imagehash

            vision = made["encoder_input"]["vision"]
            grids = vision["grid_thw"]
            of_media = vision["patches"].numpy()
            ends = grids.prod(dim=1).cumsum(0).tolist()
            for place, (kind, grid) in enumerate(zip(kinds, grids.tolist(), strict=True)):
                if kind == "image":
                    patches = of_media[ends[place] - grid[1] * grid[2] : ends[place]]
                    pixels = frame_of(patches, grid[1], grid[2], self.transform)
                    bits = imagehash.phash(Image.fromarray(pixels)).hash
                    hashes[place] = np.packbits(bits).tobytes()
        return b"".join(hashes)

    def _special(self, turns: Sequence[Turn[Part]]) -> list[str]:
        names = (*TAGS, *STRUCTURAL_TOKENS)  # the others are tokens in texts, too
        pattern = re.compile("|".join(map(re.escape, names)))
        return sorted({name for t in turns for x in _texts(t) for name in pattern.findall(x)})

    def _boxes(self, turns: Sequence[Turn[Part]]) -> dict[str, UnitEvidence]:
        """What boxes tell of each unit that they are said to have, where their image is known."""
        images = [medium for medium in _media(turns) if medium.kind == "image"]
        evidence: dict[str, list[UnitEvidence]] = {}
        for objects in (part for t in turns for part in t.content if isinstance(part, Objects)):
            with suppress(ValueError, IndexError, TypeError):
                medium = images[objects.image]
                given = {"image": medium.source, **medium.settings}
                size = self.transform.image_transform.measure(given)["original_size"]
                for entry in objects.entries if objects.unit in READINGS else ():
                    for numbers in coordinates_of(entry):
                        of_unit = evidence.setdefault(objects.unit, [])
                        of_unit.append(UnitEvidence.of(numbers, size))
        return {unit: UnitEvidence.joined(parts) for unit, parts in evidence.items()}


def _media(turns: Sequence[Turn[Part]]) -> list[Medium]:
    return [part for turn in turns for part in turn.content if isinstance(part, Medium)]


def _texts(turn: Turn[Part]) -> Iterator[str]:
    for part in turn.content:
        if isinstance(part, str):
            yield part
        elif isinstance(part, Objects):
            yield part.text
            yield json.dumps([*part.entries], default=str)


def _content(turns: Sequence[Turn[Part]], identities: Sequence[str], tools: Any) -> bytes:
    """Digest all that a sample says, in one way however its record writes it."""
    of_media = iter(identities)

    def plain(part: Part) -> Any:
        if isinstance(part, Medium):
            return [part.kind, next(of_media), part.settings]
        return [*part] if isinstance(part, Objects) else part

    said = [[t.role, t.masked, t.tool_calls, [*map(plain, t.content)]] for t in turns]
    written = json.dumps([said, tools], sort_keys=True, default=str)
    return xxhash.xxh3_128_digest(written.encode())


def _min_hash(text: str) -> bytes:
    text = " ".join(text.casefold().split())
    ends = range(_PIECE, max(len(text), _PIECE) + 1)
    pieces = {text[end - _PIECE : end].encode("utf-8", "surrogatepass") for end in ends}
    min_hash = _empty_min_hash().copy()
    min_hash.update_batch([*pieces])
    return min_hash.hashvalues.astype(np.uint32).tobytes()


@cache
def _empty_min_hash() -> Any:  # whose permutations take longer than the text
    from datasketch import MinHash

    return MinHash(TEXT_NUMBERS, hashfunc=xxhash.xxh32_intdigest)


def _answers(turns: Sequence[Turn[Part]]) -> dict[str, int]:
    counts = Counter({"any": 0, "empty": 0, "one word": 0})
    for turn in turns:
        if turn.role == "assistant" and not turn.masked and not turn.tool_calls:
            text = " ".join(_texts(turn)).strip()
            counts["any"] += 1
            counts["empty"] += not text
            counts["one word"] += is_one_word(text)
    return dict(counts)


def is_one_word(text: str) -> bool:
    """Whether a text is a word alone, perhaps with punctuation."""
    words = re.findall(r"\w+", text)
    if len(text.split()) != 1 or len(words) != 1:
        return False
    has_spaces = not _NO_SPACES.search(unicodedata.name(words[0][0], ""))
    return len(words[0]) <= (_LONGEST_WORD if has_spaces else _LONGEST_CJK)


def _language(text: str) -> str:
    letters = "".join(filter(str.isalpha, text))
    if len(letters.encode("utf-8", "surrogatepass")) < _LEAST_LETTERS:
        return ""
    import py3langid

    return py3langid.classify(text)[0]
