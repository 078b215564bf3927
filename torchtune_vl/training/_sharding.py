"""A model on its devices: its dtypes, how it is divided, and its gradients' norm."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.utils.checkpoint import checkpoint, noop_context_fn

from torchtune_vl._torchao import Float8LinearConfig, NF4Tensor, convert_to_float8_training
from torchtune_vl._torchtune import DoRALinear, LoRALinear, TransformerSelfAttentionLayer
from torchtune_vl.modules.adapters import num_bytes
from torchtune_vl.modules.experts import Experts, kept_choices
from torchtune_vl.modules.grouped import GroupedLinear
from torchtune_vl.modules.nf4 import pack_nf4
from torchtune_vl.training._mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def dtype_on(device: torch.device, name: str) -> torch.dtype:
    """Return a dtype by its name, or raise ``ValueError`` if a GPU cannot compute with it."""
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        gpu = torch.cuda.get_device_name(device)
        asked = "which dtype or compute_dtype asks for (bf16)"
        raise ValueError(f"{gpu} has no bfloat16, {asked}: set both to fp32")
    return DTYPES[name]


def multiply_in_float8(model: Any, device: torch.device) -> None:
    """Let linear layers within a decoder's layers multiply in float8, in forward and backward.

    Inputs, weights and gradients are scaled by the largest of each tensor ("FP8 Formats for Deep
    Learning", arXiv 2209.05433); weights stay as they are. Raises ``ValueError`` if layers have
    adapters, are experts or have sizes that are no multiples of 16, or the device has no float8.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no float8: set float8=False")
    if experts_of(model):
        raise ValueError("float8 is for linear layers, and experts are none: set float8=False")
    linears = [m for m in model.decoder.layers.modules() if isinstance(m, nn.Linear)]
    others = [m for m in model.decoder.layers.modules() if isinstance(m, LoRALinear | DoRALinear)]
    if others or any(size % 16 for m in linears for size in m.weight.shape):
        fitting = "without adapters, and of sizes that are multiples of 16"
        raise ValueError(f"float8 is for linear layers {fitting}: set float8=False")
    # Any number of tokens, which gradients of weights are summed over
    config = Float8LinearConfig(pad_inner_dim=True)
    convert_to_float8_training(model.decoder.layers, config=config)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors have a dtype, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def layers_of(model: nn.Module) -> list[TransformerSelfAttentionLayer]:
    """List the layers of decoder and encoders."""
    return [m for m in model.modules() if isinstance(m, TransformerSelfAttentionLayer)]


def recompute_layers(model: Any, how: Literal["none", "selective", "full"]) -> None:
    """Let backward compute layers anew, instead of keeping what they keep: each or every other."""
    # No backward comes through a frozen encoder: what it kept for one would never be let go
    encoder_layers = [layer for e in model.encoders.values() for layer in e.layers]
    is_trained = any(p.requires_grad for layer in encoder_layers for p in layer.parameters())
    frozen = set() if is_trained else {*encoder_layers}
    every = {"none": 0, "selective": 2, "full": 1}[how]
    for number, layer in enumerate(layers_of(model)):
        if every and number % every == 0 and layer not in frozen:
            has_experts = any(isinstance(m, Experts) for m in layer.modules())
            contexts = kept_choices if has_experts else noop_context_fn
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=contexts
            )


def is_sharded(model: nn.Module, mesh: Mesh, dtype: torch.dtype, cpu_offload: bool) -> bool:
    """Whether a model is to be sharded: over devices, or for its weights' dtype or their place."""
    shares_weights = mesh.replicate * mesh.shards > 1
    return shares_weights or dtypes_of(model) != {dtype} or cpu_offload


