"""Feed-forwards of which each token takes a few: mixtures of experts.

"Outrageously Large Neural Networks" (arXiv 1701.06538), as transformers' ``Qwen3MoeSparseMoeBlock``
and ``Qwen3VLMoeTextTopKRouter`` have them: no token is dropped, whatever experts it goes to.
"""

# Shape suffixes: T tokens, N experts, A of them that a token takes, R = T x A rows of these, E
# width, W width of an expert; D devices, each of which has M = N / D of the experts

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from torchtune_vl.modules import attention
from torchtune_vl.modules.adapters import MakeLinear
from torchtune_vl.modules.context import exchange_rows
from torchtune_vl.modules.dimensions import Dimensions
from torchtune_vl.modules.linear import Linear

# Of the tokens of a layer: how many went to each expert, and the sums of their probabilities, [N]
Routed = tuple[torch.Tensor, torch.Tensor]


class MixtureOfExperts(nn.Module):
    """Experts, and the router that chooses for each token which it takes."""

    def __init__(self, dims: Dimensions, linear: MakeLinear) -> None:
        super().__init__()
        self.num_active = dims.num_active_experts
        self.router = Linear(dims.embed_dim, dims.num_experts, bias=False)
        self.experts = Experts(dims.num_experts, dims.embed_dim, dims.expert_dim, linear)
        # While a forward runs whose balance is wanted; not where backward computes it again
        self.routed: list[Routed] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to hidden states [..., E] the experts that have most probability, as they say.

        Their weights, float32 until they are multiplied, add up to 1.
        """
        x_TE = x.flatten(0, -2)
        probabilities_TN = F.softmax(self.router(x_TE), dim=-1, dtype=torch.float32)
        experts_TA = torch.ops.torchtune_vl.choose_experts(
            probabilities_TN.detach(), self.num_active
        )
        weights_TA = probabilities_TN.gather(-1, experts_TA)
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        experts_R, order_R = experts_TA.flatten().sort(stable=True)
        numbers_N = torch.arange(probabilities_TN.shape[-1], device=x.device)
        # Not by bincount, which waits for the device
        ends_N = torch.searchsorted(experts_R, numbers_N, right=True, out_int32=True)
        if self.routed is not None:
            self.routed.append((_counts(ends_N), probabilities_TN.sum(0)))
        back_R = order_R.argsort()
        rows_RE = _ToExperts.apply(x_TE, order_R, back_R, self.num_active)
        out_RE = self.experts(rows_RE, ends_N)
        out_TAE = attention.permute_rows(out_RE, back_R, order_R).unflatten(0, weights_TA.shape)
        # As a product of matrices, which keeps no weighted copy, and sums before it rounds
        return (weights_TA.to(x.dtype)[:, None] @ out_TAE).view_as(x)


# How experts are chosen where it is not by probability, in the thread that computes
_Choose = Callable[[torch.Tensor, int], torch.Tensor]
_choose: ContextVar[_Choose | None] = ContextVar("choose", default=None)
# An operator, which torch.compile does not look into: a layer stays one function, in a forward and
# where backward computes it again
_operators = torch.library.Library("torchtune_vl", "FRAGMENT")
_operators.define(
    "choose_experts(Tensor probabilities_TN, int num_active) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@torch.library.impl(_operators, "choose_experts", "CompositeExplicitAutograd")
def _choose_experts(probabilities_TN: torch.Tensor, num_active: int) -> torch.Tensor:
    return (_choose.get() or _most_probable)(probabilities_TN, num_active)


@torch.library.register_fake("torchtune_vl::choose_experts", lib=_operators)
def _most_probable(probabilities_TN: torch.Tensor, num_active: int) -> torch.Tensor:
    return probabilities_TN.topk(num_active).indices


def kept_choices() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a forward and of its recomputation, in which tokens keep the experts they had.

    They are ``context_fn`` of ``torch.utils.checkpoint``. Probabilities that are computed again may
    differ in the last bit, and those that are nearly equal change places: gradients would be of
    experts that the loss did not come from, and rows for other devices' experts others than sent.
    """
    kept: list[torch.Tensor] = []

    def keep(probabilities_TN: torch.Tensor, num_active: int) -> torch.Tensor:
        experts_TA = _most_probable(probabilities_TN, num_active)
        kept.append(experts_TA.int())  # a copy: compiled code may write over what it gets
        return experts_TA

    def again() -> _Choose:
        choices = iter(kept)
        return lambda *_: next(choices).long()

    return _Choosing(lambda: keep), _Choosing(again)


