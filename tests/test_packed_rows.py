"""Packed rows in the model: each document is as if it were alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quickstart.checkpoint import write_tiny_checkpoint
from torchtune_vl.data import packed_collate_vision, padded_collate_vision_targets
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform, qwen2_5_vl_from_config

ANSWERS = ("A cat.", "Zwei Katzen sitzen im Schnee.", "不知道", "Yes")


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory, vocabulary)
    return directory


@pytest.fixture
def model(checkpoint: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    return qwen2_5_vl_from_config(checkpoint)


def medium(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    height, width = rng.integers(30, 150, 2)
    if kind == "image":
        return {"type": "image", "image": rng.integers(0, 256, (height, width, 3), np.uint8)}
    frames = rng.integers(0, 256, (rng.integers(2, 7), height, width, 3), np.uint8)
    return {"type": "video", "video": frames, "sample_fps": 2.0}


def sample(transform: Qwen2_5_VLTransform, seed: int, kinds: Sequence[str]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    media = [medium(rng, kind) for kind in kinds]
    question = {"type": "text", "text": "What? " * int(rng.integers(1, 9))}
    turns = [
        {"role": "user", "content": [*media, question]},
        {"role": "assistant", "content": ANSWERS[seed % len(ANSWERS)]},
    ]
    made = transform({"messages": turns})
    made["labels"] = [
        -100 if ignored else token
        for token, ignored in zip(made["tokens"], made["mask"], strict=True)
    ]
    return made


@pytest.fixture(scope="module")
def samples(checkpoint: Path) -> list[dict[str, Any]]:
    transform = Qwen2_5_VLTransform.from_pretrained(checkpoint)
    kinds = (["image"], [], ["video"], ["image", "image"], ["video", "image"], [])
    return [sample(transform, seed, k) for seed, k in enumerate(kinds)]


def losses_and_gradients(
    model: torch.nn.Module, batch: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = model(**batch)
    losses.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), gradients


def test_a_packed_row_has_losses_and_gradients_of_its_documents(
    model: torch.nn.Module, samples: list[dict[str, Any]]
) -> None:
    packed, gradients = losses_and_gradients(model, packed_collate_vision(samples))
    alone = [losses_and_gradients(model, packed_collate_vision([s])) for s in samples]
    torch.testing.assert_close(
        packed, torch.cat([losses for losses, _ in alone]), rtol=1e-6, atol=0
    )
    for name, gradient in gradients.items():
        expected = sum(g[name] for _, g in alone if name in g)
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name
        assert expected.norm() > 0, name


def test_a_padded_batch_has_the_same_losses(
    model: torch.nn.Module, samples: list[dict[str, Any]]
) -> None:
    packed, gradients = losses_and_gradients(model, packed_collate_vision(samples))
    padded, padded_gradients = losses_and_gradients(model, padded_collate_vision_targets(samples))
    torch.testing.assert_close(padded, packed, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        assert (gradient - padded_gradients[name]).norm() <= 1e-5 * gradient.norm(), name


@torch.no_grad()
def test_no_document_sees_another(model: torch.nn.Module, samples: list[dict[str, Any]]) -> None:
    second = samples[3]
    changed = {**second, "tokens": [*second["tokens"]]}
    text = [i for i, ignored in enumerate(second["mask"]) if not ignored]
    for i in text:
        changed["tokens"][i] = 1000 + i
    pixels = second["encoder_input"]["vision"]
    changed["encoder_input"] = {"vision": {**pixels, "patches": pixels["patches"] + 1}}
    logits = [
        model(**{k: v for k, v in packed_collate_vision(row).items() if k not in LOSS})
        for row in (samples, [*samples[:3], changed, *samples[4:]])
    ]
    before, after = (x[0].split([len(s["tokens"]) for s in samples]) for x in logits)
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old, new) == (number != 3)


LOSS = ("targets", "output_positions")


def test_without_media_the_encoder_has_no_gradients_or_beside_other_processes_zeros(
    model: torch.nn.Module, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = packed_collate_vision([samples[1]])
    losses, alone = losses_and_gradients(model, batch)
    assert not any(name.startswith("encoders.") for name in alone)
    with torch.no_grad():
        # Without gradients products are another library's, which may round otherwise
        torch.testing.assert_close(model.eval()(**batch), losses, rtol=1e-6, atol=0)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    _, beside = losses_and_gradients(model.train(), batch)
    assert beside.keys() == {name for name, _ in model.named_parameters()}
    assert all(not g.any() for name, g in beside.items() if name.startswith("encoders."))


def test_a_row_is_as_long_as_its_documents_are_not(
    model: torch.nn.Module, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has positions of its own; one that is too long is refused."""
    row: Any = packed_collate_vision(samples)
    longest = max(row["mask"].lengths)
    assert longest < row["tokens"].numel()
    monkeypatch.setattr(model.decoder, "max_seq_len", longest)
    model(**row)
    monkeypatch.setattr(model.decoder, "max_seq_len", longest - 1)
    with pytest.raises(ValueError, match=f"^a sequence of {longest} tokens is longer than max"):
        model(**row)


def test_a_row_of_nothing(model: torch.nn.Module) -> None:
    for collate in (packed_collate_vision, padded_collate_vision_targets):
        losses, gradients = losses_and_gradients(model, collate([]))
        assert losses.shape == (0,)
        assert all(g.count_nonzero() == 0 for g in gradients.values())


def test_losses_of_many_positions_are_made_in_chunks(
    model: torch.nn.Module, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, gradients = losses_and_gradients(model, packed_collate_vision(samples))
    rows = []
    monkeypatch.setattr("torchtune_vl.modules.loss.CHUNK", 7)
    logits = model.decoder.logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(model.decoder, "logits", counted)
    chunked, chunked_gradients = losses_and_gradients(model, packed_collate_vision(samples))
    assert len(whole) > 14
    assert max(rows) == 7
    last = (len(whole) - 1) % 7 + 1
    assert sum(rows) == 2 * len(whole) - last  # again for the gradients, but for the last
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        assert (gradient - chunked_gradients[name]).norm() <= 1e-5 * gradient.norm(), name


def test_compiled_layers_are_not_compiled_for_each_row(
    model: torch.nn.Module, checkpoint: Path, samples: list[dict[str, Any]]
) -> None:
    for layer in (*model.decoder.layers, *model.encoders["vision"].layers):
        layer.forward = torch.compile(layer.forward, backend="eager")
    transform = Qwen2_5_VLTransform.from_pretrained(checkpoint)
    graphs = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(4):
        row = [sample(transform, 10 * seed + i, ["image", "video"][: i % 3]) for i in range(4)]
        model(**packed_collate_vision(row)).sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[-1]  # the second knows that sizes change
