"""Runs whose settings are drawn at random, each killed, resumed, exported and compared.

    python -m tests.random_runs --count 60 --seed 0

Each configuration is a shipped config with what a tiny model on a CPU needs, and keys drawn from
it: what is trained and how, dtypes, optimizer, packing, data workers, processes, tensor
parallelism, validation, data. It goes through the real command: six steps, killed at one of them,
resumed, to its end. Then losses and what was trained are compared with a plain loop over
transformers' model on the same samples, and logits of the export in transformers with those of the
run's own last state. Settings that cannot work have to be refused in one sentence.
"""

import argparse
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from torchtune import config as components
from transformers import AutoModelForImageTextToText

from quickstart.vocabulary import fetch_vocabulary
from tests.finetune_runs import (
    NARROW,
    NARROW_QWEN2_VL,
    NARROW_QWEN3_VL,
    NARROW_QWEN3_VL_MOE,
    last_step,
    read_samples,
    start,
    write_config,
    write_inputs,
)
from tests.plain_loop import plain_run, start_of
from tests.reference import reference_inputs
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.datasets import vision_chat_dataset
from torchtune_vl.models import transform_from_pretrained
from torchtune_vl.models._weights import initial_adapters

STEPS = 6
COUNT = 24
SECONDS_TO_END = 60
TIMEOUT = 300
MIXES = {
    "text": ((),),
    "images": (("image",),),
    "images and text": (("image",), (), (), ("image", "image", "image")),
    "videos": (("video",), ()),
    "all": (("image",), (), ("image", "image", "image"), ("video",), (), ("image", "video")),
}
FAMILIES = {
    "qwen2_5_vl": NARROW,
    "qwen2_vl": NARROW_QWEN2_VL,
    "qwen3_vl": NARROW_QWEN3_VL,
    "qwen3_vl_moe": NARROW_QWEN3_VL_MOE,
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW, fused": {"_component_": "torch.optim.AdamW", "fused": True},
    "AdamW": {"_component_": "torch.optim.AdamW"},
    "SGD": {"_component_": "torch.optim.SGD", "momentum": 0.9},
    "AdamW8bit": {"_component_": "torchao.optim.AdamW8bit"},
}
# float32 against float32: only the order of sums differs. Everything else rounds: weights or
# products to bfloat16 (8 bits of mantissa), momenta to 8 bits
EXACT, ROUNDED = 1e-4, 3e-2

Check = Callable[[Any, Path, Path], str]


@dataclass
class Drawn:
    """A configuration and what is to be expected of it."""

    config: str
    mix: str
    settings: dict[str, Any]
    processes: int
    kill_after: int
    words: list[str] = field(default_factory=list)
    refused: str | None = None

    def __str__(self) -> str:
        return "; ".join(self.words)

    @property
    def is_exact(self) -> bool:
        """Whether it computes in float32 as the plain loop does."""
        return (
            self.settings["dtype"] == "fp32"
            and self.settings["compute_dtype"] is None
            and "8bit" not in self.settings["optimizer"]["_component_"]
        )


