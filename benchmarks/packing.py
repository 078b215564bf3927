"""Fill of packed rows, and samples planned per second, for several look-ahead buffers.

Run as ``python -m benchmarks.packing``. Sizes are random, with the spread of a mix of text, images
of 224 to 1920 px and videos. Fill counts all rows, those at the end of an epoch too; it cannot
exceed 1 for the scarcer of tokens and patches. Seconds are of processor time, on one core.
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from torchtune_vl.data import PackedRows, Plan, Size

MAX_TOKENS = 16_384
LOOKAHEADS = (16, 64, 256, 1024)
# Budgets of a row. An image has four patches for each of its tokens: the first never binds
PATCHES_PER_TOKEN = (4.0, 3.3, 3.0)
PIXELS_PER_TOKEN = 28 * 28


class Measured(NamedTuple):
    """Fill with tokens and patches, and samples per second."""

    tokens: float
    patches: float
    speed: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5, help="runs of which to take the median")
    arguments = parser.parse_args()
    given = sizes(arguments.samples)
    tokens = [size.tokens for size in given]
    of_media = sum(size.patches for size in given) / 4 / sum(tokens)
    print(
        f"{len(given)} samples of {min(tokens)} to {max(tokens)} tokens, median "
        f"{statistics.median(tokens):.0f}, {of_media:.0%} of them of images and videos; rows of "
        f"{MAX_TOKENS} tokens\n"
    )
    print("patches per token   look-ahead   token fill   patch fill   samples/s")
    for patches_per_token in PATCHES_PER_TOKEN:
        for lookahead in LOOKAHEADS:
            planner = PackedRows(MAX_TOKENS, int(patches_per_token * MAX_TOKENS), lookahead)
            plans = [plan(planner, given) for _ in range(arguments.repeats)]
            speed = statistics.median(plan.speed for plan in plans)
            print(
                f"{patches_per_token:17}   {lookahead:10}   {plans[0].tokens:10.2%}   "
                f"{plans[0].patches:10.2%}   {speed:9,.0f}"
            )


def sizes(count: int, seed: int = 0) -> list[Size]:
    """Return random sizes: 30 % text, 65 % with images (mostly one), 5 % with a video."""
    random = np.random.default_rng(seed)
    media = [_media_tokens(random) for _ in range(count)]
    text = np.clip(random.lognormal(5.5, 0.9, count), 50, 2000).astype(int).tolist()
    return [Size(text[i] + media[i], 4 * media[i], text[i] // 2) for i in range(count)]


def _media_tokens(random: np.random.Generator) -> int:
    kind = random.random()
    if kind < 0.3:
        return 0
    if kind < 0.95:
        images = 1 if random.random() < 0.8 else int(random.integers(2, 5))
        return sum(_image_tokens(random) for _ in range(images))
    return int(random.integers(500, 8000))


def _image_tokens(random: np.random.Generator) -> int:
    width = random.uniform(224, 1920)
    height = np.clip(width * random.uniform(0.5, 1.5), 224, 1920)
    return min(int(width * height) // PIXELS_PER_TOKEN, 2700)


def plan(planner: PackedRows, given: list[Size]) -> Measured:
    """Plan an epoch as training does, one row a step."""
    sizes_of_samples = np.array(given, np.int32)
    with TemporaryDirectory() as directory:
        start = time.process_time()
        made = Plan.make(Path(directory), planner, sizes_of_samples, rows_per_step=1, epochs=1)
        seconds = time.process_time() - start
        count = made.last_step
    tokens, patches, _ = (sum(values) / count for values in zip(*given, strict=True))
    return Measured(
        tokens / planner.max_tokens, patches / planner.max_patches, len(given) / seconds
    )


if __name__ == "__main__":
    main()
