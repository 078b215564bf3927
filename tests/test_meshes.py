"""Devices that share weights, rows and layers compute what one computes."""

import torchtune_vl._torchao  # noqa: F401 # isort: skip (before torchtune, in processes that tests start)

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from tests.finetune_runs import NARROW, NARROW_QWEN3_VL_MOE, run, write_config, write_inputs
from tests.test_finetune import ADAPTERS
from torchtune_vl.data import Batch, RowSharing, packed_collate_vision
from torchtune_vl.models._weights import load_weights_into
from torchtune_vl.models.qwen2_5_vl import lora_qwen2_5_vl, qwen2_5_vl
from torchtune_vl.models.qwen3_vl import lora_qwen3_vl, qwen3_vl
from torchtune_vl.models.qwen3_vl_moe import lora_qwen3_vl_moe, qwen3_vl_moe
from torchtune_vl.modules import mrope_positions, vision_index
from torchtune_vl.modules.context import RowShare
from torchtune_vl.modules.nf4 import PackedNF4
from torchtune_vl.modules.parallelism import decoder_tp_plan
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._sharding import (
    average_copies,
    average_experts,
    clip_grad_norm,
    divide_experts,
    divide_layers,
    pack_quantized,
    shard,
)

IMAGE, VIDEO = 590, 591
DIMS: dict[str, Any] = {
    "vocab_size": 600,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "embed_dim": 192,
    "intermediate_dim": 96,
    "mrope_sections": (4, 6, 6),
    "tie_word_embeddings": False,
    "vision_intermediate_dim": 32,
    "vision_embed_dim": 32,
    "vision_num_layers": 2,
    "vision_num_heads": 2,
    "full_attention_layers": (1,),
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
# Features of two layers, learned positions, norms of heads that do not divide the width
DEEPSTACK_DIMS: dict[str, Any] = {
    **{name: size for name, size in DIMS.items() if name != "full_attention_layers"},
    "num_layers": 3,
    "embed_dim": 96,
    "mrope_sections": (6, 5, 5),
    "head_dim": 32,
    "position_grid": 5,
    "deepstack_layers": (0, 1),
}
# More experts than devices, of a number that these do not divide, and a layer without
EXPERTS_DIMS: dict[str, Any] = {
    **DEEPSTACK_DIMS,
    "num_experts": 7,
    "num_active_experts": 3,
    "expert_dim": 24,
    "dense_layers": (1,),
}
# What devices can share; of six, two have three each, which two more divide by their rows
SHARED_EXPERTS: dict[str, Any] = {**EXPERTS_DIMS, "num_experts": 8}
FEW_SHARED_EXPERTS: dict[str, Any] = {**EXPERTS_DIMS, "num_experts": 6}


def sample(rng: np.random.Generator, geometry: Any, grids: list[tuple[int, int, int]]) -> Any:
    """A conversation with media of any sizes at random places."""
    tokens = rng.integers(0, 580, rng.integers(1, 9)).tolist()
    for t, h, w in grids:
        tokens += [IMAGE if t == 1 else VIDEO] * (t * h * w // 4)
        tokens += rng.integers(0, 580, rng.integers(1, 9)).tolist()
    is_trained = rng.random(len(tokens)) < 0.7
    trains = zip(tokens, is_trained, strict=True)
    labels = [t if trained and t < 580 else -100 for t, trained in trains]
    made = {"tokens": tokens, "labels": labels}
    thw = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    made["input_pos"] = mrope_positions(
        tokens, thw, [2.0] * len(grids), placeholder_ids=(IMAGE, VIDEO), merge_size=2
    )
    if grids:
        count = sum(t * h * w for t, h, w in grids)
        patches = rng.integers(0, 256, (count, geometry.values_per_patch), np.uint8)
        vision = {"patches": torch.from_numpy(patches), "grid_thw": thw}
        made["encoder_input"] = {"vision": vision | vision_index(thw, geometry)}
    return made


def rows(count: int, seed: int, geometry: Any) -> list[Batch]:
    """Packed rows: with one long document, many, media of all kinds, and none."""
    rng = np.random.default_rng(seed)
    kinds = [
        [[(3, 8, 12)]],  # a video, whose frames devices share
        [[], [(1, 16, 20)], [(1, 2, 2), (2, 4, 6)], []],
        [[], [], []],
        [[(1, 10, 18)]],  # an image alone, which one device encodes
    ]
    return [
        packed_collate_vision([sample(rng, geometry, grids) for grids in kinds[n % len(kinds)]])
        for n in range(count)
    ]


def model_of(method: str) -> Any:
    *others, method = method.split()
    plain, lora, dims = qwen2_5_vl, lora_qwen2_5_vl, DIMS
    if others == ["deepstack"]:
        plain, lora, dims = qwen3_vl, lora_qwen3_vl, DEEPSTACK_DIMS
    if others[:1] == ["experts"]:
        plain, lora, dims = qwen3_vl_moe, lora_qwen3_vl_moe, EXPERTS_DIMS
    if others[1:2] == ["shared"]:
        dims = FEW_SHARED_EXPERTS if "few" in others else SHARED_EXPERTS
    if "balanced" in others:
        dims = {**dims, "router_aux_loss_coef": 0.5}
    if method == "full":
        return plain(**dims)
    adapted = ["q_proj", "k_proj", "v_proj", "output_proj", "qkv"]
    settings: dict[str, Any] = {"encoder_trainable": "lora", "lora_rank": 4, "lora_alpha": 8}
    settings |= {"apply_lora_to_mlp": True, "apply_lora_to_output": True}
    settings |= {"use_dora": method == "dora", "quantize_base": method == "qlora"}
    return lora(adapted, **settings, **dims)


def compute(model: Any, batch: Batch, group: Any = None) -> torch.Tensor:
    if isinstance(batch["mask"], RowShare):
        batch["mask"].group = group
    return model(**batch)


def random_weights(method: str) -> dict[str, torch.Tensor]:
    """Weights of a model, not quantized, whose adapters change something."""
    torch.manual_seed(0)
    plain = model_of(method.replace("qlora", "lora"))
    random = {
        "weight": lambda p: torch.randn_like(p) * 0.1,
        "magnitude": lambda p: 0.5 + torch.rand_like(p),
    }
    return {
        name: random[name.rpartition(".")[2]](p)
        if "lora_b" in name or "magnitude" in name
        else p.detach()
        for name, p in plain.named_parameters()
    }


def gradients_on(
    rank: int, store: str, mesh: Mesh, method: str, weights: dict[str, torch.Tensor], out: str
) -> None:
    processes = mesh.data * mesh.copies
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    devices, row_group = mesh.devices("cpu"), mesh.row_group("cpu")
    expert_devices = mesh.expert_devices("cpu")
    with torch.device("meta"):
        model = model_of(method)
    if mesh.tensor > 1:
        divide_layers(model, devices["tensor"], decoder_tp_plan(model))
    if expert_devices is not None:
        divide_experts(model, expert_devices["experts"])
    if processes > mesh.tensor:
        shard(model, devices, torch.float32, False, expert_devices)
    load_weights_into(model, weights, torch.device("cpu"))
    model.train()
    own = rows(4, 0, model.encoders["vision"].geometry)[rank // mesh.copies :: mesh.data]
    losses = []
    for row in own:
        if row_group:
            row = RowSharing(dist.get_rank(row_group), mesh.context, (IMAGE, VIDEO))(row)
        loss = compute(model, row, row_group).sum()
        losses.append(loss.detach())
        (loss * (processes // mesh.tensor)).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if mesh.tensor > 1:
        average_copies(trained.values(), devices["tensor"])
    if expert_devices is not None:
        average_experts(trained.values(), expert_devices)
    norm = clip_grad_norm(trained.values(), math.inf)
    total = torch.stack(losses).sum()
    dist.all_reduce(total)
    found = {n: p.grad for n, p in trained.items()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
    if rank == 0:
        torch.save({"loss": total / mesh.tensor, "norm": norm, "gradients": whole}, out)
    dist.destroy_process_group()


MESHES = {
    "context 2": Mesh(1, 1, 2, 1),
    "tensor 2": Mesh(1, 1, 1, 2),
    "shard 2": Mesh(1, 2, 1, 1),
    "context 4": Mesh(1, 1, 4, 1),
    "shard 2, replicate 2": Mesh(2, 2, 1, 1),
    "context 2, tensor 2": Mesh(1, 1, 2, 2),
    "shard 2, context 2": Mesh(1, 2, 2, 1),
    "replicate 2, tensor 2": Mesh(2, 1, 1, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *("full", "lora", "dora", "qlora"),
        *("deepstack full", "deepstack lora", "experts full", "experts lora"),
        *("experts qlora", "experts balanced full"),
    ],
)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_gradients_are_those_of_one_process(mesh: Mesh, method: str, tmp_path: Path) -> None:
    if method == "qlora" and mesh.tensor > 1:
        pytest.skip("quantized weights do not divide")
    if "experts" in method and mesh.tensor > 1:
        with torch.device("meta"), pytest.raises(ValueError, match=r"^experts do not"):
            decoder_tp_plan(model_of(method))
        return
    if "balanced" in method and mesh.context > 1:
        pytest.skip("the balance of a row is known where all of it is: tests/test_experts.py")
    compare_with_one_process(mesh, method, tmp_path)


MESHES_OF_EXPERTS = {
    "shard 2, experts 2": Mesh(1, 2, 1, 1, 2),
    "context 2, experts 2": Mesh(1, 1, 2, 1, 2),
    "shard 4, experts 2": Mesh(1, 4, 1, 1, 2),
    "shard 2, context 2, experts 4": Mesh(1, 2, 2, 1, 4),
    "shard 2, replicate 2, experts 2": Mesh(2, 2, 1, 1, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *("experts shared full", "experts shared few full", "experts shared lora"),
        "experts shared balanced full",
    ],
)
@pytest.mark.parametrize("mesh", MESHES_OF_EXPERTS.values(), ids=MESHES_OF_EXPERTS)
def test_devices_that_share_experts(mesh: Mesh, method: str, tmp_path: Path) -> None:
    if "few" in method and mesh.experts == 4:
        pytest.skip("four do not divide six: tests/test_experts.py")
    if "balanced" in method and mesh.context > 1:
        pytest.skip("the balance of a row is known where all of it is: tests/test_experts.py")
    compare_with_one_process(mesh, method, tmp_path)


def compare_with_one_process(mesh: Mesh, method: str, tmp_path: Path) -> None:
    weights = random_weights(method)
    with torch.device("meta"):
        model = model_of(method)
    load_weights_into(model, weights, torch.device("cpu"))
    total = sum(compute(model, row).sum() for row in rows(4, 0, model.encoders["vision"].geometry))
    assert isinstance(total, torch.Tensor)
    total.backward()
    store, out = tmp_path / "store", tmp_path / "found"
    processes = mesh.data * mesh.copies
    args = (str(store), mesh, method, weights, str(out))
    torch.multiprocessing.spawn(gradients_on, args, nprocs=processes)
    found = torch.load(out)
    torch.testing.assert_close(found["loss"], total.detach(), rtol=1e-5, atol=0)
    norm = clip_grad_norm(model.parameters(), math.inf)
    torch.testing.assert_close(found["norm"], norm, rtol=1e-5, atol=0)
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        difference = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert difference <= 1e-5, (name, difference)


def test_a_row_is_shared_out_whole() -> None:
    """Each token, target and frame goes to one device, and a device's keys are those it may see."""
    geometry = model_of("full").encoders["vision"].geometry
    for devices, row in itertools.product(
        (2, 3, 8), [*rows(8, 1, geometry), packed_collate_vision([])]
    ):
        shares = [RowSharing(n, devices, (IMAGE, VIDEO))(row) for n in range(devices)]
        count = row["tokens"].numel()
        padded = shares[0]["tokens"].numel() * devices
        assert count <= padded < count + 2 * devices
        gathered = torch.cat([share["tokens"][0] for share in shares])
        found = sorted(torch.cat([share["mask"].targets for share in shares]).tolist())
        assert found == [*range(len(row["targets"]))]
        documents = row["tokens"][0].split(row["mask"].lengths)
        for share in shares:
            own, mask = share["tokens"][0], share["mask"]
            assert torch.equal(share["targets"], row["targets"][mask.targets])
            pieces = own.split(mask.queries.lengths)
            seen = gathered[mask.key_rows].split(mask.keys.lengths)
            for piece, keys in zip(pieces, seen, strict=True):
                assert torch.equal(keys[-len(piece) :], piece)
                begins = (torch.equal(keys, d[: len(keys)]) for d in documents)
                assert any(begins) or not keys.any()  # padding
        if "encoder_input" in row:
            media = row["encoder_input"]["vision"]
            encoded = [share["encoder_input"]["vision"] for share in shares]
            real = [v for v, s in zip(encoded, shares, strict=True) if sum(s["mask"].sent)]
            assert torch.equal(torch.cat([v["patches"] for v in real]), media["patches"])
            assert sum(len(v["grid_thw"]) for v in real) == int(media["grid_thw"][:, 0].sum())
            placeholders = torch.isin(gathered, torch.tensor([IMAGE, VIDEO])).sum()
            assert sum(sum(share["mask"].received) for share in shares) == placeholders


def test_devices_have_equal_work_of_a_long_document() -> None:
    tokens = 4096
    sample = {"tokens": [1] * tokens, "labels": [1] * tokens, "input_pos": torch.zeros(tokens, 3)}
    row = packed_collate_vision([sample])
    pairs = []
    for device in range(8):
        share = RowSharing(device, 8, ())(row)["mask"]
        lengths = zip(share.queries.lengths, share.keys.lengths, strict=True)
        pairs.append(sum(q * k - q * (q - 1) // 2 for q, k in lengths))
    assert sum(pairs) == tokens * (tokens + 1) // 2
    assert len({*pairs}) == 1


def test_compiled_layers_break_for_attention_alone() -> None:
    """Its shapes are those of each row; traced, they would be compiled anew for each."""
    torch._dynamo.reset()
    counters.clear()
    model = qwen2_5_vl(**DIMS)
    for layer in [*model.decoder.layers, *model.encoders["vision"].layers]:
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    for row in rows(4, 0, model.encoders["vision"].geometry):
        compute(model, row).sum().backward()
    (reason,) = counters["graph_break"]
    assert "attend_within_segments" in reason


def test_layers_of_packed_weights_are_compiled_once() -> None:
    with torch.device("meta"):
        model = model_of("qlora")
    pack_quantized(model)
    kinds = {type(m) for m in model.modules() if isinstance(m, PackedNF4)}
    assert sorted(kind.__name__ for kind in kinds) == ["PackedLoRALinear", "PackedNF4Linear"]


STAGES = [
    ("one process", 1, {}),
    ("context 2", 2, {"parallel.context": 2}),
    ("shard 2, replicate 2", 4, {"parallel.shard": 2, "parallel.replicate": 2}),
    ("tensor 2", 2, {"parallel.tensor": 2}),
    ("context 2, tensor 2", 4, {"parallel.context": 2, "parallel.tensor": 2}),
    ("shard 2", 2, {}),
]
STAGES_OF_EXPERTS = [
    ("one process", 1, {}),
    ("shard 2, experts 2", 2, {"parallel.experts": 2}),
    ("shard 4, experts 2", 4, {"parallel.experts": 2}),
    ("shard 2", 2, {}),
    ("context 2, shard 2, experts 4", 4, {"parallel.context": 2, "parallel.experts": 4}),
    ("replicate 2, experts 2", 4, {"parallel.replicate": 2, "parallel.experts": 2}),
    ("context 2", 2, {"parallel.context": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "experts full", "experts lora"])
def test_a_run_goes_on_and_is_exported_on_other_meshes(
    method: str, vocabulary: Path, tmp_path: Path
) -> None:
    has_experts = "experts" in method
    config = NARROW_QWEN3_VL_MOE if has_experts else {**NARROW, "tie_word_embeddings": False}
    write_inputs(tmp_path, vocabulary, 12, config=config)
    name = "qwen3_vl_moe/full" if has_experts else "qwen2_5_vl/full"
    stages = STAGES_OF_EXPERTS if has_experts else STAGES
    settings: dict[str, Any] = {
        "lr_scheduler": {"_component_": "tests.finetune_runs.constant_rate"},
        "num_workers": 1,
        "optimizer.fused": True,
        "rows_per_step": 4,
        "rows.max_tokens": 384,
    }
    if method == "lora":
        settings["model"] = {**ADAPTERS, "apply_lora_to_mlp": True}
    if method == "experts lora":
        name = "qwen3_vl_moe/lora"
        settings["model.apply_lora_to_mlp"] = True
    steps = 2 * len(stages)
    whole = run(write_config(tmp_path, tmp_path / "whole", {**settings, "max_steps": steps}, name))
    losses: dict[int, float] = {}
    output = tmp_path / "parts"
    for number, (_, processes, mesh) in enumerate(stages):
        last = {"max_steps": 2 * number + 2, "resume": True, "parallel.shard": None}
        losses |= run(write_config(tmp_path, output, {**settings, **last, **mesh}, name), processes)
    assert losses.keys() == whole.keys()
    assert max(abs(losses[step] / loss - 1) for step, loss in whole.items()) <= 1e-5
    epoch = max(output.glob("epoch_*"))
    exported = contents(epoch)
    for stage, processes, mesh in stages[:-1]:
        last = {"max_steps": steps, "resume": True, "parallel.shard": None}
        run(write_config(tmp_path, output, {**settings, **last, **mesh}, name), processes)
        assert contents(epoch) == exported, stage


def contents(directory: Path) -> dict[str, bytes]:
    """What the files of an export are."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
