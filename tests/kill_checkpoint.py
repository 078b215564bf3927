"""Save checkpoints in a loop, be killed, and look at what is left, again and again.

Run as ``python -m tests.kill_checkpoint DIRECTORY --kills 8 --megabytes 4``. The one that saves is
forked from the one that kills and looks, so that a round does not wait for imports.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from tests.reference import reference_config
from torchtune_vl.files._directory import MANIFEST
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config
from torchtune_vl.training import Qwen2_5_VLCheckpointer

OPTIMIZER_VALUES = 100_000
EPOCHS = 2  # numbers that are taken in turn, so that checkpoints are replaced too
HIDDEN_SIZE = 256


def main() -> None:
    """Kill before each change of the file system in turn, then at random moments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=8, help="at random moments of a save")
    parser.add_argument("--megabytes", type=int, default=4, help="of embeddings")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    base, output = arguments.directory / "base", arguments.directory / "output"
    vocab_size = arguments.megabytes * 1_000_000 // (4 * HIDDEN_SIZE)
    reference_config("head_dim_128", vocab_size=vocab_size).save_pretrained(base)

    saved = run(base, output, first=1, last=2)[0]  # one of each number, undisturbed
    look(base, output, saved)
    saved = kill_before_each_step(base, output, saved)
    saved = kill_at_random(base, output, saved, arguments.kills, arguments.seed)
    print(f"all well, {saved} saves", flush=True)


def kill_at_random(base: Path, output: Path, saved: int, kills: int, seed: int) -> int:
    """Kill during saves, at moments that are uniform over a save and a little more."""
    saved, duration = run(base, output, first=saved + 1, last=saved + 1)
    generator = random.Random(seed)
    replaced = 0
    for kill in range(kills):
        moment = generator.uniform(0, 1.25 * duration)
        before = saved
        finished, _ = run(base, output, first=saved + 1, kill_after=moment)
        left = sorted(path.name for path in output.iterdir())
        saved = look(base, output, max(saved, finished))
        replaced += saved > before
        print(f"kill {kill}: after {moment:.3f} of {duration:.3f} s, {saved} of {left}", flush=True)
    print(f"{kills} kills, {replaced} of them when the new checkpoint was there", flush=True)
    return saved


def kill_before_each_step(base: Path, output: Path, saved: int) -> int:
    """Kill before the first change of the file system that a save makes, the second, ..."""
    for step in range(1, 1000):
        finished, _ = run(base, output, first=saved + 1, last=saved + 1, kill_before=step)
        if finished > saved:
            print(f"{step - 1} steps", flush=True)
            return look(base, output, finished)
        saved = look(base, output, saved)
    raise AssertionError("a save takes too many steps")


def run(
    base: Path,
    output: Path,
    *,
    first: int,
    last: int = sys.maxsize,
    kill_after: float | None = None,
    kill_before: int | None = None,
) -> tuple[int, float]:
    """Number of the last save that returned, and seconds that it took."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        save_in_a_loop(base, output, first, last, kill_before, writer)
    os.close(writer)
    finished, started, duration = first - 1, 0.0, 0.0
    with os.fdopen(reader) as lines:
        for line in lines:
            number = int(line)
            if number >= first:
                finished, duration = number, time.perf_counter() - started
            else:
                started = time.perf_counter()
                if kill_after is not None:
                    time.sleep(kill_after)
                    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return finished, duration


def save_in_a_loop(
    base: Path, output: Path, first: int, last: int, kill_before: int | None, writer: int
) -> NoReturn:
    """Save checkpoints whose every value is their number; tell of each start by 0 and of its end.

    Ends the process.
    """
    try:
        # There are no files of weights to start from, which is seen when they are read
        checkpointer = Qwen2_5_VLCheckpointer(base, output, ["none"])
        with torch.device("meta"):
            names = qwen2_5_vl_from_config(base).state_dict()
        weights = {name: torch.empty(tensor.shape) for name, tensor in names.items()}
        steps = 0

        def count(event: str, _: object) -> None:
            nonlocal steps
            if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                steps += 1
                if steps == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        for number in range(first, last + 1):
            for tensor in weights.values():
                tensor.fill_(number)
            optimizer = torch.full((OPTIMIZER_VALUES,), float(number))
            state = {"model": weights, "optimizer": optimizer, "epochs_run": number}
            if kill_before:
                sys.addaudithook(count)
            os.write(writer, b"0\n")
            checkpointer.save_checkpoint(state, number % EPOCHS, intermediate_checkpoint=True)
            os.write(writer, f"{number}\n".encode())
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def look(base: Path, output: Path, saved: int) -> int:
    """Number of the newest checkpoint: that of the last save that returned, or the one after.

    Each directory that is there loads, is whole and of one save.
    """
    resumed = Qwen2_5_VLCheckpointer(base, output, should_load_recipe_state=True).load_checkpoint()
    number = resumed["epochs_run"]
    assert number in (saved, saved + 1), (number, saved)
    assert (resumed["optimizer"] == number).all()
    assert all((tensor == number).all() for tensor in resumed["model"].values())
    for epoch in range(EPOCHS):
        directory = output / f"epoch_{epoch}"
        loaded = Qwen2_5_VLCheckpointer(directory, output.parent / "elsewhere").load_checkpoint()
        values = loaded["model"].values()
        of_directory = next(iter(values)).flatten()[0]
        assert of_directory in (number - 1, number, number + 1), (epoch, of_directory, number)
        assert all((tensor == of_directory).all() for tensor in values)
    for path in output.glob("epoch_*"):
        assert path.suffix == ".partial" or (path / MANIFEST).is_file()
    return number


if __name__ == "__main__":
    main()
