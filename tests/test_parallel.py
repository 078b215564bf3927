"""What devices can share and compute, gradients' norm, and adapters before the first step."""

import torchtune_vl._torchao  # noqa: F401 # isort: skip (before torchtune, in processes that tests start)

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtune.modules.peft import DoRALinear, LoRALinear

from quickstart.checkpoint import write_tiny_checkpoint
from torchtune_vl.models._weights import initial_adapters, load_weights_into
from torchtune_vl.models.qwen2_5_vl import (
    lora_qwen2_5_vl_from_config,
    qwen2_5_vl,
    qwen2_5_vl_from_config,
)
from torchtune_vl.modules.parallelism import decoder_tp_plan
from torchtune_vl.recipes._check_config import read_config
from torchtune_vl.recipes.finetune import FinetuneRecipe
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._sharding import (
    average_copies,
    clip_grad_norm,
    divide_layers,
    gather,
    multiply_in_float8,
    shard,
)

SMALL: dict[str, Any] = {
    "vocab_size": 600,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "embed_dim": 128,
    "intermediate_dim": 96,
    "mrope_sections": (4, 6, 6),
    "tie_word_embeddings": False,
    "vision_intermediate_dim": 32,
    "vision_embed_dim": 32,
    "vision_num_layers": 1,
    "vision_num_heads": 2,
}


@contextmanager
def divided(rank: int, data: int, tensor: int, **dims: Any) -> Iterator[Any]:
    """Divide a model on the meta device over devices, of which one is here."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=data * tensor)
    try:
        mesh = Mesh(1, data, 1, tensor).devices("cpu")
        with torch.device("meta"):
            model = qwen2_5_vl(**{**SMALL, **dims})
        if tensor > 1:
            divide_layers(model, mesh["tensor"], decoder_tp_plan(model))
        shard(model, mesh, torch.float32, cpu_offload=False)
        yield model
    finally:
        dist.destroy_process_group()


# Devices that share the data, those that share layers, and the rank of the one that is here
LAYOUTS = [(64, 1, 63), (2, 2, 1), (2, 4, 6), (1, 2, 1)]


def cut_in(case: int, weights: dict[str, torch.Tensor]) -> None:
    data, tensor, rank = LAYOUTS[case]
    moved = []
    send = torch.Tensor.to

    def note(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        moved.append(tensor.numel())
        return send(tensor, *args, **options)

    with divided(rank, data, tensor) as model:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "to", note)
            load_weights_into(model, weights, torch.device("cpu"))
        kept = 0
        for name, parameter in model.named_parameters():
            layout = parameter.device_mesh, parameter.placements
            assert layout[0].get_coordinate()[0] == rank // tensor
            expected = distribute_tensor(weights[name], *layout, src_data_rank=None).to_local()
            assert torch.equal(parameter.to_local(), expected), name
            kept += expected.numel()
        assert sum(moved) == kept


@pytest.mark.slow
def test_each_device_cuts_its_own_part_on_the_host() -> None:
    torch.manual_seed(0)
    weights = qwen2_5_vl(**SMALL).state_dict()
    # Each in a process of its own: torch keeps of a group that is gone where its ranks were
    torch.multiprocessing.spawn(cut_in, (weights,), nprocs=len(LAYOUTS))


def test_offloaded_parts_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the devices of the mesh are others."""
    weights = qwen2_5_vl(**SMALL).state_dict()
    with divided(0, 2, 1) as model:
        parameter = model.get_parameter("decoder.norm.weight")
        monkeypatch.setattr(type(parameter.device_mesh), "device_type", "meta")
        monkeypatch.setattr(model, "load_state_dict", lambda placed, assign: placed_are(placed))
        load_weights_into(model, weights, torch.device("cpu"))


def placed_are(placed: dict[str, Any]) -> None:
    assert {x.device.type for x in placed.values()} == {"cpu"}
    assert {x.to_local().device.type for x in placed.values()} == {"cpu"}


def test_rows_that_devices_cannot_share_twice_are_refused() -> None:
    expected = r"3 devices share weights.*divide the 128 rows of decoder\.layers\.0\.attn\.q_proj"
    with pytest.raises(ValueError, match=expected), divided(0, data=3, tensor=2):
        pass


