"""Memory of a training step on CUDA beside what `tune-vl estimate` computes, and what it waits for.

Run as ``python -m benchmarks.memory``, where torch sees a CUDA device, or a stand-in for its
runtime. It prints Markdown. Each case, in a process of its own, is the recipe with a shipped config
as the first of so many ranks, whose process group is torch's fake one, so that one device is
enough. The model gets weights of zeros, and takes steps of the largest row that the config allows.

Memory is what torch's allocator has given to tensors at its peak, and what it has reserved; it is
not that of the CUDA context, nor of communication. `sent` is what setup copies to the device,
beside what a rank keeps. Waits and copies to the host are those of a step; a wait for anything but
its loss ends the case with an error, except where the optimizer is on the host.
"""

import argparse
import io
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.optim.lr_scheduler import LambdaLR
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torchtune_vl import _torchtune as tune
from torchtune_vl._torchtune import instantiate
from torchtune_vl.data import Row, RowSharing, packed_collate_vision
from torchtune_vl.data._packing import Size
from torchtune_vl.files._together import Together
from torchtune_vl.media import Geometry
from torchtune_vl.modules import Segments
from torchtune_vl.modules.adapters import is_adapter, num_bytes
from torchtune_vl.modules.context import RowShare
from torchtune_vl.modules.layout import mrope_positions, vision_index
from torchtune_vl.recipes._check_config import read_config
from torchtune_vl.recipes.finetune import FinetuneRecipe
from torchtune_vl.training._memory import estimate_memory
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._metrics import Metrics
from torchtune_vl.training._sharding import local_part

