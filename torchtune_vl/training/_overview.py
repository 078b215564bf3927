"""What a run is about to do, in one table."""

from rich.console import Console
from rich.table import Table

from torchtune_vl.data import Plan
from torchtune_vl.datasets import Measurements


class Overview:
    """The table that a run shows before its first step."""

    def __init__(self) -> None:
        self._datasets: dict[str, dict[str, str]] = {}

    def add_dataset(self, key: str, measured: Measurements, bad: int, plan: Plan) -> None:
        """Add a dataset that was measured and planned."""
        tokens, _, targets = measured.sizes.sum(axis=0, dtype=int).tolist()
        counts = {
            "samples": len(measured.sizes) - bad,
            "bad, left out": bad,
            "truncated": measured.counts["truncated"],
            "images and videos": measured.counts["media"],
            "tokens": tokens,
            "supervised tokens": targets,
            "rows": (plan.last_step - plan.first_step + 1) * plan.rows_per_step,
        }
        self._datasets[key] = {name: f"{count:,}" for name, count in counts.items()}

    def show(self, steps: int, memory: int) -> None:
        """Print the table, and how many steps are to go, with how much memory if that is known."""
        table = Table("", *self._datasets)
        for name in next(iter(self._datasets.values()), {}):
            table.add_row(name, *(counts[name] for counts in self._datasets.values()))
        if self._datasets:
            Console().print(table)
        foretold = f", in about {memory / 1e9:.1f} GB of each device, computed" if memory else ""
        print(f"{steps:,} steps to go{foretold}")
