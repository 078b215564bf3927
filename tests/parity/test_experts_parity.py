"""Training beside experts: the loss of their balance, and adapters of attention."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tests.parity.figures import record
from tests.parity.test_model_parity import BATCHES, samples_of
from tests.parity.test_peft_parity import (
    ATTENTION,
    LOGITS,
    adapter_of,
    base_weights,
    batch,
    difference,
    merge_adapter,
    our_logits,
    our_model,
)
from tests.reference import (
    QWEN3_VL_MOE,
    family_prefix,
    reference_config,
    reference_inputs,
    reference_model,
)
from torchtune_vl.checkpoint._adapters import load_adapter, save_adapter
from torchtune_vl.data import packed_collate_vision
from torchtune_vl.files._tensor_names import flat_name
from torchtune_vl.models import model_from_pretrained
from torchtune_vl.models._registry import family_of
from torchtune_vl.training._sharding import recompute_layers

COEFFICIENT = 0.05  # so large that a tenth of it would be seen


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_balance_of_experts(batch: str, recomputes: bool, tmp_path: Path) -> None:
    """All that is in a row counts, and in transformers' batch all but padding."""
    reference = reference_model(reference_config(QWEN3_VL_MOE))
    reference.save_pretrained(tmp_path)
    reference.config.text_config.router_aux_loss_coef = COEFFICIENT
    samples = samples_of(batch, QWEN3_VL_MOE)
    inputs = reference_inputs(samples)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = reference(**inputs, labels=labels, output_router_logits=True)
    expected.loss.backward()
    without = expected.loss - COEFFICIENT * expected.aux_loss

    model = model_from_pretrained(tmp_path, router_aux_loss_coef=COEFFICIENT).train()
    if recomputes:
        recompute_layers(model, "full")
    row = packed_collate_vision(samples)
    loss = model(**row).mean()
    loss.backward()
    assert all(layer.mlp.routed is None for layer in model.decoder.layers[::2])
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)
    assert expected.aux_loss > 3  # as many as a token has experts: that of a perfect balance
    with torch.no_grad():  # what is learned is told without it
        torch.testing.assert_close(model.eval()(**row).mean(), without, rtol=1e-6, atol=0)
    names = family_of(tmp_path).names.to_published(dict(model.named_parameters()))
    theirs = {flat_name(name): p.grad for name, p in reference.named_parameters()}
    for name, parameter in names.items():
        gradient = theirs[flat_name(name)]
        if batch == "text" and "visual" in name:
            continue
        gradient = gradient.mT if gradient.ndim == 3 else gradient
        error = (parameter.grad - gradient).norm() / gradient.norm()
        assert error < 1e-4, (name, error)
        record(f"{family_prefix(QWEN3_VL_MOE)}balance: gradients, relative", 1, float(error))
    record(
        f"{family_prefix(QWEN3_VL_MOE)}balance: losses, relative",
        1,
        float((loss / expected.loss - 1).detach().abs()),
    )


def test_balance_is_that_of_packed_rows(tmp_path: Path) -> None:
    reference_model(reference_config(QWEN3_VL_MOE)).save_pretrained(tmp_path)
    model = model_from_pretrained(tmp_path, router_aux_loss_coef=COEFFICIENT).train()
    tokens, targets = torch.ones(1, 4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    needs = "router_aux_loss_coef needs packed rows, each whole on its device"
    with pytest.raises(ValueError, match=needs):
        model(tokens, output_positions=torch.arange(4), targets=targets)
    assert model(tokens).shape == (1, 4, 600)  # of which no loss is made


@torch.no_grad()
def test_peft_loads_our_adapter_beside_experts(tmp_path: Path) -> None:
    base, shape = tmp_path / "base", QWEN3_VL_MOE
    reference_model(reference_config(shape)).save_pretrained(base)
    attention = {"lora_attn_modules": [*ATTENTION, "qkv"], "encoder_trainable": "lora"}
    model = our_model(base, False, {**attention, "apply_lora_to_output": True})
    (tmp_path / "adapter").mkdir()
    save_adapter(adapter_of(model, base), tmp_path / "adapter")
    theirs = AutoModelForImageTextToText.from_pretrained(base)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    samples = batch(shape=shape)
    inputs = reference_inputs(samples)
    ours, plain = our_logits(model, samples), model_from_pretrained(base).eval()
    assert difference(our_logits(plain, samples), ours, inputs) > 0.05
    largest = difference(ours, theirs(**inputs).logits, inputs)
    record(f"{family_prefix(shape)}adapters: logits of ours in peft, absolute", 1, largest)
    assert largest <= LOGITS
    plain.load_state_dict(merge_adapter(base_weights(base), load_adapter(tmp_path / "adapter")))
    assert difference(our_logits(plain, samples), ours, inputs) <= LOGITS
