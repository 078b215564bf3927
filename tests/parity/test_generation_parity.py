"""Answers beside transformers' generate."""

from pathlib import Path

import pytest
import torch

from tests.parity.figures import record
from tests.reference import (
    QWEN2_VL,
    Conversation,
    family_prefix,
    reference_config,
    reference_inputs,
    reference_model,
)
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.generation import generate
from torchtune_vl.models import model_from_pretrained

PROMPTS = {
    "text": [Conversation([], 6)],
    "padded_text": [Conversation([], 3), Conversation([], 11)],
    "images": [Conversation([(1, 6, 10)]), Conversation([(1, 4, 4), (1, 12, 18)])],
    "mixed": [Conversation([], 5), Conversation([(1, 18, 4)]), Conversation([], 20)],
}


@pytest.mark.parametrize("shape", ["head_dim_128", "grouped_untied", QWEN2_VL])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_greedy_answers(shape: str, prompts: str, tmp_path: Path) -> None:
    reference = reference_model(reference_config(shape))
    reference.save_pretrained(tmp_path / "model")
    model = model_from_pretrained(tmp_path / "model").eval()

    generator = torch.Generator().manual_seed(3)
    samples = [conversation.sample(generator, shape) for conversation in PROMPTS[prompts]]
    inputs = reference_inputs(samples, pad="left")
    length = inputs["input_ids"].shape[1]
    free = reference.generate(
        **inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, length:].tolist()
    # A token of the first answer stops all: some answers end early, others never
    stop = free[0][5]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]

    batch = padded_collate_vision(samples, pad_direction="left")
    assert generate(model, batch, max_new_tokens=12, stop_tokens=[]) == free
    assert generate(model, batch, max_new_tokens=12, stop_tokens=[stop]) == expected
    record(f"{family_prefix(shape)}prompts: tokens of greedy answers", 2 * len(samples), 0)
    # The caches are gone: the model trains on as before
    assert not model.caches_are_setup()