class _Choosing(AbstractContextManager[None]):
    """In which experts are chosen by a function, made anew each time that it is entered."""

    def __init__(self, make: Callable[[], _Choose]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.token = _choose.set(self.make())

    def __exit__(self, *error: object) -> None:
        _choose.reset(self.token)


class Experts(nn.Module):
    """Gated feed-forwards (SwiGLU), each of which is applied to rows of its own.

    Those of a few devices, ``group``, if they share them: each applies its own to what all have.
    """

    def __init__(self, count: int, embed_dim: int, width: int, linear: MakeLinear) -> None:
        super().__init__()
        self.count = count
        self.gate_up_proj = linear("gate_up_proj", embed_dim, 2 * width, False, count=count)
        self.down_proj = linear("down_proj", width, embed_dim, False, count=count)
        self.group: ProcessGroup | None = None

    def forward(self, rows_RE: torch.Tensor, ends_N: torch.Tensor) -> torch.Tensor:
        """Apply the experts to groups of rows, which lie side by side and end at ``ends_N``."""
        if self.group is not None:
            return self._on_devices(rows_RE, ends_N, self.group)
        return self._apply_own(rows_RE, ends_N)

    def _apply_own(self, rows_RE: torch.Tensor, ends_N: torch.Tensor) -> torch.Tensor:
        gate_RW, up_RW = self.gate_up_proj(rows_RE, ends_N).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_RW) * up_RW, ends_N)

    @torch.compiler.disable  # how many rows are sent is a number of the host
    def _on_devices(
        self, rows_RE: torch.Tensor, ends_N: torch.Tensor, group: ProcessGroup
    ) -> torch.Tensor:
        """Send rows to the devices of their experts, and get back what these make of them.

        Each knows how many it will get only when the others' routers have chosen: the host waits
        for that, once in a forward.
        """
        leaving_DM = _counts(ends_N).view(group.size(), -1)
        coming_DM = torch.empty_like(leaving_DM)
        if rows_RE.is_meta:  # as if tokens chose evenly
            sent = received = [len(rows) for rows in rows_RE.tensor_split(group.size())]
        else:
            dist.all_to_all_single(coming_DM, leaving_DM, group=group)
            sent, received = torch.stack([leaving_DM.sum(1), coming_DM.sum(1)]).tolist()
        came_RE = exchange_rows(rows_RE, sent, received, group)
        # They come device by device, and go to experts
        numbers_DM = torch.arange(coming_DM.shape[1], device=rows_RE.device).expand_as(coming_DM)
        experts_R = numbers_DM.flatten().repeat_interleave(
            coming_DM.flatten(), output_size=len(came_RE)
        )
        order_R = experts_R.argsort(stable=True)
        back_R = order_R.argsort()
        ends_M = coming_DM.sum(0).cumsum(0, dtype=torch.int32)
        out_RE = self._apply_own(attention.permute_rows(came_RE, order_R, back_R), ends_M)
        out_RE = attention.permute_rows(out_RE, back_R, order_R)
        return exchange_rows(out_RE, received, sent, group)


def _counts(ends_N: torch.Tensor) -> torch.Tensor:
    return ends_N.diff(prepend=ends_N.new_zeros(1))


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


def balance_loss(routed: Sequence[Routed], num_active: int) -> torch.Tensor:
    """Loss of routers that prefer some experts, of all layers together, a float32 scalar.

    It is 1 x ``num_active`` where all are chosen alike ("Switch Transformers", arXiv 2101.03961,
    equations 4 to 6, as transformers' ``load_balancing_loss_func`` takes them over layers).
    """
    counts_N, probabilities_N = (torch.stack(parts).sum(0) for parts in zip(*routed, strict=True))
    choices = counts_N.sum()  # a token's in a layer are num_active
    shares_N = counts_N * num_active / choices
    return len(counts_N) * (shares_N * probabilities_N * num_active / choices).sum()
