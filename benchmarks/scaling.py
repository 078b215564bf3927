"""The time of a step on 8 to 1,024 H100, computed: which term grows, and what mesh to choose.

Run as ``python -m benchmarks.scaling``, some minutes without a GPU. It prints the tables of
docs/scaling.md and draws docs/pictures/scaling.png; how they are computed is in
:mod:`benchmarks.step_time`. At its end it measures, on the machine that it runs on, what a data
worker takes for a row.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.packing import sizes
from benchmarks.step_time import (
    DOCUMENTS,
    IMAGE_GRID,
    MEMORY_BYTES,
    PEAK_FLOPS,
    PLANNER,
    TEXT_TOKENS,
    TITLES,
    USED_SHARE_OF_PEAK,
    VIDEO_TOKENS,
    Group,
    Imbalance,
    Mesh,
    Model,
    Row,
    Stage,
    Times,
    gather_seconds,
    plan_of,
    row_of_a_video,
    row_of_images,
    small_all_reduce_seconds,
    stages_seconds,
    step_times,
)
from torchtune_vl.data import TrainingRows
from torchtune_vl.data._plan import ENTRY

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "scaling.png"
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
POWERS = tuple(2**i for i in range(11))
FIXED_ROWS = 128
SHORTER_DOCUMENTS = (1, 2, 4, 8, 16)  # of a row
SOME = 64  # devices to shard over
SIZES = ("7b", "72b")
# Meshes to show beside each other: replicate, shard, context, tensor
SEVERAL = {
    "7b": [(1, 1024), (16, 64), (128, 8), (64, 8, 2), (64, 8, 1, 2), (64, 4, 1, 4)],
    "72b": [(1, 64), (1, 32, 2), (1, 8, 8), (1, 32, 1, 2), (1, 16, 1, 4), (1, 8, 1, 8)],
}
STATE_BYTES = 16  # of each parameter: weights, gradients and AdamW in float32
NEARLY = 0.98  # of the speed of the fastest mesh


@dataclass(frozen=True)
class Case:
    """Rows of a step for a number of devices; ``imbalance`` is None for rows that are all alike."""

    model: Model
    row: Row
    imbalance: Imbalance | None = None

    def meshes(self, devices: int, rows: int) -> Iterator[Mesh]:
        """All that divide the heads and the rows of a step."""
        for tensor in (n for n in POWERS[:4] if self.model.divisible_by % n == 0):
            for context in POWERS[:5]:
                for shard in POWERS:
                    replicate, rest = divmod(devices, tensor * context * shard)
                    mesh = Mesh(replicate, shard, context, tensor)
                    if replicate and not rest and rows % mesh.data == 0:
                        yield mesh

    def fits(self, mesh: Mesh, rows: int) -> bool:
        """Whether a device has the memory for a step of so many rows."""
        states = STATE_BYTES * self.model.parameters_on(mesh)
        # That is the least that it can be, and takes no time to compute
        return states <= MEMORY_BYTES and self.memory_bytes(mesh, rows) <= MEMORY_BYTES

    def memory_bytes(self, mesh: Mesh, rows: int) -> int:
        """What a step of so many rows takes on each device."""
        return self.model.memory_bytes(self.row, mesh, rows)

    def times(self, mesh: Mesh, rows: int) -> Times:
        """Time of a step of so many rows."""
        ratio = self.imbalance.ratio(rows, mesh.data) if self.imbalance else 1.0
        return step_times(self.model, self.row, mesh, rows, ratio)

    def best(self, devices: int, rows: int) -> Mesh | None:
        """The mesh to choose: of those nearly as fast as the fastest, the simplest.

        What it costs to share a row is computed less exactly than the rest: it has to be worth it.
        """
        seconds = {mesh: self.times(mesh, rows).total for mesh in self.meshes(devices, rows)}
        ordered = sorted(seconds, key=lambda mesh: seconds[mesh])
        fastest = next((mesh for mesh in ordered if self.fits(mesh, rows)), None)
        if fastest is None:
            return None
        near = [mesh for mesh in ordered if seconds[mesh] * NEARLY <= seconds[fastest]]
        near.sort(key=lambda mesh: mesh.context * mesh.tensor)  # then by seconds
        return next(mesh for mesh in near if self.fits(mesh, rows))


@dataclass(frozen=True)
class Line:
    """A line of a table: a step on so many devices."""

    mesh: Mesh
    rows: int
    memory_bytes: int
    times: Times

    @property
    def device_seconds(self) -> float:
        """Of a row."""
        return self.times.total * math.prod(self.mesh) / self.rows


def line_of(case: Case, mesh: Mesh, rows: int) -> Line:
    """Compute a line."""
    return Line(mesh, rows, case.memory_bytes(mesh, rows), case.times(mesh, rows))


def best(case: Case, rows_of: Iterable[tuple[int, int]]) -> list[Line]:
    """The mesh to choose for each number of devices and rows."""
    found = [(case.best(devices, rows), rows) for devices, rows in rows_of]
    return [line_of(case, mesh, rows) for mesh, rows in found if mesh]


@cache
def case_of_images(size: str) -> Case:
    """Rows of images, which differ as random samples do."""
    model = Model(size)
    return Case(model, row_of_images(), Imbalance(model))


def sharded(size: str) -> list[Line]:
    """A row for each device, and weights sharded over all, where they fit."""
    case = case_of_images(size)
    meshes = [Mesh(shard=devices) for devices in COUNTS]
    return [
        line_of(case, mesh, math.prod(mesh)) for mesh in meshes if case.fits(mesh, math.prod(mesh))
    ]


def growing(size: str) -> list[Line]:
    """A row for each device, on the best mesh."""
    return best(case_of_images(size), zip(COUNTS, COUNTS, strict=True))


def fixed(size: str) -> list[Line]:
    """The same number of rows on any number of devices, on the best mesh."""
    return best(case_of_images(size), ((devices, FIXED_ROWS) for devices in COUNTS))


def videos(size: str) -> list[Line]:
    """A long video for each node, on the best mesh."""
    case = Case(case_of_images(size).model, row_of_a_video())
    return best(case, ((devices, devices // 8) for devices in COUNTS))


def several(size: str) -> list[Line]:
    """Several meshes of as many devices, a row for each."""
    case = case_of_images(size)
    meshes = [Mesh(*shape) for shape in SEVERAL[size]]
    return [line_of(case, mesh, math.prod(mesh)) for mesh in meshes]


TABLES = {
    "a row for each device, sharded over all": sharded,
    "a row for each device, the best mesh": growing,
    f"{FIXED_ROWS} rows a step, the best mesh": fixed,
    f"a video of {VIDEO_TOKENS:,} tokens for 8 devices, the best mesh": videos,
    "a row for each device, several meshes": several,
}


def table(lines: Sequence[Line]) -> str:
    """Markdown of lines, with the terms that any of them has."""
    used = [n for n in TITLES if any(getattr(line.times, n) >= 5e-4 for line in lines)]
    titles = ["devices", "mesh", "GB", "step, s", *(TITLES[n] for n in used), "efficiency"]
    text = []
    for line in lines:
        cells = [f"{math.prod(line.mesh):,}", str(line.mesh), f"{line.memory_bytes / 1e9:.0f}"]
        cells += [f"{line.times.total:.2f}"]
        cells += [f"{getattr(line.times, n):.3f}" for n in used]
        text.append([*cells, f"{lines[0].device_seconds / line.device_seconds:.0%}"])
    return markdown(titles, text)


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Make a table of cells."""
    head, *rest = (f"| {' | '.join(cells)} |" for cells in (titles, *lines))
    return "\n".join([head, "|" + "---|" * len(titles), *rest])


