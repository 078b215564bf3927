"""Our model beside transformers', with the same weights through our checkpointer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.parity.figures import record
from tests.positions import defined_positions
from tests.reference import (
    IMAGE_PAD,
    QWEN2_VL,
    SHAPES,
    VIDEO_PAD,
    Conversation,
    family_prefix,
    has_steps_apart,
    reference_config,
    reference_inputs,
    reference_model,
)
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.files._tensor_names import flat_name
from torchtune_vl.models import model_from_pretrained
from torchtune_vl.models._registry import family_of

BATCHES = {
    "text": [Conversation([]), Conversation([], text_tokens=30)],
    "one_image": [Conversation([(1, 10, 14)])],
    "padded_with_text": [Conversation([], 25), Conversation([(1, 22, 6)]), Conversation([], 3)],
    "several_images": [
        Conversation([(1, 2, 2), (1, 18, 30), (1, 8, 8)]),
        Conversation([(1, 16, 16)]),
        Conversation([(1, 4, 50), (1, 4, 50)], 40),
    ],
}


class Pair:
    """A model of transformers and ours, loaded from its directory."""

    def __init__(self, shape: str, directory: Path) -> None:
        self.reference = reference_model(reference_config(shape))
        self.reference.save_pretrained(directory)
        self.ours = model_from_pretrained(directory).eval()
        self.names = family_of(directory).names
        self.shape = shape
        self.prefix = family_prefix(shape)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("models") / request.param)


def samples_of(batch: str, shape: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [conversation.sample(generator, shape) for conversation in BATCHES[batch]]


def our_logits(model: torch.nn.Module, samples: list[dict[str, Any]]) -> torch.Tensor:
    batch = padded_collate_vision(samples)
    del batch["labels"]
    return model(**batch)


def reference_logits(model: PreTrainedModel, samples: list[dict[str, Any]]) -> torch.Tensor:
    # Tokens and patches of one row at a time would do as well; the batch is padded as users' are
    model.model.rope_deltas = None
    return model(**reference_inputs(samples)).logits


def at_tokens(logits: torch.Tensor, samples: list[dict[str, Any]]) -> torch.Tensor:
    rows = [row[: len(s["tokens"])] for row, s in zip(logits, samples, strict=True)]
    return torch.cat(rows)


@pytest.mark.parametrize("batch", BATCHES)
def test_logits(pair: Pair, batch: str) -> None:
    samples = samples_of(batch, pair.shape)
    with torch.no_grad():
        ours = at_tokens(our_logits(pair.ours, samples), samples)
        reference = at_tokens(reference_logits(pair.reference, samples), samples)
    # Logits that hardly differ between tokens would make any bound easy
    assert reference.std() > 0.5
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=0)
    record(
        f"{pair.prefix}batches: logits, float32, absolute", 1, float((ours - reference).abs().max())
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_gradients(pair: Pair, batch: str) -> None:
    samples = samples_of(batch, pair.shape)
    weight = torch.randn(1, generator=torch.Generator().manual_seed(1))
    for model, logits_of in ((pair.ours, our_logits), (pair.reference, reference_logits)):
        model.zero_grad()
        logits = at_tokens(logits_of(model, samples), samples)
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits * weight).sum().backward()
    published = pair.names.to_published(
        {name: parameter.grad for name, parameter in pair.ours.named_parameters()}
    )
    ours = {flat_name(name): gradient for name, gradient in published.items()}
    # transformers 5 has experts' matrices the other way round in memory
    reference = {
        flat_name(n): p.grad if p.ndim != 3 or p.grad is None else p.grad.mT
        for n, p in pair.reference.named_parameters()
    }
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        if batch == "text" and name.startswith("visual."):
            assert ours[name] is None
            continue
        error = (ours[name] - gradient).norm() / gradient.norm()
        # The bias of the keys has no effect on softmax: its gradient is rounding noise
        if not (name.endswith("k_proj.bias") and gradient.norm() < 1e-3):
            assert error < 1e-4, f"{name}: {error:.1e}"
            record(f"{pair.prefix}parameters: gradients, float32, relative", 1, float(error))


def test_bfloat16_is_as_close_to_float32_as_the_reference(pair: Pair) -> None:
    halves = {
        "ours": copy.deepcopy(pair.ours).bfloat16(),
        "reference": copy.deepcopy(pair.reference).bfloat16(),
    }
    distance = dict.fromkeys(halves, 0.0)
    with torch.no_grad():
        for batch in BATCHES:
            samples = samples_of(batch, pair.shape)
            exact = at_tokens(reference_logits(pair.reference, samples), samples)
            ours = at_tokens(our_logits(halves["ours"], samples), samples)
            theirs = at_tokens(reference_logits(halves["reference"], samples), samples)
            distance["ours"] += float((ours - exact).pow(2).sum())
            distance["reference"] += float((theirs.float() - exact).pow(2).sum())
    ratio = (distance["ours"] / distance["reference"]) ** 0.5
    assert ratio <= 1.1
    record(f"{pair.prefix}models: bfloat16's distance from float32 / the reference's", 1, ratio)


def test_video_logits(pair: Pair) -> None:
    """With the positions of the definition: see ``tests/positions.py``."""
    generator = torch.Generator().manual_seed(0)
    conversation = Conversation([(1, 6, 6), (9, 4, 6), (2, 4, 4)], 9, [1.0, 0.5])
    samples = [conversation.sample(generator, pair.shape)]
    inputs = reference_inputs(samples)
    if not has_steps_apart(pair.shape):  # with which releases agree
        positions = defined_positions(
            samples[0]["tokens"],
            conversation.grids,
            # A step of Qwen2-VL's grid is one position, whatever the clock says
            [0.5, 0.5] if pair.shape == QWEN2_VL else conversation.seconds_per_step,
            image_token_id=IMAGE_PAD,
            video_token_id=VIDEO_PAD,
        )
        inputs["position_ids"] = positions.T[:, None]
    pair.reference.model.rope_deltas = None
    with torch.no_grad():
        ours = our_logits(pair.ours, samples)
        reference = pair.reference(**inputs).logits
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=0)
