"""What the model offers beside logits: switches, positions, chunks, errors of dimensions."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchtune.modules import TransformerSelfAttentionLayer

from tests.reference import Conversation, reference_config
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.media._patches import normalization_by, patchify
from torchtune_vl.models._registry import families
from torchtune_vl.models.qwen2_5_vl import (
    GEOMETRY,
    Qwen2_5_VLImageTransform,
    qwen2_5_vl,
    qwen2_5_vl_from_config,
)
from torchtune_vl.modules import concatenate_patches


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("config")
    reference_config().save_pretrained(directory)
    return directory


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    conversations = [Conversation([(1, 6, 10)]), Conversation([])]
    collated = padded_collate_vision([c.sample(generator) for c in conversations])
    del collated["labels"]
    return collated


@pytest.mark.parametrize(
    ("switches", "trained"),
    [
        ({}, {"decoder", "encoder", "fusion"}),
        ({"decoder_trainable": False}, {"encoder", "fusion"}),
        ({"encoder_trainable": False}, {"decoder", "fusion"}),
        ({"encoder_trainable": False, "fusion_trainable": False}, {"decoder"}),
        ({"decoder_trainable": False, "encoder_trainable": False}, {"fusion"}),
    ],
)
def test_switches(directory: Path, switches: dict[str, bool], trained: set[str]) -> None:
    model = qwen2_5_vl_from_config(directory, **switches)
    model(**batch()).mean().backward()

    def part(name: str) -> str:
        if ".merger." in name:
            return "fusion"
        return "encoder" if name.startswith("encoders.") else "decoder"

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part(name) in trained), name
        assert (parameter.grad is not None) == (part(name) in trained), name


@pytest.mark.parametrize("family", [f.package for f in families()])
def test_a_family_gives_what_it_names(family: str) -> None:
    package = import_module(f"torchtune_vl.models.{family}")
    assert dir(package) == sorted(package.__all__)
    given = {name: getattr(package, name) for name in package.__all__}
    assert all(callable(function) for name, function in given.items() if name != "GEOMETRY")
    size = next(iter(package.FAMILY.sizes))
    named = {family, f"lora_{family}_from_config", f"qlora_{family}_{size}", f"{family}_tune_to_hf"}
    assert named <= {*given}
    with pytest.raises(AttributeError, match=f"'torchtune_vl.models.{family}' has no .* 'of_9b'"):
        package.of_9b  # noqa: B018


def test_layers_are_torchtunes_to_its_recipes(directory: Path) -> None:
    model = qwen2_5_vl_from_config(directory)
    layers = [m for m in model.modules() if isinstance(m, TransformerSelfAttentionLayer)]
    assert len(layers) == 3 + 4


@torch.no_grad()
def test_positions_of_text(directory: Path) -> None:
    model = qwen2_5_vl_from_config(directory).eval()
    tokens = torch.randint(0, 500, (2, 7))
    default = model(tokens)
    one_axis = torch.arange(7).expand(2, -1)
    assert torch.equal(model(tokens, input_pos=one_axis), default)
    assert torch.equal(model(tokens, input_pos=one_axis[..., None].expand(-1, -1, 3)), default)
    assert not torch.allclose(model(tokens, input_pos=2 * one_axis), default)


@torch.no_grad()
def test_chunks_and_positions_of_output(directory: Path) -> None:
    model = qwen2_5_vl_from_config(directory).eval()
    inputs = batch()
    logits = model(**inputs)
    some = model(**inputs, output_positions=torch.tensor([1, 5, 30]))
    torch.testing.assert_close(some, logits.flatten(0, 1)[[1, 5, 30]])
    model.set_num_output_chunks(4)
    torch.testing.assert_close(torch.cat(model(**inputs), dim=1), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uint8_patches_give_the_same_embeddings(directory: Path, dtype: torch.dtype) -> None:
    encoder = qwen2_5_vl_from_config(directory).encoders["vision"].to(dtype)
    pixels = torch.randint(0, 256, (3, 84, 140), dtype=torch.uint8)
    as_float, as_uint8 = (
        Qwen2_5_VLImageTransform(patch_dtype=patch_dtype)({"image": pixels})
        for patch_dtype in ("float32", "uint8")
    )
    assert as_uint8["pixel_values"].shape == (60, 588)
    assert as_uint8["pixel_values"].nbytes * 8 == as_float["pixel_values"].nbytes
    assert torch.equal(as_uint8["image_grid_thw"], as_float["image_grid_thw"])
    embeddings = [encoder(s["pixel_values"], s["image_grid_thw"]) for s in (as_float, as_uint8)]
    assert torch.equal(*embeddings)


@torch.no_grad()
def test_uint8_patches_of_images_and_videos_together(directory: Path) -> None:
    encoder = qwen2_5_vl_from_config(directory).encoders["vision"]
    generator = np.random.default_rng(0)
    media = [
        generator.integers(0, 256, shape, dtype=np.uint8)
        for shape in ((1, 56, 84, 3), (4, 84, 56, 3), (1, 28, 28, 3))
    ]
    grids = torch.tensor([[1, 4, 6], [2, 6, 4], [1, 2, 2]])
    normalization = normalization_by(GEOMETRY.mean, GEOMETRY.std)
    as_float = torch.cat(
        [torch.from_numpy(patchify(frames, GEOMETRY, normalization)) for frames in media]
    )
    as_uint8 = [torch.from_numpy(patchify(frames, GEOMETRY)) for frames in media]
    assert [p.shape[1] for p in as_uint8] == [588, 1176, 588]
    joined = concatenate_patches(as_uint8)
    assert joined.shape == as_float.shape
    assert torch.equal(encoder(joined, grids), encoder(as_float, grids))
    images = [as_uint8[0], as_uint8[2]]
    assert concatenate_patches(images).shape == (28, 588)  # no copy where there is no video


@torch.no_grad()
def test_uint8_patches_of_the_pil_backend_differ_by_rounding(directory: Path) -> None:
    """Its order of operations, x / 255 - mean, differs from the model's in the last bit."""
    encoder = qwen2_5_vl_from_config(directory).encoders["vision"]
    pixels = torch.randint(0, 256, (3, 90, 150), dtype=torch.uint8)
    embeddings = []
    for patch_dtype in ("float32", "uint8"):
        transform = Qwen2_5_VLImageTransform(backend="pil", patch_dtype=patch_dtype)
        sample = transform({"image": pixels})
        embeddings.append(encoder(sample["pixel_values"], sample["image_grid_thw"]))
    torch.testing.assert_close(*embeddings, atol=1e-6, rtol=0)


