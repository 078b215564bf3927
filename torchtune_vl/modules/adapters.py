"""Linear layers, plain, quantized or with low-rank adapters; the latter are torchtune's.

LoRA: arXiv 2106.09685. DoRA: arXiv 2402.09353. QLoRA: arXiv 2305.14314.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from torchtune_vl._torchao import linear_nf4
from torchtune_vl._torchtune import DoRALinear, LoRALinear
from torchtune_vl.modules.grouped import GroupedLinear, GroupedLoRALinear
from torchtune_vl.modules.linear import Linear
from torchtune_vl.modules.loss import chunked_cross_entropy
from torchtune_vl.modules.nf4 import quantize

Trainable = Literal["frozen", "lora", "full"]

# A linear layer of a part of a model, from its name in the part, its dimensions and its bias; and,
# as ``count``, how many there are of it for rows of their own
MakeLinear = Callable[..., nn.Module]

NF4_BLOCK = 64  # weights that share a scale
NF4_SCALER_BLOCK = 256  # most scales that share one of their own

# What follows the name of a layer in the names of its adapter's parameters
ADAPTER_SUFFIXES = (".lora_a.weight", ".lora_b.weight", ".magnitude")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is of an adapter."""
    return name.endswith(ADAPTER_SUFFIXES)


def build_linear(
    part: str,
    name: str,
    in_dim: int,
    out_dim: int,
    bias: bool,
    *,
    count: int | None = None,
    trainable: Mapping[str, Trainable] | None = None,
    adapted: Collection[str] = (),
    quantize_base: bool = False,
    use_dora: bool = False,
    **adapter: Any,
) -> nn.Module:
    """Build a linear layer, such as ``q_proj`` of the ``decoder``.

    It gets an adapter (of ``rank``, ``alpha`` and ``dropout``) if its part is "lora" and its name
    among ``adapted``. With ``count`` it is as many layers, each for rows of its own, which have no
    DoRA. With ``quantize_base`` its weight is NF4, unless it is trained or of the output layer, as
    in the paper; one that does not divide into blocks is a ``ValueError``.
    """
    how = (trainable or {}).get(part, "full")
    is_quantized = quantize_base and how != "full" and name != "output"
    blocks = _nf4_blocks(name, in_dim, (count or 1) * out_dim) if is_quantized else {}
    if count is not None:
        is_adapted = how == "lora" and name in adapted
        kind: Any = partial(GroupedLoRALinear, **adapter) if is_adapted else GroupedLinear
        layer = kind(count, in_dim, out_dim)
        layer.is_quantized = is_quantized
    elif how == "lora" and name in adapted:
        kind = DoRA if use_dora else LoRALinear
        if name == "output":
            kind = OutputDoRA if use_dora else OutputLoRA
        layer = kind(in_dim, out_dim, use_bias=bias, **adapter)
        layer._quantize_base = is_quantized
    else:
        kind = OutputLinear if name == "output" else NF4Linear if is_quantized else Linear
        layer = kind(in_dim, out_dim, bias=bias)
    if is_quantized:
        quantized = quantize(layer.weight.detach(), **blocks)
        layer.weight = nn.Parameter(quantized, requires_grad=False)
    return layer


def _nf4_blocks(name: str, in_dim: int, out_dim: int) -> dict[str, int]:
    """Block sizes of NF4 that divide a weight."""
    blocks, rest = divmod(in_dim * out_dim, NF4_BLOCK)
    if rest:
        problem = f"the weight of {name}, {out_dim} x {in_dim}, does not divide into blocks"
        raise ValueError(f"{problem} of {NF4_BLOCK}: it cannot be quantized")
    scales = next(size for size in range(NF4_SCALER_BLOCK, 0, -1) if blocks % size == 0)
    return {"block_size": NF4_BLOCK, "scaler_block_size": scales}


def adapted_layers(model: nn.Module) -> list[Any]:
    """List the layers that have an adapter, each with its ``rank`` and ``alpha``."""
    kinds = LoRALinear | DoRA | GroupedLoRALinear
    return [module for module in model.modules() if isinstance(module, kinds)]


def num_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes that a tensor takes, also one that is made of others, such as NF4."""
    if not hasattr(tensor.data, "__tensor_flatten__"):
        return tensor.nbytes
    inner, _ = tensor.data.__tensor_flatten__()
    return sum(getattr(tensor.data, name).nbytes for name in inner)


class NF4Linear(nn.Linear):
    """A layer without an adapter, whose weight is NF4."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, from [..., in_dim] to [..., out_dim]."""
        out = linear_nf4(x, self.weight)
        return out if self.bias is None else out + self.bias


class DoRA(DoRALinear):
    """torchtune's layer, but it does not scale the bias, and it keeps a magnitude that was loaded.

    The paper and peft scale weights only, and so does torchtune where it merges. Recipes initialize
    magnitudes after loading weights, also where these include trained ones.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float, **kwargs: Any) -> None:
        super().__init__(in_dim, out_dim, rank, alpha, **kwargs)
        self.rank = rank
        self.alpha = alpha
        self._is_loaded = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._is_loaded |= f"{prefix}magnitude" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def initialize_dora_magnitude(self) -> None:
        """Make the layer's output that of its weight and its LoRA, unless it was loaded."""
        if not self._is_loaded:
            super().initialize_dora_magnitude()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, from [..., in_dim] to [..., out_dim]."""
        multiply = linear_nf4 if self._quantize_base else F.linear
        out = multiply(x, self.weight)
        if not self.disabled:
            with torch.no_grad():  # norms count as constants in gradients, as in the paper
                product = self.lora_b.weight @ self.lora_a.weight
                norm = self._get_weight_norm(self.weight.to(product.dtype), product)
            low_rank = self.lora_b(self.lora_a(self.dropout(x)))
            out = self.magnitude / norm * (out + self.scaling * low_rank)
        return out if self.bias is None else out + self.bias


class _OutputLayer(nn.Module):
    """Gives logits or, of targets, losses.

    In one call, for where weights are sharded each call gathers them, and processes have to make
    equally many: the chunks of a loss are not.
    """

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits [..., V] of [..., E], or float32 losses [P] of [P, E] and targets [P]."""
        if targets is None:
            return super().forward(x)
        losses = chunked_cross_entropy(x, super().forward, targets)
        if isinstance(x, DTensor):  # as styles of tensor parallelism expect of a layer they divide
            return DTensor.from_local(losses, x.device_mesh, x.placements, run_check=False)
        return losses


class OutputLinear(_OutputLayer, Linear):
    """The output layer of a decoder."""


class OutputLoRA(_OutputLayer, LoRALinear):
    """The output layer of a decoder, with an adapter."""


class OutputDoRA(_OutputLayer, DoRA):
    """The output layer of a decoder, with an adapter that has magnitudes."""
