"""Our recipe on one process and on two, stopped and gone on with."""

import json
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.finetune_runs import (
    command,
    kill_after,
    last_step,
    read_losses,
    read_metric,
    read_samples,
    run,
    start,
    write_config,
    write_inputs,
)
from torchtune_vl.checkpoint._adapters import load_adapter, merge_adapter
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform, qwen2_5_vl_hf_to_tune
from torchtune_vl.training import export

COUNT = 24


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    write_inputs(root, vocabulary, COUNT)
    return root


def weights(output: Path) -> dict[str, torch.Tensor]:
    (epoch,) = output.glob("epoch_*")
    return load_file(epoch / "model.safetensors")


def same(losses: dict[int, float], others: dict[int, float]) -> bool:
    assert losses
    assert losses.keys() == others.keys()
    difference = max(abs(loss / others[step] - 1) for step, loss in losses.items())
    print(f"largest relative difference in {len(losses)} steps: {difference:.2g}")
    return difference <= 1e-5


ADAPTERS = {
    "_component_": "torchtune_vl.models.qwen2_5_vl.lora_qwen2_5_vl_from_config",
    "checkpoint_dir": "${checkpoint_dir}",
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "qkv", "output_proj"],
    "lora_rank": 4,
    "lora_alpha": 8,
    "encoder_trainable": "lora",
}

TOKENIZER = {
    "_component_": "torchtune_vl.models.qwen2_5_vl.Qwen2_5_VLTransform.from_pretrained",
    "checkpoint_dir": "${checkpoint_dir}",
    "patch_dtype": "uint8",
}

MODES: dict[str, dict[str, Any]] = {
    "FSDP": {},
    "tensor parallel": {"parallel.tensor": 2},
    "both, on four processes": {"parallel.tensor": 2, "clip_grad_norm": 0.5},
    "one rank has text alone": {
        "rows": {"_component_": "torchtune_vl.data.PaddedRows", "batch_size": 1},
        "shuffle": False,
    },
    "LoRA, encoder frozen": {
        "model": {**ADAPTERS, "lora_attn_modules": ["q_proj"], "encoder_trainable": "frozen"},
        "optimizer.lr": 1e-2,
    },
    "DoRA": {"model": {**ADAPTERS, "use_dora": True}, "optimizer.lr": 1e-2},
    "QLoRA": {"model": {**ADAPTERS, "quantize_base": True}, "optimizer.lr": 1e-2},
}


VALIDATION = {
    "_component_": "torchtune_vl.datasets.vision_chat_dataset",
    "source": "json",
    "data_files": "${dataset.data_files}",
    "split": "train[:6]",
}


