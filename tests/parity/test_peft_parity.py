"""Adapters beside peft's on transformers' model: files, logits, gradients, a training run."""

import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft.tuners.lora.torchao
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torchtune import training
from torchtune.modules.peft import get_adapter_params, get_adapter_state_dict

from tests.parity.figures import record
from tests.reference import (
    QWEN2_VL,
    QWEN3_VL,
    Conversation,
    family_prefix,
    reference_config,
    reference_inputs,
    reference_model,
)
from torchtune_vl.checkpoint._adapters import (
    _HARMLESS,
    Adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    targeted_modules,
)
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.files._json import read_json_object
from torchtune_vl.models._registry import family_of
from torchtune_vl.models.qwen2_5_vl import (
    lora_qwen2_5_vl_from_config,
    qwen2_5_vl_from_config,
    qwen2_5_vl_peft_to_tune,
    qwen2_5_vl_tune_to_peft,
)
from torchtune_vl.modules.adapters import is_adapter
from torchtune_vl.training import Qwen2_5_VLCheckpointer, merge

# peft refuses torchao before 0.16, though no weight here is torchao's
if Version(version("torchao")) < Version("0.16"):
    peft.tuners.lora.torchao.is_torchao_available = lambda: False

RANK, ALPHA = 4, 10
UNTIED = "grouped_untied"
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
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    bases = {
        shape: tmp_path_factory.mktemp(shape)
        for shape in (UNTIED, "head_dim_128", QWEN2_VL, QWEN3_VL)
    }
    for shape, directory in bases.items():
        reference_model(reference_config(shape)).save_pretrained(directory)
    return bases


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases[UNTIED]


def reference(base: Path) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(base)


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
    return Adapter(trained, RANK, ALPHA, str(base), family_of(base).names)


def batch(count: int = 3, seed: int = 0, shape: str = UNTIED) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    grids = [[(1, 8, 12)], [], [(1, 4, 4), (2, 6, 10)], [(1, 10, 6)]]
    return [
        Conversation(grids[i % 4], 12, [1.0] if i % 4 == 2 else []).sample(generator, shape)
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
@pytest.mark.parametrize("shape", [UNTIED, QWEN2_VL, QWEN3_VL])
@torch.no_grad()
def test_peft_loads_our_adapter(
    bases: dict[str, Path], tmp_path: Path, part: str, use_dora: bool, shape: str
) -> None:
    base, prefix = bases[shape], family_prefix(shape)
    model = our_model(base, use_dora, PARTS[part])
    save_adapter(adapter_of(model, base), tmp_path)
    theirs = PeftModel.from_pretrained(reference(base), tmp_path).eval()
    samples = batch(shape=shape)
    inputs = reference_inputs(samples)
    ours = our_logits(model, samples)
    plain = qwen2_5_vl_from_config(base)
    plain.load_state_dict(base_weights(base))
    assert difference(our_logits(plain.eval(), samples), ours, inputs) > 0.05
    largest = difference(ours, theirs(**inputs).logits, inputs)
    record(f"{prefix}adapters: logits of ours in peft, float32, absolute", 1, largest)
    assert largest <= LOGITS

    weights = base_weights(base)
    plain.load_state_dict(merge_adapter(weights, load_adapter(tmp_path, weights)))
    largest = difference(our_logits(plain, samples), ours, inputs)
    record(f"{prefix}adapters: logits of merged weights, float32, absolute", 1, largest)
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


# What peft can make that our merge computes rightly: settings, and the shape of the base
RIGHT: dict[str, tuple[dict[str, Any], str]] = {
    "random start": ({"init_lora_weights": False}, UNTIED),
    "gaussian start": ({"init_lora_weights": "gaussian"}, UNTIED),
    "EVA": ({"init_lora_weights": "eva"}, UNTIED),
    "orthogonal start": ({"init_lora_weights": "orthogonal"}, UNTIED),
    "output layer": ({"target_modules": ["q_proj", "lm_head"]}, UNTIED),
    "DoRA of the output layer": (
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        UNTIED,
    ),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, UNTIED),
    "whole merger": ({"modules_to_save": ["merger"]}, UNTIED),
    "tied embedding": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "head_dim_128",
    ),
    "all linear layers": ({"target_modules": "all-linear"}, "head_dim_128"),
}
# ... and what it must refuse, with a part of the message
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, UNTIED, "init_lora_weights is 'pissa'.*merge_and"),
    "OLoRA": ({"init_lora_weights": "olora"}, UNTIED, "init_lora_weights is 'olora'"),
    "MiCA": ({"init_lora_weights": "mica"}, UNTIED, "init_lora_weights is 'mica'"),
    "rsLoRA": ({"use_rslora": True}, UNTIED, "use_rslora is True"),
    "ranks": ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, UNTIED, "rank_pattern is {"),
    "alphas": ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, UNTIED, "alpha_pattern is {"),
    "biases": ({"bias": "lora_only"}, UNTIED, "bias is 'lora_only'"),
    "biases of B": ({"lora_bias": True}, UNTIED, "lora_bias is True"),
    "tokens": ({"trainable_token_indices": [1, 2]}, UNTIED, "trainable_token_indices is"),
    "aLoRA": (
        {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        UNTIED,
        "alora_invocation_tokens is .*no weights compute the same",
    ),
    "convolution": (
        {"target_modules": ["q_proj", "patch_embed.proj"]},
        UNTIED,
        "patch_embed.proj.weight .*of a convolution, merge it by .*merge_and_unload",
    ),
    "adapter of the embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        UNTIED,
        "embed_tokens.lora_embedding_A.*merge_and_unload",
    ),
    "embedding that is no longer tied": (
        {"modules_to_save": ["embed_tokens"]},
        "head_dim_128",
        "token embedding and the output layer, lm_head, are one.*merge_and_unload",
    ),
    "output layer that is tied": (
        {"target_modules": ["q_proj", "lm_head"]},
        "head_dim_128",
        "an adapter of lm_head not even peft merges rightly: train one without",
    ),
}


