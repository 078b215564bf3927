"""Adapters beside peft's on transformers' model: files, logits, gradients, a training run."""

from pathlib import Path
from typing import Any

import peft.tuners.lora.torchao
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torchtune import training
from torchtune.modules.peft import get_adapter_params, get_adapter_state_dict

from tests.parity.figures import record
from tests.reference import (
    Conversation,
    reference_config,
    reference_inputs,
    reference_model,
)
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.models.qwen2_5_vl import (
    lora_qwen2_5_vl_from_config,
    qwen2_5_vl_from_config,
    qwen2_5_vl_peft_to_tune,
    qwen2_5_vl_tune_to_peft,
)
from torchtune_vl.modules.adapters import is_adapter
from torchtune_vl.training import Qwen2_5_VLCheckpointer
from torchtune_vl.training._adapters import (
    Adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)

# peft refuses the torchao that torchtune needs, though no weight here is torchao's
peft.tuners.lora.torchao.is_torchao_available = lambda: False

RANK, ALPHA = 4, 10
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
LOGITS = 2e-5  # float32, products in another order
PARTS: dict[str, dict[str, Any]] = {
    "decoder": {"lora_attn_modules": ATTENTION, "apply_lora_to_mlp": True},
    "encoder": {
        "lora_attn_modules": ["qkv", "output_proj"],
        "apply_lora_to_mlp": True,
        "decoder_trainable": "frozen",
        "encoder_trainable": "lora",
    },
    "all parts and the output layer": {
        "lora_attn_modules": [*ATTENTION, "qkv"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": True,
        "encoder_trainable": "lora",
        "fusion_trainable": "lora",
    },
    "some layers, the merger in full": {
        "lora_attn_modules": ["q_proj", "qkv"],
        "encoder_trainable": "lora",
        "fusion_trainable": "full",
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    reference_model(reference_config()).save_pretrained(directory)
    return directory


def reference(base: Path) -> nn.Module:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(base)


def base_weights(base: Path) -> dict[str, torch.Tensor]:
    return Qwen2_5_VLCheckpointer(base, base.parent / "output").load_checkpoint()["model"]


def our_model(base: Path, use_dora: bool, settings: dict[str, Any], seed: int = 1) -> nn.Module:
    """Our model with adapters that have been trained, as far as values go."""
    torch.manual_seed(seed)
    model = lora_qwen2_5_vl_from_config(
        base, **settings, lora_rank=RANK, lora_alpha=ALPHA, use_dora=use_dora
    )
    missing, unexpected = model.load_state_dict(base_weights(base), strict=False)
    assert all(map(is_adapter, missing))
    assert not unexpected
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    with torch.no_grad():
        for name, parameter in get_adapter_params(model).items():
            if name.endswith("lora_b.weight"):
                parameter.normal_(0, 0.05)
            elif not name.endswith("lora_a.weight"):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    return model.eval()


def adapter_of(model: nn.Module, base: Path) -> Adapter:
    trained = {name: p.detach().clone() for name, p in get_adapter_params(model).items()}
    return Adapter(trained, RANK, ALPHA, str(base))


def batch(count: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    grids = [[(1, 8, 12)], [], [(1, 4, 4), (2, 6, 10)], [(1, 10, 6)]]
    return [
        Conversation(grids[i % 4], 12, [1.0] if i % 4 == 2 else []).sample(generator)
        for i in range(count)
    ]


def our_logits(model: nn.Module, samples: list[dict[str, Any]]) -> torch.Tensor:
    collated = padded_collate_vision(samples)
    collated.pop("labels")
    return model(**collated)


def difference(ours: torch.Tensor, theirs: torch.Tensor, inputs: dict[str, Any]) -> float:
    assert ours.abs().max() > 1
    return ((ours - theirs)[inputs["attention_mask"].bool()]).abs().max().item()


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_peft_loads_our_adapter(base: Path, tmp_path: Path, part: str, use_dora: bool) -> None:
    model = our_model(base, use_dora, PARTS[part])
    save_adapter(adapter_of(model, base), tmp_path)
    theirs = PeftModel.from_pretrained(reference(base), tmp_path).eval()
    samples = batch()
    inputs = reference_inputs(samples)
    ours = our_logits(model, samples)
    plain = qwen2_5_vl_from_config(base)
    plain.load_state_dict(base_weights(base))
    assert difference(our_logits(plain.eval(), samples), ours, inputs) > 0.05
    largest = difference(ours, theirs(**inputs).logits, inputs)
    record("adapters: logits of ours in peft, float32, absolute", 1, largest)
    assert largest <= LOGITS

    plain.load_state_dict(merge_adapter(base_weights(base), load_adapter(tmp_path)))
    largest = difference(our_logits(plain, samples), ours, inputs)
    record("adapters: logits of merged weights, float32, absolute", 1, largest)
    assert largest <= LOGITS


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@torch.no_grad()
def test_an_adapter_of_peft_loads_in_ours(base: Path, tmp_path: Path, use_dora: bool) -> None:
    torch.manual_seed(3)
    targets = r".*(q_proj|k_proj|v_proj|o_proj|qkv|attn\.proj|gate_proj|up_proj|down_proj|mlp\.0)"
    theirs = get_peft_model(
        reference(base),
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=targets,
            use_dora=use_dora,
            modules_to_save=["merger.ln_q"],
        ),
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.mul_(1.1)
        elif "lora_B" in name:
            parameter.normal_(0, 0.05)
    theirs.save_pretrained(tmp_path / "peft")
    checkpointer = Qwen2_5_VLCheckpointer(base, tmp_path / "output", adapter_dir=tmp_path / "peft")
    model = lora_qwen2_5_vl_from_config(
        base,
        [*ATTENTION, "qkv"],
        apply_lora_to_mlp=True,
        encoder_trainable="lora",
        fusion_trainable="lora",
        lora_rank=RANK,
        lora_alpha=ALPHA,
        use_dora=use_dora,
    ).eval()
    missing, unexpected = model.load_state_dict(checkpointer.load_checkpoint()["model"], False)
    assert {name.removeprefix("encoders.vision.merger.mlp.w2.") for name in missing} == {
        "lora_a.weight",
        "lora_b.weight",
        *(["magnitude"] if use_dora else []),
    }
    assert not unexpected
    for module in model.modules():  # what a recipe does after loading
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    samples = batch()
    inputs = reference_inputs(samples)
    expected = theirs(**inputs).logits
    largest = difference(our_logits(model, samples), expected, inputs)
    record("adapters: logits of peft's in ours, float32, absolute", 1, largest)
    assert largest <= LOGITS


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("part", PARTS)
def test_gradients_and_twenty_steps(base: Path, tmp_path: Path, part: str, use_dora: bool) -> None:
    model = our_model(base, use_dora, PARTS[part])
    save_adapter(adapter_of(model, base), tmp_path)
    theirs = PeftModel.from_pretrained(reference(base), tmp_path, is_trainable=True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    optimizers = [
        torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        for parameters in ([p for p in model.parameters() if p.requires_grad], trained)
    ]
    for step in range(20):
        samples = batch(4, seed=step)
        collated = padded_collate_vision(samples)
        labels = collated.pop("labels")
        losses = [
            loss_of(model(**collated), labels),
            loss_of(theirs(**reference_inputs(samples)).logits, labels),
        ]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            ours = {name: p.grad for name, p in get_adapter_params(model).items()}
            compare_gradients(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
        relative = abs(losses[0].item() / losses[1].item() - 1)
        record("adapters: loss of 20 steps beside peft, relative", 1, relative)
        assert relative <= 1e-4


def compare_gradients(ours: dict[str, torch.Tensor], theirs: nn.Module) -> None:
    expected = {
        name.replace("modules_to_save.default.", "")
        .replace(".default.weight", ".weight" if "magnitude" not in name else "")
        .replace("lora_magnitude_vector.default", "lora_magnitude_vector"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    renamed = qwen2_5_vl_tune_to_peft(ours)
    assert renamed.keys() == expected.keys()
    for name, gradient in renamed.items():
        scale = expected[name].norm()
        relative = ((gradient - expected[name]).norm() / scale).item()
        record("adapters: gradients beside peft, relative", 1, relative)
        assert relative <= 1e-4, name


def test_names_go_there_and_back(base: Path) -> None:
    model = our_model(base, True, PARTS["all parts and the output layer"])
    names = get_adapter_state_dict(model.state_dict())
    assert qwen2_5_vl_peft_to_tune(qwen2_5_vl_tune_to_peft(names)).keys() == names.keys()
    older = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for name, value in qwen2_5_vl_tune_to_peft(names).items()
    }
    assert qwen2_5_vl_peft_to_tune(older).keys() == names.keys()
    with pytest.raises(ValueError, match="1 names are not of"):
        qwen2_5_vl_peft_to_tune({"base_model.model.model.layers.0.mlp.gate.lora_A.weight": 1})


@pytest.mark.parametrize("fusion_trainable", ["lora", "full"])
def test_resuming_takes_the_base_and_the_adapter(
    base: Path, tmp_path: Path, fusion_trainable: str
) -> None:
    settings = {**PARTS["all parts and the output layer"], "fusion_trainable": fusion_trainable}
    model = our_model(base, True, settings)
    adapter = adapter_of(model, base)
    config = {"r": RANK, "lora_alpha": ALPHA}
    Qwen2_5_VLCheckpointer(base, tmp_path).save_checkpoint(
        {
            training.MODEL_KEY: merge_adapter(base_weights(base), adapter),
            training.ADAPTER_KEY: {n: t for n, t in adapter.tensors.items() if is_adapter(n)},
            training.ADAPTER_CONFIG: config,
            training.EPOCHS_KEY: 1,
        },
        epoch=0,
        intermediate_checkpoint=True,
    )
    state = Qwen2_5_VLCheckpointer(base, tmp_path, should_load_recipe_state=True).load_checkpoint()
    assert state[training.EPOCHS_KEY] == 1
    expected = {**base_weights(base), **adapter.tensors}
    assert state[training.MODEL_KEY].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[training.MODEL_KEY][name], tensor), name
    assert all(map(is_adapter, state[training.ADAPTER_KEY]))
    theirs = PeftModel.from_pretrained(reference(base), tmp_path / "epoch_0" / "adapter").eval()
    samples = batch()
    inputs = reference_inputs(samples)
    with torch.no_grad():
        largest = difference(our_logits(model, samples), theirs(**inputs).logits, inputs)
    assert largest <= LOGITS
