"""Optimizers go on from a saved step as if nothing had been, on one process and on two."""

import torchtune_vl._torchao  # noqa: F401 # isort: skip (before torchtune, in processes that tests start)

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torchao.optim import AdamW8bit
from torchtune import config

from torchtune_vl.training._optimizer_state import (
    fit,
    initialize,
    optimizer_state,
    set_plain_values,
    step,
)

ROOT = Path(__file__).parents[1]
OPTIMIZERS: list[dict[str, Any]] = [
    {"_component_": "torch.optim.AdamW", "lr": 1e-2, "fused": True},
    {"_component_": "torch.optim.SGD", "lr": 1e-2},
    {"_component_": "torch.optim.SGD", "lr": 1e-2, "momentum": 0.9},
    {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-2},
    {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-2, "bf16_stochastic_round": True},
    {"_component_": "torchao.optim.AdamW4bit", "lr": 1e-2},
    {"_component_": "torchao.optim.AdamWFp8", "lr": 1e-2},
    {"_component_": "torchao.optim._AdamW", "lr": 1e-2, "bf16_stochastic_round": True},
    {"_component_": "tests.test_optimizer_state.Counting", "lr": 1e-2},
]


class Counting(torch.optim.Optimizer):
    """Whose state is a plain number, which its steps depend on."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    count = self.state[p].get("count", 0) + 1
                    self.state[p]["count"] = count
                    with torch.no_grad():
                        p.add_(p.grad, alpha=-group["lr"] / count)


class Model(nn.Module):
    """Has a matrix whose rows are no whole blocks, and a part that may be without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(96, 128)
        self.second = nn.Linear(128, 60)
        self.unused = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor, uses_all: bool) -> torch.Tensor:
        x = self.first(x).tanh()
        return self.second(x).square().mean() + (self.unused(x).mean() if uses_all else 0)


def make(settings: dict[str, Any]) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model().to(torch.bfloat16 if settings.get("bf16_stochastic_round") else torch.float32)
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fsdp.fully_shard(model, mesh=mesh)
    arguments = {key: value for key, value in settings.items() if key != "_component_"}
    component = config._utils._get_component_from_path(settings["_component_"])
    return model, component(model.parameters(), **arguments)


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, uses_all: bool
) -> None:
    for number in steps:
        torch.manual_seed(number)
        x = torch.randn(8, 96, dtype=next(model.parameters()).dtype)
        model(x, uses_all).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def goes_on(settings: dict[str, Any], directory: Path) -> None:
    model, optimizer = make(settings)
    take_steps(model, optimizer, range(2), uses_all=False)

    def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        trained = dict(model.named_parameters())
        weights = {name: p.detach() for name, p in trained.items()}
        return {"model": weights, "optimizer": optimizer_state(optimizer, trained)}

    dcp.async_save(state(model, optimizer), checkpoint_id=directory).result()
    take_steps(model, optimizer, range(2, 4), uses_all=True)

    other, resumed = make(settings)
    rates = [group["lr"] for group in resumed.param_groups]
    initialize(resumed)
    assert all(group["lr"] is rate for group, rate in zip(resumed.param_groups, rates, strict=True))
    trained = dict(other.named_parameters())
    saved = FileSystemReader(directory).read_metadata().state_dict_metadata
    sizes = {
        name.removeprefix("optimizer."): getattr(found, "size", None)
        for name, found in saved.items()
    }
    fit(resumed, trained, sizes)
    assert trained["unused.weight"] not in resumed.state
    loaded = state(other, resumed)
    dcp.load(loaded, checkpoint_id=directory)
    set_plain_values(resumed, trained, loaded["optimizer"])
    take_steps(other, resumed, range(2, 4), uses_all=True)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        values = [w.full_tensor() if dist.get_world_size() > 1 else w for w in (p, q)]
        assert torch.equal(*values), f"{settings}: {name}"


def in_a_group(rank: int, processes: int, directory: Path) -> None:
    torch.compiler.set_stance("force_eager")  # compiling takes torchao a minute
    store = dist.FileStore(str(directory / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    for number, settings in enumerate(OPTIMIZERS):
        if processes > 1 and settings.get("bf16_stochastic_round"):
            continue  # torchao 0.15 cannot, of weights that are sharded
        goes_on(settings, directory / str(number))
    if processes == 1:
        model, optimizer = make(OPTIMIZERS[3])
        initialize(optimizer)
        own = optimizer_state(optimizer, {"first": model.first.weight})
        sizes = {name: x.shape for name, x in own.items()}
        fit(optimizer, {"first": model.first.weight}, sizes)
        codes = "first.exp_avg.codes.0_of_1"
        for others in ({"first.step": torch.Size()}, {**sizes, codes: torch.Size([1])}):
            with pytest.raises(
                ValueError, match="saved by processes that shared weights otherwise"
            ):
                fit(optimizer, {"first": model.first.weight}, others)
    dist.barrier()  # or one could close what the other still reads
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_optimizers_go_on_as_if_nothing_had_been(processes: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_a_group, (processes, tmp_path), nprocs=processes)


def step_compiled(rank: int, directory: Path) -> None:
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = nn.Linear(3, 25, bias=False)  # 13 rows of one process, 12 of the other
    fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = AdamW8bit(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    step(optimizer)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_step_is_not_taken_for_that_of_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    for name in ("first", "second"):  # which finds what that one compiled
        (tmp_path / name).mkdir()
        torch.multiprocessing.spawn(step_compiled, (tmp_path / name,), nprocs=2)


def test_all_that_docs_and_configs_name_are_among_them() -> None:
    texts = [*ROOT.glob("docs/*.md"), *ROOT.glob("torchtune_vl/recipes/configs/*/*.yaml")]
    text = "".join(path.read_text(encoding="utf-8") for path in texts)
    named = set(re.findall(r"\btorch(?:ao)?\.optim\.[A-Z_]\w+", text))
    assert "torchao.optim.AdamW8bit" in named
    assert named <= {settings["_component_"] for settings in OPTIMIZERS}
