"""Models with adapters: what is built, quantized, trained and refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules.peft import (
    DoRALinear,
    LoRALinear,
    get_adapter_params,
    get_merged_lora_ckpt,
)

from tests.reference import Conversation, reference_config, reference_model
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.models.qwen2_5_vl import (
    lora_qwen2_5_vl,
    lora_qwen2_5_vl_3b,
    lora_qwen2_5_vl_from_config,
    qlora_qwen2_5_vl_7b,
    qwen2_5_vl_from_config,
)
from torchtune_vl.modules.adapters import DoRA, build_linear, is_adapter, num_bytes
from torchtune_vl.training import Qwen2_5_VLCheckpointer

ALL = ["q_proj", "k_proj", "v_proj", "qkv", "output_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    reference_model(reference_config()).save_pretrained(directory)
    return directory


def weights(base: Path) -> dict[str, torch.Tensor]:
    return Qwen2_5_VLCheckpointer(base, base.parent / "output").load_checkpoint()["model"]


def logits(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    samples = [Conversation([(1, 8, 12), (1, 4, 4)]).sample(generator)]
    batch = padded_collate_vision(samples)
    batch.pop("labels")
    return model(**batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_attn_modules": ["q_proj"], "decoder_trainable": "frozen"}, "nothing would be"),
        (
            {"lora_attn_modules": ["qkv"]},
            r"\['qkv'\]: decoder_trainable is 'lora', but",
        ),
        ({"lora_attn_modules": ["q_proj", "qkv"]}, "qkv is no layer of a part that"),
        ({"lora_attn_modules": ["q_proj", "k"]}, "k is no layer of a part that"),
        ({"lora_attn_modules": ["q_proj"], "encoder_trainable": "yes"}, "unknown encoder_tra"),
        ({"lora_attn_modules": ["q_proj"], "fusion_trainable": "lora"}, "fusion_trainable is"),
        (
            {"lora_attn_modules": [], "decoder_trainable": "lora"},
            "has none",
        ),
    ],
)
def test_what_matches_nothing_is_refused(
    base: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lora_qwen2_5_vl_from_config(base, **settings)


def test_a_dimension_is_that_of_the_config(base: Path) -> None:
    with pytest.raises(TypeError, match="multiple values for keyword argument 'num_layers'"):
        lora_qwen2_5_vl_from_config(base, ["q_proj"], num_layers=1)


def test_a_tied_output_layer_gets_no_adapter() -> None:
    with pytest.raises(ValueError, match="output layer of this size is its token embedding"):
        lora_qwen2_5_vl_3b(["q_proj"], apply_lora_to_output=True)


def test_trained_parameters(base: Path) -> None:
    model = lora_qwen2_5_vl_from_config(
        base, ["q_proj", "qkv"], encoder_trainable="lora", fusion_trainable="full"
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == get_adapter_params(model).keys()
    adapted = {name.rpartition(".lora_")[0] for name in trained if is_adapter(name)}
    assert adapted == {f"decoder.layers.{i}.attn.q_proj" for i in range(3)} | {
        f"encoders.vision.layers.{i}.attn.qkv" for i in range(4)
    }
    merger = {n for n, _ in model.named_parameters() if n.startswith("encoders.vision.merger.")}
    assert {name for name in trained if not is_adapter(name)} == merger


def test_adapters_of_the_merger_alone(base: Path) -> None:
    model = lora_qwen2_5_vl_from_config(
        base,
        [],
        apply_lora_to_mlp=True,
        decoder_trainable="frozen",
        fusion_trainable="lora",
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"encoders.vision.merger.mlp.{layer}.lora_{x}.weight"
        for layer in ("w1", "w2")
        for x in "ab"
    }


@pytest.mark.parametrize(
    ("part", "prefixes"),
    [
        ("decoder_trainable", ("decoder.",)),
        ("encoder_trainable", ("encoders.vision.layers.", "encoders.vision.patch_embed.")),
        ("fusion_trainable", ("encoders.vision.merger.",)),
    ],
)
def test_a_part_in_full(base: Path, part: str, prefixes: tuple[str, ...]) -> None:
    others = {"decoder_trainable": "frozen"} if part != "decoder_trainable" else {}
    model = lora_qwen2_5_vl_from_config(base, [], **{**others, part: "full"})
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(prefixes), name


@pytest.mark.parametrize(("size", "count"), [(lora_qwen2_5_vl_3b, 36), (qlora_qwen2_5_vl_7b, 28)])
def test_sizes(size: Any, count: int) -> None:
    with torch.device("meta"):
        model = size(["q_proj"], lora_rank=4)
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert [tuple(layer.lora_a.weight.shape) for layer in layers] == [(4, layers[0].in_dim)] * count


@pytest.mark.parametrize("use_dora", [False, True])
@torch.no_grad()
def test_quantized_layers_multiply_by_what_they_dequantize_to(base: Path, use_dora: bool) -> None:
    settings: dict[str, Any] = {
        "lora_attn_modules": ["q_proj", "qkv"],
        "encoder_trainable": "lora",
        "use_dora": use_dora,
    }
    quantized = lora_qwen2_5_vl_from_config(base, quantize_base=True, **settings).eval()
    quantized.load_state_dict(weights(base), strict=False)
    plain = lora_qwen2_5_vl_from_config(base, **settings).eval()
    for model in (quantized, plain):
        for module in model.modules():
            if isinstance(module, DoRALinear):
                module.initialize_dora_magnitude()
    in_nf4 = {n for n, p in quantized.named_parameters() if isinstance(p.data, NF4Tensor)}
    linear = {
        f"{name}.weight"
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear | LoRALinear | DoRALinear) and ".lora_" not in name
    }
    assert in_nf4 == linear - {"decoder.output.weight"}
    state = quantized.state_dict()
    assert not any(isinstance(tensor, NF4Tensor) for tensor in state.values())
    stored = weights(base)
    for name in in_nf4:
        error = (state[name] - stored[name]).abs().max() / stored[name].abs().max()
        assert 0 < error < 0.2, name
    plain.load_state_dict(state)
    for name, parameter in quantized.named_parameters():
        if name.endswith("lora_b.weight"):
            parameter.normal_(0, 0.05)
    plain.load_state_dict(quantized.state_dict())
    # The bias is added after the product, not in it: rounding alone
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=0, atol=2e-5)


def test_gradients_flow_through_quantized_layers(base: Path) -> None:
    model = lora_qwen2_5_vl_from_config(
        base, ALL, apply_lora_to_mlp=True, encoder_trainable="lora", fusion_trainable="lora",
        quantize_base=True,
    )  # fmt: skip
    model.load_state_dict(weights(base), strict=False)
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if name.endswith("lora_b.weight"):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name


def test_odd_shapes_are_quantized_or_refused() -> None:
    linear = partial(build_linear, "encoder", trainable={"encoder": "frozen"}, quantize_base=True)
    layer: Any = linear("w1", 1280, 3420, False)  # the published encoder's: 68,400 blocks
    assert isinstance(layer.weight.data, NF4Tensor)
    with pytest.raises(ValueError, match="weight of w1, 7 x 5, does not divide into blocks of 64"):
        linear("w1", 5, 7, False)


@torch.no_grad()
def test_torchtune_merges_what_our_layers_compute(base: Path) -> None:
    """Its recipes merge by :func:`get_merged_lora_ckpt`, biases and magnitudes included."""
    for use_dora in (False, True):
        model = lora_qwen2_5_vl_from_config(
            base, ALL, encoder_trainable="lora", use_dora=use_dora, lora_rank=4, lora_alpha=6
        ).eval()
        model.load_state_dict(weights(base), strict=False)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b.weight"):
                parameter.normal_(0, 0.05)
        for module in model.modules():
            if isinstance(module, DoRALinear):
                module.initialize_dora_magnitude()
                module.magnitude.mul_(1.1)
        expected = logits(model)
        plain = qwen2_5_vl_from_config(base).eval()
        plain.load_state_dict(get_merged_lora_ckpt(dict(model.state_dict()), 4, 6))
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_memory_of_quantized_weights() -> None:
    dimensions: dict[str, Any] = {
        "vocab_size": 8192,
        "num_layers": 6,
        "num_heads": 16,
        "num_kv_heads": 2,
        "embed_dim": 2048,
        "intermediate_dim": 7168,
        "tie_word_embeddings": True,
        "vision_num_layers": 8,
        "vision_intermediate_dim": 3420,
    }
    with torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = lora_qwen2_5_vl(["q_proj"], quantize_base=True, **dimensions)
        finally:
            torch.set_default_dtype(torch.float32)
    base_parameters = [p for name, p in model.named_parameters() if not is_adapter(name)]
    count = sum(p.numel() for p in base_parameters)
    assert count > 500e6
    assert sum(map(num_bytes, base_parameters)) <= 0.3 * 2 * count


@pytest.mark.parametrize("quantize_base", [False, True])
def test_a_run_tells_what_it_trains(
    base: Path, caplog: pytest.LogCaptureFixture, quantize_base: bool
) -> None:
    with caplog.at_level("INFO"):
        model = lora_qwen2_5_vl_from_config(
            base,
            ["q_proj"],
            lora_rank=4,
            fusion_trainable="full",
            quantize_base=quantize_base,
        )

    def count(module: nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()):,}"

    encoder = model.encoders["vision"]
    adapters, merger = f"{3 * 4 * (256 + 256):,}", count(encoder.merger)
    layers = count(nn.ModuleList([encoder.patch_embed, encoder.layers]))
    assert [record.getMessage() for record in caplog.records[:3]] == [
        f"decoder: {adapters} of {count(model.decoder)} parameters are trained",
        f"encoder: 0 of {layers} parameters are trained",
        f"merger: {merger} of {merger} parameters are trained",
    ]


def test_the_first_process_alone_tells_it(
    base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    with caplog.at_level("INFO"):
        lora_qwen2_5_vl_from_config(base, ["q_proj"], lora_rank=4, fusion_trainable="full")
    assert not caplog.records


def test_what_is_trained_in_full_is_not_quantized() -> None:
    for trainable in ("frozen", "full"):
        layer: Any = build_linear(
            "encoder", "w1", 64, 64, False, trainable={"encoder": trainable}, quantize_base=True
        )
        assert isinstance(layer.weight.data, NF4Tensor) == (trainable == "frozen")


def test_a_magnitude_that_was_loaded_stays() -> None:
    layer, fresh = DoRA(8, 6, 2, 4), DoRA(8, 6, 2, 4)
    state = {name: torch.rand_like(tensor) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    fresh.load_state_dict({n: t for n, t in state.items() if n != "magnitude"}, strict=False)
    for module in (layer, fresh):
        module.initialize_dora_magnitude()
    assert torch.equal(layer.magnitude, state["magnitude"])
    assert not torch.equal(fresh.magnitude, state["magnitude"])
