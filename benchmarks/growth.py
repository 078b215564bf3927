"""What a run costs before its first step, and what its processes hold, as a dataset grows.

Run as ``python -m benchmarks.growth``. Sizes are those of `benchmarks.packing`, drawn with repeats,
and mapped from a file, as no process needs them for itself. The planner is the first process alone;
a worker is one of 8 of one of 8 ranks, which reads the plan of all of its rows, 64 rows a step.
Memory is what a process holds for itself (anonymous pages) beyond what it held before, at its peak;
mapped files are not in it, as the system drops their pages when it needs room. Seconds are of
processor time, on one core.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.packing import MAX_TOKENS, sizes
from torchtune_vl.data import PackedRows, Plan, TrainingRows

COUNTS = (10**4, 10**5, 10**6, 10**7)
ROWS_PER_STEP = 64
DRAWN = 20_000
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
        print(json.dumps({"plan": plan, "read": read}[part](Path(directory))))
        return
    print("samples      plan, s   planner, MB   files, MB   row fill   a worker's step, ms   MB")
    for count in arguments.counts:
        with TemporaryDirectory() as directory:
            draw_sizes(Path(directory, "sizes.npy"), count)
            planned, found = (run(part, directory) for part in ("plan", "read"))
        print(
            f"{count:10,}   {planned['seconds']:7.2f}   {planned['memory'] / 1e6:11.0f}   "
            f"{planned['files'] / 1e6:9.1f}   {planned['fill']:8.2%}   "
            f"{1000 * found['seconds']:19.2f}   {found['memory'] / 1e6:2.0f}"
        )


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
