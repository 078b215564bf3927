"""Sampling and limits of generation, and that it goes on as training has it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtune.generation import generate as torchtune_generate
from torchtune.modules import local_kv_cache

from tests.reference import (
    IMAGE_PAD,
    VIDEO_PAD,
    Conversation,
    reference_config,
    reference_model,
)
from torchtune_vl.data import packed_collate_vision, padded_collate_vision
from torchtune_vl.data._collate import padded_collate_vision_targets
from torchtune_vl.generation import generate
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config
from torchtune_vl.modules.layout import mrope_positions
from torchtune_vl.modules.vision import _blank
from torchtune_vl.training import Qwen2_5_VLCheckpointer


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    reference_config().save_pretrained(tmp_path)
    torch.manual_seed(0)
    return qwen2_5_vl_from_config(tmp_path).eval()


def prompts() -> dict:
    generator = torch.Generator().manual_seed(0)
    samples = [Conversation([(1, 4, 4)]).sample(generator), Conversation([]).sample(generator)]
    return padded_collate_vision(samples, pad_direction="left")


def test_prompts_padded_on_the_right_are_refused(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = padded_collate_vision([Conversation([]).sample(generator)])
    with pytest.raises(ValueError, match='pad_direction="left"'):
        generate(model, batch, max_new_tokens=1, stop_tokens=[])


def test_top_1_is_greedy_and_temperature_varies(model: torch.nn.Module) -> None:
    greedy = generate(model, prompts(), max_new_tokens=6, stop_tokens=[])
    top_1 = generate(model, prompts(), max_new_tokens=6, stop_tokens=[], temperature=1.0, top_k=1)
    assert top_1 == greedy
    torch.manual_seed(0)
    hot = [
        generate(model, prompts(), max_new_tokens=6, stop_tokens=[], temperature=3.0)
        for _ in range(3)
    ]
    assert hot[0] != hot[1] != hot[2]


def test_prompts_that_leave_no_room(model: torch.nn.Module) -> None:
    model.decoder.max_seq_len = 30
    with pytest.raises(ValueError, match="max_seq_len of 30"):
        generate(model, prompts(), max_new_tokens=20, stop_tokens=[])
    assert not model.caches_are_setup()


def prompts_of_text() -> dict[str, Any]:
    sample = Conversation([]).sample(torch.Generator().manual_seed(0))
    del sample["labels"]
    return padded_collate_vision([sample], pad_direction="left")


def test_training_after_generation(model: torch.nn.Module) -> None:
    # So that the encoder runs without media, as it does beside other processes
    for module in (model.decoder,):
        module.requires_grad_(False)
    _blank.cache_clear()
    model.train()
    with torch.inference_mode():
        model(**prompts_of_text())
    model(**prompts_of_text()).sum().backward()
    assert all(not p.grad.any() for p in model.encoders.parameters())


@pytest.mark.parametrize("sharded", [False, True])
def test_tokens_are_decoded_without_the_encoder(model: torch.nn.Module, sharded: bool) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        runs = []
        model.encoders["vision"].register_forward_hook(lambda *_: runs.append(1))
        if sharded:
            for layer in model.encoders["vision"].layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        (answer,) = generate(model, prompts_of_text(), max_new_tokens=6, stop_tokens=[])
        assert len(answer) == 6
        assert len(runs) == sharded  # other processes could have media in their prompts
        model(**packed_collate_vision([]))
        assert len(runs) == 2 * sharded  # and in their rows, where this one's is empty
    finally:
        torch.distributed.destroy_process_group()


MIXES = [
    Conversation([], 7),
    Conversation([(1, 4, 6)]),
    Conversation([(1, 4, 6), (1, 12, 4)], 3),
    Conversation([(20, 4, 4)], 4, [1.0]),
    Conversation([(6, 4, 4), (1, 4, 6)], 5, [2.5]),
    Conversation([(1, 8, 4), (9, 2, 4), (12, 4, 2)], 2, [2.0, 0.5]),
]


def answered(conversation: Conversation, prompt: dict[str, Any], answer: list[int]) -> dict:
    """The sample that trains an answer to a prompt."""
    tokens = prompt["tokens"] + answer
    grid_thw = torch.tensor(conversation.grids, dtype=torch.int64).reshape(-1, 3)
    positions = mrope_positions(
        tokens,
        grid_thw,
        conversation.intervals,
        placeholder_ids=(IMAGE_PAD, VIDEO_PAD),
        merge_size=2,
    )
    labels = [-100] * len(prompt["tokens"]) + answer
    return {**prompt, "tokens": tokens, "labels": labels, "input_pos": positions}


def test_answers_are_written_where_training_has_them(tmp_path: Path) -> None:
    """Positions of each new token, and the logits that chose it, in padded and packed rows."""
    reference_model(reference_config("head_dim_128")).save_pretrained(tmp_path / "model")
    model = qwen2_5_vl_from_config(tmp_path / "model").eval()
    checkpointer = Qwen2_5_VLCheckpointer(tmp_path / "model", tmp_path / "unused")
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    generator = torch.Generator().manual_seed(3)
    prompts = [conversation.sample(generator) for conversation in MIXES]
    written: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: written.append(kwargs["input_pos"]), with_kwargs=True
    )
    batch = padded_collate_vision(prompts, pad_direction="left")
    answers = generate(model, batch, max_new_tokens=8, stop_tokens=[])
    hook.remove()
    steps = torch.cat(written[1:], dim=1)  # the last token is not read again

    samples = [answered(*each) for each in zip(MIXES, prompts, answers, strict=True)]
    for sample, prompt, positions in zip(samples, prompts, steps, strict=True):
        assert sample["input_pos"][len(prompt["tokens"]) : -1].tolist() == positions.tolist()
    for collate in (padded_collate_vision_targets, packed_collate_vision):
        row = collate(samples)
        targets = row.pop("targets").tolist()
        assert targets == [token for answer in answers for token in answer]
        with torch.no_grad():
            assert model(**row).argmax(-1).flatten().tolist() == targets


@pytest.mark.parametrize("rng", [None, torch.Generator()], ids=["greedy", "drawn from one"])
@pytest.mark.parametrize("cached", [True, False])
def test_torchtunes_own_generation(
    cached: bool, rng: torch.Generator | None, tmp_path: Path
) -> None:
    """Of text, with its caches and without, as ours."""
    reference_config().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = qwen2_5_vl_from_config(tmp_path).eval()
    sample = Conversation([], 7).sample(torch.Generator().manual_seed(0))
    batch = padded_collate_vision([sample], pad_direction="left")
    ours = generate(model, batch, max_new_tokens=5, stop_tokens=[])
    prompt = torch.tensor(sample["tokens"])
    arguments = {"batch_size": 1, "device": torch.device("cpu"), "dtype": torch.float32}
    cache = local_kv_cache(model, **arguments, decoder_max_seq_len=len(prompt) + 5)
    with cache if cached else nullcontext():
        assert model.caches_are_enabled() == cached
        theirs, _ = torchtune_generate(model, prompt, max_generated_tokens=5, top_k=1, rng=rng)
    assert theirs[0, len(prompt) :].tolist() == ours[0]
    assert not model.caches_are_setup()
