"""Warnings that are said once."""

import os
from multiprocessing import get_context

from torchtune_vl.media._said import Said


def test_one_of_processes_that_come_at_the_same_time_tells() -> None:
    kinds = [str(number) for number in range(3000)]
    said, processes = Said(*kinds), get_context("fork")
    told, start = processes.Value("q", 0), processes.Barrier(4)

    def tell() -> None:
        start.wait()
        count = sum(said.is_new(kind) for kind in kinds)
        with told:
            told.value += count
        os._exit(0)

    workers = [processes.Process(target=tell) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert told.value == len(kinds)
    assert all(kind in said for kind in kinds)
    assert not said.is_new("7")
