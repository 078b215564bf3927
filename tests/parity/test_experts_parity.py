"""Training of experts and beside them: the loss of their balance, and adapters."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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
from torchtune_vl.checkpoint._adapters import WEIGHTS, load_adapter, save_adapter
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
    with pytest.raises(ValueError, match="is added to losses, and logits are asked for"):
        model(tokens)
    assert model.eval()(tokens).shape == (1, 4, 600)


ADAPTED = {
    "attention and output": {
        "lora_attn_modules": [*ATTENTION, "qkv"],
        "apply_lora_to_output": True,
    },
    "experts and feed-forwards": {"lora_attn_modules": [], "apply_lora_to_mlp": True},
    "all": {
        "lora_attn_modules": [*ATTENTION, "qkv"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": True,
        "fusion_trainable": "lora",
    },
}


@pytest.mark.parametrize("what", ADAPTED)
@torch.no_grad()
def test_peft_loads_our_adapter(tmp_path: Path, what: str) -> None:
    base, shape = tmp_path / "base", QWEN3_VL_MOE
    reference_model(reference_config(shape)).save_pretrained(base)
    model = our_model(base, False, {"encoder_trainable": "lora", **ADAPTED[what]})
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
    weights = base_weights(base)
    loaded = load_adapter(tmp_path / "adapter", weights)
    plain.load_state_dict(merge_adapter(weights, loaded))
    assert difference(our_logits(plain, samples), ours, inputs) <= LOGITS
    saved = adapter_of(model, base)
    assert loaded.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], x) for name, x in saved.tensors.items())


def trained_by_peft(directory: Path, **settings: Any) -> PeftModel:
    base = AutoModelForImageTextToText.from_pretrained(directory / "base")
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.05)
    theirs.save_pretrained(directory / "peft")
    return theirs


@pytest.mark.parametrize(
    "targets",
    [
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ["mlp.experts.gate_up_proj"],
        ["down_proj"],  # not of the layer without experts, where it is a module
        ["layers.0.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj"],
    ],
)
@torch.no_grad()
def test_an_adapter_of_experts_by_peft(tmp_path: Path, targets: list[str]) -> None:
    reference_model(reference_config(QWEN3_VL_MOE)).save_pretrained(tmp_path / "base")
    theirs = trained_by_peft(tmp_path, target_modules=["q_proj"], target_parameters=targets)
    weights = base_weights(tmp_path / "base")
    plain = model_from_pretrained(tmp_path / "base").eval()
    samples = batch(shape=QWEN3_VL_MOE)
    inputs = reference_inputs(samples)
    expected = theirs(**inputs).logits
    assert difference(our_logits(plain, samples), expected, inputs) > 0.05
    plain.load_state_dict(merge_adapter(weights, load_adapter(tmp_path / "peft", weights)))
    largest = difference(our_logits(plain, samples), expected, inputs)
    record(f"{family_prefix(QWEN3_VL_MOE)}adapters: logits of peft's, merged, absolute", 1, largest)
    assert largest <= LOGITS


WRONG: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], None], str]] = {
    "a layer lacks them": (
        lambda config, tensors: drop(tensors, r"layers\.2\.mlp\.experts"),
        r"it adapts model\.language_model\.layers\.2\.mlp\.experts\.(gate_up|down)_proj.* but ad",
    ),
    "another rank": (
        lambda config, tensors: config.update(r=3),
        r"is not of experts with adapters",
    ),
    "one without a name": (
        lambda config, tensors: (
            drop(tensors, "base_layer"),
            config.update(target_parameters=None),
        ),
        r"lora_[AB]\.weight is of experts, but not one of gate_up_proj and down_proj by target",
    ),
    "one matrix": (
        lambda config, tensors: drop(tensors, r"experts\.lora_B"),
        r"is of experts, but not one of",
    ),
}


def drop(tensors: dict[str, torch.Tensor], pattern: str) -> None:
    for name in [name for name in tensors if re.search(pattern, name)]:
        del tensors[name]


@pytest.mark.parametrize("what", WRONG)
@torch.no_grad()
def test_adapters_of_experts_that_are_wrong(tmp_path: Path, what: str) -> None:
    change, sentence = WRONG[what]
    reference_model(reference_config(QWEN3_VL_MOE)).save_pretrained(tmp_path / "base")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained_by_peft(tmp_path, target_modules=["q_proj"], target_parameters=targets)
    file, tensors = tmp_path / "peft" / "adapter_config.json", tmp_path / "peft" / WEIGHTS
    config, matrices = json.loads(file.read_text()), load_file(tensors)
    change(config, matrices)
    file.write_text(json.dumps(config))
    save_file(matrices, tensors)
    with pytest.raises(ValueError, match=sentence) as error:
        load_adapter(tmp_path / "peft", base_weights(tmp_path / "base"))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "peft") in str(error.value)
