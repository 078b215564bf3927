"""What a run keeps, goes on from, and refuses to go on from."""

import json
import os
import resource
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchao.optim
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from tests.finetune_runs import (
    read_losses,
    read_metric,
    read_samples,
    run,
    start,
    write_config,
    write_inputs,
)
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_hf_to_tune
from torchtune_vl.recipes._check_config import read_config
from torchtune_vl.recipes._config_keys import Config
from torchtune_vl.recipes.finetune import FinetuneRecipe
from torchtune_vl.training import Qwen2_5_VLCheckpointer
from torchtune_vl.training._fingerprint import FIXED
from torchtune_vl.training._saved_steps import Steps

COUNT = 24
VALIDATION = {
    "_component_": "torchtune_vl.datasets.vision_chat_dataset",
    "source": "json",
    "data_files": "${dataset.data_files}",
    "split": "train[:6]",
}
SETTINGS = {
    "max_steps": 4,
    "save_every_n_steps": 2,
    "keep_last": 2,
    "dataset_val": VALIDATION,
    "eval_every_n_steps": 1,
    # Rises at the end, so that the best step is not the last
    "lr_scheduler": {"_component_": "tests.test_going_on.up_at_the_end"},
}


def up_at_the_end(optimizer: Any, num_training_steps: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < num_training_steps - 1 else -50.0
    )


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("going_on")
    write_inputs(root, vocabulary, COUNT)
    return root


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    """The config of a run that is finished."""
    config = write_config(root, root / "finished", SETTINGS)
    run(config)
    return config


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The config of a copy of it."""
    output = tmp_path / "run"
    shutil.copytree(finished.with_suffix(""), output)
    config = OmegaConf.load(finished)
    config.output_dir = str(output)
    OmegaConf.save(config, output.with_suffix(".yaml"))
    return output.with_suffix(".yaml")


def recipe(config: Path, *overrides: str) -> FinetuneRecipe:
    return FinetuneRecipe(read_config(["--config", str(config), *overrides]))


def refusal(config: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        recipe(config, "resume=True", *overrides).setup()
    dist.destroy_process_group()
    message = str(error.value)
    assert "\n" not in message
    return message


def weights(epoch: Path) -> dict[str, torch.Tensor]:
    return qwen2_5_vl_hf_to_tune(load_file(epoch / "model.safetensors"))


def test_the_end_of_a_run(copy: Path, finished: Path) -> None:
    output, epoch = copy.with_suffix(""), finished.with_suffix("") / "epoch_0"
    losses = read_metric(output, "validation_loss")
    del losses[0]  # before the first step
    assert min(losses, key=losses.__getitem__) == 3
    assert {path.name for path in (output / "steps").iterdir()} == {"step_3", "step_4"}

    # Torn by a power failure, and not our file
    log = output / "samples" / "process_0.jsonl"
    samples = read_samples(output)
    with log.open("a") as file:
        file.write('{"step": 4, "samp')
    (output / "samples" / "notes").mkdir()
    process = start(copy, 1, "resume=True", "export=best")
    messages, _ = process.communicate()
    assert process.returncode == 0, messages[-3000:]
    assert "The run ended with step 4: raise max_steps or epochs to train on" in messages
    assert read_samples(output) == samples
    best = weights(output / "epoch_0")
    state = {"model": {name: torch.empty_like(tensor) for name, tensor in best.items()}}
    dcp.load(state, checkpoint_id=output / "steps" / "step_3", no_dist=True)
    last = weights(epoch)
    for name, tensor in best.items():
        assert torch.equal(tensor, state["model"][name]), name
    assert not all(torch.equal(tensor, last[name]) for name, tensor in best.items())

    assert "step_4 is of an earlier run: if that has steps, go on with resume=True, or name" in (
        refusal(copy, "resume=False")
    )
    assert "step 4 already, and is to end after step 3" in refusal(copy, "max_steps=3")

    shutil.rmtree(output / "steps")
    for resume in ("resume=True", "resume=False"):
        assert "epoch_0 is of an earlier run: if that has steps, go on" in refusal(copy, resume)


@pytest.mark.slow
def test_a_run_that_is_made_longer(root: Path, finished: Path, tmp_path: Path) -> None:
    """It has the learning rates of the longer run from there on, and what its export needs."""
    config = write_config(root, tmp_path / "run", SETTINGS)
    output, whole = tmp_path / "run", finished.with_suffix("")
    process = start(
        config, 1, "max_steps=2", "checkpointer._component_=tests.test_going_on.Failing"
    )
    messages, _ = process.communicate()
    assert "no room" in messages
    assert process.returncode != 0
    assert (output / "steps" / "step_2").is_dir()
    assert not [*output.glob("epoch_*")]
    process = start(config, 1, "resume=True")
    messages, _ = process.communicate()
    assert process.returncode == 0, messages[-3000:]
    assert "was to end after step 2, and is to end after step 4 now" in messages
    rates, expected = (read_metric(run, "lr_decoder") for run in (output, whole))
    assert rates == {step: rate for step, rate in expected.items() if step > 2}
    assert rates[3] < 0 < expected[1]
    assert read_samples(output) == read_samples(whole)


class Failing(Qwen2_5_VLCheckpointer):
    """Whose disk is full when the run ends."""

    def save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        """Fail."""
        raise OSError("no room")


@pytest.mark.slow
def test_smaller_rows_for_the_rest_of_an_epoch(root: Path, tmp_path: Path) -> None:
    """What helps when memory ran out: each sample is still trained on once."""
    settings = {"rows.max_patches": None, "rows.max_tokens": 700, "rows_per_step": 2}
    config = write_config(root, tmp_path / "run", {**settings, "max_steps": 2})
    before = read_samples(tmp_path / "run") if run(config) else {}
    smaller = ("max_steps=null", "rows.max_tokens=400", "rows_per_step=4")
    run(config, 1, "resume=True", *smaller)
    samples = read_samples(tmp_path / "run")
    assert {step: samples[step] for step in before} == before
    assert sorted(s for step in samples.values() for s in step) == [*range(COUNT)]
    rows = [
        json.loads(line)
        for line in (tmp_path / "run/samples/process_0.jsonl").read_text().splitlines()
    ]
    assert {sum(row["step"] == step for row in rows) for step in (3, len(samples))} == {4}


def test_what_may_not_change(copy: Path, root: Path, tmp_path: Path) -> None:
    for override, change in {
        "optimizer.lr=2e-3": "optimizer.lr was 0.001 and is 0.002",
        "dtype=bf16": "dtype was 'fp32' and is 'bf16'",
        "model.encoder_trainable=False": "model.encoder_trainable was True and is False",
        "tokenizer.max_seq_len=100": "tokenizer.max_seq_len was 16384 and is 100",
        "dataset_val=null": "dataset_val was None",
    }.items():
        message = refusal(copy, override)
        assert "a run goes on with the settings that it began with, but" in message
        assert change in message or "dataset_val" in change

    base = tmp_path / "other"
    shutil.copytree(root / "base", base)
    there = f"checkpoint_dir={base}"
    recipe(copy, "resume=True", there, *MAY_CHANGE).setup()
    dist.destroy_process_group()

    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    (base / "checksums.json").unlink(missing_ok=True)
    assert "model that it began with, but config.json of checkpoint_dir has changed" in refusal(
        copy, there
    )
    shutil.copy(root / "base" / "config.json", base)
    tensors = load_file(base / "model.safetensors")
    tensors["visual.merger.mlp.0.bias"][0] += 1
    save_file(tensors, base / "model.safetensors")
    assert "but what the checkpointer loads has changed" in refusal(copy, there)

    data = root / "train.jsonl"
    text = data.read_text(encoding="utf-8")
    try:
        data.write_text(text.replace("Yes", "No."), encoding="utf-8")
        assert "dataset that it began with, but train.jsonl has changed" in refusal(copy)
    finally:
        data.write_text(text, encoding="utf-8")


MAY_CHANGE = (
    "rows.max_tokens=600",
    "rows.lookahead=64",
    "num_workers=1",
    "keep_last=1",
    "save_every_n_steps=null",
    "eval_every_n_steps=null",
    "log_every_n_steps=3",
    "activation_checkpointing=full",
    "max_steps=9",
)


def test_a_save_in_flight_outlives_an_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Steps.finish

    def slow(steps: Steps, partial: Path) -> None:
        time.sleep(0.5)
        finish(steps, partial)

    monkeypatch.setattr(Steps, "finish", slow)
    config = write_config(root, tmp_path / "run", {"save_every_n_steps": 1})
    failing = recipe(config)
    failing.setup()
    log = failing._log

    def fail() -> bool:
        if failing.step == 2:
            raise RuntimeError("an error")
        return log()

    monkeypatch.setattr(failing, "_log", fail)
    with pytest.raises(RuntimeError, match="an error"):
        failing.train()
    assert [path.name for path in (tmp_path / "run" / "steps").iterdir()] == ["step_1"]
    failing.cleanup()


@pytest.mark.slow
def test_a_disk_that_is_full(copy: Path) -> None:
    output = copy.with_suffix("")
    size = max(path.stat().st_size for path in (output / "steps" / "step_4").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        process = start(copy, 1, "resume=True", "max_steps=8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    messages, _ = process.communicate()
    assert process.returncode == 2, messages[-3000:]
    assert f"{output}/steps/step_" in messages.splitlines()[-1]
    assert " cannot be written (" in messages.splitlines()[-1]
    assert {path.name for path in (output / "steps").iterdir()} == {"step_3", "step_4"}


@pytest.mark.slow
def test_two_processes_go_on_from_an_older_step(root: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_every_n_steps": 1, "keep_last": 3}
    whole = run(write_config(root, tmp_path / "whole", settings), 2)
    config = write_config(root, tmp_path / "parts", settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "steps" / "step_4" / "__1_0.distcp").unlink()
    os.truncate(tmp_path / "parts" / "steps" / "step_3" / ".metadata", 100)
    process = start(config, 2, "resume=True")
    messages, _ = process.communicate()
    assert process.returncode == 0, messages[-3000:]
    assert messages.count("and the run goes on from step_2") == 2
    assert read_losses(tmp_path / "parts") == {step: whole[step] for step in (3, 4)}
    assert read_samples(tmp_path / "parts") == read_samples(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts" / "epoch_0").items():
        assert torch.equal(tensor, weights(tmp_path / "whole" / "epoch_0")[name]), name


def adamw_8bit(params: Any, **settings: Any) -> torch.optim.Optimizer:
    """What torchao compiles, for a minute, as it is."""
    torch.compiler.set_stance("force_eager")
    return torchao.optim.AdamW8bit(params, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_8_bit_optimizer_goes_on(root: Path, tmp_path: Path, processes: int) -> None:
    settings = {
        "max_steps": 4,
        "optimizer": {"_component_": "tests.test_going_on.adamw_8bit", "lr": 1e-3},
        "lr_scheduler": None,
        "dataset_val": VALIDATION,
    }
    whole = run(write_config(root, tmp_path / "whole", settings), processes)
    config = write_config(root, tmp_path / "parts", settings)
    run(config, processes, "max_steps=2")
    run(config, processes, "resume=True")
    assert read_losses(tmp_path / "parts") == {step: whole[step] for step in (3, 4)}
    for name, tensor in weights(tmp_path / "parts" / "epoch_0").items():
        assert torch.equal(tensor, weights(tmp_path / "whole" / "epoch_0")[name]), name


def test_all_keys_that_may_not_change_are_keys() -> None:
    assert {field.name for field in fields(Config)} >= set(FIXED)