def draw(rng: random.Random) -> Drawn:
    """Draw a configuration."""
    family = rng.choice([*FAMILIES])
    has_experts = "num_experts" in FAMILIES[family].get("text_config", {})
    method = rng.choice(["full", "lora", "dora", "qlora"])
    mix = rng.choice([*MIXES])
    dtype, compute = rng.choice([("fp32", None), ("fp32", None), ("fp32", "bf16"), ("bf16", None)])
    optimizer = rng.choice([*OPTIMIZERS])
    processes = rng.choice([1, 1, 2, 2, 4])
    model, trained, refused = _draw_model(rng, method, mix, has_experts)
    rows = rng.choice(["packed", "padded"])
    has_tensor = method != "qlora" and not has_experts
    kinds = ["shard", *["tensor"][:has_tensor], *["context"][: rows == "packed"]]
    mesh = dict.fromkeys(("replicate", "shard", "context", "tensor"), 1)
    for size in {1: [], 2: [2], 4: [2, 2]}[processes]:
        mesh[rng.choice([*kinds, "replicate"])] *= size
    if mesh["tensor"] > 2:  # heads of the tiny model
        mesh |= {"tensor": 2, "shard": 2}
    if has_experts and method != "qlora":
        devices = mesh["shard"] * mesh["context"]
        mesh["experts"] = rng.choice([size for size in (1, 2, 4) if devices % size == 0])
    settings: dict[str, Any] = {
        **model,
        "max_steps": STEPS,
        "dtype": dtype,
        "compute_dtype": compute,
        "optimizer": {**OPTIMIZERS[optimizer], "lr": 1e-3 if method == "full" else 1e-2},
        "learning_rates.merger": rng.choice([None, 5e-4]),
        "learning_rates.encoder": rng.choice([None, 2e-3]),
        **{f"parallel.{kind}": size for kind, size in mesh.items()},
        "num_workers": max(rng.randrange(3), mesh["context"] - 1),
        "clip_grad_norm": rng.choice([None, 1.0, 0.05]),
        "activation_checkpointing": rng.choice(["none", "selective", "full"]),
        "save_every_n_steps": rng.choice([1, 2, 3, None]),
        "eval_every_n_steps": rng.choice([1, 2, 4, None]),
        "log_every_n_steps": rng.choice([1, 2]),
        "keep_last": rng.choice([1, 2]),
        "shuffle": rng.choice([True, True, False]),
        "seed": rng.randrange(100),
        "rows_per_step": max(rng.choice([2, 4]), mesh["replicate"] * mesh["shard"]),
    }
    if rows == "padded":
        settings["rows"] = {"_component_": "torchtune_vl.data.PaddedRows", "batch_size": 2}
    else:
        settings["rows.max_tokens"] = rng.choice([512, 700])
        settings["rows.max_patches"] = rng.choice([None, 2048])
    if rng.random() < 0.5:
        settings["dataset_val"] = {"data_files": "${dataset.data_files}", "split": "train[:5]"}
    if rng.random() < 0.3:
        settings["lr_scheduler"] = None
    words = [
        method, trained, mix, f"{dtype}/{compute}", optimizer, rows, f"{processes} processes",
        *(f"{kind} {size}" for kind, size in mesh.items() if size > 1),
        f"{settings['num_workers']} workers",
        "validation" if "dataset_val" in settings else "no validation",
    ]  # fmt: skip
    name = {"full": "full", "qlora": "qlora"}.get(method, "lora")
    kill_after = rng.randint(1, STEPS - 1)
    if "model" in settings:
        settings["model"]["trained_in_float32"] = rng.random() < 0.5
        words.append(f"trained in float32: {settings['model']['trained_in_float32']}")
    words.insert(0, family)
    config = f"{family}/{name}"
    return Drawn(config, mix, settings, processes, kill_after, words, refused)


def _draw_model(
    rng: random.Random, method: str, mix: str, has_experts: bool
) -> tuple[dict[str, Any], str, str | None]:
    """Settings of the model, what they train in words, and why they are refused, if they are."""
    names = ("decoder", "encoder", "fusion")
    kinds = ["frozen", "full"] if method == "full" else ["frozen", "lora", "full"]
    parts = {name: rng.choice(kinds) for name in names}
    if set(parts.values()).isdisjoint(kinds[1:2]):
        parts["decoder"] = kinds[1]
    sees_media = mix != "text"
    refused = None
    if not sees_media and (parts["encoder"] != "frozen" or parts["fusion"] != "frozen"):
        if rng.random() < 0.7:
            parts |= {"decoder": kinds[1], "encoder": "frozen", "fusion": "frozen"}
        else:
            refused = "gradient|media|image"
    words = ", ".join(f"{name} {kind}" for name, kind in parts.items() if kind != "frozen")
    if method == "full":
        return (
            {f"model.{name}_trainable": kind == "full" for name, kind in parts.items()},
            words,
            refused,
        )
    adapted = {name for name, kind in parts.items() if kind == "lora"}
    modules = []
    if "decoder" in adapted:
        modules += rng.sample(["q_proj", "k_proj", "v_proj"], rng.randint(1, 3))
    if "encoder" in adapted:
        modules += ["qkv"]
    if adapted & {"decoder", "encoder"} and rng.random() < 0.5:
        modules += ["output_proj"]
    on_mlp = "fusion" in adapted or rng.random() < 0.5
    if has_experts and parts["decoder"] == "full":
        refused = "experts are not trained beside adapters"
    if has_experts and parts["decoder"] == "lora" and on_mlp and method == "dora":
        refused = "experts have no magnitudes"
    rank = rng.choice([2, 4, 16])
    return (
        {
            "model": {
                "_component_": "torchtune_vl.models.lora_model_from_pretrained",
                "checkpoint_dir": "${checkpoint_dir}",
                "weights": False,
                "lora_attn_modules": modules,
                "apply_lora_to_mlp": on_mlp,
                "lora_rank": rank,
                "lora_alpha": rng.choice([rank, 2 * rank]),
                "use_dora": method == "dora",
                "quantize_base": method == "qlora",
                **{f"{name}_trainable": kind for name, kind in parts.items()},
            }
        },
        words,
        refused,
    )


