"""Linear layers side by side, each for rows of its own, as experts are."""

# Shape suffixes: N layers, R rows of all of them; I and O the widths that a layer takes and gives

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from torchtune_vl._torchao import NF4Tensor
from torchtune_vl.modules.nf4 import dequantize

_ALIGNED = 16  # bytes that rows of matrices have to be multiples of for torch's grouped product
# Major compute capabilities of GPUs that have a kernel for it, up to torch 2.14 at least; on others
# torch multiplies group by group, and the host waits for where these end
_WITH_KERNEL = (9, 10)


class GroupedLinear(nn.Module):
    """Linear layers without bias, side by side, each for rows of its own.

    Their weight [N, I, O] has the layout of published checkpoints, in which rows are multiplied
    from the left. Devices that share the experts have some of them each. It may be NF4, if it
    ``is_quantized``.
    """

    is_quantized = False

    def __init__(self, count: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = in_dim**-0.5  # as of torch's linear layers
        self.weight = nn.Parameter(torch.empty(count, in_dim, out_dim).uniform_(-bound, bound))

    def forward(self, rows_RI: torch.Tensor, ends_N: torch.Tensor) -> torch.Tensor:
        """Multiply groups of rows as :func:`grouped_product` does; returns [R, O]."""
        if self.is_quantized:
            return self._widened_product(rows_RI, ends_N)
        weight = self.weight
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        return grouped_product(rows_RI, own, ends_N)

    @torch.compiler.disable  # traced, the sizes of NF4 tensors become symbols that they cannot have
    def _widened_product(self, rows_RI: torch.Tensor, ends_N: torch.Tensor) -> torch.Tensor:
        return _NF4Product.apply(rows_RI, self.weight, ends_N)


class GroupedLoRALinear(GroupedLinear):
    """Such layers with adapters (LoRA, arXiv 2106.09685), of each layer its own.

    Where torch has no product for matrices as narrow as the rank, a GPU is waited for: in bfloat16
    it takes multiples of 8.
    """

    def __init__(
        self, count: int, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float
    ) -> None:
        super().__init__(count, in_dim, out_dim)
        self.rank = rank
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout)
        self.lora_a = GroupedLinear(count, in_dim, rank)
        self.lora_b = GroupedLinear(count, rank, out_dim)
        nn.init.zeros_(self.lora_b.weight)

    def adapter_params(self) -> list[str]:
        """Name the adapters' parameters, as torchtune's recipes ask layers to."""
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, rows_RI: torch.Tensor, ends_N: torch.Tensor) -> torch.Tensor:
        """Apply the layers, as those without adapters are."""
        low_rank_RO = self.lora_b(self.lora_a(self.dropout(rows_RI), ends_N), ends_N)
        return super().forward(rows_RI, ends_N) + self.alpha / self.rank * low_rank_RO


class _NF4Product(torch.autograd.Function):
    """Widens weights for a product, and again for its backward: only their codes are kept."""

    @staticmethod
    def forward(
        ctx: Any, rows_RI: torch.Tensor, nf4_NIO: NF4Tensor, ends_N: torch.Tensor
    ) -> torch.Tensor:
        ctx.nf4_NIO = nf4_NIO
        ctx.save_for_backward(ends_N)
        return grouped_product(rows_RI, dequantize(nf4_NIO).to(rows_RI.dtype), ends_N)

    @staticmethod
    def backward(ctx: Any, grad_RO: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (ends_N,) = ctx.saved_tensors
        weight_NIO = dequantize(ctx.nf4_NIO).to(grad_RO.dtype)
        return grouped_product(grad_RO, weight_NIO.mT, ends_N), None, None


def grouped_product(
    rows_RI: torch.Tensor, weight_NIO: torch.Tensor, ends_N: torch.Tensor
) -> torch.Tensor:
    """Multiply groups of rows, which lie side by side, by a matrix each; returns [R, O].

    ``ends_N``, int32, are where the groups end. On a GPU nothing waits for them unless
    :func:`waits_for_groups`.
    """
    if rows_RI.is_meta:  # any groups have the same shapes, and take the same memory and operations
        return rows_RI @ weight_NIO[0]
    if has_grouped_product(weight_NIO) and not (rows_RI.is_cpu and torch.compiler.is_compiling()):
        return F.grouped_mm(rows_RI, weight_NIO, offs=ends_N)
    return _group_by_group(rows_RI, weight_NIO, ends_N)


@torch.compiler.disable  # it would be compiled anew for each number of rows
def _group_by_group(
    rows_RI: torch.Tensor, weight_NIO: torch.Tensor, ends_N: torch.Tensor
) -> torch.Tensor:
    *ends, _ = ends_N.tolist()
    groups = zip(rows_RI.tensor_split(ends), weight_NIO, strict=True)
    # Also those without rows, of which there are few in training: gradients need a zero of each
    return torch.cat([group @ matrix for group, matrix in groups])


def has_grouped_product(weight_NIO: torch.Tensor) -> bool:
    """Whether torch's product of groups takes such weights, and is not slower than ours."""
    if any(size * weight_NIO.itemsize % _ALIGNED for size in weight_NIO.shape[1:]):
        return False
    if weight_NIO.is_cuda:
        return _major(weight_NIO) >= 8 and weight_NIO.dtype == torch.bfloat16
    # In bfloat16 a CPU is faster group by group
    return weight_NIO.is_cpu and weight_NIO.dtype == torch.float32


def waits_for_groups(weight_NIO: torch.Tensor) -> bool:
    """Whether the host waits for where groups end, to multiply them by weights on a GPU."""
    return _major(weight_NIO) not in _WITH_KERNEL or not has_grouped_product(weight_NIO)


def _major(tensor: torch.Tensor) -> int:
    return torch.cuda.get_device_capability(tensor.device)[0]