def trained_by_peft(base: Path, directory: Path, settings: dict[str, Any]) -> nn.Module:
    """An adapter of peft on transformers' model whose parameters have all moved, and its files."""
    torch.manual_seed(3)
    defaults = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
    theirs = get_peft_model(reference(base), LoraConfig(**{**defaults, **settings})).eval()
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.mul_(1.1)
        elif parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.parametrize("kind", RIGHT)
@torch.no_grad()
def test_adapters_of_peft_are_merged(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    settings, shape = RIGHT[kind]
    base = bases[shape]
    theirs = trained_by_peft(base, tmp_path / "peft", settings)
    merge(base, tmp_path / "peft", tmp_path / "merged")
    samples = batch()
    inputs = reference_inputs(samples)
    expected = theirs(**inputs).logits
    assert difference(reference(base)(**inputs).logits, expected, inputs) > 0.05
    merged = reference(tmp_path / "merged").eval()
    largest = difference(merged(**inputs).logits, expected, inputs)
    record("adapters: logits of merged weights, float32, absolute", 1, largest)
    assert largest <= LOGITS


@pytest.mark.parametrize("kind", REFUSED)
@torch.no_grad()
def test_adapters_of_peft_that_are_more_are_refused(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    settings, shape, message = REFUSED[kind]
    trained_by_peft(bases[shape], tmp_path / "peft", settings)
    with pytest.raises(ValueError, match=message) as error:
        merge(bases[shape], tmp_path / "peft", tmp_path / "merged")
    assert str(tmp_path / "peft") in str(error.value)
    assert not (tmp_path / "merged").exists()
    checkpointer = Qwen2_5_VLCheckpointer(
        bases[shape], tmp_path / "output", adapter_dir=tmp_path / "peft"
    )
    with pytest.raises(ValueError, match=message):
        checkpointer.load_checkpoint()


def test_every_setting_of_peft_is_known(base: Path, tmp_path: Path) -> None:
    """Of each field of the installed peft's config: its default is taken, a strange value not."""
    with torch.no_grad():
        trained_by_peft(base, tmp_path, {})
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    assert content.keys() >= {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    load_adapter(tmp_path)
    for key in content.keys() - _HARMLESS:
        path.write_text(json.dumps({**content, key: "strange"}))
        with pytest.raises(ValueError, match=f"{key} is 'strange', expected plain LoRA"):
            load_adapter(tmp_path)


# Whose layers are told by names, by a pattern, or by what is left out
TARGETS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "qkv", "mlp.0"]},
    "names of both decoder and encoder": {"target_modules": ["gate_proj", "o_proj", "lm_head"]},
    "one name in full": {"target_modules": ["model.language_model.layers.1.self_attn.q_proj"]},
    "pattern": {"target_modules": r"^(?!.*visual).*\.(q_proj|up_proj)"},
    "pattern of layers": {"target_modules": r"model\.visual\.blocks\.[13]\..*qkv"},
    "one left out": {"target_modules": ["q_proj", "qkv"], "exclude_modules": ["blocks.0.attn.qkv"]},
    "some left out": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*visual.*"},
    "part in full": {"target_modules": "all-linear", "modules_to_save": ["merger"]},
}


