"""The time of a training step on a mesh of H100, and the memory of a device, computed.

:mod:`benchmarks.scaling` makes tables of it. Operations, parameters and activations are counted on
the models themselves, the waiting for the slowest device is that of planned random samples. Speeds
of devices and links are published ones, with their source beside each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.packing import sizes
from torchtune_vl.data import PackedRows, Plan
from torchtune_vl.data._packing import PATCH_WORK
from torchtune_vl.models import qwen2_5_vl
from torchtune_vl.modules import encoder_index, vision_index
from torchtune_vl.recipes import config_path
from torchtune_vl.training._flops import FlopCounter, peak_flops
from torchtune_vl.training._memory import estimate_memory
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._sharding import gathered_together

# Of the device: NVIDIA's data sheet of the H100 SXM. The share of the peak is assumed
PEAK_FLOPS = peak_flops("NVIDIA H100 80GB HBM3") or 0.0
USED_SHARE_OF_PEAK = 0.5
MEMORY_BYTES_PER_SECOND = 0.8 * 3.35e12
MEMORY_BYTES = 80e9  # of 85.5e9: the rest is for the CUDA context, NCCL's buffers and fragments
DEVICES_OF_A_NODE = 8

# What a ring moves, nccl-tests' busbw, by the number of nodes with all of their devices and network
# cards: on one node 362e9 (NVIDIA/nccl issue 1047; NVLink has 450e9), on more issue 1229
RING_NODES = (1, 4, 8, 16, 32, 64, 128)
RING_BYTES_PER_SECOND = (362e9, 360e9, 345e9, 320e9, 300e9, 280e9, 260e9)
TREE_SHARE = 0.92  # of a ring, as all numbers below from src/graph/tuning.cc of NCCL (b647562)
# Seconds of a collective, and of each of its hops over NVLink and over the network
RING_START, RING_NVLINK_HOP, RING_NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6
TREE_NVLINK_HOP, TREE_NETWORK_HOP = 28e-6, 28e-6
# Of a number or two (protocol LL)
SMALL_START, SMALL_NVLINK_HOP, SMALL_NETWORK_HOP = 6.8e-6, 0.6e-6, 5e-6
# Of a step: targets, loss, norm of the gradients (`_train_step` of the recipe)
SMALL_ALL_REDUCES = 3
# Read and written for each parameter: norm 4, clipping 8, AdamW 16 and 12
OPTIMIZER_BYTES = 40

IMAGE_GRID = (1, 50, 56)  # patches along time, height and width: 784 x 700 px, 700 tokens
FRAME_PATCHES = 2800
DOCUMENT_TOKENS, DOCUMENTS = 1024, 16
TEXT_TOKENS = DOCUMENT_TOKENS - FRAME_PATCHES // 4
VIDEO_STEPS, VIDEO_TOKENS = 160, 115_000
# Of the simulation of waiting
PLANNER = PackedRows(max_tokens=16_384, max_patches=65_536)
DRAWN_SAMPLES, SIMULATED_SAMPLES = 4_000, 100_000


@dataclass(frozen=True)
class Group:
    """Devices that communicate: so many on each of so many nodes."""

    on_node: int
    nodes: int

    @classmethod
    def of(cls, size: int, stride: int) -> "Group":
        """Make one of every ``stride``-th device."""
        on_node = min(size, max(1, DEVICES_OF_A_NODE // stride))
        return cls(on_node, size // on_node)

    @property
    def size(self) -> int:
        """How many devices it has."""
        return self.on_node * self.nodes

    @property
    def bytes_per_second(self) -> float:
        """What a ring moves: on one node by NVLink, on more by the network cards of its devices."""
        whole = float(np.interp(math.log2(self.nodes), np.log2(RING_NODES), RING_BYTES_PER_SECOND))
        return whole if self.nodes == 1 else whole * self.on_node / DEVICES_OF_A_NODE


def gather_seconds(group: Group, size_bytes: float) -> float:
    """All-gather to, or reduce-scatter of, so many bytes by a ring."""
    if group.size == 1 or not size_bytes:
        return 0.0
    network_hops = group.nodes - 1
    nvlink_hops = group.size - 1 - network_hops
    hops = RING_START + nvlink_hops * RING_NVLINK_HOP + network_hops * RING_NETWORK_HOP
    return hops + size_bytes * (group.size - 1) / group.size / group.bytes_per_second


def all_reduce_seconds(group: Group, size_bytes: float) -> float:
    """All-reduce by a ring, which scatters and gathers, or by a tree, whichever is faster."""
    if group.size == 1 or not size_bytes:
        return 0.0
    ring = 2 * gather_seconds(group, size_bytes) - RING_START
    on_node, between = (group.on_node - 1), math.ceil(math.log2(group.nodes))
    hops = 2 * (on_node * TREE_NVLINK_HOP + between * TREE_NETWORK_HOP)
    return min(ring, hops + 2 * size_bytes / (TREE_SHARE * group.bytes_per_second))


def small_all_reduce_seconds(group: Group) -> float:
    """All-reduce of a number by a tree."""
    on_node, between = (group.on_node - 1), math.ceil(math.log2(group.nodes))
    hops = 2 * (on_node * SMALL_NVLINK_HOP + between * SMALL_NETWORK_HOP)
    return SMALL_START + hops if group.size > 1 else 0.0


def exchange_seconds(group: Group, size_bytes: float) -> float:
    """All-to-all of so many bytes of each device: what leaves a node goes by its own card."""
    if group.size == 1:
        return 0.0
    leaving = (group.nodes - 1) / group.nodes
    speed = group.bytes_per_second / (group.on_node if group.nodes > 1 else 1)
    part = leaving if group.nodes > 1 else (group.size - 1) / group.size
    hop = RING_NETWORK_HOP if group.nodes > 1 else RING_NVLINK_HOP
    return RING_START + (group.size - 1) * hop + size_bytes * part / speed


@dataclass(frozen=True)
class Row:
    """What one forward and backward takes."""

    documents: tuple[int, ...]
    media: Any
    patches: int
    targets: int

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.documents)


def row_of_images(documents: int = DOCUMENTS) -> Row:
    """A packed row of conversations with an image each; half of the text is supervised."""
    grids = torch.tensor([IMAGE_GRID] * documents)
    media = encoder_index(vision_index(grids, qwen2_5_vl.GEOMETRY))
    targets = documents * (TEXT_TOKENS // 2)
    return Row((DOCUMENT_TOKENS,) * documents, media, documents * FRAME_PATCHES, targets)


def row_of_a_video() -> Row:
    """One conversation about a video."""
    grid = torch.tensor([(VIDEO_STEPS, *IMAGE_GRID[1:])])
    media = encoder_index(vision_index(grid, qwen2_5_vl.GEOMETRY))
    text = VIDEO_TOKENS - VIDEO_STEPS * FRAME_PATCHES // 4
    return Row((VIDEO_TOKENS,), media, VIDEO_STEPS * FRAME_PATCHES, text // 2)


class Model:
    """A model of published size, on the meta device: what it computes, moves and keeps."""

    def __init__(self, size: str) -> None:
        self.config = OmegaConf.load(config_path("qwen2_5_vl/full"))
        self.config.model = {"_component_": f"{qwen2_5_vl.__name__}.qwen2_5_vl_{size}"}
        with torch.device("meta"):
            self.module = getattr(qwen2_5_vl, f"qwen2_5_vl_{size}")()
        self.flops = FlopCounter(self.module)
        decoder, encoder = self.module.decoder, self.module.encoders["vision"]
        attn = decoder.layers[0].attn
        self.width = decoder.tok_embeddings.embedding_dim
        self.vocabulary = decoder.tok_embeddings.num_embeddings
        self.key_value_width = attn.k_proj.weight.shape[0] + attn.v_proj.weight.shape[0]
        heads = (x.weight.shape[0] // attn.head_dim for x in (attn.q_proj, attn.k_proj))
        self.divisible_by = math.gcd(*heads)
        self.layers, self.layer_parameters = len(decoder.layers), parameters_of(decoder.layers[0])
        self.parameters = parameters_of(self.module)
        self.output_parameters = parameters_of(decoder.output)
        self.embedding_parameters = parameters_of(decoder.tok_embeddings)
        within = {*encoder.modules()}
        groups = [group for group in gathered_together(self.module) if group[0] in within]
        # Of each group of the encoder: its parameters, and its share of the layers
        self.encoder_groups = [
            (
                sum(map(parameters_of, group)),
                len([m for m in group if m in encoder.layers]) / len(encoder.layers),
            )
            for group in groups
        ]

    def parameters_on(self, mesh: Mesh) -> float:
        """Parameters that each device keeps."""
        divided = self.layers * self.layer_parameters + self.output_parameters
        return (self.parameters - divided + divided / mesh.tensor) / mesh.shards

    def memory_bytes(self, row: Row, mesh: Mesh, rows: int) -> int:
        """What a step of so many rows takes on each device at its peak, by `tune-vl estimate`."""
        turns = min(2, rows // mesh.data)  # gradients of more rows are summed
        # Copies take nothing
        return self._memory(row.tokens, row.patches, mesh._replace(replicate=1), turns)

    @cache  # noqa: B019 (models are few, and live as long as the process)
    def _memory(self, tokens: int, patches: int, mesh: Mesh, turns: int) -> int:
        settings = {
            "rows.max_tokens": tokens,
            "rows.max_patches": patches,
            "rows_per_step": turns * mesh.data,
            "parallel.context": mesh.context,
            "parallel.tensor": mesh.tensor,
        }
        config = self.config.copy()
        for key, value in settings.items():
            OmegaConf.update(config, key, value)
        return sum(estimate_memory(config, math.prod(mesh)).values())


def parameters_of(module: torch.nn.Module) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Stage:
    """What FSDP gathers at once, as a layer: what it computes, and what is moved for it."""

    forward_seconds: float
    backward_seconds: float
    gather_seconds: float = 0.0
    scatter_seconds: float = 0.0
    all_reduce_seconds: float = 0.0
    is_gathered_again: bool = field(default=True, kw_only=True)  # for backward


def stages_seconds(stages: Sequence[Stage], shares_links: bool) -> float:
    """Forward and backward of layers in turn, with what FSDP moves meanwhile.

    While a layer computes, the weights of the next are gathered, and in backward the gradients of
    the one before are reduced too: it takes as long as the longer of both. Nothing runs beside the
    first gather of forward and of backward, and the last reduction. Gathers and reductions of a
    group come in turn; sums over copies (HSDP) run beside these, or after them if they share the
    links.
    """

    def moving(gathered: Stage, reduced: Stage) -> float:
        again = gathered.gather_seconds if gathered.is_gathered_again else 0.0
        both = (again + reduced.scatter_seconds, reduced.all_reduce_seconds)
        return sum(both) if shares_links else max(both)

    none = Stage(0.0, 0.0)
    before, behind = [none, *stages[:-1]], [*stages[1:], none]
    seconds = stages[0].gather_seconds + stages[-1].gather_seconds + moving(none, stages[0])
    for stage, earlier, later in zip(stages, before, behind, strict=True):
        seconds += max(stage.forward_seconds, later.gather_seconds)
        seconds += max(stage.backward_seconds, moving(earlier, later))
    return seconds


@dataclass(frozen=True)
class Times:
    """Seconds of a step, by what takes them."""

    compute: float = field(metadata={"title": "compute"})
    recompute: float = field(metadata={"title": "recomputing"})
    waiting: float = field(metadata={"title": "waiting for the slowest"})
    shard: float = field(metadata={"title": "FSDP, exposed"})
    replicate: float = field(metadata={"title": "copies, exposed"})
    context: float = field(metadata={"title": "context"})
    tensor: float = field(metadata={"title": "tensor"})
    optimizer: float = field(metadata={"title": "optimizer and norm"})

    @property
    def total(self) -> float:
        """Seconds of all."""
        return sum(getattr(self, f.name) for f in fields(self))


TITLES = {f.name: f.metadata["title"] for f in fields(Times)}


def step_times(model: Model, row: Row, mesh: Mesh, rows: int, imbalance: float = 1.0) -> Times:
    """Time of a step of so many rows over all devices.

    ``imbalance`` is how much longer the slowest of devices computes than they do on average.
    """
    encoder, decoder, output = compute_seconds(model, row, mesh)
    fsdp = Group.of(mesh.shards, mesh.tensor)
    copies = Group.of(mesh.replicate, mesh.tensor * mesh.shards)
    layer_exchange, logits_exchange = tensor_seconds(model, row, mesh)
    keys, embeddings = context_seconds(model, row, mesh)

    def stage(compute: float, exchange: float, parameters: float) -> Stage:
        # Backward is twice the work of a forward, and makes that anew before
        return Stage(
            forward_seconds=compute / 3 + exchange,
            backward_seconds=compute + 2 * exchange,
            gather_seconds=gather_seconds(fsdp, 2 * parameters),
            scatter_seconds=gather_seconds(fsdp, 4 * parameters),
            all_reduce_seconds=all_reduce_seconds(copies, 4 * parameters / mesh.shards),
        )

    layer_parameters = model.layer_parameters / mesh.tensor
    layer = stage(decoder / model.layers, layer_exchange + keys, layer_parameters)
    stages = [
        # Backward of the embedding takes no weights
        replace(stage(0.0, 0.0, model.embedding_parameters), is_gathered_again=False),
        *(stage(encoder * share, 0.0, parameters) for parameters, share in model.encoder_groups),
        *([layer] * model.layers),
        stage(output, logits_exchange, model.output_parameters / mesh.tensor),
    ]
    working = sum(s.forward_seconds + s.backward_seconds for s in stages)
    shares_links = fsdp.nodes > 1
    without_copies = [replace(s, all_reduce_seconds=0.0) for s in stages]
    sharded = stages_seconds(without_copies, shares_links)
    copied = stages_seconds(stages, shares_links)
    turns = rows / mesh.data
    compute = turns * (encoder + decoder + output)
    return Times(
        compute=compute,
        recompute=compute / 3,
        waiting=(imbalance - 1) * compute * 4 / 3,
        shard=turns * (sharded - working),
        replicate=turns * (copied - sharded),
        context=turns * (3 * model.layers * keys + 2 * embeddings),
        tensor=turns * 3 * (model.layers * layer_exchange + logits_exchange),
        optimizer=optimizer_seconds(model, mesh),
    )


def compute_seconds(model: Model, row: Row, mesh: Mesh) -> tuple[float, float, float]:
    """Forward and backward of encoder, decoder layers and output layer on each device.

    Frames and tokens are divided by `context`, layers of the decoder alone by `tensor`.
    """
    speed = USED_SHARE_OF_PEAK * PEAK_FLOPS * mesh.context
    encoder = model.flops.step([], row.media, 0) / speed
    decoder = model.flops.step(row.documents, None, 0) / (speed * mesh.tensor)
    return encoder, decoder, model.flops.step([], None, row.targets) / (speed * mesh.tensor)


def tensor_seconds(model: Model, row: Row, mesh: Mesh) -> tuple[float, float]:
    """What a layer, and the output layer, exchange between devices that share them, in a forward.

    A layer gathers the tokens and scatters their sums, at attention and at feed-forward; the output
    layer gathers logits.
    """
    group = Group.of(mesh.tensor, 1)
    tokens = 2 * model.width * row.tokens / mesh.context
    logits = 2 * model.vocabulary * row.targets / mesh.context
    return 4 * gather_seconds(group, tokens), gather_seconds(group, logits)


def context_seconds(model: Model, row: Row, mesh: Mesh) -> tuple[float, float]:
    """Gathering keys and values of a layer, and exchanging the embeddings of media."""
    group = Group.of(mesh.context, mesh.tensor)
    keys = 2 * model.key_value_width * row.tokens / mesh.tensor
    embeddings = 2 * model.width * row.patches / 4 / mesh.context
    return gather_seconds(group, keys), exchange_seconds(group, embeddings)


def optimizer_seconds(model: Model, mesh: Mesh) -> float:
    """Clipping, the optimizer, and numbers that all devices sum."""
    moved = OPTIMIZER_BYTES * model.parameters_on(mesh) / MEMORY_BYTES_PER_SECOND
    return moved + SMALL_ALL_REDUCES * small_all_reduce_seconds(Group.of(math.prod(mesh), 1))


class Imbalance:
    """How long devices wait for the slowest, from plans of random samples."""

    def __init__(self, model: Model) -> None:
        given = sizes(DRAWN_SAMPLES)
        self.sizes = np.array(given, np.int32)
        # Operations of each sample
        self.encoder = np.array([model.flops.step([], media_of(s.patches), 0) for s in given])
        self.decoder = np.array([model.flops.step([s.tokens], None, s.targets) for s in given])

    @cache  # noqa: B019 (as above)
    def ratio(self, rows: int, rows_at_once: int) -> float:
        """The time of steps of so many rows, over what it would be if all rows were equal.

        Devices gather the same weights, layer by layer, and so wait for the slowest in each turn,
        in the encoder as in the decoder. Heavy rows come in the same turn: `TrainingRows` gives
        each device its heaviest row first.
        """
        encoder, decoder, work = self._planned(rows)
        order = np.argsort(-work, axis=1)
        encoder, decoder = (
            np.take_along_axis(x, order, axis=1).reshape(-1, rows_at_once)
            for x in (encoder, decoder)
        )
        slowest = encoder.max(axis=1) + decoder.max(axis=1)
        return float(slowest.sum() / (encoder + decoder).mean(axis=1).sum())

    @cache  # noqa: B019 (as above)
    def _planned(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Operations of rows in encoder and decoder, and the planner's work, each [steps, rows]."""
        drawn = np.random.default_rng(0).integers(0, len(self.sizes), SIMULATED_SAMPLES)
        with TemporaryDirectory() as directory:
            plan = plan_of(Path(directory), self.sizes[drawn], rows)
            # Without the last step, whose rows are not full
            ends = plan.ends[: (plan.last_step - 1) * rows + 1].copy()
            entries = plan.entries[: ends[-1]].copy()
        samples = drawn[entries["sample"]]
        planned = entries["tokens"] + PATCH_WORK * entries["patches"]  # as `PackedRows.work`
        encoder, decoder, work = (
            np.add.reduceat(x, ends[:-1]).astype(float).reshape(-1, rows)
            for x in (self.encoder[samples], self.decoder[samples], planned)
        )
        return encoder, decoder, work


def plan_of(directory: Path, sizes: np.ndarray, rows: int) -> Plan:
    """Plan an epoch in steps of so many rows."""
    return Plan.make(directory, PLANNER, sizes, rows_per_step=rows, epochs=1)


def media_of(patches: int) -> dict[str, list[list[int]]]:
    """So many patches in frames of one size and windows of 64, as ``FlopCounter`` takes them."""
    whole, rest = divmod(patches, FRAME_PATCHES)
    windows, last = divmod(patches, 64)
    return {"frames": [[FRAME_PATCHES] * whole, [rest]], "windows": [[64] * windows, [last]]}