STEPS = 3  # the first makes the optimizer's states
IMAGE_GRID = (1, 32, 32)  # patches along time, height and width: 448 x 448 px, 256 tokens
IMAGES_OF_DOCUMENT = 4
VIDEO_GRID = (384, 24, 50)  # 768 frames, an hour at one in 4.7 s: 115,200 tokens
TITLES = (
    *("case", "ranks", "tokens", "estimate, GB", "allocated", "ratio", "reserved"),
    *("sent / kept", "copied to the host, GB", "waits"),
)
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A line of the table: a method, a size, and what differs from the shipped config."""

    method: str
    size: str
    ranks: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)
    documents: tuple[tuple[Grid, ...], ...] = ((IMAGE_GRID,) * IMAGES_OF_DOCUMENT,) * 16
    family: str = "qwen2_5_vl"

    def __str__(self) -> str:
        name = "" if self.family == Case.family else f"{self.package.FAMILY.name} "
        parts = [f"{name}{self.size.upper()} {self.method}"]
        parts += [f"{key.rpartition('.')[2]} {value}" for key, value in self.changes.items()]
        return ", ".join(parts)

    @property
    def package(self) -> Any:
        """The package of its family."""
        return import_module(f"torchtune_vl.models.{self.family}")

    @property
    def tokens(self) -> int:
        """Tokens of its row, a quarter of its patches."""
        return sum(t * h * w for grids in self.documents for t, h, w in grids) // 4

    def config(self, directory: str) -> DictConfig:
        """Return its config, of a run in a directory."""
        settings = {"output_dir": directory, "checkpoint_dir": directory, "compile": False}
        settings |= {"rows.max_tokens": self.tokens, "rows.max_patches": 4 * self.tokens}
        given = [f"{key}={value}" for key, value in {**settings, **self.changes}.items()]
        config = read_config(["--config", f"{self.family}/{self.method}", *given])
        # Of a published size, without a checkpoint
        kind = "" if self.method == "full" else "lora_"
        config.model._component_ = f"{self.package.__name__}.{kind}{self.family}_{self.size}"
        for argument in ("checkpoint_dir", "weights"):
            del config.model[argument]
        data = Mesh.of(config.parallel, self.ranks).data
        config.rows_per_step = max(config.rows_per_step, data)
        return config


DOCUMENT = (IMAGE_GRID,) * IMAGES_OF_DOCUMENT
SHORT, VIDEO = (DOCUMENT,) * 4, ((VIDEO_GRID,),)
NONE, SELECTIVE = ({"activation_checkpointing": kind} for kind in ("none", "selective"))
FROZEN = {"model.encoder_trainable": False, "model.fusion_trainable": False}
METHODS, SIZES, RANKS = ("full", "lora", "qlora"), ("3b", "7b", "32b", "72b"), (1, 8, 64)
CASES = (
    *(Case(*choice) for choice in itertools.product(METHODS, SIZES, RANKS)),
    Case("full", "3b", 8, FROZEN),
    Case("full", "3b", 8, SELECTIVE, SHORT),
    Case("full", "3b", 8, NONE, SHORT),
    Case("full", "7b", 8, {"activation_offloading": True}, SHORT),
    Case("full", "7b", 64, {"parallel.cpu_offload": True}),
    Case("lora", "7b", 1, SELECTIVE, SHORT),
    Case("lora", "7b", 8, NONE, SHORT),
    Case("qlora", "7b", 1, NONE, SHORT),
    Case("full", "7b", 64, {"parallel.replicate": 8}),
    Case("full", "7b", 8, {"parallel.context": 2}),
    Case("full", "7b", 64, {"parallel.context": 8}),
    Case("full", "7b", 8, {"parallel.tensor": 2}),
    Case("full", "32b", 64, {"parallel.tensor": 8}),
    Case("lora", "32b", 8, {"parallel.tensor": 4}),
    Case("lora", "7b", 8, {"parallel.context": 2, "parallel.tensor": 2}),
    Case("full", "2b", family="qwen3_vl"),
    Case("full", "8b", 8, family="qwen3_vl"),
    Case("full", "8b", 8, {"parallel.context": 2}, family="qwen3_vl"),
    Case("lora", "8b", 1, NONE, SHORT, family="qwen3_vl"),
    Case("lora", "8b", 8, {"parallel.tensor": 2}, family="qwen3_vl"),
    Case("qlora", "8b", family="qwen3_vl"),
    Case("full", "7b", 8, {"parallel.context": 8, "tokenizer.max_seq_len": 128000}, VIDEO),
)


class MeasuredRecipe(FinetuneRecipe):
    """The recipe as the first of many ranks, set up for steps alone: without data and logs."""

    def _init_process_group(self) -> None:
        ranks = int(os.environ["WORLD_SIZE"])
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        self.together = Together()  # nobody would answer

    def setup(self) -> None:
        """Make what a step takes."""
        self.checkpointer = Zeros(self.cfg.model)
        self.model = self._make_model()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = instantiate(self.cfg.optimizer, self._parameter_groups())
        self.offloading = (
            tune.OffloadActivations() if self.cfg.activation_offloading else nullcontext()
        )
        self.step, self.had_media, self.rows, self.sources = 0, True, None, ["dataset"]
        self.seeing, self.newly_bad, self.sample_log = {}, [], io.StringIO()
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0)
        self.metrics = Metrics(None, self.flops, None, self.device, self.mesh, self.sources)

    def row(self, documents: Sequence[Sequence[Grid]]) -> Row:
        """Make a row of documents of media alone, each of whose tokens is a target, pinned."""
        geometry = self.model.encoders["vision"].geometry
        samples = [sample_of(grids, self.placeholder_ids[0], geometry) for grids in documents]
        batch = packed_collate_vision(samples)
        if self.row_group:
            batch = RowSharing(0, self.mesh.context, self.placeholder_ids)(batch)
        kinds = (torch.Tensor, Segments, RowShare)
        batch = tree_map_only(kinds, lambda x: x.pin_memory(), dict(batch))
        sizes = [Size(len(sample["tokens"]), 0, len(sample["tokens"]) - 1) for sample in samples]
        return Row(batch, [*range(len(sizes))], sizes, {}, True, [], [0] * len(sizes))


class Zeros:
    """A checkpointer whose weights are zeros on the host, all in the memory of the largest."""

    def __init__(self, model: DictConfig) -> None:
        with torch.device("meta"):
            built = instantiate(model)
        named = built.named_parameters()
        shapes = {name: p.shape for name, p in named if not is_adapter(name)}
        largest = max(shape.numel() for shape in shapes.values())
        # Memory that nobody has written to takes none
        zeros = torch.from_numpy(np.zeros(largest, np.int16)).view(torch.bfloat16)
        self.weights = {n: zeros[: shape.numel()].view(shape) for n, shape in shapes.items()}

    def load_checkpoint(self) -> dict[str, Any]:
        """Return the weights by our names."""
        return {tune.MODEL_KEY: self.weights}


def sample_of(grids: Sequence[Grid], placeholder_id: int, geometry: Geometry) -> dict[str, Any]:
    """Make a sample of media alone, with blank frames."""
    grid_thw = torch.tensor(grids)
    patches = int(grid_thw.prod(1).sum())
    tokens = [placeholder_id] * (patches // 4)
    intervals = [1.0] * len(grids)
    positions = mrope_positions(
        tokens, grid_thw, intervals, placeholder_ids=[placeholder_id], merge_size=2
    )
    frames = 1 if all(t == 1 for t, _, _ in grids) else 2
    values = frames * geometry.values_per_patch // geometry.temporal_patch_size
    vision = {"patches": torch.zeros(patches, values, dtype=torch.uint8), "grid_thw": grid_thw}
    vision |= vision_index(grid_thw, geometry)
    return {
        "tokens": tokens,
        "labels": tokens,
        "input_pos": positions,
        "encoder_input": {"vision": vision},
    }


class Copies(TorchDispatchMode):
    """Counts bytes that go from the host to the device, and from there to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._count(args[1], args[0])
        elif func is torch.ops.aten._to_copy.default:
            self._count(args[0], out)
        return out

    def _count(self, source: torch.Tensor, copy: torch.Tensor) -> None:
        self.sent += copy.nbytes * (copy.is_cuda and source.device.type == "cpu")
        self.received += copy.nbytes * (source.is_cuda and copy.device.type == "cpu")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose title has this")
    only = parser.parse_args().only
    print(markdown(TITLES), markdown(["---"] * len(TITLES)), sep="\n")
    for case in CASES:
        if only in str(case):
            print(line_of(case, apart(case)), flush=True)