def exposed(size: str, mesh: Mesh, documents: int) -> float:
    """What FSDP adds to computing rows of so many documents, one for each device."""
    times = step_times(case_of_images(size).model, row_of_images(documents), mesh, math.prod(mesh))
    return (times.shard + times.replicate) / (times.compute + times.recompute)


def shorter_rows(size: str) -> str:
    """Markdown of what FSDP adds to shorter rows, sharded over all devices and over some."""
    meshes = Mesh(shard=COUNTS[-1]), Mesh(replicate=COUNTS[-1] // SOME, shard=SOME)
    lines = [
        [f"{row_of_images(n).tokens:,}", *(f"{exposed(size, mesh, n):.0%}" for mesh in meshes)]
        for n in SHORTER_DOCUMENTS
    ]
    return markdown(["tokens of a row", *(f"exposed, {mesh}" for mesh in meshes)], lines)


def also_growing() -> str:
    """Markdown of what is in no row: sums of numbers, saves, and the plan."""
    models = [case_of_images(size).model for size in SIZES]
    titles = [
        "devices",
        "a sum of all, ms",
        *(f"save of a device, {size.upper()}, GB" for size in SIZES),
    ]
    lines = []
    for devices in (COUNTS[0], COUNTS[4], COUNTS[-1]):
        seconds = small_all_reduce_seconds(Group.of(devices, 1))
        # Weights and AdamW in float32, each once
        saves = [f"{12 * model.parameters / devices / 1e9:.2f}" for model in models]
        entries = devices * DOCUMENTS * ENTRY.itemsize
        lines.append([f"{devices:,}", f"{1e3 * seconds:.3f}", *saves, f"{entries / 1e3:.0f}"])
    return markdown([*titles, "plan of a step, kB"], lines)


def seconds_of_llama(layers: int, parameters: int, tokens: int, devices: int) -> float:
    """Forward and backward of a decoder's layers, sharded over all devices, none recomputed."""
    group = Group.of(devices, 1)
    compute = 6 * parameters * tokens / (USED_SHARE_OF_PEAK * PEAK_FLOPS)
    moved = (gather_seconds(group, size * parameters) for size in (2, 4))
    return stages_seconds([Stage(compute / 3, compute * 2 / 3, *moved)] * layers, True)


def published() -> str:
    """Markdown of what formulas give beside what others measured."""
    node, lines = Group.of(8, 1), []
    for size, theirs in ((2**27, 0.377e-3), (2**30, 2.689e-3), (2**33, 20.754e-3)):
        what = f"reduce-scatter of {size / 1e9:.2f} GB on 8 H100, ms"
        ours = gather_seconds(node, size)
        lines.append([what, "NCCL 1047", f"{1e3 * theirs:.2f}", f"{1e3 * ours:.2f}"])
    for name, source, few, many, shape, ratio in (
        ("Llama-2 7B", "arXiv 2411.13055", 128, 2048, (32, 202_383_360, 8192), 1 - 0.3722),
        ("Llama 3.1 8B", "torchtitan", 8, 128, (32, 218_112_000, 16_384), 6514 / 6667),
    ):
        ours = seconds_of_llama(*shape, few) / seconds_of_llama(*shape, many)
        what = f"{name}, FSDP: throughput of a device of {many:,} / of {few:,}"
        lines.append([what, source, f"{ratio:.0%}", f"{ours:.0%}"])
    return markdown(["what", "source", "published", "computed"], lines)


def draw() -> Figure:
    """Draw what a step takes beyond computing, and how it grows, for both models."""
    figure = Figure(figsize=(11, 11), dpi=110, layout="constrained")
    axes = figure.subplots(3, 2, sharey="row")
    for column, size in enumerate(SIZES):
        _draw_terms(axes[0, column], size)
        _draw_exposed(axes[1, column], size)
        _draw_efficiency(axes[2, column], size)
        for each in axes[:, column]:
            each.set_xticks(range(len(COUNTS)), [f"{n:,}" for n in COUNTS])
            each.set_xlim(-0.6, len(COUNTS) - 0.4)
            each.grid(alpha=0.3)
            each.set_axisbelow(True)
        axes[2, column].set_xlabel("H100")
    axes[0, 0].set_ylabel("% of computing, computed")
    axes[1, 0].set_ylabel("% of computing, computed")
    axes[2, 0].set_ylabel("%, computed")
    return figure


def _draw_terms(axes: Any, size: str) -> None:
    for lines, shift, hatch in ((sharded(size), -0.2, ""), (growing(size), 0.2, "///")):
        places = [COUNTS.index(math.prod(line.mesh)) + shift for line in lines]
        bottom = np.zeros(len(lines))
        for number, term in enumerate(("waiting", "shard", "replicate", "context", "optimizer")):
            seconds = [(line.times.compute + line.times.recompute, line.times) for line in lines]
            heights = [100 * getattr(times, term) / computing for computing, times in seconds]
            how = {"color": f"C{number}", "hatch": hatch, "edgecolor": "white", "linewidth": 0.0}
            axes.bar(places, heights, 0.38, bottom, label="" if hatch else TITLES[term], **how)
            bottom += heights
    axes.set(title=f"{size.upper()}: left sharded over all, right the best mesh")
    axes.legend(loc="upper left", ncols=2, fontsize="small")
    axes.set_ylim(0, 18)


def _draw_exposed(axes: Any, size: str) -> None:
    for color, documents in enumerate(SHORTER_DOCUMENTS[1:]):
        case = Case(case_of_images(size).model, row_of_images(documents))
        for most, style in ((COUNTS[-1], "o-"), (SOME, "x--")):
            shards = [min(devices, most) for devices in COUNTS]
            meshes = [Mesh(n // some, some) for n, some in zip(COUNTS, shards, strict=True)]
            # What fits some devices fits more
            least = next(n for n, mesh in enumerate(meshes) if case.fits(mesh, math.prod(mesh)))
            meshes = meshes[least:]
            places = [COUNTS.index(math.prod(mesh)) for mesh in meshes]
            shares = [100 * exposed(size, mesh, documents) for mesh in meshes]
            label = f"{case.row.tokens:,} tokens, over {'all' if style == 'o-' else most}"
            axes.plot(places, shares, style, color=f"C{color}", label=label)
    axes.set(title=f"{size.upper()}: exposed FSDP, by tokens of a row")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="upper left", ncols=2, fontsize="small")
    axes.set_ylim(0.1, 3000)


def _draw_efficiency(axes: Any, size: str) -> None:
    for (title, make), style in zip([*TABLES.items()][:3], ("o-", "s-", "^--"), strict=True):
        lines = make(size)
        places = [COUNTS.index(math.prod(line.mesh)) for line in lines]
        shares = [100 * lines[0].device_seconds / line.device_seconds for line in lines]
        axes.plot(places, shares, style, label=title)
    axes.set(title=f"{size.upper()}: throughput of a device, to that of the fewest")
    axes.set_ylim(60, 102)
    axes.legend(loc="lower left")


def measured_row_seconds(runs: int = 5) -> float:
    """Measure the processor time that a data worker takes for a row of images."""
    # Only here, for they import transformers
    from benchmarks.data_path import jpeg, one_core, prose, write_checkpoint
    from quickstart.checkpoint import CONFIG
    from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform

    with TemporaryDirectory() as directory, one_core():
        checkpoint = Path(directory, "checkpoint")
        write_checkpoint(checkpoint, CONFIG)
        transform = Qwen2_5_VLTransform.from_pretrained(checkpoint, patch_dtype="uint8")
        # Of another size than the grid's, as most images are: it is resized
        image = jpeg(*(14 * side + 5 for side in reversed(IMAGE_GRID[1:])))
        text = transform.decode(transform.encode(prose(), add_eos=False)[:TEXT_TOKENS])
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
        answer = {"role": "assistant", "content": text}
        messages = [{"role": "user", "content": content}, answer]
        seconds = []
        for _ in range(runs + 1):  # the first one compiles
            start = time.process_time()
            samples = [transform({"messages": messages}) for _ in range(DOCUMENTS)]
            for sample in samples:
                sample["labels"] = sample["tokens"]
            PLANNER.collate(samples)
            seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def measured_share_seconds(rows: int = COUNTS[-1]) -> float:
    """Measure the processor time that a worker takes to find its rows in a step of so many."""
    given = np.array(sizes(20 * rows), np.int32)
    with TemporaryDirectory() as directory:
        plan = plan_of(Path(directory), given, rows)
        own = TrainingRows(None, PLANNER, plan, world_size=rows)
        own._share(1)
        start = time.process_time()
        own._share(1)
        return time.process_time() - start


def main() -> None:
    """Compute, print, draw and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print("All computed, none measured. A mesh is replicate x shard x context x tensor.\n")
    for size in SIZES:
        for title, make in TABLES.items():
            print(f"{size.upper()}, {title}\n\n{table(make(size))}\n")
        print(f"{size.upper()}, a row for each of {COUNTS[-1]:,} devices\n\n{shorter_rows(size)}\n")
    print(f"{also_growing()}\n\n{published()}\n")
    draw().savefig(PICTURE)
    torch.set_num_threads(1)  # as a data worker
    row, share = measured_row_seconds(), measured_share_seconds()
    print(
        f"Measured, processor time of this machine: {row:.2f} s for a row of {DOCUMENTS} images, "
        f"and {1e3 * share:.0f} ms to find a device's rows in a step of {COUNTS[-1]:,}."
    )


if __name__ == "__main__":
    main()
