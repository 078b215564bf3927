"""A model over several devices: how it is divided, and its gradients' norm."""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DeviceMesh, DTensor

from torchtune_vl._torchao import NF4Tensor


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    cpu_offload: bool,
) -> None:
    """Shard a model over data-parallel devices by FSDP2: each layer, and the rest as one.

    Gradients are summed in float32. Quantized weights, which are frozen and small, stay whole.

    Args:
        model: the model, on the meta device.
        layers: those of its modules that are gathered one at a time.
        mesh: the devices.
        compute_dtype: dtype that gathered weights have, and so the computation.
        cpu_offload: whether weights, gradients and optimizer states live in the host's memory.
    """
    # Inputs stay as they are: rotary tables are float32 in any computation
    precision = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    quantized = {p for p in model.parameters() if isinstance(p.data, NF4Tensor)}
    for module in (*layers, model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            ignored_params=quantized,
        )


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    """List the dtypes of a model's parameters but for quantized ones.

    Args:
        model: the model.

    Returns:
        The dtypes.
    """
    return {p.dtype for p in model.parameters() if not isinstance(p.data, NF4Tensor)}


def gather(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Collect parameters on the first process, one after the other.

    Args:
        parameters: by name; sharded or not, the same on all processes.

    Returns:
        Whole tensors on the CPU by name; on other processes none.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, p in parameters.items():
        tensor = p.full_tensor() if isinstance(p, DTensor) else p
        if dist.get_rank() == 0:
            whole[name] = tensor.detach().cpu()
    return whole


def non_finite(parameters: Mapping[str, nn.Parameter], device: torch.device) -> list[str]:
    """Find parameters that have an infinite or missing number on any process.

    Args:
        parameters: by name; sharded or not, the same on all processes.
        device: where the processes exchange what they found.

    Returns:
        The names.
    """
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters.values()]
    bad = torch.stack([(~p.detach().isfinite()).any().to(device, torch.int32) for p in local])
    dist.all_reduce(bad)
    return [name for name, is_bad in zip(parameters, bad.tolist(), strict=True) if is_bad]


def average_copies(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average the gradients of what each device of a group has a copy of.

    All compute the same, but not to the last bit where a device's backward is not deterministic,
    and the copies would drift apart.

    Args:
        parameters: have gradients, or not.
        mesh: the devices that share layers, with one dimension, which has a name.
    """
    (name,) = mesh.mesh_dim_names or ()
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            names = gradient.device_mesh.mesh_dim_names or ()
            if name in names and gradient.placements[names.index(name)].is_shard():
                continue
            gradient = gradient.to_local()
        if gradient is not None:
            dist.all_reduce(gradient, group=mesh.get_group())
            gradient /= mesh.size()


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients down to a norm that they exceed, over parameters sharded in several ways.

    Like :func:`torch.nn.utils.clip_grad_norm_`, which takes those of one mesh only.

    Args:
        parameters: have gradients, or not.
        max_norm: the norm; infinite for the norm before alone.

    Returns:
        The norm before, a scalar, on the device and not waited for.
    """
    groups: dict[object, list[torch.Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            layout = (p.grad.device_mesh, p.grad.placements) if isinstance(p.grad, DTensor) else ()
            groups.setdefault(layout, []).append(p.grad)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in groups.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if not whole:
        return torch.zeros(())
    total = torch.linalg.vector_norm(torch.stack(whole))
    if math.isinf(max_norm):
        return total
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradients in groups.values():
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(local, factor.to(local[0].device))
    return total
