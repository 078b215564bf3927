"""Texts to compare tokenizers on: generated Unicode, translations into many languages, code.

``python -m tests.corpora DIRECTORY`` fetches the translations from PyPI.
"""

import ast
import hashlib
import os
import random
import re
import subprocess
import sys
import sysconfig
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

# Django (BSD-3-Clause) speaks a hundred languages and has scripts for browsers. Its wheel is read
# as an archive of texts, neither installed nor imported.
PACKAGE = "Django==5.2.8"
WHEEL = "django-5.2.8-py3-none-any.whl"
SHA256 = "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f"

ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|box_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
LINE_BREAKS = ("\n", "\r", "\r\n", "\n\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x85", "\u2028\u2029")
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
JOINERS = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u180e\ufe0e\ufe0f\U000e0100"
# The endings that the pre-tokenizer knows, and letters that fold to them or look like them
ENDINGS = (
    "s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "Re", "vE", "M", "LL", "lL", "D", "x",
    "ſ", "ſt", "ﬆ", "ﬅ", "ß", "ẞ", "ŉ", "ı", "İ", "s\u0307", "t\u0323", "rë", "r\u0435", "ⓢ",
)  # fmt: skip
APOSTROPHES = "'''’ʼ＇`´ʹ"
WORDS = (
    "the", " of", " and", " it's", " THEY'LL", " Jump-over", " lazy_dogs", " naïve", " 42", ".",
    ", ", "def ", "return", "self.", "if (x", ") {", "}\n", "    ", "\t\t", "0x1F", "//", "#",
)  # fmt: skip
PLANES = (0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 13, 14, 15, 16)
SURROGATES = range(0xD800, 0xE000)


def generated_texts(seed: int, characters: int) -> Iterator[str]:
    """Varied strings of up to some thousand characters, ``characters`` or more together."""
    rng = random.Random(seed)
    while characters > 0:
        text = _generated_text(rng)
        characters -= len(text)
        yield text


def _generated_text(rng: random.Random) -> str:
    pools = [_neighbours(rng), _anywhere(rng), *rng.choices(_pools(), k=rng.randint(1, 4))]
    pools = rng.sample(pools, rng.randint(1, len(pools)))
    atoms = [rng.choice(rng.choice(pools)) for _ in range(int(2 ** rng.uniform(0, 8)))]
    if rng.random() < 0.05:
        repeated = rng.choice(atoms)
        atoms.insert(rng.randrange(len(atoms)), repeated * int(2 ** rng.uniform(3, 10)))
    text = "".join(atoms)
    return unicodedata.normalize("NFD", text) if rng.random() < 0.1 else text


def _neighbours(rng: random.Random) -> Sequence[str]:
    """Characters of one script, assigned or not, as a rule."""
    first = rng.choice(PLANES) * 0x10000 + rng.randrange(0, 0x10000, 64)
    return _characters(range(first, first + 64)) or "a"


def _anywhere(rng: random.Random) -> Sequence[str]:
    plane = rng.choice(PLANES) * 0x10000
    return _characters(plane + rng.randrange(0x10000) for _ in range(40)) or "a"


def _characters(code_points: Iterable[int]) -> Sequence[str]:
    return "".join(chr(c) for c in code_points if c not in SURROGATES)