def check(drawn: Drawn, root: Path, output: Path) -> str:
    """Run a configuration and compare.

    Args:
        drawn: the configuration.
        root: with the inputs of its mix.
        output: directory of the run.

    Returns:
        What was compared, in words.
    """
    config = write_config(root, output, drawn.settings, drawn.config)
    if drawn.refused:
        return _refused(config, drawn)
    _start_and_kill(config, drawn)
    seconds = _resume_to_the_end(config, drawn)
    _look_at_what_it_left(output, drawn)
    cfg = OmegaConf.load(config)
    transform = transform_from_pretrained(root / "base")
    dataset = vision_chat_dataset(
        transform, source="json", data_files=str(root / "train.jsonl"), split="train"
    )
    loss = _compare_with_plain_loop(config, dataset, drawn)
    logits = _compare_export(cfg, transform, dataset, output)
    return f"ended {seconds:.1f} s after its last step; {loss}; logits within {logits:.1g}"


def _refused(config: Path, drawn: Drawn) -> str:
    process = start(config, drawn.processes)
    messages, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0, f"ran, though {drawn.refused}\n{messages[-2000:]}"
    assert "Traceback" not in messages, messages[-4000:]
    assert re.search(drawn.refused or "", messages), messages[-2000:]
    return "refused"


def _start_and_kill(config: Path, drawn: Drawn) -> None:
    output = config.with_suffix("")
    process = start(config, drawn.processes)
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and last_step(output) < drawn.kill_after:
        if time.monotonic() > deadline:
            _give_up(process)
        time.sleep(0.02)
    family = []
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        family = parent.children(recursive=True)
        trainers = [member for member in (parent, *family) if _is_trainer(member)]
        for member in (parent, *trainers):
            _signal(member, signal.SIGSTOP)
        for member in (parent, *trainers):
            _signal(member, signal.SIGKILL)
    messages, _ = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), messages[-4000:]
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"outlived the run: {[member.cmdline() for member in alive]}"


def _give_up(process: subprocess.Popen[str]) -> NoReturn:
    """Kill a run that hangs, and tell what it said."""
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        member.kill()
    raise AssertionError(f"no end within {TIMEOUT} s\n{process.communicate()[0][-4000:]}")


def _is_trainer(member: psutil.Process) -> bool:
    """Whether it is a process of the run and not one of its data workers, which end by it."""
    try:
        return "torchtune_vl" in " ".join(member.cmdline()) and "fork" not in member.cmdline()
    except psutil.Error:
        return False


