"""Steps that a run can go on from, in directories, and its log of samples."""

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

from torchtune_vl.files import _directory as directories

_PROGRESS = "progress.json"

log = logging.getLogger(__name__)


class SavedStep(NamedTuple):
    """A step that is whole; its progress is what :meth:`Steps.begin` was given."""

    directory: Path
    progress: dict[str, Any]


class Steps:
    """``step_N`` in a directory, each complete, with checksums, or not there.

    The newest ``keep_last`` are kept, and the best that they know of; other names are left alone.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last

    def tidy(self) -> None:
        """Remove directories that were being written or removed when a crash came."""
        directories.tidy(self.directory, r"step_\d+")

    def newest(self) -> Path | None:
        """Return the directory of the last step that was saved, or None."""
        return next(iter(directories.numbered(self.directory, "step")), None)

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step}"

    def read(self, directory: Path) -> SavedStep:
        """Return a step, or raise ``ValueError`` with all in which it is not as it was written."""
        directories.check_manifest(directory, required=(_PROGRESS, ".metadata"))
        return SavedStep(directory, _progress(directory))

    def newest_whole(self) -> SavedStep | None:
        """Return the newest step that is as it was written, or None if none was saved.

        Damaged ones become ``step_N.damaged``: their numbers come again. ``ValueError`` if all are.
        """
        reasons: dict[Path, str] = {}
        for directory in directories.numbered(self.directory, "step"):
            try:
                step = self.read(directory)
            except (ValueError, OSError) as error:
                reasons[directory] = str(error)
                continue
            for damaged, reason in reasons.items():
                aside = damaged.with_suffix(".damaged")
                directories.remove(aside)
                damaged.rename(aside)
                told = "%s is damaged (%s): it is %s now, and the run goes on from %s"
                log.warning(told, damaged, reason, aside.name, directory.name)
            return step
        if reasons:
            found = f"no step in {self.directory} can be gone on from"
            remedy = "restore one, or name another output_dir"
            raise ValueError(f"{found} ({'; '.join(reasons.values())}): {remedy}")
        return None

    def begin(self, step: int, progress: dict[str, Any]) -> Path:
        """Make the directory that a step is written to, and write its progress as JSON.

        Its ``["best"]["step"]`` is the number of a step to keep as long as this one, or None.
        """
        partial = self.path(step).with_suffix(".partial")
        directories.remove(partial)
        partial.mkdir(parents=True)
        directories.write_json(partial / _PROGRESS, progress)
        return partial

    def finish(self, partial: Path) -> None:
        """Give a step that is on the disk its checksums and its name, and remove older ones."""
        directories.complete(partial, partial.with_suffix(""))
        saved = directories.numbered(self.directory, "step")
        kept = {*saved[: self.keep_last]}
        kept |= {self.path(best) for directory in kept if (best := _best(directory)) is not None}
        for old in set(saved) - kept:
            directories.remove(old)


def _progress(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / _PROGRESS).read_text(encoding="utf-8")))


def _best(directory: Path) -> int | None:
    try:
        return _progress(directory)["best"]["step"]
    except (OSError, ValueError, LookupError, TypeError):  # damaged: found when resuming
        return None


def drop_steps_after(step: int, path: Path) -> None:
    """Drop lines of later steps, which come again, and torn ones from JSON Lines with ``step``s."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    with directories.new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(line for line in lines if step_of(line) <= step)


def step_of(line: str) -> float:
    """The ``step`` of a line of JSON Lines, infinite if it is torn."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return math.inf
