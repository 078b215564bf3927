"""Mixtures of experts: their product, what does not wait for the device, and what is refused."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForImageTextToText

from tests.finetune_runs import NARROW_QWEN3_VL_MOE, run, write_config, write_inputs
from tests.reference import QWEN3_VL_MOE, Conversation, reference_config
from tests.test_generation import answers
from tests.test_meshes import DIMS, EXPERTS_DIMS, IMAGE, VIDEO, model_of, random_weights, rows
from torchtune_vl.data import RowSharing, packed_collate_vision
from torchtune_vl.generation import load_model
from torchtune_vl.generation._captured import can_capture
from torchtune_vl.media import Geometry
from torchtune_vl.models._weights import load_weights_into
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl
from torchtune_vl.models.qwen3_vl_moe import lora_qwen3_vl_moe, qwen3_vl_moe
from torchtune_vl.modules import experts as routing
from torchtune_vl.modules.adapters import build_linear
from torchtune_vl.modules.dimensions import Dimensions
from torchtune_vl.modules.experts import MixtureOfExperts
from torchtune_vl.modules.grouped import (
    GroupedLinear,
    grouped_product,
    has_grouped_product,
    waits_for_groups,
)
from torchtune_vl.modules.quantized import Quantized, QuantizedExperts, quantize_layers
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._sharding import (
    default_dtype,
    divide_experts,
    gathered_together,
    local_part,
    multiply_in_float8,
    recompute_layers,
    shard,
)


def experts_of(
    count: int = 7, active: int = 3, width: int = 24, embed_dim: int = 32
) -> MixtureOfExperts:
    others: Any = dict.fromkeys(
        ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_dim"), 1
    )
    others |= {"tie_word_embeddings": False, "max_seq_len": 1, "vision_gated": False}
    others |= {"geometry": Geometry, "vision_norm": None, "vision_activation": F.silu}
    own = {"num_experts": count, "num_active_experts": active, "expert_dim": width}
    torch.manual_seed(0)
    dims = Dimensions(embed_dim=embed_dim, vision_intermediate_dim=1, **own, **others)
    return MixtureOfExperts(dims, partial(build_linear, "decoder"))


def by_the_definition(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert."""
    out = []
    for token in x.flatten(0, -2):
        shares = (mixture.router.weight @ token).softmax(0, dtype=torch.float32)
        best = shares.topk(mixture.num_active)
        result = torch.zeros_like(token)
        for share, number in zip(best.values / best.values.sum(), best.indices, strict=True):
            gate, up = (token @ mixture.experts.gate_up_proj.weight[number]).chunk(2)
            result = result + share * (
                (F.silu(gate) * up) @ mixture.experts.down_proj.weight[number]
            )
        out.append(result)
    return torch.stack(out).view_as(x)


# A width whose rows have no multiple of 16 bytes, which torch's product refuses; fewer tokens than
# experts; a token that takes all
@pytest.mark.parametrize(
    ("settings", "tokens"),
    [({}, 50), ({"width": 3}, 50), ({}, 1), ({"active": 7}, 5), ({"count": 1, "active": 1}, 4)],
)
def test_definition(settings: dict[str, int], tokens: int) -> None:
    experts = experts_of(**settings).double()
    x = torch.randn(2, tokens, 32, dtype=torch.float64, requires_grad=True)
    expected, weight = by_the_definition(experts, x), torch.randn(2, tokens, 32)
    wanted = (x, *experts.parameters())
    exact = torch.autograd.grad((expected * weight).sum(), wanted)
    # Probabilities are float32 in any dtype
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        own = copy.deepcopy(experts).to(dtype)
        given = x.detach().to(dtype).requires_grad_()
        out = own(given)
        found = torch.autograd.grad((out * weight).sum(), (given, *own.parameters()))
        for actual, wished in zip((out, *found), (expected, *exact), strict=True):
            assert actual.dtype == dtype
            assert (actual - wished).norm() <= tolerance * wished.norm()


def test_no_tokens() -> None:
    experts = experts_of()
    x = torch.zeros(1, 0, 32, requires_grad=True)
    out = experts(x)
    assert out.shape == x.shape
    (out * 2.0).sum().backward()
    assert all(not p.grad.any() for p in experts.parameters())