def apart(case: Case) -> dict[str, Any]:
    """Measure in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, case).result()


def markdown(cells: Sequence[str]) -> str:
    """Make a line of a table."""
    return f"| {' | '.join(cells)} |"


def line_of(case: Case, found: Mapping[str, Any]) -> str:
    """Make a line of the table."""
    gb = {name: f"{found[name] / 1e9:.1f}" for name in ("estimate", "allocated", "reserved")}
    ratio = found["estimate"] / found["allocated"]
    sent = f"{found['sent'] / found['kept']:.2f}" if found["kept"] else "-"
    cells = [str(case), str(case.ranks), f"{case.tokens:,}", gb["estimate"], gb["allocated"]]
    cells += [f"{ratio:.3f}", gb["reserved"], sent, f"{found['received'] / 1e9:.1f}"]
    return markdown([*cells, "-" if found["waits"] is None else str(found["waits"])])


def measured(case: Case) -> dict[str, Any]:
    """Return bytes, and the waits of a step, None where they are not counted."""
    os.environ["WORLD_SIZE"] = str(case.ranks)
    with TemporaryDirectory() as directory:
        config = case.config(directory)
        recipe = MeasuredRecipe(config)
        with Copies() as setup:
            recipe.setup()
        kept = sum(map(num_bytes, map(local, recipe.model.parameters())))
        rows = [recipe.row(case.documents)] * min(2, config.rows_per_step // recipe.data_ranks)
        config.rows_per_step = len(rows) * recipe.data_ranks
        for _ in range(STEPS - 1):
            recipe._train_step(iter(rows))
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        # An optimizer on the host waits for its gradients
        watched = nullcontext() if config.parallel.cpu_offload else waiting_once()
        with Copies() as step, watched as waits:
            recipe._train_step(iter(rows))
    meshes = recipe.devices, recipe.expert_devices
    estimate = sum(estimate_memory(config, case.ranks, *meshes).values())
    return {
        "estimate": estimate,
        "allocated": peak,
        "reserved": reserved,
        "sent": setup.sent,
        "kept": kept,
        "received": step.received,
        "waits": None if waits is None else len(waits),
    }


def local(parameter: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter that is on the device of this rank, empty if none is."""
    part = parameter.data
    part = local_part(part)
    return part if part.is_cuda else part[:0]


@contextmanager
def waiting_once() -> Iterator[list[int]]:
    """Refuse all that waits for the device but for ``tolist``, and count that."""
    waits: list[int] = []
    tolist = torch.Tensor.tolist

    def wait(tensor: torch.Tensor) -> Any:
        if not tensor.is_cuda:
            return tolist(tensor)
        waits.append(tensor.numel())
        torch.cuda.set_sync_debug_mode("default")
        try:
            return tolist(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    torch.cuda.set_sync_debug_mode("error")
    with patch.object(torch.Tensor, "tolist", wait):
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    main()
