"""How much the host launches while a step is saved: by a thread, and by a process.

Run as ``python -m benchmarks.saving``. A GPU's host has to launch operations faster than they are
computed, while the save that has begun is written. So operations of one number are counted, on the
CPU, alone and beside a save of 2 GB by each of the two ways of ``torch.distributed.checkpoint``.
"""

import logging
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

TENSORS, SIDE = 32, 4096
RUNS, ALONE_SECONDS = 5, 3
BETWEEN_LOOKS = 200  # operations


def main() -> None:
    """Measure in turns, and print."""
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    with TemporaryDirectory() as directory:
        store = dist.FileStore(f"{directory}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        state = {str(i): torch.randn(SIDE, SIDE) for i in range(TENSORS)}
        shares: dict[str, list[float]] = {kind.value: [] for kind in AsyncCheckpointerType}
        for _ in range(RUNS):
            until = time.perf_counter() + ALONE_SECONDS
            alone = rate_until(lambda until=until: time.perf_counter() > until)  # type: ignore[misc]
            for kind in AsyncCheckpointerType:
                saved = Path(directory) / "step"
                shares[kind.value].append(rate_beside_a_save(state, kind, saved) / alone)
                shutil.rmtree(saved)
        dist.destroy_process_group()
    for name, found in shares.items():
        low, median, high = statistics.quantiles(found)
        print(f"{name}: {median:.2f} ({low:.2f} to {high:.2f}) of the operations alone")


def rate_beside_a_save(
    state: dict[str, torch.Tensor], kind: AsyncCheckpointerType, directory: Path
) -> float:
    """Operations a second from when a save has begun until it is written."""
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=kind is AsyncCheckpointerType.PROCESS,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    stager = DefaultStager(options)
    written = dcp.async_save(
        state, checkpoint_id=directory, async_checkpointer_type=kind, async_stager=stager
    )
    rate = rate_until(written.done)  # type: ignore[union-attr]
    written.result()  # type: ignore[union-attr]
    return rate


def rate_until(is_done: Callable[[], bool]) -> float:
    """Operations a second."""
    number, count, start = torch.zeros(1), 0, time.perf_counter()
    while not is_done():
        for _ in range(BETWEEN_LOOKS):
            number = number + 1
        count += BETWEEN_LOOKS
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
