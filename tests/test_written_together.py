"""Checkpoints that several processes write: the same as one writes, or none in all of them."""

import torchtune_vl._torchao  # noqa: F401 # isort: skip (before torchtune, in processes that tests start)

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from quickstart.checkpoint import write_tiny_checkpoint
from torchtune_vl._torchtune import MODEL_KEY
from torchtune_vl.checkpoint import HubCheckpointer
from torchtune_vl.checkpoint._together import Together
from torchtune_vl.files import _safetensors as tensor_io
from torchtune_vl.files._directory import checksum
from torchtune_vl.files._safetensors import LazyTensor, cast_lazily, write_shards

SHARD_SIZE = "1MB"


def join(rank: int, directory: Path) -> Any:
    store = dist.FileStore(str(directory / "store"), 2)
    wait = timedelta(seconds=100)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
    return dist.group.WORLD


def weights_of(base: Path) -> dict[str, torch.Tensor]:
    checkpointer = HubCheckpointer(base, base.parent / "unused")
    loaded: dict[str, torch.Tensor] = checkpointer.load_checkpoint()[MODEL_KEY]
    return loaded


def spread(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | LazyTensor]:
    """Some sharded, some lazy, some whole."""
    mesh = init_device_mesh("cpu", (2,))
    kinds = (
        lambda x: distribute_tensor(x, mesh, [Shard(0)]),
        lambda x: distribute_tensor(x, mesh, [Replicate()]),
        lambda x: LazyTensor(x.shape, x.dtype, lambda: x + 0),
        lambda x: cast_lazily(x, x.dtype),
    )
    return {name: kinds[i % 4](x) for i, (name, x) in enumerate(weights.items())}


def files_of(directory: Path) -> dict[str, str]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): checksum(path) for path in paths}


def save(base: Path, output: Path, weights: Any, group: Any) -> None:
    checkpointer = HubCheckpointer(base, output)
    checkpointer.save_checkpoint({MODEL_KEY: weights}, epoch=0, group=group)


def cut_small(_: Any = None) -> None:
    """Write several files of a small model."""
    write = write_shards
    tensor_io.write_shards = lambda w, d, _, **k: write(w, d, SHARD_SIZE, **k)  # type: ignore[assignment]


def save_in_two(rank: int, directory: Path) -> None:
    group = join(rank, directory)
    cut_small()
    base = directory / "base"
    save(base, directory / "two", spread(weights_of(base)), group)
    dist.destroy_process_group()


def test_two_processes_write_what_one_does(vocabulary: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_tiny_checkpoint(base, vocabulary)
    torch.multiprocessing.spawn(save_in_two, (tmp_path,), nprocs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_io, "write_shards", tensor_io.write_shards)
        cut_small()
        save(base, tmp_path / "one", weights_of(base), None)
    found, expected = (files_of(tmp_path / name / "epoch_0") for name in ("two", "one"))
    assert len([name for name in found if name.endswith(".safetensors")]) > 3
    assert found == expected


def fail_in_two(rank: int, directory: Path, failing: int) -> None:
    group = join(rank, directory)
    cut_small()
    base = directory / "base"
    if rank == failing:
        tensor_io.save_tensors = refuse
    with pytest.raises(OSError, match=r"epoch_0 cannot be written \(the disk is full\): make room"):
        save(base, directory / "two", spread(weights_of(base)), group)
    dist.destroy_process_group()


def refuse(*_: Any) -> None:
    raise OSError("the disk is full")


@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_cannot_write_fails_in_all(failing: int, vocabulary: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_tiny_checkpoint(base, vocabulary)
    save(base, tmp_path / "two", weights_of(base), None)
    before = files_of(tmp_path / "two" / "epoch_0")
    torch.multiprocessing.spawn(fail_in_two, (tmp_path, failing), nprocs=2)
    assert files_of(tmp_path / "two" / "epoch_0") == before
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["epoch_0"]


def write_apart(rank: int, directory: Path) -> None:
    """Write to disks of two machines, each of which has its own."""
    together = Together(join(rank, directory))
    target = directory / "epoch_0"
    if rank:
        Path.is_dir = lambda _: False  # type: ignore[method-assign]
    expected = r"process 1 does not see .*epoch_0\.partial"
    with pytest.raises(OSError, match=expected), together.new_directory(target):
        raise AssertionError("nobody writes")
    dist.destroy_process_group()


def test_disks_that_are_not_shared_are_refused(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(write_apart, (tmp_path,), nprocs=2)
    assert not [*tmp_path.glob("epoch_0*")]


def test_an_error_of_another_kind_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Together().new_directory(tmp_path / "epoch_0"):
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]
