"""Data workers that end with the process that started them, the trainer."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader


@contextmanager
def loading(dataset: Any, num_workers: int, **options: Any) -> Iterator[Iterator[Any]]:
    """Iterate over ``DataLoader(dataset, **options)``, whose workers end with the ``with`` block.

    The workers ignore SIGTERM and SIGINT, which clusters and terminals send to all processes: they
    go on until their trainer ends, and are gone as soon as it is, even if it was killed. If one was
    killed or crashed, the block raises a ChildProcessError.
    """
    # With a generator, or else it draws from that of the steps, once more after resuming
    options |= {"worker_init_fn": _begin, "generator": torch.Generator()}
    loader = DataLoader(dataset, num_workers=num_workers, **options)
    # No worker may collect our garbage: a process group would wait for threads that no fork copies
    gc.freeze()
    try:
        loaded = iter(loader)
    finally:
        gc.unfreeze()
    workers = getattr(loaded, "_workers", [])
    try:
        yield _keeping_threads(loaded, torch.get_num_threads())
    except (RuntimeError, OSError, EOFError) as error:  # of torch's handler of SIGCHLD, or its pipe
        for worker in workers:
            with suppress(RuntimeError):  # of the handler, while we wait for it to end
                # Not only for its pipe to us, which closes before its exit code is known
                worker.join(timeout=0.2)
        pid, status = next(((w.pid, w.exitcode) for w in workers if w.exitcode), (0, 0))
        if not status:
            raise
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else "crashed"
        raise ChildProcessError(
            f"data worker {pid} {how}: if memory ran out, lower num_workers, or give a container "
            "more shared memory (docker run --shm-size)"
        ) from error
    finally:
        # Not left to garbage collection: a traceback, or a library, may keep the iterator alive
        if workers:
            loaded._shutdown_workers()  # type: ignore[attr-defined]
        for worker in workers:
            worker.kill()  # those that did not listen
            worker.join()


def _keeping_threads(loaded: Iterator[Any], threads: int) -> Iterator[Any]:
    """Iterate, and set the number of threads, for threads that begin later, to what it was.

    The one that pins memory sets it to 1. Where backward, in a thread of its own, has another than
    forward had, layers that it computes anew are compiled for it anew, to what may not fit.
    """
    for batch in loaded:
        torch.set_num_threads(threads)
        yield batch


# Kept, since what they hold of the trainer may wait here for threads, too, when it is freed
_handlers_of_the_trainer: list[Any] = []


def _begin(worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        _handlers_of_the_trainer.append(signal.signal(number, signal.SIG_IGN))
    Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = parent_process()
    assert trainer is not None
    wait([trainer.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)  # its main thread may wait for somebody to read
