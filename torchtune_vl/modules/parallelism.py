"""How the decoder's layers divide over devices: tensor parallelism (Megatron-LM).

Heads and feed-forwards are divided (arXiv 1909.08053) and, between them, tokens (arXiv 2205.05198,
section 4.2.2), so that norms and residuals are not kept by every device.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from torchtune_vl._torchao import NF4Tensor
from torchtune_vl.modules.experts import MixtureOfExperts
from torchtune_vl.modules.vision import VisionLanguageModel

_WHOLE, _TOKENS, _WIDTH, _HEADS = Replicate(), Shard(1), Shard(-1), Shard(2)
# How parameters of linear layers are divided, with adapters or without; others are copied
_BY_OUTPUTS = {name: Shard(0) for name in ("weight", "bias", "lora_b.weight", "magnitude")}
_BY_INPUTS = {name: Shard(1) for name in ("weight", "lora_a.weight")}


def decoder_tp_plan(model: VisionLanguageModel) -> dict[str, ParallelStyle]:
    """Plan tensor parallelism of the decoder.

    Heads and feed-forwards are divided, with their adapters, the output layer where it is not the
    token embedding, and tokens where each is computed by itself. Each device computes the whole
    vision encoder, which is small. Returns styles by module, for torch's ``parallelize_module``.
    Raises ``ValueError`` for quantized weights, and for experts.
    """
    if any(isinstance(module, MixtureOfExperts) for module in model.decoder.modules()):
        problem = "experts do not divide over devices that share layers"
        raise ValueError(f"{problem}: set parallel.tensor to 1, parallel.shard divides them")
    if any(isinstance(p.data, NF4Tensor) for p in model.decoder.parameters()):
        problem = "quantized weights do not divide over devices that share layers"
        raise ValueError(f"{problem}: set parallel.tensor to 1, parallel.shard divides them")
    if len(model.encoders["vision"].deepstack_layers) >= len(model.decoder.layers):
        problem = "features are added behind all layers, the last of which gives whole rows"
        raise ValueError(f"{problem}: set parallel.tensor to 1")
    plan: dict[str, ParallelStyle] = {"decoder": _SharedTokens()}
    for i in range(len(model.decoder.layers)):
        layer = f"decoder.layers.{i}"
        plan |= {
            f"{layer}.{norm}": Divided({}, _TOKENS, _TOKENS) for norm in ("sa_norm", "mlp_norm")
        }
        plan |= {f"{layer}.{part}": _AllTokens() for part in ("attn", "mlp")}
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3"):
            plan[f"{layer}.{name}"] = Divided(_BY_OUTPUTS, _WHOLE, _WIDTH)
        for name in ("attn.output_proj", "mlp.w2"):
            plan[f"{layer}.{name}"] = Divided(_BY_INPUTS, _WIDTH, _TOKENS)
        if model.decoder.layers[i].attn.q_norm is not None:
            for name in ("attn.q_norm", "attn.k_norm"):
                plan[f"{layer}.{name}"] = Divided({}, _HEADS, _HEADS)
    if model.decoder.output is not None:
        plan["decoder.output"] = Divided(_BY_OUTPUTS, _WHOLE, _WHOLE)
    return plan


class Divided(ParallelStyle):
    """A module whose parameters are divided, by name, or copied.

    It takes the part of its input that a device has, and gives the part of its output. torch's own
    styles know no adapters, and would train norms that are frozen.
    """

    def __init__(
        self, parameters: Mapping[str, Placement], inputs: Placement, outputs: Placement
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.inputs = inputs
        self.outputs = outputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in [*module.named_parameters()]:
            placement = self.parameters.get(name, _WHOLE)
            divided = distribute_tensor(parameter.data, device_mesh, [placement])
            owner, _, own_name = name.rpartition(".")
            placed = nn.Parameter(divided, requires_grad=parameter.requires_grad)
            module.get_submodule(owner).register_parameter(own_name, placed)

        def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = args
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [self.inputs], run_check=False)
            return x, *others

        def give(module: nn.Module, args: Any, output: DTensor) -> torch.Tensor:
            return output.redistribute(placements=[self.outputs]).to_local()

        module.register_forward_pre_hook(take)
        module.register_forward_hook(give)
        return module


class _AllTokens(ParallelStyle):
    """A module that takes tokens of all devices, and gives each its own."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            own = DTensor.from_local(args[0], device_mesh, [_TOKENS], run_check=False)
            x: torch.Tensor = own.redistribute(placements=[_WHOLE])
            if "rope" in kwargs:  # attention, which has no use for padding
                x = x[:, : kwargs["rope"].shape[1]]
            return (x,), kwargs

        def give(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            most = -(-args[0].shape[1] // device_mesh.size())
            return F.pad(output, (0, 0, 0, most - output.shape[1]))

        module.register_forward_pre_hook(take, with_kwargs=True)
        module.register_forward_hook(give)
        return module


class _SharedTokens(ParallelStyle):
    """A decoder each of whose devices has as many tokens between its layers, padded if need be."""

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        def own(x: torch.Tensor) -> torch.Tensor:
            padded = F.pad(x, (0, 0, 0, -x.shape[1] % device_mesh.size()))
            whole = DTensor.from_local(padded, device_mesh, [_WHOLE], run_check=False)
            return whole.redistribute(placements=[_TOKENS]).to_local()

        def share(layer: nn.Module, args: Any) -> tuple[Any, ...]:
            return (own(args[0]),)

        def share_features(deepstack: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return own(output)

        def join(
            layer: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor
        ) -> torch.Tensor:
            shared = DTensor.from_local(output, device_mesh, [_TOKENS], run_check=False)
            whole = shared.redistribute(placements=[_WHOLE]).to_local()
            return whole[:, : kwargs["rope"].shape[1]]

        module.layers[0].register_forward_pre_hook(share)
        module.deepstack.register_forward_hook(share_features)
        module.layers[-1].register_forward_hook(join, with_kwargs=True)
        return module
