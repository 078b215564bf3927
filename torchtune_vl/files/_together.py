"""What several processes do together: directories that they write, tensors that they share."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkstemp
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from torchtune_vl.files._directory import new_directory

T = TypeVar("T")

_SEEN_WITHIN = 30  # seconds


class Part(NamedTuple):
    """Where in a tensor the part of a process is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> "Part":
        """Return that of this process, as checkpoints of torch have it."""
        (chunk,) = tensor.__create_chunk_list__()
        return cls(tuple(chunk.offsets), tuple(chunk.sizes))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Indices of the part."""
        places = zip(self.offsets, self.sizes, strict=True)
        return tuple(slice(offset, offset + size) for offset, size in places)


class Together(NamedTuple):
    """Processes that call the same methods in the same order.

    They are all of ``group``, which is made of all that there are; without one, this one alone.
    """

    group: ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """The number of this process among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        """How many they are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def by_first(self, act: Callable[[], T]) -> T:
        """Let the first one act, so that all go on with what it gives, or raise what it raises.

        That is an ``OSError`` or ``ValueError``; others end it, and so the rest.
        """
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [act()]
            except (ValueError, OSError) as error:
                outcome = [error]
        if self.group is not None:
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def first_error(self, own: Exception | None) -> Exception | None:
        """Return the error of the first process that has one."""
        errors: list[Any] = [own]
        if self.group is not None:
            errors *= self.world_size
            dist.all_gather_object(errors, own, group=self.group)
        return next(filter(None, errors), None)

    def parts_of(self, tensors: Mapping[str, object]) -> list[dict[str, Part]]:
        """Return by process where the parts of tensors are, of those that are sharded."""
        own = {n: Part.of(tensor) for n, tensor in tensors.items() if isinstance(tensor, DTensor)}
        everyone: list[Any] = [own] * self.world_size
        if self.group is not None:
            dist.all_gather_object(everyone, own, group=self.group)
        return everyone

    def collect(self, tensor: DTensor, parts: Sequence[Part], rank: int) -> torch.Tensor | None:
        """Give one process, of a rank, a tensor from the parts of all, on its CPU.

        The others keep no more than they have.
        """
        own, sizes = tensor.to_local().flatten(), [math.prod(part.sizes) for part in parts]
        lacking = max(sizes) - len(own)  # all have to send as much
        padded = F.pad(own, (0, lacking)) if lacking else own  # which would copy it, too
        sent = [padded]
        if self.group is not None:
            # By the tensors' own backend, where that of the group may be the host's
            sent = [torch.empty_like(padded) for _ in parts] if self.rank == rank else []
            dist.gather(padded, sent or None, dst=rank)
        if self.rank != rank:
            return None
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for part, size, flat in zip(parts, sizes, sent, strict=True):
            whole[part.slices] = flat[:size].view(part.sizes).cpu()
        return whole

    def check_shared(self, directory: Path) -> None:
        """Raise ``OSError`` if not all see what the first one writes to a directory."""

        def mark() -> Path:
            descriptor, name = mkstemp(prefix=".seen-by-all-", dir=directory)
            os.close(descriptor)
            return Path(name)

        marked = self.by_first(mark)
        unseen = self.first_error(self._unseen(marked))
        self.by_first(marked.unlink)
        if unseen:
            raise unseen

    def _unseen(self, path: Path) -> OSError | None:
        """Tell that this process does not see what the first one made."""
        # File systems of clusters may show it some seconds later
        end = time.monotonic() + _SEEN_WITHIN
        while not path.exists():
            if time.monotonic() > end:
                seen = f"process {self.rank} does not see {path}, which another machine wrote"
                return OSError(f"{seen}: name a directory on a disk that all machines share")
            time.sleep(0.1)
        return None

    @contextmanager
    def new_directory(self, target: Path) -> Iterator[Path]:
        """Yield a directory to write to, which ends as that of :func:`new_directory`.

        An ``OSError`` or ``ValueError`` of one process is raised in all, and nothing is left.
        """
        opened = ExitStack()

        def end(error: Exception | None) -> None:
            with opened:
                if error:
                    raise error

        partial = self.by_first(lambda: opened.enter_context(new_directory(target)))
        if unseen := self.first_error(self._unseen(partial)):
            self.by_first(lambda: end(unseen))
        own: Exception | None = None
        try:
            yield partial
        except (ValueError, OSError) as error:
            own = error
        except BaseException:
            with opened:
                raise
        failed = self.first_error(own)
        self.by_first(lambda: end(failed))