@pytest.mark.parametrize(
    ("queries", "keys", "devices", "fitting"),
    [(8, 4, 2, ""), (8, 4, 4, ""), (8, 2, 4, "1, 2"), (6, 6, 4, "1, 2, 3, 6"), (6, 4, 4, "1, 2")],
)
def test_devices_share_heads_equally(queries: int, keys: int, devices: int, fitting: str) -> None:
    with torch.device("meta"):
        dims = {"num_heads": queries, "num_kv_heads": keys, "embed_dim": 32 * queries}
        model = qwen2_5_vl(**{**SMALL, **dims, "tie_word_embeddings": True})
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    try:
        mesh = init_device_mesh("cpu", (devices,))
        if fitting:
            with pytest.raises(ValueError, match="query heads") as error:
                divide_layers(model, mesh, decoder_tp_plan(model))
            assert str(error.value) == (
                f"parallel.tensor is {devices}, and does not divide the model's {queries} query "
                f"heads and {keys} key/value heads: set it to one of {fitting}"
            )
            assert not any(isinstance(p, DTensor) for p in model.parameters())
        else:
            divide_layers(model, mesh, decoder_tp_plan(model))
            for name, heads in (("q", queries), ("k", keys), ("v", keys)):
                weight = model.get_parameter(f"decoder.layers.1.attn.{name}_proj.weight")
                assert isinstance(weight, DTensor)
                assert weight.to_local().shape == (heads // devices * 32, 32 * queries)
    finally:
        dist.destroy_process_group()


def test_quantized_layers_do_not_divide(base: Path) -> None:
    with torch.device("meta"):
        model = lora_qwen2_5_vl_from_config(base, ["v_proj"], quantize_base=True)
    with pytest.raises(ValueError, match="quantized weights do not divide"):
        decoder_tp_plan(model)


MESHES: dict[str, tuple[dict[str, Any], int, Mesh | str]] = {
    "one": ({}, 1, Mesh(1, 1, 1, 1)),
    "all share weights": ({}, 6, Mesh(1, 6, 1, 1)),
    "the rest shares": ({"replicate": 2, "context": 2}, 12, Mesh(2, 3, 2, 1)),
    "all named": ({"shard": 2, "tensor": 4}, 8, Mesh(1, 2, 1, 4)),
    "one alone": ({"shard": 1}, 2, "parallel.shard is 1, and there are 2 processes: leave shard"),
    "too few": (
        {"tensor": 3},
        2,
        "parallel.tensor is 3, and does not divide the 2 processes: lower",
    ),
    "too many": (
        {"replicate": 2, "shard": 2},
        8,
        "parallel.replicate x parallel.shard is 2 x 2, and there are 8 processes: leave shard",
    ),
    "no divisor": (
        {"context": 2, "tensor": 2},
        6,
        "parallel.context x parallel.tensor is 2 x 2, and does not divide the 6 processes",
    ),
    "experts over all that share weights": (
        {"context": 2, "experts": 6},
        6,
        Mesh(1, 3, 2, 1, 6),
    ),
    "experts and layers": (
        {"tensor": 2, "experts": 2},
        4,
        "parallel.experts and parallel.tensor do not go together: set one to 1",
    ),
    "experts over others": (
        {"replicate": 2, "experts": 4},
        4,
        "parallel.experts is 4, and does not divide the 2 devices that share weights, parallel.sha",
    ),
}


@pytest.mark.parametrize(("sizes", "processes", "expected"), MESHES.values(), ids=MESHES)
def test_meshes(sizes: dict[str, int], processes: int, expected: Mesh | str) -> None:
    alone = {"replicate": 1, "shard": None, "context": 1, "tensor": 1, "experts": 1}
    parallel = {**alone, **sizes}
    if isinstance(expected, Mesh):
        assert Mesh.of(parallel, processes) == expected
        assert expected.data * expected.copies == processes
        assert expected.copies == parallel["context"] * parallel["tensor"]
    else:
        with pytest.raises(ValueError, match=f"^{expected}"):
            Mesh.of(parallel, processes)


@pytest.mark.parametrize("dtypes", [["dtype=bf16"], ["dtype=fp32", "compute_dtype=bf16"]])
def test_a_gpu_without_bfloat16_is_refused(
    dtypes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "device_count": 1,
        "set_device": None,
        "get_device_name": "Tesla K80",
        "is_bf16_supported": False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(FinetuneRecipe, "_init_process_group", lambda _: None)
    config = read_config(["--config", "quickstart/digits.yaml", "device=cuda", *dtypes])
    with pytest.raises(ValueError, match=r"Tesla K80 has no bfloat16.*: set both to fp32$"):
        FinetuneRecipe(config)


@pytest.mark.parametrize("max_norm", [0.1, 10.0, 1e6, math.inf])
def test_gradients_are_clipped_as_by_torch(max_norm: float) -> None:
    ours = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3))
    ours[:2](torch.arange(10.0).view(2, 5)).square().sum().backward()  # the last has no gradients
    theirs = copy.deepcopy(ours)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    norm = clip_grad_norm(ours.parameters(), max_norm)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    torch.testing.assert_close(norm, expected, check_dtype=False)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def average_on(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    own = torch.full((2, 3), float(rank))
    parts = [
        nn.Parameter(torch.zeros(2, 3)),
        *(
            nn.Parameter(DTensor.from_local(torch.zeros(2, 3), mesh, [placement], run_check=False))
            for placement in (Replicate(), Shard(0))
        ),
    ]
    parts[0].grad = own.clone()
    for part in parts[1:]:
        part.grad = DTensor.from_local(own.clone(), mesh, part.placements, run_check=False)
    average_copies(parts, mesh)
    found = [parts[0].grad, *(part.grad.to_local() for part in parts[1:])]
    for gradient, value in zip(found, (0.5, 0.5, float(rank)), strict=True):
        assert torch.equal(gradient, torch.full((2, 3), value))
    dist.destroy_process_group()


def test_gradients_of_copies_are_averaged_and_those_of_parts_are_not(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(average_on, (str(tmp_path / "store"),), nprocs=2)


@pytest.fixture(scope="module")
def base(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters") / "base"
    write_tiny_checkpoint(directory, vocabulary)
    return directory


@pytest.mark.parametrize("quantize_base", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_new_adapters_change_nothing(base: Path, use_dora: bool, quantize_base: bool) -> None:
    torch.manual_seed(0)
    weights = qwen2_5_vl_from_config(base).state_dict()
    with torch.device("meta"):
        model = lora_qwen2_5_vl_from_config(
            base,
            lora_attn_modules=["q_proj", "v_proj", "qkv"],
            lora_rank=4,
            lora_alpha=8,
            encoder_trainable="lora",
            use_dora=use_dora,
            quantize_base=quantize_base,
        )
    adapters = initial_adapters(model, weights, seed=1)
    load_weights_into(model, {**weights, **adapters}, torch.device("cpu"))
    layers = [m for m in model.modules() if isinstance(m, LoRALinear | DoRALinear)]
    assert layers
    for layer in layers:
        x = torch.randn(3, layer.in_dim)
        adapted = layer(x)
        layer.disabled = True
        torch.testing.assert_close(adapted, layer(x), rtol=0, atol=1e-5)

    # From another seed, others; those that there are stay
    again = initial_adapters(model, weights, seed=2)
    assert again.keys() == adapters.keys()
    assert not any(torch.equal(again[n], a) for n, a in adapters.items() if ".lora_a." in n)
    assert not initial_adapters(model, {**weights, **adapters}, seed=2)


def gather_in_a_group(rank: int, directory: Path) -> None:
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    gathered = gather(dict(model.named_parameters()), rank=0)
    if rank == 0:
        assert gathered.keys() == whole.keys()
        assert all(torch.equal(gathered[name], tensor) for name, tensor in whole.items())
    else:
        assert gathered == {}
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_first_process_alone_gathers(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(gather_in_a_group, (tmp_path,), nprocs=2)


def test_float8_multiplies_in_the_decoder_alone() -> None:
    torch.manual_seed(0)
    dims = {"embed_dim": 128, "intermediate_dim": 96, "vision_embed_dim": 32}
    model = qwen2_5_vl(**{**SMALL, **dims}).bfloat16()
    layer, x = model.decoder.layers[0], torch.randn(1, 9, 128, dtype=torch.bfloat16)
    weight, expected = layer.mlp.w1.weight.clone(), layer.mlp(x)
    expected.square().sum().backward()
    gradient = layer.mlp.w1.weight.grad
    multiply_in_float8(model, torch.device("cpu"))
    layer.zero_grad()
    found = layer.mlp(x)
    found.square().sum().backward()
    assert torch.equal(layer.mlp.w1.weight, weight)
    # Three bits of mantissa: a product is off by a sixteenth at most, sums by less
    for ours, exact in ((found, expected), (layer.mlp.w1.weight.grad, gradient)):
        assert 1e-3 < (ours - exact).norm() / exact.norm() < 0.15
    kinds = {
        type(m).__name__ for part in (model.encoders, model.decoder.output) for m in part.modules()
    }
    assert "Float8Linear" not in kinds
    assert sum(type(m).__name__ == "Float8Linear" for m in model.modules()) == 2 * 7


def test_float8_is_refused_where_it_does_not_fit(base: Path) -> None:
    with torch.device("meta"):
        adapted = lora_qwen2_5_vl_from_config(base, ["q_proj"])
        odd = qwen2_5_vl(**{**SMALL, "intermediate_dim": 88})
    for model in (adapted, odd):
        with pytest.raises(ValueError, match=r"without adapters, and of sizes that.*float8=False"):
            multiply_in_float8(model, torch.device("cpu"))