def test_products_of_both_ways_are_the_same() -> None:
    x, weight = torch.randn(20, 16), torch.randn(5, 16, 8)
    ends = torch.tensor([3, 3, 12, 20, 20], dtype=torch.int32)
    assert has_grouped_product(weight)
    assert not has_grouped_product(weight.double())
    assert not has_grouped_product(torch.zeros(5, 16, 6))
    together = grouped_product(x, weight, ends)
    one_by_one = grouped_product(x.double(), weight.double(), ends)
    torch.testing.assert_close(together.double(), one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_device_has_the_shapes(dtype: torch.dtype) -> None:
    experts = experts_of().to(dtype)
    x = torch.randn(2, 9, 32, dtype=dtype, requires_grad=True)
    on_meta, given = copy.deepcopy(experts).to("meta"), x.detach().to("meta").requires_grad_()
    for module, hidden in ((experts, x), (on_meta, given)):
        (module(hidden) * 2.0).sum().backward()
    assert given.grad is not None
    assert given.grad.shape == x.shape
    for p, other in zip(experts.parameters(), on_meta.parameters(), strict=True):
        assert (p.grad.shape, p.grad.dtype) == (other.grad.shape, other.grad.dtype)


def test_nothing_waits_where_torch_has_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever waits for one is an error."""
    with FakeTensorMode():
        with default_dtype(torch.bfloat16):
            experts = experts_of()
        x = torch.empty(2, 9, 32, dtype=torch.bfloat16, requires_grad=True)
        with pytest.raises(DataDependentOutputException):
            experts(x)
        monkeypatch.setattr("torchtune_vl.modules.grouped.has_grouped_product", lambda weight: True)
        experts.routed = []
        out = experts(x)
        assert len(experts.routed) == 1
        (out * 2.0).sum().backward()
        assert all(p.grad.shape == p.shape for p in (x, *experts.parameters()))


@pytest.mark.parametrize(
    ("capability", "dtype", "has", "waits"),
    [
        ((10, 0), torch.bfloat16, True, False),
        ((9, 0), torch.bfloat16, True, False),
        ((8, 0), torch.bfloat16, True, True),  # torch multiplies in a loop
        ((12, 0), torch.bfloat16, True, True),
        ((9, 0), torch.float32, False, True),
        ((7, 5), torch.bfloat16, False, True),
    ],
)
def test_steps_are_captured_where_nothing_waits(
    capability: tuple[int, int],
    dtype: torch.dtype,
    has: bool,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        weight = torch.empty(7, 16, 8, dtype=dtype, device="cuda")
        assert has_grouped_product(weight) is has
        assert waits_for_groups(weight) is waits
    monkeypatch.setattr("torchtune_vl.generation._captured.waits_for_groups", lambda weight: waits)
    model = qwen3_vl_moe(**EXPERTS_DIMS).requires_grad_(False)
    assert can_capture(model, torch.device("cuda")) is not waits
    quantize_layers(model.bfloat16().decoder.layers, "int8")
    assert not can_capture(model, torch.device("cuda"))


def test_greedy_decoding_is_a_whole_forward_for_each_token() -> None:
    torch.manual_seed(0)
    model = qwen3_vl_moe(**EXPERTS_DIMS | {"image_token_id": 592, "video_token_id": 593}).eval()
    for p in model.decoder.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    generator = torch.Generator().manual_seed(0)
    conversations = [Conversation([(1, 4, 4)]), Conversation([], 12), Conversation([(1, 6, 4)], 5)]
    prompts = [conversation.sample(generator, QWEN3_VL_MOE) for conversation in conversations]
    found = answers(model, prompts, 8, batch_size=2)
    assert len({tuple(answer) for answer in found}) == 3
    for prompt, answer in zip(prompts, found, strict=True):
        assert len(set(answer)) > 2
        sample = {**prompt, "tokens": [*prompt["tokens"], *answer]}
        sample["labels"] = sample["tokens"]
        behind = prompt["input_pos"].max() + 1 + torch.arange(len(answer))
        sample["input_pos"] = torch.cat([prompt["input_pos"], behind[:, None].expand(-1, 3)])
        row = packed_collate_vision([sample])
        row.pop("targets"), row.pop("output_positions")
        with torch.no_grad():
            logits = model(**row)[0, -len(answer) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize(
    "method", ["full", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "qlora"))]
)
def test_layers_with_experts_are_compiled(method: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    weights = random_weights(f"experts balanced {method}")
    models = []
    for _ in range(2):
        with torch.device("meta"):
            models.append(model_of(f"experts balanced {method}").train())
        load_weights_into(models[-1], weights, torch.device("cpu"))
    plain, compiled = models
    for layer in compiled.decoder.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    for row in rows(2, 0, plain.encoders["vision"].geometry):
        expected, found = plain(**row), compiled(**row)
        torch.testing.assert_close(found, expected)
        expected.sum().backward()
        found.sum().backward()
    named = dict(compiled.named_parameters())
    for name, p in plain.decoder.named_parameters():
        if p.requires_grad:
            other = named[f"decoder.{name}"].grad
            assert (other - p.grad).norm() <= 1e-5 * p.grad.norm(), name


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("full", None),
        ("balanced full", None),
        ("balanced full", "aot_eager"),
        *(
            pytest.param(method, backend, marks=pytest.mark.slow)
            for method, backend in (
                ("full", "aot_eager"),
                ("full", "inductor"),
                ("balanced full", "inductor"),
            )
        ),
    ],
)
def test_recomputation_takes_the_experts_of_the_forward(
    method: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where equal probabilities would be in another order: here in any."""
    torch._dynamo.reset()
    weights, gradients = random_weights(f"experts {method}"), []
    for recomputes in (False, True):
        with torch.device("meta"):
            model = model_of(f"experts {method}").train()
        load_weights_into(model, weights, torch.device("cpu"))
        if backend:
            for layer in model.decoder.layers:
                layer.forward = torch.compile(layer.forward, backend=backend)
        if recomputes:
            recompute_layers(model, "full")
        loss = 0
        for row in rows(2, 0, model.encoders["vision"].geometry):  # two forwards, then backward
            loss += model(**row).sum()
        with monkeypatch.context() as patched:
            patched.setattr(routing, "_most_probable", lambda p, count: (-p).topk(count).indices)
            # Twice, as who calls backward may
            loss.backward(retain_graph=not backend)
            if not backend:
                model.zero_grad()
                loss.backward()
        gradients.append({name: p.grad for name, p in model.decoder.named_parameters()})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_layers_whose_balance_is_wanted_are_compiled_once() -> None:
    """Beyond torch's limit of compilations a layer, recomputed, is not what it was in forward."""
    graphs = []
    for layers in (3, 6):
        torch._dynamo.reset()
        counters.clear()
        settings = {"num_layers": layers, "router_aux_loss_coef": 0.5, "dense_layers": ()}
        model = qwen3_vl_moe(**{**EXPERTS_DIMS, **settings})
        for layer in model.decoder.layers:
            layer.forward = torch.compile(layer.forward, backend="eager")
        (row,) = rows(1, 0, model.encoders["vision"].geometry)
        model(**row)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len({*graphs}) == 1


def test_balance_of_a_share_of_a_row() -> None:
    model = qwen3_vl_moe(**EXPERTS_DIMS, router_aux_loss_coef=0.5)
    (row,) = rows(1, 0, model.encoders["vision"].geometry)
    share = RowSharing(0, 2, (IMAGE, VIDEO))(row)
    share.pop("encoder_input")
    told = r"^router_aux_loss_coef needs packed rows, each whole .* parallel.context=1, or set"
    with pytest.raises(ValueError, match=told):
        model.eval().train().decoder(
            model.tok_embeddings(share["tokens"]),
            share["mask"],
            input_pos=share["input_pos"],
            targets=share["targets"],
        )


def lora(**settings: Any) -> Any:
    return lora_qwen3_vl_moe(["q_proj"], **{**EXPERTS_DIMS, **settings})


def shared(devices: int, experts: int, **dims: Any) -> Any:
    """Share the experts of a model on the meta device with devices that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    try:
        mesh = Mesh(1, devices, 1, 1, experts)
        shares = mesh.expert_devices("cpu")
        assert shares is not None
        model = qwen3_vl_moe(**{**EXPERTS_DIMS, **dims})
        divide_experts(model, shares["experts"])
        shard(model, mesh.devices("cpu"), torch.float32, False, shares)
        return model
    finally:
        dist.destroy_process_group()


def test_a_device_has_its_share_of_experts() -> None:
    with torch.device("meta"):
        model = shared(6, 2, num_experts=8)
    own = {name: local_part(p).shape for name, p in model.decoder.layers[0].mlp.named_parameters()}
    assert own == {
        "router.weight": (2, 96),  # of 8 rows over 6 devices, the first has 2
        "experts.gate_up_proj.weight": (4, 32, 48),
        "experts.down_proj.weight": (4, 24, 32),
    }


def test_estimates_know_what_is_gathered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They divide experts no further than a plan does, and groups are of a decoder layer's size."""
    really, found = fsdp.fully_shard, []

    def fully_shard(modules: Any, **how: Any) -> Any:
        found.append(modules)
        return really(modules, **how)

    monkeypatch.setattr(fsdp, "fully_shard", fully_shard)
    wide = {"num_experts": 8, "expert_dim": 240}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = Mesh(1, 8, 1, 1, 2)
        shares = mesh.expert_devices("cpu")
        assert shares is not None
        with torch.device("meta"):
            model = qwen3_vl_moe(**{**EXPERTS_DIMS, **wide})
        divide_experts(model, shares["experts"])
        expected = [*gathered_together(model)]
        shard(model, mesh.devices("cpu"), torch.float32, False, shares)
    finally:
        dist.destroy_process_group()
    assert max(map(len, expected)) > 1
    assert [modules for modules in found if isinstance(modules, list)] == expected


def share(model: Any) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        divide_experts(model, init_device_mesh("cpu", (2,)))
    finally:
        dist.destroy_process_group()


def none_to_share() -> None:
    share(qwen2_5_vl(**DIMS))


def quantized_to_share() -> None:
    share(lora(num_experts=8, quantize_base=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_experts_are_those_of_their_values(dtype: torch.dtype) -> None:
    """Logits, and gradients of adapters and of what comes before, but no kept weights."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"apply_lora_to_mlp": True, "encoder_trainable": "frozen"}
    with default_dtype(dtype):
        quantized, plain = (lora(quantize_base=q, **settings) for q in (True, False))
    with torch.no_grad():
        for name, p in quantized.named_parameters():
            if "lora_b" in name:
                p.normal_(0, 0.1)
    plain.load_state_dict(quantized.state_dict())
    grouped = quantized.decoder.layers[0].mlp.experts.down_proj.weight
    assert grouped.shape == (7, 24, 96)
    (row,) = rows(1, 0, plain.encoders["vision"].geometry)
    losses, keeps_weights = [], []
    for model in (quantized, plain):
        kept: list[torch.Size] = []

        def keep(x: torch.Tensor, kept: list[torch.Size] = kept) -> torch.Tensor:
            kept.append(x.shape)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses.append(model(**row).sum())
        keeps_weights.append(any(shape[-2:] == (24, 96) for shape in kept))
    assert keeps_weights == [False, True]
    loss, expected = losses
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(quantized.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "with magnitudes": (
        lambda: lora(apply_lora_to_mlp=True, use_dora=True),
        "^experts have no magnitudes: leave use_dora or apply_lora_to_mlp out",
    ),
    "in full beside": (
        lambda: lora_qwen3_vl_moe(
            ["qkv"], **EXPERTS_DIMS, decoder_trainable="full", encoder_trainable="lora"
        ),
        "^experts are not trained beside adapters: make ",
    ),
    "none": (
        lambda: qwen2_5_vl(**DIMS, router_aux_loss_coef=0.1),
        "^router_aux_loss_coef is for the balance of experts, and this model has none: leave it",
    ),
    "quantized and shared": (
        quantized_to_share,
        "^quantized experts are not shared by devices: set parallel.experts=1, parallel.shard",
    ),
    "not shared equally": (
        lambda: shared(2, 2),
        "^parallel.experts is 2, and does not divide the model's 7 experts: set it to a divisor",
    ),
    "parts of rows": (
        lambda: shared(10, 2, num_experts=8),
        "^5 devices have the same experts by parallel.experts, and do not divide the 96 that "
        "gate_up_proj.weight has of each: raise it, or parallel.replicate",
    ),
    "none to share": (
        none_to_share,
        "^parallel.experts is 2, and the model has no experts: set parallel.experts=1",
    ),
    "float8": (
        lambda: multiply_in_float8(qwen3_vl_moe(**EXPERTS_DIMS), torch.device("cpu")),
        "^float8 is for linear layers, and experts are none: set float8=False",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str) -> None:
    act, sentence = REFUSED[what]
    with torch.device("meta"), pytest.raises(ValueError, match=sentence) as error:
        act()
    assert "\n" not in str(error.value)
    with torch.device("meta"):  # the encoder's feed-forwards alone
        mlps = lora_qwen3_vl_moe(
            ["qkv"],
            True,
            **EXPERTS_DIMS,
            decoder_trainable="frozen",
            encoder_trainable="lora",
        )
    assert not any(p.requires_grad for p in mlps.decoder.parameters())


# As those of other layers in test_linear.py
@pytest.mark.parametrize(("how", "error"), [("int8", 0.008), ("int4", 0.09)])
@pytest.mark.parametrize("ends", [[0, 0, 0, 0], [0, 1, 1, 1], [0, 40, 41, 90], [3, 3, 6, 90]])
def test_products_of_quantized_experts(how: Quantized, error: float, ends: list[int]) -> None:
    torch.manual_seed(0)
    weight_EKN = torch.empty(4, 128, 48).uniform_(-1, 1).bfloat16()
    rows_RK = torch.randn(ends[-1], 128).bfloat16()
    ends_E = torch.tensor(ends, dtype=torch.int32)
    exact = grouped_product(rows_RK.float(), weight_EKN.float(), ends_E)
    product = QuantizedExperts(weight_EKN, how)(rows_RK, ends_E)
    assert product.dtype == torch.bfloat16
    assert product.shape == exact.shape
    far = (product.float() - exact).norm() / exact.norm()
    assert not len(exact) or error / 20 < far < error


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_layers_are_quantized_as_they_are_loaded(
    how: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that of one alone there are all bits."""
    config = reference_config(QWEN3_VL_MOE)
    config.text_config.hidden_size, config.text_config.moe_intermediate_size = 128, 192
    config.vision_config.out_hidden_size = 128
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    whole = load_model(tmp_path, dtype=torch.bfloat16)
    quantize_layers(whole.decoder.layers, how)
    loaded: list[nn.Module] = []

    def load(module: nn.Module, *args: Any) -> None:
        before = (m for layer in loaded[1:] for m in layer.modules())
        assert not any(isinstance(m, GroupedLinear) for m in before)
        load_weights_into(module, *args)
        loaded.append(module)

    monkeypatch.setattr("torchtune_vl.generation._load.load_weights_into", load)
    found = load_model(tmp_path, quantize=how).state_dict()
    assert len(loaded) == 1 + len(whole.decoder.layers)
    expected = whole.state_dict()
    assert [*found] == [*expected]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_routers_are_not_quantized() -> None:
    layer = nn.ModuleList([experts_of(width=64, embed_dim=128)]).bfloat16()
    router = layer[0].router.weight.clone()
    x = torch.randn(3, 20, 128).bfloat16()
    with torch.no_grad():
        plain = layer[0](x)
        quantize_layers(layer, "int8")
        quantized = layer[0](x)
    assert torch.equal(layer[0].router.weight, router)
    assert 0 < (quantized - plain).float().norm() / plain.float().norm() < 0.02
    assert {type(m) for m in layer[0].experts.children()} == {QuantizedExperts}


@pytest.mark.slow
def test_runs_of_one_and_of_two_processes(vocabulary: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path, vocabulary, 24, config=NARROW_QWEN3_VL_MOE)
    settings = {"max_steps": 5, "model.router_aux_loss_coef": 0.01}
    name = "qwen3_vl_moe/full"
    one = run(write_config(tmp_path, tmp_path / "one", settings, name))
    two = run(write_config(tmp_path, tmp_path / "two", {**settings, "num_workers": 1}, name), 2)
    assert two == pytest.approx(one, rel=1e-5)
    exports = [next((tmp_path / run_name).glob("epoch_*")) for run_name in ("one", "two")]
    weights = [load_file(export / "model.safetensors") for export in exports]
    assert weights[0].keys() == weights[1].keys()
    # As published: experts, their inputs, their outputs
    experts = weights[0]["model.language_model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.shape == (8, 80, 2 * 32)
    _, told = AutoModelForImageTextToText.from_pretrained(exports[0], output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