def divide_layers(model: Any, mesh: DeviceMesh, plan: Mapping[str, ParallelStyle]) -> None:
    """Divide a model's layers over the devices of a mesh with one dimension, by tensor parallelism.

    Raises ``ValueError`` if they cannot share the decoder's heads or feed-forward equally.
    """
    attn, devices = model.decoder.layers[0].attn, mesh.size()
    queries, keys = (x.weight.shape[0] // attn.head_dim for x in (attn.q_proj, attn.k_proj))
    common = math.gcd(queries, keys)
    if common % devices:
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        heads = f"the model's {queries} query heads and {keys} key/value heads: set it to one of"
        raise ValueError(f"parallel.tensor is {devices}, and does not divide {heads} {fitting}")
    width = model.decoder.layers[0].mlp.w1.weight.shape[0]
    if width % devices:
        told = f"parallel.tensor is {devices}, and does not divide the feed-forward's width"
        raise ValueError(f"{told} of {width}: set it to another divisor of {common}")
    parallelize_module(model, mesh, dict(plan))


def divide_experts(model: Any, mesh: DeviceMesh) -> None:
    """Divide a model's experts over the devices of a mesh with one dimension.

    Raises ``ValueError`` if it has none, or they do not divide equally.
    """
    every, devices = experts_of(model), mesh.size()
    if not every:
        none = f"parallel.experts is {devices}, and the model has no experts"
        raise ValueError(f"{none}: set parallel.experts=1")
    if any(isinstance(p.data, NF4Tensor) for experts in every for p in experts.parameters()):
        problem = "quantized experts are not shared by devices"
        raise ValueError(f"{problem}: set parallel.experts=1, parallel.shard divides them")
    count = every[0].count
    if count % devices:
        told = f"parallel.experts is {devices}, and does not divide the model's {count} experts"
        raise ValueError(f"{told}: set it to a divisor of {count}")
    for experts in every:
        experts.group = mesh.get_group()
        for layer in [m for m in experts.modules() if isinstance(m, GroupedLinear)]:
            own = distribute_tensor(layer.weight.data, mesh, [Shard(0)])
            layer.weight = nn.Parameter(own, requires_grad=layer.weight.requires_grad)


def experts_of(model: Any) -> list[Experts]:
    return [m for m in model.decoder.modules() if isinstance(m, Experts)]


def shard(
    model: Any,
    devices: DeviceMesh,
    dtype: torch.dtype,
    cpu_offload: bool,
    expert_devices: DeviceMesh | None = None,
) -> None:
    """Shard a model on the meta device by FSDP2, over ``shard`` of the devices' dimensions.

    Over ``replicate`` it is copied, where that has several. Gathered weights, and so the
    computation, have ``dtype``; gradients are summed in float32. Weights, gradients and optimizer
    states may live in the host's memory (``cpu_offload``). Experts that devices share are sharded
    over ``shard`` of ``expert_devices``.

    Raises ``ValueError`` if devices that share layers and data cannot share a weight equally.
    """
    _refuse_unequal_parts(model, devices["shard"])
    # Inputs stay as they are: rotary tables are float32 in any computation
    precision = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    offload = fsdp.CPUOffloadPolicy() if cpu_offload else fsdp.OffloadPolicy()
    how: dict[str, Any] = {"mp_policy": precision, "offload_policy": offload}
    pack_quantized(model)
    groups = [*gathered_together(model)]  # by what a decoder layer has before its experts are cut
    if expert_devices is not None:
        _shard_experts(model, expert_devices, **how)
    how["mesh"] = _mesh_of_weights(devices)
    for modules in groups:
        fsdp.fully_shard(modules, **how)
    if isinstance(model.decoder.tok_embeddings, fsdp.FSDPModule):
        model.decoder.tok_embeddings.set_unshard_in_backward(False)  # which takes no weights
    fsdp.fully_shard(model, **how)


def _shard_experts(model: Any, devices: DeviceMesh, **how: Any) -> None:
    """Shard experts that devices share over those that have the same ones."""
    number = devices["shard"].size()
    for experts in experts_of(model):
        for name, p in experts.named_parameters():
            if max(p.shape[1:]) % number:
                told = f"{number} devices have the same experts by parallel.experts, and do not"
                raise ValueError(
                    f"{told} divide the {max(p.shape[1:])} that {name} has of each: raise it, or "
                    "parallel.replicate"
                )
        # Each expert, for they are few, along its longer side
        how["shard_placement_fn"] = lambda p: Shard(1 if p.shape[1] >= p.shape[2] else 2)
        fsdp.fully_shard(experts, mesh=_mesh_of_weights(devices), **how)


def _mesh_of_weights(devices: DeviceMesh) -> DeviceMesh:
    is_copied = devices["replicate"].size() > 1
    return devices["replicate", "shard"] if is_copied else devices["shard"]


def is_of_shared_experts(p: torch.Tensor) -> bool:
    """Whether devices share a parameter by :func:`divide_experts`."""
    return isinstance(p, DTensor) and "experts" in (p.device_mesh.mesh_dim_names or ())


def pack_quantized(model: nn.Module) -> None:
    """Keep NF4 weights as bytes, which can be sharded."""
    for layer in [m for m in model.modules() if isinstance(getattr(m, "weight", None), NF4Tensor)]:
        pack_nf4(layer)


def gathered_together(model: Any) -> Iterator[list[nn.Module]]:
    """List the modules whose weights are gathered at once: about as many as a decoder layer has.

    What is in none of them is gathered from the forward's start to the backward's end: the final
    norm, and an embedding that is the output layer too.
    """
    decoder, encoder = model.decoder, model.encoders["vision"]
    if decoder.output is not None:
        yield [decoder.tok_embeddings]
    enough = _size(decoder.layers[0])
    group: list[nn.Module] = []
    modules = [encoder.patch_embed, encoder.pos_embed, *encoder.layers]
    modules += [*encoder.deepstack_mergers, encoder.merger]
    for module in filter(None, modules):
        if group and sum(map(_size, [*group, module])) > enough:
            yield group
            group = []
        group.append(module)
    yield group
    # One of 128 experts too, 1.2 or 4.8 GB in bfloat16 in the published sizes: a product takes all
    for layer in decoder.layers:
        yield [layer]
    if decoder.output is not None:
        yield [decoder.output]


def _size(module: nn.Module) -> int:
    return sum(num_bytes(local_part(p)) for p in module.parameters())


def _refuse_unequal_parts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Refuse rows that layers divide and data would divide again, where torch misplaces a rest."""
    if mesh.size() == 1:
        return
    for name, p in model.named_parameters():
        if not isinstance(p, DTensor) or is_of_shared_experts(p):
            continue
        if p.placements[0].is_shard(0):
            devices = p.device_mesh.size(), mesh.size()
            if p.shape[0] % math.prod(devices):
                raise ValueError(
                    f"parallel.tensor is {devices[0]}, and {devices[1]} devices share weights: "
                    f"together they do not divide the {p.shape[0]} rows of {name} equally. Take "
                    "another number of either"
                )


def plain_parameters(module: nn.Module) -> list[nn.Parameter]:
    """List a module's parameters but for quantized ones."""
    return [p for p in module.parameters() if not isinstance(p.data, NF4Tensor)]


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    """List the dtypes of a model's :func:`plain_parameters`."""
    return {p.dtype for p in plain_parameters(model)}


def gather(
    parameters: Mapping[str, torch.Tensor], rank: int | None = None
) -> dict[str, torch.Tensor]:
    """Collect tensors, sharded or not, whole on the CPU of a process, or of all, one by one."""
    whole: dict[str, torch.Tensor] = {}
    for name, p in parameters.items():
        tensor = p.full_tensor() if isinstance(p, DTensor) else p
        if rank in (None, dist.get_rank()):
            whole[name] = tensor.detach().cpu()
    return whole


def non_finite(parameters: Mapping[str, nn.Parameter], device: torch.device) -> list[str]:
    """Name the parameters, sharded or not, that are not finite on all processes."""
    local = [local_part(p).detach() for p in parameters.values()]
    bad = torch.stack([(~p.isfinite()).any().to(device, torch.int32) for p in local])
    dist.all_reduce(bad)
    return [name for name, is_bad in zip(parameters, bad.tolist(), strict=True) if is_bad]


def average_copies(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average the gradients of what each device of a mesh with one named dimension has a copy of.

    Where a backward is not deterministic to the last bit, the copies would drift apart. Of what
    each device has a summand, as of a norm of its tokens, it gets the sum first.
    """
    (name,) = mesh.mesh_dim_names or ()
    for p in parameters:
        if p.grad is None:
            continue
        gradient = p.grad
        if isinstance(p, DTensor) and isinstance(gradient, DTensor):
            if gradient.placements != p.placements:
                p.grad = gradient = gradient.redistribute(placements=p.placements)
            names = gradient.device_mesh.mesh_dim_names or ()
            if name in names and gradient.placements[names.index(name)].is_shard():
                continue
        own = local_part(gradient)
        dist.all_reduce(own, group=mesh.get_group())
        own /= mesh.size()


def average_experts(parameters: Iterable[nn.Parameter], devices: DeviceMesh) -> None:
    """Average the gradients of experts over all devices, as others are.

    FSDP has averaged them over those that have the same experts, which have seen the tokens of all.
    Not by its ``set_gradient_divide_factor``, which gloo cannot take while it sums.
    """
    for p in parameters:
        if is_of_shared_experts(p) and p.grad is not None:
            local_part(p.grad).div_(devices["experts"].size())


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients down to a norm that they exceed, over parameters sharded in several ways.

    :func:`torch.nn.utils.clip_grad_norm_` takes those of one mesh only. Returns the norm before, a
    float64 scalar, on the device and not waited for. All processes have to call it.
    """
    by_copies: dict[int, list[torch.Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            by_copies.setdefault(_copies(p.grad), []).append(local_part(p.grad))
    if not by_copies:
        return torch.zeros(())
    squares = [
        torch.nn.utils.get_total_norm(local).double() ** 2 / copies
        for copies, local in by_copies.items()
    ]
    total = torch.stack(squares).sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    total = total.sqrt()
    if not math.isinf(max_norm):
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for local in by_copies.values():
            torch._foreach_mul_(local, factor.to(local[0]))
    return total


def _copies(tensor: torch.Tensor) -> int:
    """How many devices have the same part of a tensor."""
    devices = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(tensor, DTensor):
        return devices
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return devices // math.prod(size for size, place in sizes if not place.is_replicate())


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this device has of a tensor, all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
