"""What a run costs before its first step, and what its processes hold, as a dataset grows.

Run as ``python -m benchmarks.growth``. A first start measures JSON Lines of a short question and
answer each, the start after it finds all of them in the cache; the trainer's memory is that of the
later start. Sizes of the plan are those of `benchmarks.packing`, drawn with repeats, and mapped
from a file. The planner is the first process alone; a worker is one of 8 of one of 8 ranks, which
reads the plan of all of its rows, 64 rows a step. Memory is what a process holds for itself
(anonymous pages) beyond what it held before, at its peak; mapped files are not in it, as the system
drops their pages when it needs room. Seconds are of processor time, on one core, without those of
the thread that watches memory.

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
from typing import NamedTuple

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


class Column(NamedTuple):
    """A column of the table."""

    title: str
    scale: float = 1.0
    digits: int = 0


COLUMNS = {
    "first": Column("first start, s", digits=1),
    "later": Column("later start, s", digits=2),
    "cache": Column("cache, MB", 1e-6),
    "trainer": Column("trainer, MB", 1e-6),
    "plan": Column("plan, s", digits=2),
    "planner": Column("planner, MB", 1e-6),
    "files": Column("files, MB", 1e-6, 1),
    "fill": Column("row fill, %", 100, 2),
    "step": Column("worker's step, ms", 1000, 2),
    "worker": Column("worker, MB", 1e-6),
}
VOCABULARY = Path(".assets/tokenizer")
PLANNER = PackedRows(MAX_TOKENS, 4 * MAX_TOKENS)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument(
        "--started", type=int, default=10**6, help="the largest count whose starts are measured"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        part, directory = arguments.one
        print(json.dumps({"plan": plan, "read": read, "start": begin}[part](Path(directory))))
        return
    print(f"{'samples':>13}   " + "   ".join(column.title for column in COLUMNS.values()))
    found: dict[int, dict[str, float]] = {}
    for count in arguments.counts:
        starts = count <= arguments.started
        found[count] = measure_plan(count) | (measure_starts(count) if starts else {})
        print(line_of(count, found[count]), flush=True)
    grown = [n for n in COLUMNS if sum(n in of_count for of_count in found.values()) > 1]
    print(line_of(COMPUTED, {name: of_many(name, found) for name in grown}))


def measure_starts(count: int) -> dict[str, float]:
    """Measure a first start on so many samples, and one after it."""
    with TemporaryDirectory() as directory:
        write_records(Path(directory, "train.jsonl"), count)
        first, later = run("start", directory), run("start", directory)
    own = {"later": later["seconds"], "cache": later["cache"], "trainer": later["memory"]}
    return {"first": first["seconds"], **own}


def measure_plan(count: int) -> dict[str, float]:
    """Measure the plan of an epoch of so many samples, and reading it."""
    with TemporaryDirectory() as directory:
        draw_sizes(Path(directory, "sizes.npy"), count)
        planned, worker = run("plan", directory), run("read", directory)
    own = {"step": worker["seconds"], "worker": worker["memory"]}
    return {**own, **{name: planned[name] for name in ("plan", "planner", "files", "fill")}}


def of_many(name: str, found: dict[int, dict[str, float]]) -> float:
    """What the computed number of samples would take, as it grew between the last two counts."""
    (few, before), (more, last) = [(n, f[name]) for n, f in found.items() if name in f][-2:]
    if name in CONSTANT:
        return last
    growth = (last - before) / (more - few)
    if name in ("first", "later"):
        return COMPUTED * growth / (RANKS * WORKERS)
    return last + (COMPUTED - more) * growth


def line_of(count: int, found: dict[str, float]) -> str:
    """A line of the table."""
    cells = [
        f"{column.scale * found[name]:,.{column.digits}f}" if name in found else "-"
        for name, column in COLUMNS.items()
    ]
    widths = [len(column.title) for column in COLUMNS.values()]
    return f"{count:13,}   " + "   ".join(map(str.rjust, cells, widths))


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
    start = time.thread_time()
    with peak() as memory:
        settings = {"source": "json", "data_files": str(directory / "train.jsonl")}
        dataset = vision_chat_dataset(transform, cache_dir=str(directory), **settings)
        measured = measure(dataset, range(len(dataset)), shown=None)
    assert measured.sizes.all(where=[True, False, True])
    seconds = time.thread_time() - start
    cache = sum(path.stat().st_size for path in (directory / "cache").rglob("*.sqlite"))
    return {"seconds": seconds, "memory": memory[0], "cache": cache}


def plan(directory: Path) -> dict[str, float]:
    """Plan an epoch, after one that compiles."""
    given = np.load(directory / "sizes.npy", mmap_mode="r")
    how = {"rows_per_step": ROWS_PER_STEP, "epochs": 1}
    Plan.make(directory / "first", PLANNER, given[:1000], **how)
    start = time.thread_time()
    with peak() as memory:
        made = Plan.make(directory / "plan", PLANNER, given, **how)
    seconds = time.thread_time() - start
    rows = int((np.diff(made.ends) > 0).sum())
    fill = made.entries["tokens"].sum(dtype=int) / rows / MAX_TOKENS
    files = sum(path.stat().st_size for path in made.directory.iterdir())
    return {"plan": seconds, "planner": memory[0], "files": files, "fill": float(fill)}


def read(directory: Path) -> dict[str, float]:
    """Read what a worker reads of the plan."""
    rows = TrainingRows(None, PLANNER, Plan(directory / "plan"), world_size=8)
    steps = range(rows.plan.first_step, rows.plan.last_step + 1, 8)
    start = time.thread_time()
    with peak() as memory:
        for step in steps:
            rows._share(step)
            rows.plan.position(step)
    return {"seconds": (time.thread_time() - start) / len(steps), "memory": memory[0]}


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