def _signal(member: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        member.send_signal(number)


def _resume_to_the_end(config: Path, drawn: Drawn) -> float:
    """Resume, and return the seconds from the last step to the end of the process."""
    output = config.with_suffix("")
    process = start(config, drawn.processes, "resume=True")
    try:
        messages, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        _give_up(process)
    ended = time.time()
    assert process.returncode == 0, messages[-4000:]
    logs = [*(output / "logs").glob("log_*.txt")]
    last_step_at = max(path.stat().st_mtime for path in logs)
    seconds = ended - last_step_at
    assert seconds < SECONDS_TO_END, f"ended {seconds:.0f} s after its last step"
    return seconds


def _look_at_what_it_left(output: Path, drawn: Drawn) -> None:
    names = {path.name for path in output.iterdir()}
    left = {name for name in names if re.search(r"partial|\.replaced|\.tmp", name)}
    assert not left, f"left behind: {left}"
    assert {"samples", "logs", "steps", "loss.png"} <= names, names
    (epoch,) = output.glob("epoch_*")
    steps = {path.name for path in (output / "steps").iterdir()}
    assert f"step_{STEPS}" in steps, steps
    assert all(re.fullmatch(r"step_\d+", name) for name in steps), steps
    assert ((epoch / "adapter").is_dir()) == ("lora_rank" in drawn.settings.get("model", {}))


def _compare_with_plain_loop(config: Path, dataset: Any, drawn: Drawn) -> str:
    output = config.with_suffix("")
    # Of processes that share a row or its layers, each has written the same
    copies = drawn.settings["parallel.tensor"] * drawn.settings["parallel.context"]
    samples = {
        step: sorted(samples)[::copies] for step, samples in sorted(read_samples(output).items())
    }
    assert [*samples] == [*range(1, STEPS + 1)], f"steps {[*samples]}"
    plain = plain_run(config, dataset, samples)
    tolerance = EXACT if drawn.is_exact else ROUNDED
    losses = _logged_losses(output)
    worst = 0.0
    for step, loss in losses.items():
        first = max((s for s in losses if s < step), default=0) + 1
        if first < step - drawn.settings["log_every_n_steps"] + 1:
            first = step - drawn.settings["log_every_n_steps"] + 1
        expected = sum(plain.losses[s] for s in range(first, step + 1)) / (step - first + 1)
        worst = max(worst, abs(loss / expected - 1))
    assert worst <= tolerance, f"losses {losses}, expected {plain.losses}"
    moved = _compare_moves(output, plain.start, plain.end) if drawn.is_exact else None
    steps = f"{len(losses)} lines of losses within {worst:.1g}"
    return steps if moved is None else f"{steps}, updates within {moved:.1g}"


def _logged_losses(output: Path) -> dict[int, float]:
    """The losses that progress.json of the last step holds, of all steps, resumed or not."""
    progress = json.loads((output / "steps" / f"step_{STEPS}" / "progress.json").read_text())
    return dict(enumerate(progress["losses"], 1))


def _compare_moves(
    output: Path, before: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> float:
    """How far what was trained is from the plain loop's, by how far it moved."""
    after = _trained_state(output, before)
    # Keys' biases move all scores of a query alike: their gradients are rounding, see
    # tests/parity/test_finetune_parity.py
    names = [name for name in before if not name.endswith("k_proj.bias")]
    distance = sum((after[n] - expected[n]).double().square().sum() for n in names)
    moved = sum((expected[n] - before[n]).double().square().sum() for n in names)
    ratio = float((distance / moved).sqrt())
    assert ratio <= 0.02, f"trained parameters are {ratio} of their way from where they should be"
    return ratio


def _trained_state(output: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {"model": {name: torch.empty_like(tensor) for name, tensor in like.items()}}
    dcp.load(state, checkpoint_id=output / "steps" / f"step_{STEPS}", no_dist=True)
    return state["model"]


@torch.no_grad()
def _compare_export(cfg: Any, transform: Any, dataset: Any, output: Path) -> float:
    """Logits of the export in transformers beside those of the run's own last state."""
    (epoch,) = output.glob("epoch_*")
    reference, report = AutoModelForImageTextToText.from_pretrained(
        epoch, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    if "quantize_base" in cfg.model:  # the export is of the weights that were quantized
        cfg.model.quantize_base = False
    meta, weights = start_of(cfg)
    weights |= initial_adapters(meta, weights, cfg.seed)
    trained = {n: weights[n] for n, p in meta.named_parameters() if p.requires_grad}
    weights |= _trained_state(output, trained)
    model = components.instantiate(cfg.model)
    model.load_state_dict(weights)
    model.eval()
    worst = 0.0
    for index in range(6):
        sample = dict(dataset[index])
        ours = model(**_arguments(padded_collate_vision([sample], transform.pad_id)))
        theirs = reference.eval()(
            **reference_inputs([sample]), position_ids=sample["input_pos"].T[:, None]
        ).logits
        difference = (ours - theirs).abs().max().item()
        assert difference <= 2e-5 * max(1.0, theirs.abs().max().item()), difference
        worst = max(worst, difference)
    return worst


def _arguments(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


def inputs(root: Path, vocabulary: Path, drawn: Drawn) -> Path:
    """Write the checkpoint and the mix of a configuration, once."""
    family = drawn.config.split("/")[0]
    directory = root / f"{family} {drawn.mix}".replace(" ", "_")
    if not directory.exists():
        directory.mkdir(parents=True)
        write_inputs(directory, vocabulary, COUNT, MIXES[drawn.mix], FAMILIES[family])
    return directory


def draws(count: int, seed: int) -> Iterator[Drawn]:
    """Draw several; each by a seed of its own, so that one can be repeated alone."""
    for number in range(count):
        yield draw(random.Random(f"{seed} {number}"))


def run_drawn(
    purpose: str, count: int, draws: Callable[[int, int], Iterable[Any]], check: Check
) -> None:
    """Draw, run and report, as a command.

    Args:
        purpose: of the command, in its help.
        count: how many runs it draws by default.
        draws: gives them, by how many and a seed.
        check: runs one, with a directory for all and one for its own files, and tells what it
            compared in words.
    """
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers to run, of those drawn")
    parser.add_argument("--keep", type=Path, help="directory to keep, instead of a temporary one")
    arguments = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        for number, drawn in enumerate(draws(arguments.count, arguments.seed)):
            if arguments.only and number not in arguments.only:
                continue
            began = time.monotonic()
            try:
                told = check(drawn, root, root / f"run_{number}")
            except Exception as error:
                failures += 1
                told = f"FAILED: {type(error).__name__}: {error}"
            print(f"{number:3} ({time.monotonic() - began:.0f} s) {drawn}: {told}", flush=True)
    sys.exit(f"{failures} failed" if failures else 0)


def main() -> None:
    """Run the command."""
    vocabulary = fetch_vocabulary(Path(".assets/tokenizer"))
    run_drawn(
        __doc__.splitlines()[0],
        60,
        draws,
        lambda drawn, root, output: check(drawn, inputs(root, vocabulary, drawn), output),
    )


if __name__ == "__main__":
    main()