@torch.no_grad()
def test_gradient_free_feed_forward_is_the_recorded_one(directory: Path) -> None:
    """The in-place product must not change what autograd computes, nor the other way round."""
    model = qwen2_5_vl_from_config(directory)
    layer = model.encoders["vision"].layers[0].mlp
    x = torch.randn(5, 64)
    free = layer(x)
    with torch.enable_grad():
        recorded = layer(x)
        plain = layer.w2(torch.nn.functional.silu(layer.w1(x)) * layer.w3(x))
        expected = torch.autograd.grad(plain.sum(), layer.w3.weight)[0]
        actual = torch.autograd.grad(recorded.sum(), layer.w3.weight)[0]
    assert torch.equal(free, recorded)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ({"embed_dim": 100, "num_heads": 3}, "100 does not divide into 3 heads of twice"),
        ({"head_dim": 64}, r"head_dim is 64, and not twice the sum .* \[16, 24, 24\]"),
        ({"deepstack_layers": range(9)}, "a decoder of 1 layers is too short: 9 layers of the enc"),
        (
            {"mrope_sections": (16, 24, 23)},
            r"2 heads of twice the sum .* \[16, 24, 23\]",
        ),
        ({"vision_embed_dim": 1281}, "width of 1281 does not divide into 16 heads"),
        (
            {"vision_embed_dim": 96},
            "16 heads of a dimension divisible by 4",
        ),
    ],
)
def test_dimensions_that_do_not_fit(dimensions: dict[str, Any], message: str) -> None:
    fitting: dict[str, Any] = {
        "vocab_size": 10,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "embed_dim": 256,
        "intermediate_dim": 8,
        "tie_word_embeddings": True,
        "vision_intermediate_dim": 8,
    }
    with torch.device("meta"):
        qwen2_5_vl(**fitting)
        with pytest.raises(ValueError, match=message):
            qwen2_5_vl(**{**fitting, **dimensions})
