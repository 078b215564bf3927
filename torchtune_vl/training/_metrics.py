"""The metrics of the log: all are computed and written here, and explained in docs/training.md."""

import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from torchtune_vl.data import Row
from torchtune_vl.modules.context import RowShare
from torchtune_vl.training._flops import FlopCounter, peak_flops
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._plot_losses import draw_losses


class Metrics:
    """Counts what this process' steps take, and writes a line of the log for all processes.

    A new metric is counted in :meth:`add_row` and computed in :meth:`write`. ``room`` is how many
    tokens have room in a row, None for as many as its batch has; ``mesh`` tells which processes
    have the same rows, and which of them the same losses; only the first has a ``logger``. Of
    several ``sources``, datasets of a mixture, the line has loss, samples and tokens of each.
    """

    def __init__(
        self,
        logger: Any,
        flops: FlopCounter,
        room: int | None,
        device: torch.device,
        mesh: Mesh,
        sources: Sequence[str],
        best_by: str = "loss",
    ) -> None:
        self.logger = logger
        self.best_by = best_by
        self.flops = flops
        self.room = room
        self.device = device
        self.mesh = mesh
        self.sources = sources if len(sources) > 1 else []
        is_gpu = device.type == "cuda"
        self.peak_flops = peak_flops(torch.cuda.get_device_name(device)) if is_gpu else None
        self.history: dict[str, Any] = {
            "losses": [],  # of each step so far
            "validation_losses": [],  # (step, loss)
            "best": {"value": None, "step": None},  # by loss, or by a metric of answers
            "samples": 0,  # that were trained on or were bad
        }
        self.begin()

    def begin(self) -> None:
        """Begin a line of the log: what comes from here on is in it."""
        self.start = time.perf_counter()
        self.waited = 0.0  # seconds without a row
        self.losses: list[float] = []
        self.targets = self.tokens = self.rooms = self.media = self.operations = 0
        self.samples = self.bad = 0
        # Of each source: loss, on the device, and supervised tokens, samples and tokens
        device = self.device if self.sources else None
        self.source_losses = torch.zeros(len(self.sources), device=device)
        self.source_counts = torch.zeros(len(self.sources), 3, dtype=torch.float64)

    def add_row(self, row: Row, losses: torch.Tensor) -> None:
        """Count what a row was; ``losses`` are those of its targets, or of this device's share."""
        mask = row.batch.get("mask")
        share = mask if isinstance(mask, RowShare) else None
        media = share.media if share else row.batch.get("encoder_input", {}).get("vision")
        tokens = [size.tokens for size in row.sizes]
        targets = sum(size.targets for size in row.sizes)
        self.targets += targets
        self.tokens += sum(tokens)
        self.rooms += self.room or row.batch["tokens"].numel()
        self.media += len(media["grid_thw"]) if media else 0
        self.operations += self.flops.step(tokens, media, targets)
        self.samples += len(row.samples) + len(row.bad)
        self.bad += len(row.bad)
        if self.sources and row.samples:
            sources = torch.tensor(row.sources)
            counts = [[size.targets, 1, size.tokens] for size in row.sizes]
            counts_of_samples = torch.tensor(counts, dtype=torch.float64)
            self.source_counts.index_add_(0, sources, counts_of_samples)
            of_losses = sources.repeat_interleave(counts_of_samples[:, 0].long())
            of_losses = of_losses[share.targets] if share else of_losses
            of_losses = of_losses.to(self.device, non_blocking=True)
            self.source_losses.index_add_(0, of_losses, losses.detach().float())

    def add_loss(self, loss: float) -> None:
        """Add the loss of a step, over all processes."""
        self.losses.append(loss)
        self.history["losses"].append(loss)

    def write(
        self, step: int, grad_norm: float, groups: list[dict[str, Any]], asked_to_stop: bool
    ) -> tuple[dict[str, float], bool]:
        """Write the line of all steps since :meth:`begin`; ``groups`` are the optimizer's.

        Processes exchange once what they counted, and with it whether they were asked to stop.
        Returns the metrics, and whether any process was.
        """
        counts = (
            *(self.targets, self.tokens, self.rooms, self.media, self.operations, asked_to_stop),
            *(self.samples, self.bad),
        )
        own = torch.tensor(counts, dtype=torch.float64).to(self.device)
        of_sources = self.source_counts.flatten().to(self.device)
        losses = self.source_losses.double().to(self.device) * self.mesh.context
        totals = torch.cat([own, of_sources, losses])
        dist.all_reduce(totals)
        totals /= self.mesh.copies
        targets, tokens, room, media, operations, stops, samples, bad = totals[:8].tolist()
        self.history["samples"] += round(samples)
        seconds = time.perf_counter() - self.start
        metrics = {
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": grad_norm,
            **{f"lr_{group['part']}": group["lr"] for group in groups},
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": targets / seconds,
            "media_per_second": media / seconds,
            "row_fill": tokens / room,
            "waiting_for_data": self.waited / seconds,
            "memory_gb": self._peak_memory() / 1e9,
        }
        metrics |= self._of_sources(*totals[8:].split([3 * len(self.sources), len(self.sources)]))
        if bad:
            metrics["bad_samples"] = bad
        if self.peak_flops:
            metrics["mfu"] = operations / seconds / (self.peak_flops * dist.get_world_size())
        if self.logger:
            self.logger.log_dict(metrics, step=step)
        return metrics, stops > 0

    def _of_sources(self, counts: torch.Tensor, losses: torch.Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        each = zip(self.sources, counts.view(-1, 3).tolist(), losses.tolist(), strict=True)
        for name, (targets, samples, tokens), loss in each:
            if samples:
                found |= {f"loss/{name}": loss / targets}
            found |= {f"samples/{name}": samples, f"tokens/{name}": tokens}
        return found

    def write_validation(self, step: int, loss: float, scores: Mapping[str, float]) -> bool:
        """Write the loss of the validation set, and scores of answers by metric.

        Tells whether it is the best so far, by the lowest loss or the highest score. What was
        before the first step, 0, is none that could be.
        """
        named = {f"validation_{name}": score for name, score in scores.items()}
        if self.logger:
            self.logger.log_dict({"validation_loss": loss, **named}, step=step)
        self.history["validation_losses"].append((step, loss))
        value, best = {"loss": loss, **scores}[self.best_by], self.history["best"]["value"]
        is_better = best is None or (value < best if self.best_by == "loss" else value > best)
        if step and is_better:
            self.history["best"] = {"value": value, "step": step}
        return bool(step and is_better)

    def show(self, step: int, directory: Path) -> None:
        """Draw all losses to a file in a directory, and sum them up."""
        losses, validation_losses, best = (
            self.history[key] for key in ("losses", "validation_losses", "best")
        )
        draw_losses(losses, validation_losses).savefig(directory / "loss.png")
        table = Table("steps", "first loss", "last loss", f"best validation {self.best_by}")
        text = f"{best['value']:.4g} (step {best['step']})" if best["step"] else "-"
        table.add_row(str(step), f"{losses[0]:.4g}", f"{losses[-1]:.4g}", text)
        Console().print(table)
        print(f"Loss curve: {directory / 'loss.png'}")

    def close(self) -> None:
        """Close the log."""
        if self.logger:
            self.logger.close()

    def _peak_memory(self) -> int:
        """The most bytes used so far: of the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
