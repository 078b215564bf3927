"""Runs that go on with an adapter, by the real command."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from tests.finetune_runs import read_losses, read_samples, run, start, write_config, write_inputs
from tests.plain_loop import plain_run
from torchtune_vl.checkpoint._adapters import load_adapter
from torchtune_vl.datasets import vision_chat_dataset
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform
from torchtune_vl.recipes._check_config import read_config
from torchtune_vl.recipes.finetune import FinetuneRecipe

MODEL: dict[str, Any] = {
    "model.lora_attn_modules": ["q_proj", "v_proj", "qkv"],
    "model.apply_lora_to_mlp": False,
    "model.lora_rank": 4,
    "model.lora_alpha": 6,
    "model.encoder_trainable": "lora",
    "max_steps": 2,
}
STILL: dict[str, Any] = {
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.0, "weight_decay": 0.0},
    "max_steps": 1,
}


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter_runs")
    write_inputs(root, vocabulary, count=8)
    return root


def config(
    root: Path, name: str, settings: dict[str, Any], shipped: str = "qwen2_5_vl/lora"
) -> Path:
    model = {
        "model._component_": "torchtune_vl.models.qwen2_5_vl.lora_qwen2_5_vl_from_config",
        "model.checkpoint_dir": str(root / "base"),
    }
    return write_config(root, root / name, {**model, **MODEL, **settings}, shipped)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(next(directory.glob("*model.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"model.use_dora": True, "model.fusion_trainable": "full"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"model.quantize_base": True, "dtype": "bf16", "num_workers": 1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["DoRA, merger in full", "LoRA", "QLoRA"],
)
def test_going_on_and_what_does_not_fit(root: Path, tmp_path: Path, settings: Any) -> None:
    """Without a learning rate a run exports what it was given, and it says what it cannot do."""
    first = tmp_path.name + "_first"
    run(config(root, first, settings))
    saved = root / first / "epoch_0"
    adapter = {"checkpointer.adapter_dir": str(saved / "adapter")}
    before, base = load_adapter(saved / "adapter"), tensors(root / "base")
    merged = tensors(saved)
    assert any(not torch.equal(merged[name], base[name].to(merged[name].dtype)) for name in base)

    second = tmp_path.name + "_second"
    run(config(root, second, {**settings, **adapter, **STILL}))
    again = root / second / "epoch_0"
    after = load_adapter(again / "adapter")
    assert (after.rank, after.alpha, after.base) == (before.rank, before.alpha, before.base)
    for ours, theirs in ((after.tensors, before.tensors), (tensors(again), merged)):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name

    third = tmp_path.name + "_third"
    others = {**MODEL, **settings, "model.lora_alpha": 12, "model.fusion_trainable": "frozen"}
    others["model.lora_attn_modules"] = ["q_proj", "k_proj", "qkv"]
    process = start(config(root, third, {**others, **adapter}))
    messages, _ = process.communicate()
    assert process.returncode not in (0, None)
    assert "lora_rank 4 and lora_alpha 12, it has 4 and 6" in messages
    assert "the adapter alone has decoder.layers.0.attn.v_proj.lora_a.weight" in messages
    assert "the model alone trains decoder.layers.0.attn.k_proj.lora_a.weight" in messages
    assert not list((root / third).glob("epoch_*"))
    assert "Step 1" not in messages


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("qwen2_5_vl/qlora", 1), ("qwen2_5_vl/lora", 2)])
def test_small_steps_of_adapters_on_bfloat16_weights(
    root: Path, tmp_path: Path, name: str, processes: int
) -> None:
    """They are those of a loop in float32, where bfloat16 would lose most of each."""
    shipped = {
        "dtype": "bf16",
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-5, "fused": True},
        "lr_scheduler": None,
        "num_workers": 2,
        "model.fusion_trainable": "full",
        "model.lora_rank": 16,
        "max_steps": 4,
    }
    path = config(root, tmp_path.name, shipped, name)
    process = start(path, processes)
    messages, _ = process.communicate()
    assert process.returncode == 0, messages[-3000:]
    assert "last place" not in messages

    output = path.with_suffix("")
    dataset = vision_chat_dataset(
        Qwen2_5_VLTransform.from_pretrained(root / "base"),
        source="json",
        data_files=str(root / "train.jsonl"),
    )
    plain = plain_run(path, dataset, read_samples(output))
    for step, loss in read_losses(output).items():
        assert loss == pytest.approx(plain.losses[step], rel=5e-3)
    step = output / "steps" / "step_4"
    saved = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
    dtypes = {x.properties.dtype for x in saved.values() if hasattr(x, "properties")}
    assert dtypes <= {torch.float32, torch.uint8}  # of random states
    state = {"model": {name: torch.empty_like(tensor) for name, tensor in plain.start.items()}}
    dcp.load(state, checkpoint_id=step, no_dist=True)
    for part in (".lora_a.", ".lora_b.", ".merger.norm.", ".merger.mlp."):
        names = [name for name in plain.start if part in name]
        ours, expected = (
            torch.cat([(end[name] - plain.start[name]).flatten() for name in names])
            for end in (state["model"], plain.end)
        )
        cosine = torch.nn.functional.cosine_similarity(ours, expected, dim=0)
        length = ours.norm() / expected.norm()
        assert cosine > 0.95, part
        assert length == pytest.approx(1, abs=0.02), part


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts tensors that are kept for a backward which does not ask for them."""

    def __init__(self) -> None:
        self.waiting: dict[int, torch.Tensor] = {}
        self.count = 0
        super().__init__(self.keep, self.waiting.pop)

    def keep(self, tensor: torch.Tensor) -> int:
        self.count += 1
        self.waiting[self.count] = tensor
        return self.count


@pytest.mark.parametrize("encoder", ["frozen", "lora"])
def test_backward_asks_for_all_that_is_kept(encoder: str, root: Path) -> None:
    """Or else torchtune's offloading of activations ends the second step."""
    settings = {"model.encoder_trainable": encoder, "activation_checkpointing": "full"}
    if encoder == "frozen":
        settings["model.lora_attn_modules"] = ["q_proj", "v_proj"]  # type: ignore[assignment]
    path = config(root, f"kept_{encoder}", settings)
    recipe = FinetuneRecipe(read_config(["--config", str(path)]))
    recipe.setup()
    recipe.offloading = kept = Kept()
    recipe.train()
    recipe.cleanup()
    assert kept.count > 0
    assert not kept.waiting