@cache
def _pools() -> list[Sequence[str]]:
    every = [chr(c) for c in range(sys.maxunicode + 1) if c not in SURROGATES]
    by_category: dict[str, list[str]] = defaultdict(list)
    for character in every:
        by_category[unicodedata.category(character)].append(character)
    assigned = [pool for name, pool in by_category.items() if name not in ("Cn", "Co")]
    digits = by_category["Nd"] + by_category["Nl"] + by_category["No"]
    marks = by_category["Mn"] + by_category["Mc"] + by_category["Me"]
    spaces = [c for c in every if c.isspace()]
    normalized = [c for c in every if not unicodedata.is_normalized("NFC", c)]
    decomposed = [unicodedata.normalize("NFD", c) for c in every]
    noncharacters = [c for c in every if ord(c) & 0xFFFE == 0xFFFE or "\ufdd0" <= c <= "\ufdef"]
    folded = [c for c in every if c.isalpha() and len({c.lower(), c.upper(), c.casefold()}) > 2]
    jamo = _characters([*range(0x1100, 0x1200), *range(0xA960, 0xA97D), *range(0xD7B0, 0xD7FC)])
    compatibility = _characters([*range(0xF900, 0xFB00), *range(0x2F800, 0x2FA20)])
    return [
        *assigned,
        by_category["Cn"],
        by_category["Co"],
        digits,
        [*"0123456789.,", *digits],
        [*"aeouAEO가कก<\n", *marks, *marks[::7]],
        [*spaces, *spaces, " ", "  ", "    ", "\t", *LINE_BREAKS],
        [*LINE_BREAKS, " ", "\t", "\u3000", "a", ".", "!"],
        [*spaces, *"a1.é漢"],
        _emoji(),
        [*BIDI, *JOINERS, *"אبa1 "],
        noncharacters,
        [*jamo, "가", "각", "a"],
        [*compatibility, "漢", "字"],
        normalized,
        [d for c, d in zip(every, decomposed, strict=True) if c != d and not "가" <= c <= "힣"],
        folded,
        [f"{apostrophe}{ending}" for apostrophe in APOSTROPHES for ending in ENDINGS],
        [*APOSTROPHES, *ENDINGS, " ", "I", "they", "\u0301"],
        _added(),
        [*_added(), *"a1 \n\u0338", *marks[::50]],
        [chr(c) for c in range(128)],
        WORDS,
    ]


def _emoji() -> list[str]:
    people, tones = "👩👨🧑👧👦👴🤷🏃", [chr(c) for c in range(0x1F3FB, 0x1F400)]
    flags = [chr(c) for c in range(0x1F1E6, 0x1F200)]
    joined = [
        f"{a}{tone}\u200d{b}" for a in people for tone in tones for b in ("⚕️", "💻", "❤️\u200d👩")
    ]
    tags = "🏴" + "".join(chr(0xE0000 + ord(c)) for c in "gbsct") + "\U000e007f"
    return [*people, *tones, *flags, *joined, tags, "1️⃣", "#⃣", "🏳️\u200d🌈", "\u200d", "©", "☺︎", "🫠"]


def _added() -> list[str]:
    broken = [token[i:j] for token in ADDED for i, j in ((0, -1), (1, None), (0, 5), (2, -2))]
    others = [token.upper() for token in ADDED] + [token.replace("|", "\u0338|") for token in ADDED]
    return [*ADDED, *ADDED, *broken, *others, "<", "<|", "|>", ">", "</", "<think>", "<|extra_0|>"]


def fetch_translations(directory: Path) -> Path:
    """Download Django's wheel, if it is not there, and return its path."""
    path = directory / WHEEL
    if path.is_file():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".unfinished-") as unfinished:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", unfinished, PACKAGE]
        subprocess.run(command, check=True)
        wheel = Path(unfinished, WHEEL)
        if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
            raise ValueError(f"{WHEEL} has the sha256 {digest} instead of {SHA256}")
        os.replace(wheel, path)
    return path


def translations(wheel: Path) -> dict[str, list[str]]:
    """The translated messages of each language, a text of some lines per catalogue and page."""
    texts: dict[str, list[str]] = defaultdict(list)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if match := re.search(r"/locale/(\w+)/LC_MESSAGES/.*\.po$", name):
                messages = list(_messages(archive.read(name).decode()))
                pages = ["\n".join(messages[i : i + 20]) for i in range(0, len(messages), 20)]
                texts[match[1]] += pages
    return texts


def _messages(catalogue: str) -> Iterator[str]:
    """The msgstr strings of a gettext catalogue but its header, which is the first."""
    strings = re.findall(r'^msgstr(?:\[\d\])? ((?:"[^\n]*"\s*)+)', catalogue, re.MULTILINE)
    for string in strings[1:]:
        if message := ast.literal_eval(f"({string})"):
            yield message


def source_code(wheel: Path) -> dict[str, list[str]]:
    """Files of each language: Python's library, numpy's headers in C, Django's web pages."""
    files = {
        "py": sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:100],
        "h": sorted(Path(np.get_include()).rglob("*.h")),
    }
    texts: dict[str, list[str]] = defaultdict(list)
    for suffix, paths in files.items():
        texts[suffix] = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            suffix = name.rpartition(".")[2]
            if suffix in ("js", "css", "html", "svg"):
                texts[suffix].append(archive.read(name).decode())
    return texts


if __name__ == "__main__":
    print(f"Texts in many languages are in {fetch_translations(Path(sys.argv[1]))}")
