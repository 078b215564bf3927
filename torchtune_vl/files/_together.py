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

# Seconds: file systems of clusters may look for names in what they knew a minute ago
_SEEN_WITHIN = 90


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

    They are those of ``group``, to which all belong that there are; without it, this one alone.
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
        """Let the first one act, so that all go on with what it gives, or raise what it raises."""
        outcome: list[Any] = [None]
        own: Exception | None = None
        if self.rank == 0:
            try:
                outcome = [act()]
            except Exception as error:
                own, outcome = error, [self._told(error)]
        if self.group is not None:
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if isinstance(outcome[0], Exception):
            raise own or outcome[0]
        return outcome[0]

    def by_each(self, act: Callable[[], T]) -> T:
        """Let each one act, and raise in all what any of them raises, an ``Exception``."""
        own: Exception | None = None
        try:
            given = act()
        except Exception as error:
            own = error
        if failed := self.first_error(own):
            raise failed
        return given

    def _told(self, error: Exception) -> Exception:
        """Return what others are told of an error; not all can be sent."""
        if isinstance(error, ValueError | OSError):
            return error
        return RuntimeError(f"process {self.rank}: {error!r}")

    def first_error(self, own: Exception | None) -> Exception | None:
        """Return this process' error or, if it has none, that of the first that has one."""
        errors: list[Any] = [own]
        if self.group is not None:
            errors *= self.world_size
            dist.all_gather_object(errors, own and self._told(own), group=self.group)
        return own or next(filter(None, errors), None)

    def parts_of(self, tensors: Mapping[str, Any]) -> list[dict[str, Part]]:
        """Return by process where the parts of tensors are, of those that are sharded.

        ``ValueError`` if others have other names, or the same in another order.
        """
        parts = {n: Part.of(tensor) for n, tensor in tensors.items() if isinstance(tensor, DTensor)}
        own = [*tensors], parts
        everyone: list[Any] = [own] * self.world_size
        if self.group is not None:
            dist.all_gather_object(everyone, own, group=self.group)
        elif any(part.sizes != tuple(tensors[n].shape) for n, part in parts.items()):
            raise ValueError("tensors are sharded over processes, which have to write together")
        if any(names != everyone[0][0] for names, _ in everyone):
            raise ValueError("processes that write together have other tensors")
        return [found for _, found in everyone]

    def collect(self, tensor: DTensor, parts: Sequence[Part], writer: int) -> torch.Tensor | None:
        """Give one process a tensor from the ``parts`` that processes have, on its CPU.

        ``writer`` is its rank. The others keep no more than they have.
        """
        mesh = tensor.device_mesh
        # Of several meshes of one dimension each has all, and that of the writer is taken
        group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
        ranks = dist.get_process_group_ranks(group)
        if writer not in ranks:
            return None
        sizes = [math.prod(parts[rank].sizes) for rank in ranks]
        own = tensor.to_local().flatten()
        lacking = max(sizes) - len(own)  # each has to send as much as the others
        sent = F.pad(own, (0, lacking)) if lacking else own  # a pad of none is a copy, too
        taken = [torch.empty_like(sent) for _ in ranks] if dist.get_rank() == writer else None
        dist.gather(sent, taken, dst=writer, group=group)
        if taken is None:
            return None
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for rank, size, flat in zip(ranks, sizes, taken, strict=True):
            whole[parts[rank].slices] = flat[:size].view(parts[rank].sizes).cpu()
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
        end = time.monotonic() + _SEEN_WITHIN
        while not os.path.exists(path):  # Path.exists raises some errors
            if time.monotonic() > end:
                seen = f"process {self.rank} does not see {path}, which another machine wrote"
                return OSError(f"{seen}: name a directory on a disk that all machines share")
            time.sleep(0.1)
        return None

    @contextmanager
    def new_directory(self, target: Path) -> Iterator[Path]:
        """Yield a directory to write to, which ends as that of :func:`new_directory`.

        What one process raises behind the last collective is raised in all, and nothing is left.
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
        except Exception as error:
            own = error
        except BaseException:
            with opened:
                raise
        failed = self.first_error(own)
        self.by_first(lambda: end(failed))
