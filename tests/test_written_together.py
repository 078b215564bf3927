"""Checkpoints that several processes write: the same as one writes, or none in all of them."""

import torchtune_vl._torchao  # noqa: F401 # isort: skip (before torchtune, in processes that tests start)

import gc
import json
import os
import time
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from benchmarks.checkpoint import anonymous_memory, peak_memory
from quickstart.checkpoint import CONFIG, write_tiny_checkpoint
from tests.test_parallel import SMALL
from torchtune_vl._torchtune import MODEL_KEY
from torchtune_vl.checkpoint import HubCheckpointer
from torchtune_vl.files import _safetensors as tensor_io
from torchtune_vl.files import _together
from torchtune_vl.files._directory import checksum, numbered
from torchtune_vl.files._safetensors import (
    LazyTensor,
    cast_lazily,
    read_tensors,
    stored_tensors,
    weight_files,
    write_shards,
)
from torchtune_vl.files._together import Together
from torchtune_vl.models._registry import family_of
from torchtune_vl.models._weights import load_weights_into
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl, qwen2_5_vl_from_config
from torchtune_vl.modules.parallelism import decoder_tp_plan
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._sharding import divide_layers, shard

SHARD_SIZE = "1MB"


def join(rank: int, directory: Path, world_size: int = 2) -> Any:
    store = dist.FileStore(str(directory / "store"), world_size)
    place = {"store": store, "rank": rank, "world_size": world_size}
    dist.init_process_group("gloo", **place, timeout=timedelta(seconds=100))
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


