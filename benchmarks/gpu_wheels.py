"""Collects what `benchmarks.gpu` needs on a machine without a network.

Run as ``python -m benchmarks.gpu_wheels``, or ``make gpu-wheels``. Beside torch and transformers,
that is, and what these bring, for Python 3.12 on Linux. Wheels are compressed by LZMA, which pip
reads as it is: a third less to send. There:

    pip install --no-index --no-deps build/gpu-wheels/*.whl
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from quickstart.vocabulary import fetch_vocabulary

PYTHON = "3.12"
# pip takes no wheels of earlier ones by themselves
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64")
CONSTRAINTS = Path("constraints.txt")
ASSETS = Path(".assets/tokenizer")
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer_config.json")
PACKAGES = (
    *("liger-kernel", "llvmlite", "numba", "omegaconf", "pillow", "psutil", "rich"),
    *("sentencepiece", "simplejpeg", "tiktoken", "torchao", "torchdata", "torchtune", "xxhash"),
)


def main() -> None:
    """Collect, and tell how much it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", default=Path("build/gpu-wheels"))
    directory = parser.parse_args().directory
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "tokenizer").mkdir(parents=True)
    with TemporaryDirectory() as temporary:
        download(Path(temporary))
        build(Path(temporary))
        for wheel in sorted(Path(temporary).glob("*.whl")):
            compress(wheel, directory / wheel.name)
    for name in VOCABULARY:
        shutil.copyfile(fetch_vocabulary(ASSETS) / name, directory / "tokenizer" / name)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{directory}: {size / 2**20:.1f} MiB")


def download(directory: Path) -> None:
    """Download the wheels that the tests ran with."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *PACKAGES]
    command += ["--only-binary", ":all:", "--python-version", PYTHON, "--dest", str(directory)]
    command += ["--constraint", str(CONSTRAINTS)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run(command, check=True)


def build(directory: Path) -> None:
    """Build this package's wheel, of a copy: builds leave files where they run."""
    copy = directory / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(name, copy / name)
    shutil.copytree("torchtune_vl", copy / "torchtune_vl")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(copy)]
    subprocess.run([*command, "--wheel-dir", str(directory)], check=True)


def compress(wheel: Path, smaller: Path) -> None:
    """Write a wheel with the same files in fewer bytes."""
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_LZMA) as new:
        for entry in old.infolist():
            with new.open(entry.filename, "w") as target, old.open(entry) as source:
                shutil.copyfileobj(source, target)


if __name__ == "__main__":
    main()
