"""Data workers end with the process that started them, in every way it can end."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch.utils.data import IterableDataset

from torchtune_vl.data._data_workers import _keeping_threads, loading


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Endless(IterableDataset):
    """More than the pipe to the trainer holds, so that workers wait for it to read."""

    def __iter__(self):
        while True:
            yield torch.zeros(100_000).numpy()


def pids() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


def test_workers_end_with_the_block_though_something_holds_the_iterator() -> None:
    with loading(Endless(), 2, batch_size=None) as rows:
        [next(rows) for _ in range(2)]  # both have begun
        for pid in pids():
            os.kill(pid, signal.SIGTERM)  # as clusters do
        workers = [psutil.Process(pid) for pid in pids()]
        assert len(workers) == 2
        [next(rows) for _ in range(20)]
    assert not any(worker.is_running() for worker in workers)
    assert rows is not None


class Garbage:
    """A cycle that may only be freed where it was made, as process groups are."""

    def __init__(self) -> None:
        self.cycle, self.pid = self, os.getpid()

    def handle(self, number: int, frame: object) -> None:
        """Handle a signal."""

    def __del__(self) -> None:
        if os.getpid() != self.pid:
            os._exit(3)


def test_workers_collect_no_garbage_of_the_trainer() -> None:
    gc.disable()
    try:
        Garbage()
        with loading(Collecting(), 1, batch_size=None) as rows:
            assert [*rows] == [0]
    finally:
        gc.enable()
        gc.collect()  # here: workers of later tests would end by it


def test_workers_free_no_handler_of_the_trainer() -> None:
    holder = Garbage()
    holder.cycle = None
    before = signal.signal(signal.SIGTERM, holder.handle)
    del holder
    try:
        with loading(Collecting(), 1, batch_size=None) as rows:
            assert [*rows] == [0]
    finally:
        signal.signal(signal.SIGTERM, before)


class Collecting(IterableDataset):
    def __iter__(self):
        gc.collect()
        yield 0


def test_workers_that_do_not_listen_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    with loading(Endless(), 1, batch_size=None) as rows:
        next(rows)
        (pid,) = pids()
        os.kill(pid, signal.SIGSTOP)
    assert not psutil.pid_exists(pid)


def fail() -> None:
    with loading(Endless(), 2, batch_size=None) as rows:
        next(rows)
        raise RuntimeError("ours")


def test_an_error_in_the_block_ends_workers_and_is_raised() -> None:
    with pytest.raises(RuntimeError, match="ours"):
        fail()
    assert not pids()


def kill_one() -> None:
    with loading(Endless(), 2, batch_size=None) as rows:
        next(rows)
        os.kill(pids()[0], signal.SIGKILL)
        while True:
            next(rows)


def test_a_killed_worker_ends_the_block_with_a_message() -> None:
    with pytest.raises(ChildProcessError, match=r"data worker \d+ was killed by SIGKILL: if mem"):
        kill_one()
    assert not pids()


TRAINER = """
import multiprocessing, sys, time
from tests.test_data_workers import Endless
from torchtune_vl.data._data_workers import loading
with loading(Endless(), 2, batch_size=None) as rows:
    next(rows)
    time.sleep(0.5)  # now they wait for somebody to read
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "fails":
        raise ValueError("no")
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "how",
    ["SIGKILL", *(pytest.param(how, marks=pytest.mark.slow) for how in ("fails", "SIGTERM"))],
)
def test_workers_are_gone_soon_after_the_trainer(how: str) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert trainer.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2
    if how.startswith("SIG"):
        trainer.send_signal(signal.Signals[how])
    trainer.wait(timeout=20)
    deadline = time.monotonic() + 5
    while any(runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_thread_that_pins_memory_leaves_others_their_number_of_threads() -> None:
    def loaded() -> Iterator[int]:
        torch.set_num_threads(1)  # as torch's thread does, for itself and all that begin later
        yield 0

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert next(_keeping_threads(loaded(), 2)) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
