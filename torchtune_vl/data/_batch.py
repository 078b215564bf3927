"""Batches on their way from a data worker to the trainer."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from torchtune_vl.modules import Segments

# A file of shared memory costs each side some half a millisecond, whatever its size; by value so
# many bytes cost less
LARGEST_BY_VALUE = 2**18


class Batch(dict[str, Any]):
    """A dict, also of dicts, whose small tensors go from process to process by value.

    torch sends each tensor of a batch as a file of shared memory. That is right for patches, but a
    batch has some ten small tensors of integers too, which would cost the trainer's Python
    milliseconds of each step.
    """

    # How pickle, and so a queue between processes, takes it apart
    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (_map_leaves(_to_send, self),)


def _map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_leaves(change, entry) for key, entry in value.items()}
    if isinstance(value, Segments):
        return Segments(value.lengths, change(value.boundaries))
    return change(value)


def _to_send(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        return value
    return value.numpy() if value.nbytes <= LARGEST_BY_VALUE else value


def _received(values: Mapping[str, Any]) -> Batch:
    return Batch(_map_leaves(_from_sent, values))


def _from_sent(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
