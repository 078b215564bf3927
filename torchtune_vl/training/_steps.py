"""Directories of the steps that a run can go on from."""

import json
import shutil
from pathlib import Path
from typing import Any

from torchtune_vl.training._directory import flush, write_json

_PROGRESS = "progress.json"


class Steps:
    """``step_N`` in a directory, each complete or not there.

    Args:
        directory: holds them; made when the first is saved.
        keep_last: how many of the newest to keep, beside the best.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last

    def tidy(self) -> None:
        """Remove what a crash left: directories that were being written or removed."""
        for left in self.directory.glob("step_*.*"):
            shutil.rmtree(left)

    def newest(self) -> Path | None:
        """Return the directory of the last step that was saved, or None."""
        return max(self._complete(), key=_number, default=None)

    def progress(self, step_dir: Path) -> dict[str, Any]:
        """Read what :meth:`begin` was given.

        Args:
            step_dir: a complete directory.

        Returns:
            The values.
        """
        return dict(json.loads((step_dir / _PROGRESS).read_text(encoding="utf-8")))

    def partial(self, step: int) -> Path:
        """Return the directory that a step is written to, before it gets its name."""
        return self.directory / f"step_{step}.partial"

    def begin(self, step: int, progress: dict[str, Any]) -> None:
        """Make the directory that a step is written to.

        Args:
            step: its number.
            progress: values that JSON can hold, which are written first.

        Raises:
            OSError: if it cannot be written.
        """
        partial = self.partial(step)
        partial.mkdir(parents=True)
        write_json(partial / _PROGRESS, progress)

    def finish(self, step: int, best: int | None) -> None:
        """Give a step that is on the disk its name, and remove those that are not kept.

        Args:
            step: its number.
            best: number of the step to keep in any case.

        Raises:
            OSError: if it cannot be renamed.
        """
        partial = self.partial(step)
        flush(partial)
        target = partial.with_suffix("")
        partial.rename(target)
        flush(self.directory)
        for old in sorted(self._complete(), key=_number)[: -self.keep_last]:
            if _number(old) != best:
                # Half of a directory must not look like a whole one
                shutil.rmtree(old.rename(old.with_suffix(".old")))

    def _complete(self) -> list[Path]:
        return [path for path in self.directory.glob("step_*") if path.suffix == ""]


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