@pytest.mark.parametrize("which", TARGETS)
def test_which_layers_peft_adapts(base: Path, tmp_path: Path, which: str) -> None:
    model = reference(base)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    theirs = get_peft_model(model, LoraConfig(r=RANK, **TARGETS[which]))
    theirs.peft_config["default"].save_pretrained(tmp_path)
    config = read_json_object(tmp_path / "adapter_config.json")
    adapted = targeted_modules(config, linear)
    assert sorted(adapted) == sorted(theirs.base_model.targeted_module_names)
    assert 0 < len(adapted) < len(linear)


@pytest.mark.parametrize("before_4_52", [False, True])
def test_layers_that_the_file_lacks(base: Path, tmp_path: Path, before_4_52: bool) -> None:
    """peft leaves them as they are in the base, and only warns."""
    with torch.no_grad():
        targets = r"model\.language_model\.layers\.\d\.self_attn\.[qv]_proj"
        trained_by_peft(base, tmp_path / "peft", {"target_modules": targets})
    path, config = (
        tmp_path / "peft" / f"adapter_{x}" for x in ("model.safetensors", "config.json")
    )
    tensors = load_file(path)
    if before_4_52:  # names of modules then, in pattern and tensors
        tensors = {name.replace("language_model.", ""): t for name, t in tensors.items()}
        content = json.loads(config.read_text())
        content["target_modules"] = targets.replace(r"language_model\.", "")
        config.write_text(json.dumps(content))
        save_file(tensors, path)
    merge(base, tmp_path / "peft", tmp_path / "whole")
    save_file({n: t for n, t in tensors.items() if "1.self_attn.v_proj" not in n}, path)
    lacking = (
        r"it adapts model\..*layers.1.self_attn.v_proj, but .*safetensors has nothing of these"
    )
    with pytest.raises(ValueError, match=lacking):
        merge(base, tmp_path / "peft", tmp_path / "merged")
    checkpointer = Qwen2_5_VLCheckpointer(base, tmp_path / "out", adapter_dir=tmp_path / "peft")
    with pytest.raises(ValueError, match=lacking):
        checkpointer.load_checkpoint()


def test_adapters_of_some_layers_by_number(base: Path, tmp_path: Path) -> None:
    """Which layers these numbers mean is not looked at."""
    with torch.no_grad():
        settings = {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}
        trained_by_peft(base, tmp_path / "peft", settings)
    merge(base, tmp_path / "peft", tmp_path / "merged")


def test_weights_of_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """peft writes the output layer beside its adapter: it tells what the adapter was trained on."""
    with torch.no_grad():
        settings = {"target_modules": ["q_proj", "lm_head"]}
        trained_by_peft(bases[UNTIED], tmp_path / "peft", settings)
    other = reference_model(reference_config(UNTIED), seed=1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"output.weight is not as in checkpoint_dir: name the b"):
        merge(tmp_path / "other", tmp_path / "peft", tmp_path / "merged")
    # Loaded in another dtype it is the same base
    reference(bases[UNTIED]).bfloat16().save_pretrained(tmp_path / "half")
    merge(tmp_path / "half", tmp_path / "peft", tmp_path / "merged")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    merge(bases[UNTIED], tmp_path / "peft", tmp_path / "merged_from_half")


@torch.no_grad()
def test_peft_loads_our_tied_embedding(bases: dict[str, Path], tmp_path: Path) -> None:
    """A decoder in full on a base whose output layer is its embedding: both move in peft too."""
    base = bases["head_dim_128"]
    settings = {
        "lora_attn_modules": ["qkv"],
        "decoder_trainable": "full",
        "encoder_trainable": "lora",
    }
    model = our_model(base, False, settings)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(Adapter(trained, RANK, ALPHA, str(base), family_of(base).names), tmp_path)
    theirs = PeftModel.from_pretrained(reference(base), tmp_path).eval()
    samples = batch()
    inputs = reference_inputs(samples)
    ours = our_logits(model, samples)
    assert difference(ours, theirs(**inputs).logits, inputs) <= LOGITS
    state = Qwen2_5_VLCheckpointer(base, tmp_path / "out", adapter_dir=tmp_path).load_checkpoint()
    model.load_state_dict(state["model"])
    assert difference(our_logits(model, samples), ours, inputs) == 0
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, path)
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(ValueError, match="one alone, or each in its own way"):
        merge(base, tmp_path, tmp_path / "merged")


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    "use_dora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["LoRA", "DoRA"]
)
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
        qwen2_5_vl_peft_to_tune({"base_model.model.model.layers.0.mlp.other.lora_A.weight": 1})


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
