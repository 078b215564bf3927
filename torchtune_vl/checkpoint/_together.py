"""What several processes do together, and directories that they write together."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from torchtune_vl.files._directory import new_directory

T = TypeVar("T")


class Together(NamedTuple):
    """Processes that call the same methods in the same order; without a group this one alone."""

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
        own: Exception | None = None
        if not partial.is_dir():
            own = OSError(f"process {self.rank} does not see {partial}, which another one made")
        if unseen := self.first_error(own):
            self.by_first(lambda: end(unseen))
        try:
            yield partial
        except (ValueError, OSError) as error:
            own = error
        except BaseException:
            with opened:
                raise
        failed = self.first_error(own)
        self.by_first(lambda: end(failed))
