"""Steps of decoding that a GPU repeats on its own, as CUDA graphs."""

# Shape suffixes: B sequences, S slots, V vocabulary

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from torchtune_vl.modules.grouped import GroupedLinear, waits_for_groups
from torchtune_vl.modules.kv_cache import Cache, Step
from torchtune_vl.modules.quantized import QuantizedExperts
from torchtune_vl.modules.vision import VisionLanguageModel

Last = tuple[int, int, int]  # a sequence's last token, its place in the slot, and its position


def step_logits(
    model: VisionLanguageModel, cache: Cache, last_B3: torch.Tensor, reach: int
) -> torch.Tensor:
    """Read the last token of sequences in the first slots; returns logits of the next, [B, V]."""
    tokens, places, positions = last_B3.T.contiguous().unbind()
    mask = Step(cache, places, reach)
    logits_B1V: Any = model(tokens[:, None], mask=mask, input_pos=positions[:, None])
    return logits_B1V.squeeze(1)


def to_device(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Make a tensor of numbers; a GPU takes them when it comes to it, and nobody waits."""
    is_cuda = device.type == "cuda"
    return torch.tensor(values, pin_memory=is_cuda).to(device, non_blocking=is_cuda)


def can_capture(model: VisionLanguageModel, device: torch.device) -> bool:
    """Whether steps may be captured: on CUDA, with plain weights that nobody trains.

    Those of a model in training move between steps, or are gathered in each. Where no kernel
    multiplies experts at once, as quantized ones, the host waits within a step.
    """
    if device.type != "cuda":
        return False
    plain = (type(p) is nn.Parameter and not p.requires_grad for p in model.parameters())
    waits = (
        isinstance(m, QuantizedExperts)
        or (isinstance(m, GroupedLinear) and waits_for_groups(m.weight))
        for m in model.modules()
    )
    return all(plain) and not any(waits)


class CapturedSteps:
    """Calls :func:`step_logits`, and repeats calls of a shape as a CUDA graph, in one launch.

    A shape is a number of sequences and a reach. The first call of one runs as it is, which loads
    kernels that a capture could not; the second is captured. A graph reads and writes where it did:
    what goes in and comes out has a fixed place, and once the cache has moved, all are dropped.

    The model is not compiled: that takes longer than a short answer does, again for some shapes,
    and what it gains beyond a graph is not measured yet. ``num_replays`` counts those of graphs.
    """

    def __init__(self, model: VisionLanguageModel, cache: Cache, device: torch.device) -> None:
        self.num_replays = 0
        self._model = model
        self._cache = cache
        self._device = device
        self._room = 0
        self._replays: dict[tuple[int, int], Callable[[], None] | None] = {}
        self._pool: Any = None
        self._last_S3 = torch.zeros(cache.num_slots, 3, dtype=torch.int64, device=device)
        shape = cache.num_slots, model.tok_embeddings.weight.shape[0]
        # Outside of the graphs' memory, where one would overwrite what another one returned
        self._logits_SV = torch.zeros(shape, device=device)

    def __call__(self, last: Sequence[Last], reach: int) -> torch.Tensor:
        """Return logits, float32 [B, V], which the next call overwrites."""
        # Few shapes occur: rows are added, which write to the first place of slots that are free,
        # where whatever is put there later begins
        rows = min(1 << (len(last) - 1).bit_length(), self._cache.num_slots)
        padded = [*last, *[(0, 0, 0)] * (rows - len(last))]
        self._last_S3[:rows].copy_(to_device(padded, self._device))
        if self._room != self._cache.room:
            self._room = self._cache.room
            self._replays.clear()
            self._pool = None  # it ended with the last of its graphs
        shape = rows, reach
        if shape not in self._replays:
            self._run(*shape)
            self._replays[shape] = None
        else:
            replay = self._replays[shape] or self._capture(*shape)
            self._replays[shape] = replay
            replay()
            self.num_replays += 1
        return self._logits_SV[: len(last)]

    def _run(self, rows: int, reach: int) -> None:
        last_B3 = self._last_S3[:rows]
        self._logits_SV[:rows] = step_logits(self._model, self._cache, last_B3, reach)

    def _capture(self, rows: int, reach: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may do what a capture forbids, such as to pin memory
        where = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self._device), torch.cuda.graph(graph, **where):
            self._run(rows, reach)
        self._pool = graph.pool()
        return graph.replay

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        # Of its own: with a graph goes cuBLAS's workspace of its stream, which all have that were
        # captured there
        return torch.cuda.Stream(self._device)
