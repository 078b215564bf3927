"""Linear layers whose weights have eight or four bits, for answers: smaller, and read sooner.

Activations stay bfloat16. Both round to the nearest; the operators are those of torch that torchao
calls, which asks for them in another way in each release.
"""

# Shape suffixes: N outputs, K inputs, G groups of inputs; E experts, R rows of all

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from torchtune_vl.modules.experts import MixtureOfExperts
from torchtune_vl.modules.grouped import GroupedLinear

# Of weights that share a scale and a zero in four bits
GROUP_SIZE = 64
# The kernel of eight bits multiplies row by row: above, weights are better widened first
_FEW_ROWS = 32


class QuantizedLinear(nn.Module):
    """A layer with weights of fewer bits than it computes with."""

    bias: torch.Tensor | None

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features = len(weight_NK)
        self.register_buffer("bias", None if bias_N is None else bias_N.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, bfloat16 [..., K] to [..., N]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = self._multiply(rows).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """A layer of int8 weights, with a scale for each output."""

    weight: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        super().__init__(weight_NK, bias_N)
        weight_NK = weight_NK.detach().float()
        scales_N = (weight_NK.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        scales_N = scales_N.to(torch.bfloat16)
        # Scales are rounded, too: what a weight becomes goes by those that it is multiplied with
        rounded_NK = (weight_NK / scales_N.float()[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("weight", rounded_NK.to(torch.int8).contiguous())
        self.register_buffer("scales", scales_N)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.device.type == "cpu" and len(rows) <= _FEW_ROWS:
            return torch._weight_int8pack_mm(rows, self.weight, self.scales)
        return F.linear(rows, self.weight.to(self.scales.dtype)) * self.scales


class Int4Linear(QuantizedLinear):
    """A layer of four-bit weights, of which groups of inputs share a scale and a zero.

    ``ValueError`` if inputs and outputs do not divide into groups and into what the kernel reads.
    """

    weight: torch.Tensor
    scales_and_zeros: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        super().__init__(weight_NK, bias_N)
        weight_NK = weight_NK.detach().float()
        num_outputs, num_inputs = weight_NK.shape
        # Of which a GPU's kernel reads 128 inputs at a time
        divisor = GROUP_SIZE if weight_NK.device.type == "cpu" else 128
        if num_inputs % divisor or num_outputs % 16:
            problem = f"a layer of {num_inputs} inputs and {num_outputs} outputs has no int4"
            told = f"they are to be multiples of {divisor} and 16; take int8"
            raise ValueError(f"{problem}: {told}")
        grouped_NGK = weight_NK.unflatten(1, (-1, GROUP_SIZE))
        low_NG, high_NG = grouped_NGK.aminmax(dim=2)
        scales_NG = ((high_NG - low_NG) / 15).clamp_min(torch.finfo(torch.float32).tiny)
        # A weight is (its number - 8) * scale + zero
        scales_NG = scales_NG.to(torch.bfloat16)
        zeros_NG = (low_NG + 8 * scales_NG.float()).to(torch.bfloat16)
        numbers_NGK = (grouped_NGK - zeros_NG.float()[..., None]) / scales_NG.float()[..., None] + 8
        numbers_NK = numbers_NGK.round_().clamp_(0, 15).to(torch.int32).flatten(1)
        self.register_buffer("weight", _packed(numbers_NK))
        pairs_GN2 = torch.stack([scales_NG, zeros_NG], dim=2).transpose(0, 1)
        self.register_buffer("scales_and_zeros", pairs_GN2.contiguous())

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        is_cpu = rows.device.type == "cpu"
        multiply = torch._weight_int4pack_mm_for_cpu if is_cpu else torch._weight_int4pack_mm
        return multiply(rows, self.weight, GROUP_SIZE, self.scales_and_zeros)


def _packed(numbers_NK: torch.Tensor) -> torch.Tensor:
    """Pack numbers from 0 to 15 as the kernel of their device reads them."""
    if numbers_NK.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(numbers_NK, 1)
    pairs = (numbers_NK[:, ::2] << 4 | numbers_NK[:, 1::2]).to(torch.uint8)
    return torch._convert_weight_to_int4pack(pairs, 8)


Quantized = Literal["int8", "int4"]
_LAYERS: dict[Quantized, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


class QuantizedExperts(nn.Module):
    """Layers side by side, each for rows of its own, as :class:`GroupedLinear` has them.

    The host waits for how many rows each has: steps of a GPU are not captured.
    """

    def __init__(self, weight_EKN: torch.Tensor, how: Quantized) -> None:
        super().__init__()
        # Kernels take contiguous weights
        weights_NK = (weight_KN.T.contiguous() for weight_KN in weight_EKN)
        self.layers = nn.ModuleList(map(_LAYERS[how], weights_NK))
        self.out_features = weight_EKN.shape[2]

    def forward(self, rows_RK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """Multiply groups of rows, which end at ``ends_E``, bfloat16 [R, K]; returns [R, N]."""
        *ends, _ = ends_E.tolist()
        out_RN = rows_RK.new_empty(len(rows_RK), self.out_features)
        groups = zip(
            self.layers, rows_RK.tensor_split(ends), out_RN.tensor_split(ends), strict=True
        )
        for layer, rows, out in groups:
            if len(rows):
                out.copy_(layer(rows))
        return out_RN


def check_dtype(how: Quantized, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` if weights of a dtype cannot be quantized."""
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{how} weights are computed with in bfloat16, not {name}")


def quantize_layers(module: nn.Module, how: Quantized) -> None:
    """Replace the linear layers within a module by quantized ones, one by one, but for routers.

    Those are small, and rounded they would choose other experts. ``ValueError`` if a weight is not
    bfloat16 or cannot be divided.
    """
    for parent in module.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, GroupedLinear):
                check_dtype(how, layer.weight.dtype)
                setattr(parent, name, QuantizedExperts(layer.weight, how))
            elif isinstance(layer, nn.Linear) and not isinstance(parent, MixtureOfExperts):
                check_dtype(how, layer.weight.dtype)
                setattr(parent, name, _LAYERS[how](layer.weight, layer.bias))
