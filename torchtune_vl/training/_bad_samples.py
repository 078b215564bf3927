"""Samples that a run goes on without, listed with their reasons."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torchtune_vl.files._directory import new_file
from torchtune_vl.training._saved_steps import step_of


class BadSample(NamedTuple):
    """A sample that could not be trained on.

    Args:
        step: in which that was found, 0 before the first.
        dataset: key of the config whose dataset it is of.
        sample: its index there, its number in a stream.
        reason: in a sentence, which names it by its ``id`` if it has one.
    """

    step: int
    dataset: str
    sample: int
    reason: str


class BadSamples:
    """The list of a run's bad samples, each once, in a file of JSON Lines.

    All processes add the same to their list; the first one ``writes`` it. ``largest_share`` of all
    samples may be bad.
    """

    def __init__(self, path: Path, largest_share: float, writes: bool) -> None:
        self.path = path
        self._largest_share = largest_share
        self._writes = writes
        self._listed: dict[tuple[str, int], BadSample] = {}
        self._has_begun = False

    def read_until(self, step: int) -> list[BadSample]:
        """Read what an earlier part of the run found up to a step; what came later comes again."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [BadSample(**json.loads(line)) for line in lines if step_of(line) <= step]

    def begin(self, found_before: Iterable[BadSample]) -> None:
        """Write the list anew, of what is listed and what was found before; from here on add."""
        self.add(found_before)
        self._has_begun = True
        if self._writes:
            self._write()

    def add(self, found: Iterable[BadSample]) -> None:
        """Add those that are not listed yet, in the order of steps and samples."""
        new = {(bad.dataset, bad.sample): bad for bad in sorted(found, reverse=True)}
        new = {key: bad for key, bad in reversed(new.items()) if key not in self._listed}
        self._listed |= new
        if self._writes and new and self._has_begun:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(bad._asdict()) + "\n" for bad in new.values())

    def _write(self) -> None:
        if not self._listed:
            self.path.unlink(missing_ok=True)
            return
        with new_file(self.path) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(bad._asdict()) + "\n" for bad in self._listed.values())

    def refuse_many(self, dataset: str, of: int) -> None:
        """Raise ``ValueError`` if too many of so many samples are bad."""
        bad = sum(listed.dataset == dataset for listed in self._listed.values())
        if bad > self._largest_share * of:
            if self._writes and not self._has_begun:
                self._write()
            raise ValueError(
                f"{bad} of {of} samples of {dataset} are bad, more than max_bad_share, "
                f"{self._largest_share}: look at {self.path}, correct the data, or raise it"
            )
