"""What a run costs before its first step, and what its processes hold, as a dataset grows.

Run as ``python -m benchmarks.growth``. A first start measures JSON Lines of a short question and
answer each, the start after it finds all of them in the cache; the trainer's memory is that of the
later start. Sizes of the plan are those of `benchmarks.packing`, drawn with repeats, and mapped
from a file. The planner is the first process alone; a worker is one of 8 of one of 8 ranks, which
reads the plan of all of its rows, 64 rows a step. Memory is what a process holds for itself
(anonymous pages) beyond what it held before, at its peak; mapped files are not in it, as the system
drops their pages when it needs room. Seconds are of processor time, on one core.

What 10^9 samples on 1,024 ranks take is computed from how it grew between the last two counts;
starts are shared by the data workers of all ranks, 8 of each.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np

from benchmarks.packing import MAX_TOKENS, sizes
from torchtune_vl.data import PackedRows, Plan, TrainingRows
from torchtune_vl.datasets import measure, vision_chat_dataset
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform

COUNTS = (10**4, 10**5, 10**6, 10**7)
ROWS_PER_STEP = 64
DRAWN = 20_000
# What is computed, as nobody here has it
COMPUTED, RANKS, WORKERS = 10**9, 1024, 8
CONSTANT = ("fill", "step", "worker")
VOCABULARY = Path(".assets/tokenizer")
PLANNER = PackedRows(MAX_TOKENS, 4 * MAX_TOKENS)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        part, directory = arguments.one
        print(json.dumps({"plan": plan, "read": read, "start": begin}[part](Path(directory))))
        return
    print(
        "      samples   first start, s   later, s   cache, MB   trainer, MB   plan, s   "
        "planner, MB   files, MB   row fill   worker's step, ms   worker, MB"
    )
    found: dict[int, dict[str, float]] = {}
    for count in arguments.counts:
        found[count] = measure_growth(count)
        print(line_of(count, found[count]), flush=True)
    print(line_of(COMPUTED, of_many(found)))


def measure_growth(count: int) -> dict[str, float]:
    """Measure all parts at a number of samples."""
    with TemporaryDirectory() as directory:
        write_records(Path(directory, "train.jsonl"), count)
        first, later = run("start", directory), run("start", directory)
        draw_sizes(Path(directory, "sizes.npy"), count)
        planned, worker = run("plan", directory), run("read", directory)
    return {
        "first": first["seconds"],
        "later": later["seconds"],
        "cache": later["cache"],
        "trainer": later["memory"],
        "plan": planned["seconds"],
        "planner": planned["memory"],
        "files": planned["files"],
        "fill": planned["fill"],
        "step": worker["seconds"],
        "worker": worker["memory"],
    }


def of_many(found: dict[int, dict[str, float]]) -> dict[str, float]:
    """What the computed number of samples and ranks would take, as it grew between the last two."""
    (few, of_few), (more, of_more) = [*found.items()][-2:]
    computed = {}
    for name, value in of_more.items():
        growth = (value - of_few[name]) / (more - few)
        if name in ("first", "later"):
            computed[name] = COMPUTED * growth / (RANKS * WORKERS)
        else:
            computed[name] = value if name in CONSTANT else value + (COMPUTED - more) * growth
    return computed


def line_of(count: int, found: dict[str, float]) -> str:
    """A line of the table."""
    return (
        f"{count:13,}   {found['first']:14.1f}   {found['later']:8.2f}   "
        f"{found['cache'] / 1e6:9,.0f}   {found['trainer'] / 1e6:11,.0f}   {found['plan']:7,.2f}   "
        f"{found['planner'] / 1e6:11,.0f}   {found['files'] / 1e6:9,.1f}   {found['fill']:8.2%}   "
        f"{1000 * found['step']:17.2f}   {found['worker'] / 1e6:10.0f}"
    )


def write_records(path: Path, count: int) -> None:
    """Write so many short conversations."""
    with path.open("w") as file:
        for number in range(count):
            turns = [
                {"role": "user", "content": f"What is {number} + {number}?"},
                {"role": "assistant", "content": f"It is {2 * number}."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def draw_sizes(path: Path, count: int) -> None:
    """Write the sizes of so many samples."""
    some, random = np.array(sizes(DRAWN), np.int32), np.random.default_rng(0)
    mapped = np.lib.format.open_memmap(path, "w+", np.int32, (count, 3))
    for first in range(0, count, 10**6):
        mapped[first : first + 10**6] = some[random.integers(0, DRAWN, min(10**6, count - first))]
    mapped.flush()


def run(part: str, directory: str) -> dict[str, float]:
    """Measure one part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--one", part, directory]
    return json.loads(subprocess.check_output(command))


def begin(directory: Path) -> dict[str, float]:
    """Open the dataset and find the sizes of all samples, as the first process does."""
    os.environ["TORCHTUNE_VL_CACHE"] = str(directory / "cache")
    transform = Qwen2_5_VLTransform(VOCABULARY / "tokenizer.json")
    transform({"messages": [{"role": "user", "content": "Hello"}]})
    datasets.disable_progress_bars()
    start = time.process_time()
    with peak() as memory:
        settings = {"source": "json", "data_files": str(directory / "train.jsonl")}
        dataset = vision_chat_dataset(transform, cache_dir=str(directory), **settings)
        measured = measure(dataset, range(len(dataset)), shown=None)
    assert measured.sizes.all(where=[True, False, True])
    seconds = time.process_time() - start
    cache = sum(path.stat().st_size for path in (directory / "cache").rglob("*.sqlite"))
    return {"seconds": seconds, "memory": memory[0], "cache": cache}


def plan(directory: Path) -> dict[str, float]:
    """Plan an epoch, after one that compiles."""
    given = np.load(directory / "sizes.npy", mmap_mode="r")
    how = {"rows_per_step": ROWS_PER_STEP, "epochs": 1}
    Plan.make(directory / "first", PLANNER, given[:1000], **how)
    start = time.process_time()
    with peak() as memory:
        made = Plan.make(directory / "plan", PLANNER, given, **how)
    seconds = time.process_time() - start
    rows = int((np.diff(made.ends) > 0).sum())
    fill = made.entries["tokens"].sum(dtype=int) / rows / MAX_TOKENS
    files = sum(path.stat().st_size for path in made.directory.iterdir())
    return {"seconds": seconds, "memory": memory[0], "files": files, "fill": float(fill)}


def read(directory: Path) -> dict[str, float]:
    """Read what a worker reads of the plan."""
    rows = TrainingRows(None, PLANNER, Plan(directory / "plan"), world_size=8)
    steps = range(rows.plan.first_step, rows.plan.last_step + 1, 8)
    start = time.process_time()
    with peak() as memory:
        for step in steps:
            rows._share(step)
            rows.plan.position(step)
    return {"seconds": (time.process_time() - start) / len(steps), "memory": memory[0]}


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes that the process holds for itself meanwhile, beyond what it held before."""
    before, most = anonymous(), [0]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            most[0] = max(most[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        is_over.set()
        watcher.join()


def anonymous() -> int:
    """Bytes of anonymous pages of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Anonymous:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
