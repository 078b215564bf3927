"""The computed memory beside that of a real model, its optimizer and its forward."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config as torchtune_config

from benchmarks.memory import Case, apart
from quickstart.checkpoint import CONFIG
from tests.finetune_runs import NARROW_QWEN3_VL_MOE
from torchtune_vl.cli import main
from torchtune_vl.modules import Segments
from torchtune_vl.modules.adapters import num_bytes
from torchtune_vl.recipes import config_path
from torchtune_vl.training._memory import PURPOSES, _Alive, _OptimizerBytes, _Run, estimate_memory
from torchtune_vl.training._mesh import Mesh

MODELS = "torchtune_vl.models.qwen2_5_vl"
PARALLEL: dict[str, Any] = {
    **{"replicate": 1, "shard": None, "context": 1, "tensor": 1, "experts": 1},
    "cpu_offload": False,
}
CHANGES = {
    "num_key_value_heads": 2,
    "image_token_id": 592,
    "video_token_id": 593,
    "vocab_size": 600,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("memory")
    (directory / "config.json").write_text(json.dumps({**CONFIG, **CHANGES}))
    return directory


def settings(checkpoint: Path, **changes: Any) -> DictConfig:
    model = {
        "_component_": f"{MODELS}.qwen2_5_vl_from_config",
        "checkpoint_dir": str(checkpoint),
    }
    return OmegaConf.create(
        {
            "model": model,
            "rows": {"max_tokens": 456, "max_patches": 1600},
            "optimizer": {"_component_": "torch.optim.AdamW", "fused": True},
            "dtype": "fp32",
            "compute_dtype": None,
            "activation_checkpointing": "none",
            "activation_offloading": False,
            "rows_per_step": 8,
            "parallel": PARALLEL,
            **changes,
        }
    )


def lora(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    return {
        "_component_": f"{MODELS}.lora_qwen2_5_vl_from_config",
        "checkpoint_dir": str(checkpoint),
        "lora_attn_modules": ["q_proj", "v_proj"],
        **changes,
    }


def estimate(checkpoint: Path, devices: int = 1, **changes: Any) -> dict[str, int]:
    return estimate_memory(settings(checkpoint, **changes), devices)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_states_are_those_of_a_real_model(checkpoint: Path, method: str) -> None:
    cfg = settings(checkpoint)
    if method != "full":
        cfg.model = lora(checkpoint, quantize_base=method == "qlora")
    memory = estimate_memory(cfg)

    model = torchtune_config.instantiate(cfg.model)
    assert memory["weights"] == sum(map(num_bytes, model.parameters()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert memory["gradients"] == sum(p.nbytes for p in trained)
    states = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    assert memory["optimizer"] == sum(x.nbytes for x in states)


def test_gradients_of_earlier_rows_are_there_in_forward(checkpoint: Path) -> None:
    several, one = (estimate(checkpoint, rows_per_step=rows) for rows in (2, 1))
    assert several["weights"] == several["gradients"] > one["gradients"]


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_devices_share_states_and_gather_layers(checkpoint: Path, method: str) -> None:
    changes = {"model": lora(checkpoint, quantize_base=True)} if method == "qlora" else {}
    one, four = (
        estimate(checkpoint, devices, rows_per_step=2 * devices, **changes) for devices in (1, 4)
    )
    for name in ("weights", "gradients", "optimizer"):
        assert four[name] == pytest.approx(one[name] / 4, rel=0.001)
    assert one["gathered layers"] == 0
    assert 0 < four["gathered layers"] < one["weights"]


def test_copies_of_the_weights_share_nothing(checkpoint: Path) -> None:
    parallel = {**PARALLEL, "replicate": 2, "shard": 2}
    copied = estimate(checkpoint, 4, parallel=parallel, rows_per_step=8)
    assert copied == estimate(checkpoint, 2, rows_per_step=4)


def test_offloading(checkpoint: Path) -> None:
    parallel = {**PARALLEL, "cpu_offload": True}
    changes = {"activation_checkpointing": "full", "rows_per_step": 4}
    here = estimate(checkpoint, 4, **changes)
    on_host = estimate(checkpoint, 4, parallel=parallel, activation_offloading=True, **changes)
    for name in ("weights", "gradients", "optimizer", "activations"):
        assert on_host[name] == 0 < here[name]
    assert on_host["gathered layers"] > 0


def test_devices_share_rows_and_layers(checkpoint: Path) -> None:
    one = estimate(checkpoint, rows_per_step=2)
    rows = estimate(checkpoint, 2, parallel={**PARALLEL, "context": 2}, rows_per_step=2)
    assert rows["weights"] == pytest.approx(one["weights"] / 2, rel=0.001)
    # A device keeps the keys and values of all
    assert one["activations"] / 2 < rows["activations"] < 0.7 * one["activations"]
    plan = {"_component_": "torchtune_vl.modules.parallelism.decoder_tp_plan"}
    parallel = {**PARALLEL, "tensor": 2, "plan": plan}
    layers = estimate(checkpoint, 2, parallel=parallel, rows_per_step=2)
    assert one["weights"] / 2 < layers["weights"] < one["weights"]
    assert one["activations"] / 2 < layers["activations"] < one["activations"]
    assert not torch.distributed.is_initialized()


def test_devices_share_experts(tmp_path: Path) -> None:
    text: Any = NARROW_QWEN3_VL_MOE["text_config"]
    wide = {**text, "moe_intermediate_size": 1024, "vocab_size": 600}
    config = {
        **NARROW_QWEN3_VL_MOE,
        **{"text_config": wide, "image_token_id": 590, "video_token_id": 591},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = {
        "_component_": "torchtune_vl.models.model_from_pretrained",
        "checkpoint_dir": str(tmp_path),
        "weights": False,
    }
    alone, two, four = (
        estimate(
            tmp_path,
            4,
            model=model,
            rows={"max_tokens": 64, "max_patches": 16},
            parallel={**PARALLEL, "experts": n},
        )
        for n in (1, 2, 4)
    )
    for name in ("weights", "gradients", "optimizer"):
        assert two[name] == pytest.approx(alone[name], rel=0.001)
        assert four[name] == pytest.approx(alone[name], rel=0.001)
    assert four["gathered layers"] < two["gathered layers"] < alone["gathered layers"]
    assert not torch.distributed.is_initialized()


def test_half_precision_computation_halves_activations(checkpoint: Path) -> None:
    whole = estimate(checkpoint)
    half = estimate(checkpoint, compute_dtype="bf16")
    assert half["weights"] == whole["weights"]
    assert 0.5 < half["activations"] / whole["activations"] < 0.7


def test_checkpointing_keeps_inputs_of_layers(checkpoint: Path) -> None:
    changes = {"model": lora(checkpoint), "rows": {"max_tokens": 456, "max_patches": 4}}
    none, selective, full = (
        estimate(checkpoint, activation_checkpointing=mode, **changes)
        for mode in ("none", "selective", "full")
    )
    assert none["activations"] > selective["activations"] > full["activations"]
    inputs = 4 * 456 * 128 * 4  # layers, tokens, width, bytes
    outputs = 3 * 456 * 128 * 4  # selected, normalized, and the input of the last norm
    assert inputs < full["activations"] < inputs + 1.1 * outputs


def test_8_bit_optimizer_takes_a_quarter_of_float32(checkpoint: Path) -> None:
    small = estimate(checkpoint, optimizer={"_component_": "torchao.optim.AdamW8bit"})
    ratio = small["optimizer"] / estimate(checkpoint)["optimizer"]
    assert 0.25 < ratio < 0.27


def test_an_optimizer_takes_memory_for_its_step() -> None:
    fused, plain, single = (
        _OptimizerBytes.of(
            OmegaConf.create({"_component_": "torch.optim.AdamW", **how}), torch.float32
        )
        for how in ({"fused": True}, {}, {"foreach": False})
    )
    assert {x.kept for x in (fused, plain, single)} == {8}
    assert fused.temporary == 0
    assert (plain.temporary, plain.takes_all_at_once) == (4, True)  # the square root, of all
    assert single.temporary > 0
    assert not single.takes_all_at_once


def test_the_optimizers_step_can_be_the_peak(checkpoint: Path) -> None:
    rows = {"max_tokens": 4, "max_patches": 16}
    optimizer = {"_component_": "torch.optim.AdamW"}
    memory = estimate(checkpoint, rows=rows, optimizer=optimizer)
    assert memory["gradients"] == memory["weights"]
    assert memory["optimizer"] == 3 * memory["weights"]
    assert memory["layers at work"] == memory["activations"] == 0


def test_rows_of_padded_samples_are_as_long_as_can_be(checkpoint: Path) -> None:
    padded = estimate(checkpoint, rows={"batch_size": 3}, tokenizer={"max_seq_len": 152})
    packed = estimate(checkpoint, rows={"max_tokens": 456, "max_patches": None})
    assert padded == packed
    less = estimate(checkpoint, rows={"max_tokens": 456, "max_patches": 64})
    assert less["activations"] < packed["activations"]


def test_rows_may_be_longer_than_a_sample(checkpoint: Path) -> None:
    short = estimate(checkpoint, rows={"max_tokens": 4096, "max_patches": 64})  # a sample's most
    long = estimate(checkpoint, rows={"max_tokens": 4100, "max_patches": 64})
    assert long["activations"] > short["activations"]


def test_nothing_trained_is_refused(checkpoint: Path) -> None:
    cfg = settings(checkpoint)
    cfg.model.update({f"{part}_trainable": False for part in ("decoder", "encoder", "fusion")})
    with pytest.raises(ValueError, match="nothing is trained"):
        estimate_memory(cfg)


def test_what_is_alive_is_counted_once() -> None:
    alive = _Alive({"weights": 7})
    given = torch.empty(100)
    alive.leave_out([given])
    with alive:
        x = given + 1
        view = x[1:]
        del x
        given.mul_(2)
        assert alive.now == {"weights": 7, "layers at work": 400}
        alive.move(view, "activations")
        y = view * 2
        del view
    assert alive.now.total() == 7 + y.nbytes
    assert alive.peak == {"weights": 7, "activations": 400, "layers at work": 396}


def test_a_layer_keeps_what_cuda_kernels_keep(checkpoint: Path) -> None:
    tokens, width, hidden, keys, heads = 456, 128, 384, 2 * 64, 2
    run = _Run(settings(checkpoint, dtype="bf16"), Mesh(1, 1, 1, 1))
    layer = run.model.decoder.layers[0]
    with torch.device("meta"):
        x = torch.empty(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        rope = torch.empty(1, tokens, 2, width // heads)
    documents = Segments.of([tokens]).to(torch.device("meta"))
    run.alive.leave_out([x, rope, documents.boundaries])
    states = run.alive.now.total()
    with run.alive:
        out = layer(x, mask=documents, rope=rope)
    # The inputs of projections, attention and feed-forward, both sums, and a factor of each norm
    kept = 2 * (6 * width + 2 * keys + 4 * hidden) + 4 * heads + 2 * 4
    small = 16 + documents.boundaries.nbytes  # the state of a dropout that is not there
    assert run.alive.now.total() - states == pytest.approx(tokens * kept, abs=small)
    assert out.requires_grad


def test_a_group_is_gathered_in_a_buffer_and_copied_out_of_it(checkpoint: Path) -> None:
    run = _Run(settings(checkpoint), Mesh(1, 4, 1, 1))
    assert run.sharding is not None
    before, layer = run.sharding.groups[-2:]
    size = sum(p.nbytes for p in layer.parameters)

    def gathered() -> float:
        return run.alive.now["gathered layers"] / size

    with run.alive:
        before.pre_forward()
        assert gathered() == 2
        before.post_forward()
        assert gathered() == 1
        layer.pre_forward()
        assert gathered() == 2
        assert sum(run.alive.peak.values()) - sum(run._states()[0].values()) == 2 * size
        layer.post_forward()
        run.sharding.gathered = None  # at the end of forward
        layer.pre_backward()
        assert gathered() == 2  # its weights, and the buffer of the one before
        for p in layer.parameters:
            p.grad = torch.empty_like(p)
        layer.post_backward()
        assert gathered() == 2  # that buffer, and the float32 gradients that are reduced
        assert run.alive.now["gradients"] == size / 4
        before.pre_backward()
        before.post_backward()
        assert gathered() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_is_that_of_the_allocator() -> None:
    found = apart(Case("lora", "3b", 8))
    assert found["estimate"] == pytest.approx(found["allocated"], rel=0.08)
    assert found["sent"] < 1.05 * found["kept"]


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.load(config_path("qwen2_5_vl/full"))
    config.update(settings(checkpoint, checkpoint_dir=str(checkpoint)))
    config.rows._component_ = "torchtune_vl.data.PackedRows"
    config.parallel.shard = None
    path = tmp_path / "mine.yaml"
    OmegaConf.save(config, path)
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "dtype=bf16", "--config", str(path), "seed=1", "--devices", "2"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "GB on each of 2 devices, computed, not measured"
    with pytest.raises(SystemExit):
        main(["estimate", "dtype=bf16", "--config", str(path), "seed=1"])
    assert capsys.readouterr().out.startswith("GB on the device, computed, not measured\n")
    assert tuple(line[:16].strip() for line in lines[1:]) == (*PURPOSES, "all")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", "nowhere.yaml"),
        ("other.yaml", "rows is missing"),
        ("qwen2_5_vl/full", "needs its config.json"),
    ],
)
def test_command_refuses(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("batch_size: 2")
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--config", name])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
