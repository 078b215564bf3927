"""Sampling and limits of generation."""

from pathlib import Path

import pytest
import torch

from tests.reference import Conversation, reference_config
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.generation import generate
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    reference_config().save_pretrained(tmp_path)
    torch.manual_seed(0)
    return qwen2_5_vl_from_config(tmp_path).eval()


def prompts() -> dict:
    generator = torch.Generator().manual_seed(0)
    samples = [Conversation([(1, 4, 4)]).sample(generator), Conversation([]).sample(generator)]
    return padded_collate_vision(samples, pad_direction="left")


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
