"""scikit-learn's handwritten digits as a chat dataset with images."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

QUESTION = "Which digit is this?"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 360
PIXELS_PER_PIXEL = 7  # 8x8 scans to 56x56, the smallest image that the model does not enlarge


def write_digits(directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write the 1,797 scans as PNG files, and conversations about them in ShareGPT format.

    Args:
        directory: where to write, made if missing.
        seed: seed of the split.

    Returns:
        The files ``train.json`` and ``held_out.json``; image paths in them are relative to
        ``directory``.
    """
    digits = load_digits()
    (directory / "images").mkdir(parents=True, exist_ok=True)
    samples = [
        _write_sample(directory, number, scan, int(target))
        for number, (scan, target) in enumerate(zip(digits.images, digits.target, strict=True))
    ]
    split = train_test_split(samples, test_size=HELD_OUT, random_state=seed, stratify=digits.target)
    files = directory / "train.json", directory / "held_out.json"
    for path, part in zip(files, split, strict=True):
        path.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
    return files


def _write_sample(directory: Path, number: int, scan: np.ndarray, target: int) -> dict:
    levels = (255 - scan * (255 / 16)).astype(np.uint8)  # dark ink on white paper
    pixels = levels.repeat(PIXELS_PER_PIXEL, axis=0).repeat(PIXELS_PER_PIXEL, axis=1)
    path = f"images/{number:04}.png"
    Image.fromarray(pixels).save(directory / path)
    return {
        "image": path,
        "conversations": [
            {"from": "human", "value": f"<image>{QUESTION}"},
            {"from": "gpt", "value": WORDS[target]},
        ],
    }