def test_a_run_and_what_it_leaves(root: Path, tmp_path: Path) -> None:
    settings = {
        "tokenizer": {**TOKENIZER, "max_pixels": 15_000, "fps": 1.5, "add_vision_id": True},
        "model": {**ADAPTERS, "use_dora": True, "fusion_trainable": "full"},
        "dataset_val": VALIDATION,
        "eval_every_n_steps": 4,
        "metrics": ["edit_similarity", "exact_match"],
        "max_new_tokens": 8,
        "save_every_n_steps": 3,
        "keep_last": 1,
        "epochs": 2,
        "optimizer.lr": 1e-2,
        "learning_rates.merger": 1e-3,
        "clip_grad_norm": 1.0,
        "num_workers": 2,  # who have to be gone at the end
    }
    config = write_config(root, tmp_path / "run", settings)
    process = start(config)
    messages, _ = process.communicate(timeout=120)
    assert process.returncode == 0, messages[-3000:]
    told = [line for line in messages.splitlines() if "Validation loss" in line]
    assert told
    assert all(line.startswith("Validation loss") for line in told)  # not behind the bar
    output = tmp_path / "run"
    losses = read_losses(output)
    assert losses.keys() == {*range(1, len(losses) + 1)}
    assert losses[len(losses)] < losses[1] - 0.5

    (log,) = (output / "logs").glob("log_*.txt")
    lines = log.read_text().splitlines()
    before, *lines = lines
    assert re.search(r"Step 0 \| .*validation_edit_similarity:", before)
    metrics = dict(re.findall(r"(\w+):(\S+)", lines[0]))
    assert metrics.keys() == METRICS
    assert float(metrics["lr_merger"]) == pytest.approx(float(metrics["lr_decoder"]) / 10)
    assert 0 < float(metrics["row_fill"]) <= 1
    validated = {
        int(step): float(loss)
        for step, loss in re.findall(r"Step (\d+) \| validation_loss:(\S+)", log.read_text())
    }
    assert validated.keys() == {
        step for step in (0, *losses) if step % 4 == 0 or step == len(losses)
    }
    del validated[0]  # nothing that could be exported
    best = min(validated, key=validated.__getitem__)
    kept = {int(path.name.removeprefix("step_")) for path in (output / "steps").iterdir()}
    assert kept == {best, len(losses)}

    samples = read_samples(output)
    assert sorted(s for step in samples.values() for s in step) == sorted([*range(COUNT)] * 2)
    assert (output / "loss.png").stat().st_size > 10_000
    assert "Loss curve" in messages
    assert f"(step {best})" in messages

    base = qwen2_5_vl_hf_to_tune(load_file(root / "base" / "model.safetensors"))
    merged = merge_adapter(base, load_adapter(output / "epoch_1" / "adapter"))
    for name, tensor in qwen2_5_vl_hf_to_tune(weights(output)).items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)

    exported = Qwen2_5_VLTransform.from_pretrained(output / "epoch_1")
    assert exported.image_transform.max_pixels == 15_000
    assert exported.video_transform.fps == 1.5
    assert exported.prompts.add_vision_id
    export(output / "epoch_1", tmp_path / "exported")
    for name, text in exported.processor_files().items():
        assert (tmp_path / "exported" / name).read_text() == text

    # What is scored in training is what the export answers
    command(
        "evaluate",
        str(output / "epoch_1"),
        "--config",
        str(config),
        "--metrics",
        "edit_similarity",
        "--max-new-tokens",
        "8",
        "--output",
        str(tmp_path / "scores"),
    )
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    last = json.loads((output / "evaluations" / f"step_{len(losses)}.json").read_text())
    assert scores["samples"] == [
        {**sample, "scores": {"edit_similarity": sample["scores"]["edit_similarity"]}}
        for sample in last["samples"]
    ]
    assert len({sample["answer"] for sample in scores["samples"]}) > 1
    logged = read_metric(output, "validation_edit_similarity")
    total = scores["metrics"]["edit_similarity"]["total"]
    assert logged[len(losses)] == pytest.approx(total, abs=1e-6)

    again = start(config)
    messages, _ = again.communicate()
    assert again.returncode != 0
    assert "resume=True, or name another output_dir" in messages


METRICS = {
    "loss",
    "grad_norm",
    "lr_encoder",
    "lr_merger",
    "lr_decoder",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "media_per_second",
    "row_fill",
    "waiting_for_data",
    "memory_gb",
}


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(root: Path, tmp_path: Path) -> None:
    settings = {"model": {**ADAPTERS, "lora_dropout": 0.1}, "epochs": 4, "optimizer.lr": 1e-2}
    whole = run(write_config(root, tmp_path / "whole", settings))
    config = write_config(root, tmp_path / "parts", settings)
    losses = stop_after(config, 2, processes=1)
    assert len(losses) < len(whole)
    assert losses | run(config, 1, "resume=True") == whole
    assert read_samples(tmp_path / "parts") == read_samples(tmp_path / "whole")


@pytest.mark.slow
def test_gradients_are_clipped(root: Path, tmp_path: Path) -> None:
    settings = {
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 1.0},
        "lr_scheduler": {"_component_": "tests.finetune_runs.constant_rate"},
        "clip_grad_norm": 1e-3,
    }
    steps = len(run(write_config(root, tmp_path / "run", settings)))
    base = load_file(root / "base" / "model.safetensors")
    moved = sum((w - base[n]).double().square().sum() for n, w in weights(tmp_path / "run").items())
    assert 1e-4 < moved**0.5 <= 1.01e-3 * steps