def cut_small() -> None:
    """Write several files of a small model."""
    write = write_shards
    tensor_io.write_shards = lambda w, d, _, group: write(w, d, SHARD_SIZE, group)  # type: ignore[assignment]


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


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_cannot_write_fails_in_all(failing: int, vocabulary: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_tiny_checkpoint(base, vocabulary)
    save(base, tmp_path / "two", weights_of(base), None)
    before = files_of(tmp_path / "two" / "epoch_0")
    torch.multiprocessing.spawn(fail_in_two, (tmp_path, failing), nprocs=2)
    assert files_of(tmp_path / "two" / "epoch_0") == before
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["epoch_0"]


def disagree(rank: int, directory: Path) -> None:
    """Do what one process alone does wrong, each of which all are told."""
    group = join(rank, directory)
    whole = {"a": torch.ones(400), "b": torch.ones(400)}

    def fail() -> torch.Tensor:
        raise RuntimeError("no memory")

    lazy = {**whole, "b": LazyTensor(torch.Size([400]), torch.float32, fail)}
    with (
        pytest.raises(RuntimeError, match="no memory"),
        Together(group).new_directory(directory / "c"),
    ):
        write_shards(lazy, directory / "c.partial", "1KB", group)
    reversed_in_one = dict(sorted(whole.items(), reverse=bool(rank)))
    with pytest.raises(ValueError, match="have other tensors"):
        write_shards(reversed_in_one, directory, group=group)
    with pytest.raises(OSError, match="nothing there"):
        Together(group).by_each(refuse_nothing if rank else list)
    sharded = {"a": distribute_tensor(whole["a"], init_device_mesh("cpu", (2,)), [Shard(0)])}
    with pytest.raises(ValueError, match="have to write together"):
        write_shards(sharded, directory)
    dist.destroy_process_group()


def refuse_nothing() -> None:
    raise OSError("nothing there")


def test_all_are_told_what_one_does_wrong(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(disagree, (tmp_path,), nprocs=2)
    # torch removes the file by which the processes met, unless one of them ends before it is freed.
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}


def write_from_a_plane(rank: int, directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Load and write a model that is divided by layers and by data."""
    group = join(rank, directory, world_size=4)
    mesh = Mesh(1, 2, 1, 2).devices("cpu")
    with torch.device("meta"):
        model: Any = qwen2_5_vl(**SMALL)
    divide_layers(model, mesh["tensor"], decoder_tp_plan(model))
    shard(model, mesh, torch.float32, cpu_offload=False)
    load_weights_into(model, weights, torch.device("cpu"))
    write_shards({n: p.detach() for n, p in model.named_parameters()}, directory, "50KB", group)
    dist.destroy_process_group()


@pytest.mark.slow
def test_four_processes_that_share_layers_and_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = qwen2_5_vl(**SMALL).state_dict()
    torch.multiprocessing.spawn(write_from_a_plane, (tmp_path, weights), nprocs=4)
    found = read_tensors(stored_tensors(weight_files(tmp_path)))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def write_apart(rank: int, directory: Path) -> None:
    """Write to disks of two machines, each of which has its own."""
    together = Together(join(rank, directory))
    together.check_shared(directory)
    _together._SEEN_WITHIN = 1
    if rank:
        os.path.exists = lambda _: False
    with pytest.raises(OSError, match=r"process 1 does not see .*: name a directory on a disk"):
        together.check_shared(directory)
    expected = r"process 1 does not see .*epoch_0\.partial"
    with pytest.raises(OSError, match=expected), together.new_directory(directory / "epoch_0"):
        raise AssertionError("nobody writes")
    dist.destroy_process_group()


@pytest.mark.slow
def test_disks_that_are_not_shared_are_refused(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(write_apart, (tmp_path,), nprocs=2)
    assert not [*tmp_path.iterdir()]


def test_an_error_of_another_kind_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Together().new_directory(tmp_path / "epoch_0"):
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]


def save_until_killed(rank: int, directory: Path) -> None:
    """Save the same weights, plus the number of the save, again and again."""
    group = join(rank, directory)
    cut_small()
    weights = weights_of(directory / "base")
    for number in count():
        changed = {name: tensor + number for name, tensor in weights.items()}
        save(directory / "base", directory / "two", spread(changed), group)
        (directory / f"saved_{number}").touch()


@pytest.mark.slow
def test_killed_while_two_write(vocabulary: Path, tmp_path: Path) -> None:
    """At any moment a checkpoint is whole, and of the last save that ended or the one after."""
    base = tmp_path / "base"
    write_tiny_checkpoint(base, vocabulary)
    weights = weights_of(base)
    name = next(iter(weights))
    chance = Random(0)
    for kill in range(20):
        for old in (*tmp_path.glob("saved_*"), tmp_path / "store"):
            old.unlink(missing_ok=True)
        both = torch.multiprocessing.spawn(save_until_killed, (tmp_path,), nprocs=2, join=False)
        while not (tmp_path / "saved_1").exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.5))
        for process in both.processes:
            process.kill()
        for process in both.processes:
            process.join()
        ended = max(int(path.name.removeprefix("saved_")) for path in tmp_path.glob("saved_*"))
        (epoch,) = numbered(tmp_path / "two", "epoch")
        found = HubCheckpointer(epoch, tmp_path / "unused").load_checkpoint()[MODEL_KEY]
        number = round(float((found[name].double() - weights[name].double()).mean()))
        assert number in (ended, ended + 1), kill
        assert all(torch.equal(found[n], weights[n] + number) for n in weights), kill


def watch(rank: int, directory: Path, act: Any) -> None:
    """Run something, and note the most anonymous memory that it took."""
    join(rank, directory)
    act(directory / "warm_up")  # what libraries take once
    gc.collect()
    before = anonymous_memory()
    with peak_memory() as peak:
        act(directory)
    (directory / f"most_{rank}").write_text(str(peak() - before))
    dist.destroy_process_group()


def load_and_export(directory: Path) -> None:
    base = directory / "base"
    with torch.device("meta"):
        model: Any = qwen2_5_vl_from_config(base)
    shard(model, Mesh(1, 2, 1, 1).devices("cpu"), torch.float32, cpu_offload=False)
    load_weights_into(model, weights_of(base), torch.device("cpu"))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save(base, directory / "output", weights, dist.group.WORLD)


def write_wide(directory: Path, depth: int) -> None:
    """Write a model without a tokenizer, of layers of 45 MB, tensor by tensor."""
    directory.mkdir(parents=True)
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": depth}
    wide |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    vision = {**CONFIG["vision_config"], "out_hidden_size": 1024}
    config = {**CONFIG, **wide, "vision_config": vision}
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = qwen2_5_vl_from_config(directory)
    state = family_of(directory).names.to_published(model.state_dict())
    write_shards(
        {n: LazyTensor(x.shape, x.dtype, partial(random, x)) for n, x in state.items()}, directory
    )


def random(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape)


@pytest.mark.slow
def test_memory_of_each_process(tmp_path: Path) -> None:
    """Half of the model, and a tensor; of one, a file of weights beside them."""
    layers = int(os.environ.get("LAYERS_OF_45_MB", "25"))
    for directory, depth in ((tmp_path / "warm_up", 1), (tmp_path, layers)):
        write_wide(directory / "base", depth)
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    torch.multiprocessing.spawn(watch, (tmp_path, load_and_export), nprocs=2)
    shares = [int((tmp_path / f"most_{rank}").read_text()) / size for rank in range(2)]
    print(f"\na model of {size / 1e9:.2f} GB: at most {shares[0]:.2f} and {shares[1]:.2f} of it")
    assert shares[1] <= 0.6
    (epoch,) = numbered(tmp_path / "output", "epoch")
    found = weights_of(epoch)
    assert all(torch.equal(found[n], w) for n, w in weights_of(tmp_path / "base").items())
