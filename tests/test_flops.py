"""Operations counted by formula beside those that torch counts as it runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.reference import QWEN3_VL, Conversation
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.models.qwen2_5_vl import lora_qwen2_5_vl, qwen2_5_vl, qwen2_5_vl_7b
from torchtune_vl.models.qwen3_vl import lora_qwen3_vl, qwen3_vl
from torchtune_vl.models.qwen3_vl_moe import lora_qwen3_vl_moe, qwen3_vl_moe
from torchtune_vl.training._flops import FlopCounter, peak_flops

DIMENSIONS: dict[str, Any] = {
    "vocab_size": 600,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 256,
    "intermediate_dim": 320,
    "mrope_sections": (8, 12, 12),
    "vision_intermediate_dim": 192,
    "vision_embed_dim": 64,
    "vision_num_layers": 4,
    "vision_num_heads": 4,
    "full_attention_layers": (1, 3),
    "image_token_id": 592,
    "video_token_id": 593,
}
GRIDS = [(1, 8, 12), (2, 10, 4), (1, 18, 22)]
LORA = {"lora_attn_modules": ["q_proj", "v_proj", "qkv"], "apply_lora_to_mlp": True}


def full(**settings: Any) -> nn.Module:
    return qwen2_5_vl(**DIMENSIONS, **{"tie_word_embeddings": False, **settings})


def lora(**settings: Any) -> nn.Module:
    return lora_qwen2_5_vl(**DIMENSIONS, **{"tie_word_embeddings": False, **LORA, **settings})


def deepstack(build: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    own = {"embed_dim": 96, "head_dim": 64, "position_grid": 5, "deepstack_layers": (0, 2)}
    left_out = ("embed_dim", "full_attention_layers")
    dimensions = {k: v for k, v in DIMENSIONS.items() if k not in left_out}
    return build(**dimensions, **own, tie_word_embeddings=False, **settings)


def experts(build: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    own = {"num_experts": 7, "num_active_experts": 3, "expert_dim": 40, "dense_layers": (1,)}
    # torch counts no grouped products, and has none of float64
    return deepstack(build, **own, **settings).double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "full": full,
    "tied": lambda: full(tie_word_embeddings=True),
    "decoder": lambda: full(encoder_trainable=False, fusion_trainable=False),
    "merger": lambda: full(encoder_trainable=False, decoder_trainable=False),
    "encoder": lambda: full(fusion_trainable=False, decoder_trainable=False),
    "lora": lambda: lora(lora_attn_modules=["k_proj"]),
    "lora everywhere": lambda: lora(
        encoder_trainable="lora", fusion_trainable="lora", apply_lora_to_output=True
    ),
    "lora and merger": lambda: lora(lora_attn_modules=["q_proj"], fusion_trainable="full"),
    "deepstack": lambda: deepstack(qwen3_vl),
    "deepstack, mergers": lambda: deepstack(
        qwen3_vl, encoder_trainable=False, decoder_trainable=False
    ),
    "deepstack, lora everywhere": lambda: deepstack(
        lora_qwen3_vl, encoder_trainable="lora", fusion_trainable="lora", **LORA
    ),
    "experts": lambda: experts(qwen3_vl_moe),
    "experts, mergers": lambda: experts(
        qwen3_vl_moe, encoder_trainable=False, decoder_trainable=False
    ),
    "experts, lora": lambda: experts(lora_qwen3_vl_moe, lora_attn_modules=["q_proj"]),
    "qlora": lambda: lora(
        lora_attn_modules=["output_proj"], quantize_base=True, apply_lora_to_mlp=False
    ),
}


def counted_by_torch(model: nn.Module, batch: dict[str, Any]) -> int:
    # The kernel for attention is one that torch counts product by product
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(**batch).sum()
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grids", [GRIDS, []], ids=["media", "text"])
def test_equals_what_torch_counts(name: str, grids: list[tuple[int, int, int]]) -> None:
    model = MODELS[name]().eval()  # in training the encoder runs without media too
    shape = QWEN3_VL if name.startswith(("deepstack", "experts")) else ""
    conversation = Conversation(grids, seconds_per_step=[1.0])
    sample = conversation.sample(torch.Generator().manual_seed(0), shape)
    batch = padded_collate_vision([sample])
    del batch["labels"]
    batch["output_positions"] = torch.arange(5)
    media = batch["encoder_input"]["vision"] if grids else None
    tokens = len(sample["tokens"])

    counter = FlopCounter(model)
    ours = counter.step([tokens], media, 5)
    # torch counts what the causal mask hides, n (n - 1) / 2 pairs. That many has one document of
    # n tokens, n (n + 1) / 2, more than n documents of a token.
    hidden = ours - counter.step([1] * tokens, media, 5)
    assert hidden > 0
    assert ours + hidden == counted_by_torch(model, batch)


def test_documents_cost_what_they_cost_alone() -> None:
    counter = FlopCounter(full())
    alone = sum(counter.step([n], None, targets) for n, targets in [(7, 3), (100, 0), (1, 1)])
    assert counter.step([7, 100, 1], None, 4) == alone
    assert counter.step([108], None, 4) > alone
    assert counter.step([], None, 0) == 0


def test_published_size_is_six_operations_per_weight() -> None:
    """The rule of thumb, in which attention of short documents and the embedding do not count."""
    with torch.device("meta"):
        model = qwen2_5_vl_7b()
    named = model.decoder.named_parameters()
    weights = sum(p.numel() for name, p in named if p.ndim > 1 and "tok_embeddings" not in name)
    flops = FlopCounter(model).step([1] * 1000, None, 1000)
    assert flops == pytest.approx(6 * weights * 1000, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peak_of_known_devices(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40", "Tesla T4", "cpu", ""]
)
def test_other_devices_have_no_peak(name: str) -> None:
    assert peak_flops(name) is None