@pytest.mark.slow
def test_samples_that_teach_nothing_are_listed_before_the_first_step(
    root: Path, tmp_path: Path
) -> None:
    """Those of all processes, in their order."""
    question = {"role": "user", "content": "a"}
    answers = ["Yes", "", "Yes", None, "", "Yes", "Yes"]
    lines = [
        json.dumps(
            {
                "messages": [
                    question,
                    *([{"role": "assistant", "content": a}] if a is not None else []),
                ]
            }
        )
        for a in answers
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    settings = {"dataset.data_files": str(tmp_path / "train.jsonl"), "num_workers": 1}
    process = start(write_config(root, tmp_path / "run", settings), 2)
    messages, _ = process.communicate()
    assert process.returncode == 2, messages[-3000:]
    told = messages[messages.index("tune-vl run: ") :]
    assert "tune-vl run: 3 of 7 samples cannot be trained on: correct them or remove them" in told
    assert re.findall(r"^sample (\d): no token of an answer", told, re.M) == ["1", "3", "4"]
    assert not list((tmp_path / "run").glob("steps/step_*"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(root: Path, tmp_path: Path) -> None:
    settings = {
        "optimizer.lr": 1e30,
        "log_every_n_steps": 4,
        "lr_scheduler": {"_component_": "tests.finetune_runs.constant_rate"},
    }
    process = start(write_config(root, tmp_path / "run", settings))
    messages, _ = process.communicate()
    assert process.returncode != 0
    (step, samples) = re.search(
        r"the loss of step (\d+) is (?:nan|inf); its samples have the indices \[(.*?)\]", messages
    ).groups()
    assert sorted(read_samples(tmp_path / "run")[int(step)]) == [*map(int, samples.split(", "))]
    assert not [*(tmp_path / "run").glob("epoch_*")]


def test_two_processes_validate_and_save_as_one(root: Path, tmp_path: Path) -> None:
    settings = {
        "dataset_val": VALIDATION,
        "eval_every_n_steps": 2,
        "max_steps": 3,
        "metrics": ["edit_similarity"],
        "max_new_tokens": 8,
        "best_by": "edit_similarity",
        "optimizer.fused": True,
    }
    metrics, evaluations = [], []
    for tensor, processes in ((1, 1), (1, 2), (2, 2)):
        output = tmp_path / f"{tensor}_{processes}"
        config = write_config(root, output, {**settings, "parallel.tensor": tensor})
        run(config, processes)
        metrics.append([read_metric(output, name) for name in ("loss", "validation_loss")])
        assert (output / "steps" / "step_3").is_dir()
        texts = [(output / "evaluations" / f"step_{n}.json").read_text() for n in (0, 2, 3)]
        evaluations.append([*map(json.loads, texts)])
    assert evaluations[0] == evaluations[1] == evaluations[2]
    for training, validation in metrics[1:]:
        assert same(metrics[0][0], training)
        assert same(metrics[0][1], validation)
        assert validation.keys() == {0, 2, 3}


@pytest.mark.slow
def test_choices_are_as_likely_on_any_number_of_processes(root: Path, tmp_path: Path) -> None:
    """Of which one has more questions than the other, and some questions have no choices."""
    records = [
        {"question": f"Which, {n}?", "choices": ["a dog", "a dog, too", "B 2"][: 2 + n % 2]}
        | {"answer": ["a dog", "B"][n % 2]}
        for n in range(5)
    ]
    records[2] = {"question": "What?", "answer": "Nothing."}
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "choices.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records if "choices" in r)
    )
    settings = {"eval_every_n_steps": 2, "max_steps": 1, "max_new_tokens": 4}
    found = []
    for name, metric, tensor, processes in (
        ("vqa", "exact_match", 1, 1),
        ("vqa", "exact_match", 1, 2),
        ("choices", "choice_likelihood", 2, 2),
    ):
        output = tmp_path / f"{tensor}_{processes}"
        data = {**VALIDATION, "data_files": str(tmp_path / f"{name}.jsonl"), "split": "train"}
        more = {"dataset_val": data, "metrics": [metric], "best_by": metric}
        run(write_config(root, output, {**settings, **more, "parallel.tensor": tensor}), processes)
        report = json.loads((output / "evaluations" / "step_1.json").read_text())
        found.append([s["choice_logprobs"] for s in report["samples"] if s["choices"]])
        assert ("choice_logprobs" in report["samples"][2]) == (name == "choices")
        assert read_metric(output, f"validation_{metric}").keys() == {0, 1}
    assert [*found[0][1]] == ["A", "B", "C"]
    assert [*found[0][0]] == ["a dog", "a dog, too"]
    assert len(found[0]) == 4
    for others in found[1:]:
        assert others == [pytest.approx(each, abs=1e-4) for each in found[0]]


@pytest.mark.slow
def test_weights_that_round_are_a_warning(root: Path, tmp_path: Path) -> None:
    config = write_config(root, tmp_path / "run", {"max_steps": 1, "dtype": "bf16"})
    process = start(config)
    messages, _ = process.communicate()
    assert process.returncode == 0
    assert "below half a unit in the last place" in messages

    again = start(config, 1, "dtype=fp32", "compute_dtype=bf16", f"output_dir={tmp_path / 'other'}")
    messages, _ = again.communicate()
    assert again.returncode == 0
    assert "last place" not in messages

    optimizer = "optimizer._component_=torchao.optim.AdamW8bit"
    third = f"output_dir={tmp_path / 'third'}"
    divided = start(config, 2, optimizer, "optimizer.bf16_stochastic_round=True", third)
    messages, _ = divided.communicate()
    assert divided.returncode == 2
    assert "cannot be used where bf16 weights are divided over devices" in messages
    assert "Traceback" not in messages


BROKEN = {
    "_component_": "tests.finetune_runs.model_that_breaks",
    "checkpoint_dir": "${checkpoint_dir}",
}
NOT_FINITE: dict[str, tuple[dict[str, Any], str, list[int]]] = {
    "gradients": (
        # Of the second row of the third step
        {"model": {**BROKEN, "gradient_of": 6}},
        r"norm of the gradients of step 3 is nan; its samples have the indices \[(.*?)\]",
        [1, 2],
    ),
    "weights": (
        {
            "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e38, "weight_decay": 1e3},
            "lr_scheduler": {"_component_": "tests.finetune_runs.constant_rate"},
        },
        "after step 1, .* is not finite",
        [],
    ),
    "validation": (
        {
            "model": {**BROKEN, "validation": True},
            "dataset_val": VALIDATION,
            "eval_every_n_steps": 2,
        },
        r"validation loss before the first step is nan; .* the indices \[0, 1, 2, 3, 4, 5\]",
        [],
    ),
}


@pytest.mark.parametrize(
    ("settings", "message", "steps"),
    [
        pytest.param(*case, id=name, marks=() if name == "gradients" else pytest.mark.slow)
        for name, case in NOT_FINITE.items()
    ],
)
def test_what_is_not_finite_is_not_learned_or_saved(
    root: Path, tmp_path: Path, settings: dict[str, Any], message: str, steps: list[int]
) -> None:
    output = tmp_path / "run"
    settings = {"save_every_n_steps": 1, "log_every_n_steps": 10, "max_steps": 4, **settings}
    process = start(write_config(root, output, settings))
    messages, _ = process.communicate()
    assert process.returncode == 2
    found = re.search(message, messages)
    assert found, messages[-2000:]
    if found.groups():
        assert sorted(read_samples(output)[3]) == [*map(int, found[1].split(", "))]
    assert sorted(path.name for path in (output / "steps").glob("step_*")) == [
        f"step_{step}" for step in steps
    ]
    if steps:
        assert f"the last save is in {output}/steps/step_{steps[-1]}" in messages
    assert not [*output.glob("epoch_*")]


@pytest.mark.slow
def test_parts_that_no_step_can_train_are_refused(vocabulary: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path, vocabulary, 6, ((),))
    for config, expected in (
        ({}, "encoder and merger cannot be trained: none of the 3 steps has an image or a video"),
        ({"model.encoder_trainable": False}, "merger cannot be trained"),
    ):
        path = write_config(
            tmp_path,
            tmp_path / "run",
            {**config, "rows": {"_component_": "torchtune_vl.data.PaddedRows", "batch_size": 1}},
        )
        process = start(path)
        messages, _ = process.communicate()
        assert process.returncode == 2
        assert expected in messages
        assert "Traceback" not in messages


@pytest.mark.slow
@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_several_processes_are_as_one(
    root: Path, tmp_path: Path, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    alone = {key: value for key, value in settings.items() if key != "parallel.tensor"}
    processes = 4 if "four" in request.node.name else 2
    one = run(write_config(root, tmp_path / "one", alone))
    two = run(write_config(root, tmp_path / "two", settings), processes)
    assert same(one, two)
    # To which Adam's steps, and so the losses, are nearly blind
    norms = (read_metric(tmp_path / name, "grad_norm") for name in ("one", "two"))
    assert same(*norms)
    samples, others = read_samples(tmp_path / "one"), read_samples(tmp_path / "two")
    copies = 2 if "parallel.tensor" in settings else 1
    assert {step: sorted(s * copies) for step, s in samples.items()} == {
        step: sorted(s) for step, s in others.items()
    }
    assert sorted(s for step in samples.values() for s in step) == [*range(COUNT)]


@pytest.mark.slow
def test_going_on_with_other_numbers_of_processes(root: Path, tmp_path: Path) -> None:
    settings = {"epochs": 2, "save_every_n_steps": 2}
    whole = run(write_config(root, tmp_path / "whole", settings))
    config = write_config(root, tmp_path / "parts", settings)
    third = len(whole) // 3
    losses: dict[int, float] = {}
    for processes, last in ((2, third), (1, 2 * third), (2, len(whole))):
        losses |= stop_after(config, last, processes)
    assert same(whole, losses)


def stop_after(config: Path, step: int, processes: int) -> dict[int, float]:
    """Run until a step, ask to stop as a cluster does, and return the losses."""
    output = config.with_suffix("")
    process = start(config, processes, "resume=True")
    while process.poll() is None and last_step(output) < step:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    messages, _ = process.communicate()
    assert (output / "steps").is_dir(), messages[-3000:]
    return read_losses(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "model"),
    [
        pytest.param(1, {}, id="one process"),
        # Which needs the random states too
        pytest.param(2, {"model": {**ADAPTERS, "lora_dropout": 0.1}}, id="two, with dropout"),
    ],
)
def test_killed_at_any_step(
    root: Path, tmp_path: Path, processes: int, model: dict[str, Any]
) -> None:
    settings = {"epochs": 32, "save_every_n_steps": 1, "keep_last": 2, **model}
    whole = run(write_config(root, tmp_path / "whole", settings), processes)
    config = write_config(root, tmp_path / "killed", settings)
    output = config.with_suffix("")
    rng = random.Random(0)
    losses: dict[int, float] = {}
    killed_after = [0]
    while len(killed_after) <= 20:
        target = killed_after[-1] + rng.randint(1, 3)
        delay = rng.random() * 0.2
        kill_after(target, config, processes, "resume=True", delay=delay)
        losses |= read_losses(output)
        killed_after.append(last_step(output))
    print(f"killed after steps {killed_after[1:]} of {len(whole)}")
    losses |= run(config, processes, "resume=True")
    assert losses == whole
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weights(output)[name], weight), name
    assert read_samples(output) == read_samples(tmp_path / "whole")
