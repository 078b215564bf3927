"""Feed-forwards of which each token takes a few: mixtures of experts.

"Outrageously Large Neural Networks" (arXiv 1701.06538), as transformers' ``Qwen3MoeSparseMoeBlock``
and ``Qwen3VLMoeTextTopKRouter`` have them: no token is dropped, whatever experts it goes to.
"""

# Shape suffixes: T tokens, N experts, A of them that a token takes, R = T x A rows of these, E
# width, W width of an expert; I and O the widths that a matrix takes and gives

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchtune_vl.modules import attention
from torchtune_vl.modules.dimensions import Dimensions
from torchtune_vl.modules.linear import Linear

_ALIGNED = 16  # bytes that rows of matrices have to be multiples of for torch's grouped product
# Of the tokens of a layer: how many went to each expert, and the sums of their probabilities, [N]
Routed = tuple[torch.Tensor, torch.Tensor]


class Experts(nn.Module):
    """Gated feed-forwards (SwiGLU), and the router that chooses for each token.

    Their matrices have the layout of published checkpoints, a row of each for each input, in which
    rows are multiplied from the left.
    """

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        count, width = dims.num_experts, dims.expert_dim
        self.num_active = dims.num_active_experts
        self.router = Linear(dims.embed_dim, count, bias=False)
        self.gate_up_proj = _matrices(count, dims.embed_dim, 2 * width)
        self.down_proj = _matrices(count, width, dims.embed_dim)
        # While a forward runs whose balance is wanted; not where backward computes it again
        self.routed: list[Routed] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to hidden states [..., E] the experts that have most probability, as they say.

        Their weights, float32 until they are multiplied, add up to 1.
        """
        x_TE = x.flatten(0, -2)
        probabilities_TN = F.softmax(self.router(x_TE), dim=-1, dtype=torch.float32)
        weights_TA, experts_TA = probabilities_TN.topk(self.num_active)
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        experts_R, order_R = experts_TA.flatten().sort(stable=True)
        numbers_N = torch.arange(len(self.gate_up_proj), device=x.device)
        # Not by bincount, which waits for the device
        ends_N = torch.searchsorted(experts_R, numbers_N, right=True, out_int32=True)
        if self.routed is not None:
            counts_N = ends_N.diff(prepend=ends_N.new_zeros(1))
            self.routed.append((counts_N, probabilities_TN.sum(0)))
        back_R = order_R.argsort()
        rows_RE = _ToExperts.apply(x_TE, order_R, back_R, self.num_active)
        gate_RW, up_RW = grouped_product(rows_RE, self.gate_up_proj, ends_N).chunk(2, dim=-1)
        out_RE = grouped_product(F.silu(gate_RW) * up_RW, self.down_proj, ends_N)
        out_TAE = attention.permute_rows(out_RE, back_R, order_R).unflatten(0, weights_TA.shape)
        # As a product of matrices, which keeps no weighted copy, and sums before it rounds
        return (weights_TA.to(x.dtype)[:, None] @ out_TAE).view_as(x)


def _matrices(count: int, in_dim: int, out_dim: int) -> nn.Parameter:
    bound = in_dim**-0.5  # as of torch's linear layers
    return nn.Parameter(torch.empty(count, in_dim, out_dim).uniform_(-bound, bound))


class _ToExperts(torch.autograd.Function):
    """Repeats tokens, expert by expert; gradients are summed token by token, in a fixed order."""

    @staticmethod
    def forward(
        ctx: Any, x_TE: torch.Tensor, order_R: torch.Tensor, back_R: torch.Tensor, num_active: int
    ) -> torch.Tensor:
        ctx.save_for_backward(back_R)
        ctx.num_active = num_active
        return x_TE.index_select(0, order_R // num_active)

    @staticmethod
    def backward(ctx: Any, grad_RE: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (back_R,) = ctx.saved_tensors
        grad_TAE = grad_RE.index_select(0, back_R).unflatten(0, (-1, ctx.num_active))
        return grad_TAE.sum(1), None, None, None


def grouped_product(
    rows_RI: torch.Tensor, weight_NIO: torch.Tensor, ends_N: torch.Tensor
) -> torch.Tensor:
    """Multiply groups of rows, which lie side by side, by a matrix each; returns [R, O].

    ``ends_N``, int32, are where the groups end. On a GPU with a kernel for it nothing waits.
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
    """Whether torch multiplies groups by such weights at once, on a GPU without waiting for it."""
    if any(size * weight_NIO.itemsize % _ALIGNED for size in weight_NIO.shape[1:]):
        return False
    if weight_NIO.is_cuda:
        has_kernel = torch.cuda.get_device_capability(weight_NIO.device) >= (8, 0)
        return has_kernel and weight_NIO.dtype == torch.bfloat16
    # In bfloat16 a CPU is faster group by group
    return weight_NIO.is_cpu and weight_NIO.dtype == torch.float32


def balance_loss(routed: Sequence[Routed], num_active: int) -> torch.Tensor:
    """Loss of routers that prefer some experts, of all layers together, a float32 scalar.

    It is 1 x ``num_active`` where all are chosen alike ("Switch Transformers", arXiv 2101.03961,
    equations 4 to 6, as transformers' ``load_balancing_loss_func`` takes them over layers).
    """
    counts_N, probabilities_N = (torch.stack(parts).sum(0) for parts in zip(*routed, strict=True))
    choices = counts_N.sum()  # a token's in a layer are num_active
    shares_N = counts_N * num_active / choices
    return len(counts_N) * (shares_N * probabilities_N * num_active / choices).sum()
