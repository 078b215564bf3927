"""Context parallelism: several devices share a packed row, each its tokens and its frames.

A device has the queries of its own tokens, and gathers keys and values of all, as "The Llama 3 Herd
of Models" (arXiv 2407.21783, section 3.3.2) does: these have few heads, so that it takes no more
than an exchange of heads would, divides any number of heads, and needs no masks of documents.
"""

# Shape suffixes as in modules/attention.py: N rows of a device, M those that its queries see, H
# heads of queries, K heads of keys and values, D dimension of a head; U units, E width

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from torchtune_vl.modules import attention
from torchtune_vl.modules.layout import Segments

# As torch 2.13 calls them, and as it did before. On the meta device, where memory is computed, they
# send nothing
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(eq=False)
class RowShare:
    """What one of the devices that share a packed row has of it, as the data workers make it.

    An object, as :class:`~torchtune_vl.modules.Segments` are, and for the same reason.

    Args:
        queries: its tokens, in pieces that lie side by side in one document.
        keys: for each piece, the tokens of its document up to its end.
        key_rows: int64 [M], where these are in what all devices gather.
        sent_rows: int64 [U], the units that it encodes, in the order in which devices get them.
        sent: how many of them each device gets.
        received: how many units it gets of each device.
        targets: int64, which of the row's targets its own are.
        media: what the encoder takes of the whole row, without patches; None without media.
        group: the devices, which the trainer knows.
    """

    queries: Segments
    keys: Segments
    key_rows: torch.Tensor
    sent_rows: torch.Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    targets: torch.Tensor
    media: dict[str, Any] | None
    group: ProcessGroup | None = None

    def with_each(self, change: Callable[[Any], Any]) -> "RowShare":
        """Return it with each of its tensors and segments changed."""
        names = ("queries", "keys", "key_rows", "sent_rows", "targets")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def to(self, device: torch.device, non_blocking: bool = False) -> "RowShare":
        """Return it on a device, as :meth:`torch.Tensor.to` does."""
        return self.with_each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RowShare":
        """Return it in pinned memory, as data loaders ask for."""
        return self.with_each(lambda x: x.pin_memory())

    @torch.compiler.disable  # as attention within segments is
    def attend(
        self, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor:
        """Attend causally to the documents of the row; returns [N, H, D]."""
        both = torch.cat([k_NKD, v_NKD], dim=1)
        both = _GatherRows.apply(both, len(self.received), self.group)
        k_MKD, v_MKD = both.index_select(0, self.key_rows).chunk(2, dim=1)
        return attention.attend_to_ends(q_NHD, k_MKD, v_MKD, self.queries, self.keys)

    def exchange(self, units_UE: torch.Tensor) -> torch.Tensor:
        """Give embeddings of units to those that have their tokens, and return one's own."""
        leaving = units_UE.index_select(0, self.sent_rows)
        return exchange_rows(leaving, self.sent, self.received, self.group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, devices: int, group: ProcessGroup | None
    ) -> torch.Tensor:
        ctx.group, ctx.count = group, len(x)
        gathered = x.new_empty(devices * len(x), *x.shape[1:])
        x = x.contiguous()
        if not x.is_meta:
            _all_gather(gathered, x, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # What devices add to a gradient is rounded once, as where it is added on one
        dtype = torch.promote_types(grad.dtype, torch.float32)
        own = grad.new_empty(ctx.count, *grad.shape[1:], dtype=dtype)
        whole = grad.to(dtype).contiguous()
        if not whole.is_meta:
            _reduce_scatter(own, whole, group=ctx.group)
        return own.to(grad.dtype), None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        sent: Sequence[int],
        received: Sequence[int],
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


# Of rows, of which each device of a group gets the next few, how many these are, and how many each
# sends: returns those that came, device by device
exchange_rows: Callable[..., torch.Tensor] = _ExchangeRows.apply


def _exchange(
    x: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup | None
) -> torch.Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    x = x.contiguous()
    if not x.is_meta:
        dist.all_to_all_single(out, x, [*received], [*sent], group=group)
    return out
