"""The state of any optimizer as tensors that a distributed checkpoint can hold, by name."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._functorch import config as compiled
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

Parameters = Mapping[str, nn.Parameter]
State = dict[str, Any]


def optimizer_state(optimizer: Optimizer, parameters: Parameters) -> State:
    """List what an optimizer keeps of its parameters, given by name, but for learning rates.

    Returns tensors or plain values, those of the optimizer itself, by ``{parameter}.{key}``.
    Tensors of low-bit optimizers are taken to pieces, ``{parameter}.{key}.{piece}.{place}``, whose
    layout depends on how many processes there are.
    """
    state: State = {}
    for parameter, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            name = f"{parameter}.{key}"
            local = value.to_local() if isinstance(value, DTensor) else value
            if hasattr(local, "__tensor_flatten__"):
                # Blocks of low-bit values go on over the end of a row: each process keeps its own
                place = f"{dist.get_rank()}_of_{dist.get_world_size()}"
                for piece in local.__tensor_flatten__()[0]:
                    state[f"{name}.{piece}.{place}"] = getattr(local, piece)
            else:
                state[name] = value
    return state


def step(optimizer: Optimizer) -> None:
    """Take a step.

    Optimizers of torchao compile theirs for the rows of weights that a process has, and torch's
    cache on the disk takes those of one for those of another, which may have one row less
    (https://github.com/pytorch/pytorch/issues/188390): it is not used here.
    """
    with compiled.patch(enable_autograd_cache=False):
        optimizer.step()


@torch.no_grad()
def initialize(optimizer: Optimizer) -> None:
    """Make the state of an optimizer that took no step, as after one that changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0  # a number or a tensor
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def fit(optimizer: Optimizer, parameters: Parameters, saved: Mapping[str, Any]) -> None:
    """Drop the initialized state of parameters that have none, without gradients yet, in a save.

    ``saved`` are the sizes of :func:`optimizer_state` there by name, None of plain values. Raises
    ``ValueError`` if it has low-bit values of processes that shared the weights otherwise.
    """
    for name, p in parameters.items():
        own = optimizer_state(optimizer, {name: p})
        missing = [
            key
            for key, value in own.items()
            if key not in saved or saved[key] not in (None, getattr(value, "shape", None))
        ]
        if missing and any(key.startswith(f"{name}.") for key in saved):
            reason = (
                f"was saved by processes that shared weights otherwise ({min(missing)} differs)"
            )
            remedy = "a low-bit optimizer goes on with as many as before, and the same parallel.*"
            raise ValueError(f"the optimizer's state {reason}: {remedy}")
        if missing:
            del optimizer.state[p]


def set_plain_values(optimizer: Optimizer, parameters: Parameters, loaded: State) -> None:
    """Take what of a loaded :func:`optimizer_state` is no tensor, which loading fills in place."""
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, torch.Tensor):
                optimizer.state[p][key] = loaded[f"{name}.{key}"]
