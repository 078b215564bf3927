"""What a page tells of all samples of a dataset: their sizes, and the rows that they fill."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from torchtune_vl.data import Plan, Planner
from torchtune_vl.data._plan import unusable
from torchtune_vl.datasets._mixture import Mixture
from torchtune_vl.datasets._sample_sizes import Measurements, measure

_MOST_BARS = 20
_MOST_NAMES = 20
_FACTORS = (0.5, 1, 2, 4)  # of the budget of a row


@dataclass
class Summary:
    """What a page tells of all samples of a mixture, and of the first epoch that they make."""

    mixture: Mixture
    planner: Planner
    rows_per_step: int
    seed: int
    shuffle: bool
    num_workers: int

    def __post_init__(self) -> None:
        each = [measure(d, range(len(d)), self.num_workers) for d in self.mixture.datasets]
        self.measured: Measurements = self.mixture.measured(each)
        # Also those that training refuses, which are shown all the same
        self.sizes = self.measured.sizes.copy()
        refused = unusable(self.planner, self.sizes)
        self.problems = dict(sorted([*self.measured.bad, *refused]))
        self.measured.sizes[[*self.problems]] = 0

    def rows_of(self, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
        """For samples, the row and the step of each, from 1, and what else is in the row.

        Of those that come several times in the epoch, the first.
        """
        found: dict[int, dict[str, Any]] = {}
        if not self.mixture.is_drawable(self.measured.sizes):
            return found
        with self._plan(self.planner, self.measured.sizes) as plan:
            is_empty = np.diff(plan.ends) == 0
            for place in np.flatnonzero(np.isin(plan.entries["sample"], indices)).tolist():
                row = int(np.searchsorted(plan.ends, place, side="right")) - 1
                entries = plan.entries[plan.ends[row] : plan.ends[row + 1]]
                number = row + 1 - int(is_empty[:row].sum())
                told = {
                    "row": number,
                    "step": row // self.rows_per_step + 1,
                    "room": _room(self.planner, entries["tokens"]),
                    "samples": entries["sample"].tolist(),
                    "tokens": entries["tokens"].tolist(),
                }
                found.setdefault(int(plan.entries["sample"][place]), told)
        return found

    def budgets(self) -> Iterator[dict[str, Any]]:
        """How full rows are, and how many there are, for several budgets of a row."""
        for factor in _FACTORS:
            planner = _scaled(self.planner, factor)
            sizes = self.measured.sizes.copy()
            too_large = [index for index, _ in unusable(planner, sizes)]
            sizes[too_large] = 0
            if not self.mixture.is_drawable(sizes):
                continue
            with self._plan(planner, sizes) as plan:
                bounds = plan.ends[np.concatenate([[True], np.diff(plan.ends) > 0])]
                rows = np.split(plan.entries["tokens"], bounds[1:-1])
                rows = [row for row in rows if len(row)]
                room = sum(_room(planner, row) for row in rows)
                yield {
                    "factor": factor,
                    "settings": _counts(planner),
                    "too_large": len(too_large),
                    "rows": len(rows),
                    "steps": plan.last_step,
                    "fill": int(plan.entries["tokens"].sum(dtype=int)) / max(room, 1),
                }

    @contextmanager
    def _plan(self, planner: Planner, sizes: np.ndarray) -> Iterator[Plan]:
        """The plan of an epoch."""
        order: dict[str, Any] = {"seed": self.seed, "shuffle": self.shuffle, "epochs": 1}
        order |= {"rows_per_step": self.rows_per_step, "draws": self.mixture.draws(sizes)}
        with TemporaryDirectory() as directory:
            yield Plan.make(Path(directory), planner, sizes, **order)

    def as_data(
        self, shown: Sequence[Mapping[str, Any]], tokens_per_second: float | None
    ) -> dict[str, Any]:
        """Sum all up: what is refused, charts, and rows, steps and time of an epoch."""
        reasons = [*self.problems.values()]
        tokens, patches, targets = self.sizes.sum(axis=0, dtype=int).tolist()
        return {
            "samples": len(self.sizes),
            "refused": len(reasons),
            "reasons": reasons[:_MOST_NAMES],
            "tokens": tokens,
            "patches": patches,
            "targets": targets,
            "rows_per_step": self.rows_per_step,
            "budgets": [*self.budgets()],
            "tokens_per_second": tokens_per_second,
            "seconds": tokens_per_second and tokens / tokens_per_second,
            "charts": [*self._charts(shown)],
        }

    def _charts(self, shown: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        tokens, patches, targets = self.sizes[self.sizes[:, 0] > 0].T
        which = "all" if len(tokens) == len(self.sizes) else "the readable"
        of_all = f"of {which} {len(tokens):,} samples"
        if len(tokens):
            yield histogram("Tokens", of_all, tokens)
            yield histogram("Patches", of_all, patches)
            yield histogram("Supervised share of tokens, %", of_all, 100 * targets / tokens)
        media = [medium for sample in shown for medium in sample.get("media", ())]
        if media:
            sides = [max(medium["height"], medium["width"]) for medium in media]
            of_shown = f"of the {len(media):,} images and videos of the samples below"
            yield histogram("Longer side after resizing, pixels", of_shown, np.array(sides))
        counts = self.measured.counts
        kinds = {"whole": len(tokens) - counts["truncated"], "media cut": counts["lost media"]}
        kinds["text cut"] = counts["truncated"] - counts["lost media"]
        if len(tokens):
            yield names("Truncation", of_all, {kind: n for kind, n in kinds.items() if n})
        if len(self.mixture.datasets) > 1:
            lengths = [len(dataset) for dataset in self.mixture.datasets]
            of_sources = dict(zip(self.mixture.names, lengths, strict=True))
            yield names("Sources", f"of all {len(self.sizes):,} samples", of_sources)


def _room(planner: Planner, tokens: np.ndarray) -> int:
    """How many tokens a row has room for, a padded one as many as its batch has."""
    return getattr(planner, "max_tokens", None) or len(tokens) * int(tokens.max())


def _counts(planner: Planner) -> dict[str, int]:
    """The budgets among a planner's arguments."""
    given = vars(planner).items()
    return {name: n for name, n in given if type(n) is int and name != "lookahead"}


def _scaled(planner: Planner, factor: float) -> Planner:
    scaled = {name: max(1, int(value * factor)) for name, value in _counts(planner).items()}
    return type(planner)(**{**vars(planner), **scaled})


def names(title: str, about: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """A chart of how many there are of each name, the most frequent first."""
    first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_NAMES]
    more = len(counts) - len(first)
    note = f"{about}; {more:,} more are not drawn" if more else about
    return {"title": title, "note": note, "names": [*map(list, first)]}


def histogram(title: str, about: str, values: np.ndarray) -> dict[str, Any]:
    """A chart of how many values there are from one round number to below the next."""
    least, most = values.min(), values.max()
    widths = (factor * 10**power for power in count() for factor in (1, 2, 5))
    width = next(w for w in widths if most // w - least // w < _MOST_BARS)
    first = int(least // width)
    bars = np.bincount((values // width).astype(int) - first).tolist()
    middle, high = (_number(q) for q in np.quantile(values, (0.5, 0.95), method="inverted_cdf"))
    note = f"{about}: half up to {middle}, 95 % up to {high}, the largest {_number(most)}"
    return {"title": title, "note": note, "first": first * width, "width": width, "bars": bars}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
