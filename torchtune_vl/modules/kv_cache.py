"""Keys and values of tokens that were read, and attention of new tokens to them."""

# Shape suffixes: N new tokens, B sequences, S slots, M tokens that are looked at, H heads of
# queries, K heads of keys and values, D dimension of a head

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from torchtune_vl.modules import attention
from torchtune_vl.modules.layout import Segments

# A cache grows by a quarter, and at least by so many tokens: what is there is copied then
_MORE = 256
# Queries that look back at once: their mask is the only thing that grows with both lengths
_QUERIES = 256


class KVCache(nn.Module):
    """Keys and values that one layer has of sequences, each in a slot of its own.

    It begins with room for ``room`` tokens of each and takes more as it needs. What is in a slot
    is known to those who write and read it, :class:`Prefill` and :class:`Step`.
    """

    def __init__(self, num_slots: int, room: int) -> None:
        super().__init__()  # torchtune's generation finds and deletes modules
        self.size = (num_slots, room)
        self.length = 0
        self.kept: torch.Tensor | None = None

    def append(self, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Add new tokens, as many to each slot, and return those of all so far, [B, K, M, D]."""
        end = self.length + k_BKSD.shape[2]
        kept = self.with_room(k_BKSD, end)
        kept[0, :, :, self.length : end] = k_BKSD
        kept[1, :, :, self.length : end] = v_BKSD
        self.length = end
        return kept[..., :end, :].unbind()

    def with_room(self, like: torch.Tensor, length: int) -> torch.Tensor:
        """Return the keys and values, [2, S, K, length or more, D], of those like [any, K, D]."""
        heads = like.shape[1]
        kept, (num_slots, room) = self.kept, self.size
        if kept is None or kept.shape[3] < length:
            had = 0 if kept is None else kept.shape[3]
            room = max(room, length) if kept is None else max(length, had + max(had // 4, _MORE))
            shape = 2, num_slots, heads, room, like.shape[-1]
            self.kept = like.new_zeros(shape)
            if kept is not None:
                self.kept[:, :, :, :had] = kept
            kept = self.kept
        return kept


class Cache:
    """Keys and values of sequences, in slots, that all layers of a decoder have."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._layers: dict[nn.Module, KVCache] = {}

    def of(self, layer: nn.Module) -> KVCache:
        """Return those of a layer."""
        if layer not in self._layers:
            self._layers[layer] = KVCache(self.num_slots, _MORE)
        return self._layers[layer]

    @property
    def room(self) -> int:
        """Tokens that the layers have room for, added up: another number once one has moved."""
        return sum(x.kept.shape[3] for x in self._layers.values() if x.kept is not None)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot what another has of its first tokens."""
        for layer in self._layers.values():
            if layer.kept is not None:
                layer.kept[:, target, :, :length] = layer.kept[:, source, :, :length]


class Prefill:
    """What prompts that lie end to end in one row attend to: each to itself, and to its slot.

    ``lengths`` are their new tokens, which go to ``slots`` of the cache, behind the ``starts``
    first tokens that these have already.
    """

    def __init__(
        self, cache: Cache, lengths: Sequence[int], slots: Sequence[int], starts: Sequence[int]
    ) -> None:
        self.cache = cache
        self.segments = Segments.of(lengths)
        self.slots = tuple(slots)
        self.starts = tuple(starts)

    def attend(
        self, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor:
        """Keep a layer's keys and values, and attend; returns [N, H, D]."""
        lengths = self.segments.lengths
        ends = [start + length for start, length in zip(self.starts, lengths, strict=True)]
        kept = self.cache.of(layer).with_room(k_NKD, max(ends))
        places = [*zip(self.slots, self.starts, ends, strict=True)]
        for new, x_NKD in zip(kept, (k_NKD, v_NKD), strict=True):
            for (slot, start, end), part in zip(places, x_NKD.split(lengths), strict=True):
                new[slot, :, start:end] = part.transpose(0, 1)
        if not any(self.starts):
            self.segments = self.segments.to(q_NHD.device)  # once, for all layers
            rows = (q_NHD, k_NKD, v_NKD)
            return attention.attend_within_segments(*rows, self.segments, is_causal=True)
        return torch.cat(
            [
                _look_back(q, kept[0, slot, :, :end], kept[1, slot, :, :end], start)
                for q, (slot, start, end) in zip(q_NHD.split(lengths), places, strict=True)
            ]
        )


def _look_back(
    q_NHD: torch.Tensor, k_KMD: torch.Tensor, v_KMD: torch.Tensor, start: int
) -> torch.Tensor:
    """Attend from tokens that begin at ``start`` to all up to their own; returns [N, H, D]."""
    attended = []
    for part_NHD in q_NHD.split(_QUERIES):
        end = start + len(part_NHD)
        mask = torch.ones(len(part_NHD), end, dtype=torch.bool, device=q_NHD.device).tril(start)
        attended.append(_attend(part_NHD, k_KMD[:, :end], v_KMD[:, :end], mask))
        start = end
    return torch.cat(attended)


def _attend(
    q_NHD: torch.Tensor, k_KMD: torch.Tensor, v_KMD: torch.Tensor, mask_NM: torch.Tensor
) -> torch.Tensor:
    q, k, v = (x[None] for x in (q_NHD.transpose(0, 1), k_KMD, v_KMD))
    return F.scaled_dot_product_attention(q, k, v, mask_NM, enable_gqa=True)[0].transpose(0, 1)


class Continuations:
    """What continuations of prompts attend to, in one row: each to its prompt, and to itself.

    ``lengths`` are, by prompt, those of its continuations, which lie end to end. They share the
    keys and values of the prompt, which are the ``starts`` first of ``slots`` of the cache; of
    their own none are kept.
    """

    def __init__(
        self,
        cache: Cache,
        lengths: Sequence[Sequence[int]],
        slots: Sequence[int],
        starts: Sequence[int],
    ) -> None:
        self.cache = cache
        self.lengths = [sum(each) for each in lengths]
        self.places = [*zip(slots, starts, strict=True)]
        own = [torch.block_diag(*[torch.ones(n, n).tril() for n in each]) for each in lengths]
        self.masks = [
            F.pad(mask.bool(), (start, 0), value=True)
            for mask, start in zip(own, starts, strict=True)
        ]

    def attend(
        self, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor:
        """Attend to a layer's keys and values; returns [N, H, D]."""
        self.masks = [mask.to(q_NHD.device) for mask in self.masks]  # once, for all layers
        kept = self.cache.of(layer).with_room(k_NKD, 0)
        attended = []
        new = (x.split(self.lengths) for x in (q_NHD, k_NKD, v_NKD))
        for q, k, v, (slot, start), mask in zip(*new, self.places, self.masks, strict=True):
            k_KMD, v_KMD = (
                torch.cat([had[slot, :, :start], x.transpose(0, 1)], dim=1)
                for had, x in zip(kept, (k, v), strict=True)
            )
            parts = zip(q.split(_QUERIES), mask.split(_QUERIES), strict=True)
            attended += [_attend(queries, k_KMD, v_KMD, seen) for queries, seen in parts]
        return torch.cat(attended)


class Step:
    """What a new token of each of the first sequences attends to: all of its slot, and itself.

    ``lengths``, int64 [B], are the tokens that each slot has, on the device; of these, ``reach`` is
    at least the largest, and one more. Shapes depend on the number of sequences and on ``reach``.
    """

    def __init__(self, cache: Cache, lengths: torch.Tensor, reach: int) -> None:
        self.cache = cache
        self.lengths = lengths
        self.reach = reach
        positions = torch.arange(reach, device=lengths.device)
        self._is_unseen_B11M = (positions > lengths[:, None])[:, None, None]
        self._bias_B11M: torch.Tensor | None = None
        self.slots = torch.arange(len(lengths), device=lengths.device)

    def attend(
        self, q_BHD: torch.Tensor, k_BKD: torch.Tensor, v_BKD: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor:
        """Keep a layer's keys and values, and attend; returns [B, H, D]."""
        kept = self.cache.of(layer).with_room(k_BKD, self.reach)
        kept[:, self.slots, :, self.lengths] = torch.stack([k_BKD, v_BKD], dim=1)
        k, v = kept[:, : len(q_BHD), :, : self.reach].unbind()
        # Heads that share keys count as positions of one head: the keys are read once, as they are
        q_BKGD = q_BHD.unflatten(1, (k.shape[1], -1))
        if self._bias_B11M is None:  # once, for all layers: of booleans each would make it anew
            bias_B11M = torch.zeros_like(self._is_unseen_B11M, dtype=q_BHD.dtype)
            self._bias_B11M = bias_B11M.masked_fill_(self._is_unseen_B11M, -torch.inf)
        return F.scaled_dot_product_attention(q_BKGD, k, v, self._bias_B11M).flatten(1, 2)
