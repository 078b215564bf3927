"""Runs on data that are drawn at random, each killed twice and resumed, beside an undisturbed one.

    python -m tests.random_data_runs --count 20 --seed 0

Drawn are the formats of one to three datasets, their weights, epochs or temperature, tables or
streams, prepared or not, augmentation, samples that cannot be trained on, validation, rows, data
workers and processes. Each goes through the real commands: a run to its end, one that is killed
and resumed with other numbers of workers and processes, `check`, `preview`, and `prepare` where
samples are to be prepared. Compared are losses, samples and their sources of each step, and the
lists of bad samples, which have to be those that `check` finds.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from quickstart.checkpoint import write_tiny_checkpoint
from quickstart.vocabulary import fetch_vocabulary
from tests import formats
from tests.finetune_runs import NARROW, command, kill_after, read_samples, run, write_config
from tests.random_runs import run_drawn
from tests.test_bad_samples import bad_records

RECORDS = 40
# Stores in memory are of one process; a pair is two samples, of which a stream has no number
_TABLES = [name for name in formats.WRITERS if "store" not in name and "stream" not in name]
_STREAMS = [name for name in _TABLES if name not in ("chosen", "coco")]
_WITH_BAD = ("messages", "columns of media")
_AUGMENTATION = {"scale": 0.6, "crop": 0.8, "jpeg_quality": [40, 90], "brightness": 0.3}


@dataclass
class Drawn:
    """What a run is trained on, and how."""

    streaming: bool
    writers: list[str]
    keys: list[dict[str, float]]  # weight or epochs of each dataset
    with_bad: list[bool]
    is_prepared: list[bool]
    augmented: list[bool]
    validation: list[int]  # numbers of datasets, none for no validation
    settings: dict[str, Any]
    processes: list[int]  # of the run, of the killed ones, of the last
    workers: list[int]
    kills: list[int]

    def __str__(self) -> str:
        return "; ".join(f"{name} {value}" for name, value in vars(self).items())


def draw(rng: random.Random) -> Drawn:
    """Draw what to run on."""
    streaming, count = rng.random() < 0.35, rng.choice([1, 1, 2, 3])
    writers = rng.sample(_STREAMS if streaming else _TABLES, count)
    if rng.random() < 0.5 and not {*writers} & {*_WITH_BAD}:
        writers[0] = rng.choice(_WITH_BAD)
    weights: list[dict[str, float]] = [{"weight": rng.choice([1.0, 2.5, 4.0])} for _ in writers]
    epochs: list[dict[str, float]] = [{"epochs": rng.choice([0.5, 1.0, 1.5])} for _ in writers]
    none: list[dict[str, float]] = [{} for _ in writers]
    keys = weights if streaming else rng.choice([weights, epochs, none])
    with_bad = [w in _WITH_BAD and rng.random() < 0.6 for w in writers]
    prepares = not streaming and rng.random() < 0.3
    is_prepared = [prepares and not bad and rng.random() < 0.7 for bad in with_bad]
    augmented = [not prepares and rng.random() < 0.3 and w != "chosen" for w in writers]
    settings: dict[str, Any] = {
        "rows_per_step": rng.choice([2, 4]),
        "shuffle": not streaming and rng.random() < 0.7,
        "seed": rng.randrange(100),
        "save_every_n_steps": rng.choice([1, 2]),
        "keep_last": rng.choice([1, 2]),
        "eval_every_n_steps": rng.choice([2, 3]),
        "on_bad_sample": "skip",
        "max_bad_share": 0.9,
        "max_steps": 8,
    }
    if keys is none and not streaming:
        settings["sampling_temperature"] = rng.choice([1.0, 2.0]) if count > 1 else 1.0
    if rng.random() < 0.4:
        settings["rows"] = {"_component_": "torchtune_vl.data.PaddedRows", "batch_size": 2}
    else:
        settings["rows.max_tokens"] = 512
        settings["rows.max_patches"] = rng.choice([None, 1500])
    tables = [] if streaming else [*range(count)]
    validation = rng.sample(tables, rng.randint(0, len(tables)))
    processes = [rng.choice([1, 2]) for _ in range(3)]
    workers = [rng.randrange(3) for _ in range(3)]
    kills = [rng.randint(1, 3), rng.randint(4, 6)]
    if streaming:  # a run that was killed before it saved begins with these anew
        processes[1], workers[1] = processes[0], workers[0]
    return Drawn(
        streaming, writers, keys, with_bad, is_prepared, augmented, validation, settings,
        processes, workers, kills,
    )  # fmt: skip


def check(drawn: Drawn, root: Path, output: Path) -> str:
    """Run what was drawn, and compare.

    Args:
        drawn: what to run.
        root: has the checkpoint in ``base``.
        output: directory of all that is written.

    Returns:
        What was compared, in words.
    """
    datasets = [_write_dataset(drawn, number, output) for number in range(len(drawn.writers))]
    whole = _write_config(drawn, datasets, root, output / "whole")
    if any(drawn.is_prepared):
        _prepare(whole, drawn, output)
    run(whole, drawn.processes[0], f"num_workers={drawn.workers[0]}")
    killed = output / "killed.yaml"
    config = OmegaConf.load(whole)
    config.output_dir = str(output / "killed")
    OmegaConf.save(config, killed)
    for at, processes, workers in zip(drawn.kills, drawn.processes, drawn.workers, strict=False):
        kill_after(at, killed, processes, "resume=True", f"num_workers={workers}")
    run(killed, drawn.processes[2], "resume=True", f"num_workers={drawn.workers[2]}")
    steps, worst = _compare(output)
    bad = _look_at_the_bad(drawn, whole, output)
    page = output / "page.html"
    command("preview", "--config", str(whole), "--output", str(page))
    assert page.stat().st_size < 20e6
    return f"{steps} steps, losses within {worst:.1g}, {bad} bad samples"


def _write_dataset(drawn: Drawn, number: int, output: Path) -> dict[str, Any]:
    directory = output / f"data_{number}"
    directory.mkdir(parents=True)
    formats.write_media(directory)
    writer = drawn.writers[number]
    settings, _ = formats.WRITERS[writer](formats.generate(number, RECORDS), directory)
    if drawn.with_bad[number]:
        path = Path(settings["data_files"])
        lines = path.read_text().splitlines()
        for place, record in enumerate(bad_records(directory).values()):
            lines.insert(2 * place + 1, json.dumps(record))
        path.write_text("\n".join(lines) + "\n")
    if drawn.augmented[number]:
        settings["augmentation"] = _AUGMENTATION
    component = "torchtune_vl.datasets.vision_chat_dataset"
    return {"_component_": component, **settings, "streaming": drawn.streaming}


def _write_config(drawn: Drawn, datasets: list[dict[str, Any]], root: Path, output: Path) -> Path:
    config = write_config(root, output, drawn.settings)
    content = OmegaConf.load(config)
    content.model.encoder_trainable = content.model.fusion_trainable = False
    content.tokenizer.patch_dtype = "uint8"
    keyed = [
        {"name": f"source {number}", **dataset, **keys}
        for number, (dataset, keys) in enumerate(zip(datasets, drawn.keys, strict=True))
    ]
    content.dataset = keyed if len(keyed) > 1 else datasets[0]
    validation = [{**datasets[n], "augmentation": None} for n in drawn.validation]
    if len(validation) == 1:
        content.dataset_val = validation[0]
    elif validation:
        content.dataset_val = [{"name": f"v{n}", **each} for n, each in enumerate(validation)]
    OmegaConf.save(content, config)
    return config


def _prepare(config: Path, drawn: Drawn, output: Path) -> None:
    """Prepare all datasets, and train on those that are to be prepared as they were written."""
    arguments = ("--output", str(output / "prepared"), "--shard-size", "7")
    command("prepare", "--config", str(config), *arguments)
    content = OmegaConf.load(config)
    several = len(drawn.writers) > 1
    for number, is_prepared in enumerate(drawn.is_prepared):
        name = f"source {number}"
        directory = output / "prepared" / name if several else output / "prepared"
        prepared = {
            "_component_": "torchtune_vl.datasets.prepared_dataset", "directory": str(directory)
        }  # fmt: skip
        if is_prepared and several:
            content.dataset[number] = {"name": name, **prepared, **drawn.keys[number]}
        elif is_prepared:
            content.dataset = prepared
    OmegaConf.save(content, config)


def _compare(output: Path) -> tuple[int, float]:
    """Steps and the largest difference of losses, if the killed run is as the undisturbed one."""
    whole, killed = (read_samples(output / name) for name in ("whole", "killed"))
    assert _sorted(whole) == _sorted(killed), f"samples {whole}, but resumed {killed}"
    assert _sources(output / "whole") == _sources(output / "killed")
    losses, resumed = (_losses(output / name) for name in ("whole", "killed"))
    assert len(losses) == len(resumed) == len(whole)
    worst = max(abs(a - b) for a, b in zip(losses, resumed, strict=True))
    assert worst < 1e-4, f"losses {losses}, but resumed {resumed}"
    bad = [(output / name / "bad_samples.jsonl") for name in ("whole", "killed")]
    assert [_lines(path) for path in bad[:1]] == [_lines(path) for path in bad[1:]]
    return len(losses), worst


def _look_at_the_bad(drawn: Drawn, config: Path, output: Path) -> int:
    """How many samples were bad, if `check` finds them."""
    listed = {
        line["sample"]: line["reason"]
        for line in _lines(output / "whole" / "bad_samples.jsonl")
        if line["dataset"] == "dataset"
    }
    # One of the fifteen is too long for a packed row
    kinds = 14 if "rows" in drawn.settings else 15
    expected = kinds * sum(drawn.with_bad)
    if drawn.streaming or any(drawn.is_prepared):
        assert len(listed) <= expected or drawn.streaming
        return len(listed)
    arguments = ("--decode", "--json", str(output / "found.json"))
    command("check", "--config", str(config), *arguments, status=1 if expected else 0)
    findings = json.loads((output / "found.json").read_text())["findings"]
    found = {f["sample"]: f["reason"] for f in findings if f["kind"] == "bad"}
    assert len(found) == expected, found
    # Those that only decoding shows are listed when they are drawn
    assert listed.items() <= found.items(), f"listed {listed}, found {found}"
    # All but the last four of bad_records
    assert len(listed) >= (kinds - 4) * sum(drawn.with_bad), listed
    return len(listed)


def _losses(output: Path) -> list[float]:
    last = max((output / "steps").iterdir(), key=lambda path: int(path.name.split("_")[1]))
    return json.loads((last / "progress.json").read_text())["losses"]


def _sources(output: Path) -> list[Any]:
    lines = [line for path in sorted((output / "samples").iterdir()) for line in _lines(path)]
    return sorted(
        pair
        for line in lines
        for pair in zip(
            itertools.repeat(line["step"]), line["samples"], line.get("sources", [""] * 99)
        )
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _sorted(samples: dict[int, list[int]]) -> dict[int, list[int]]:
    return {step: sorted(found) for step, found in samples.items()}


def draws(count: int, seed: int) -> list[Drawn]:
    """Draw several; each by a seed of its own, so that one can be repeated alone."""
    return [draw(random.Random(f"{seed} {number}")) for number in range(count)]


def main() -> None:
    """Run the command."""
    vocabulary = fetch_vocabulary(Path(".assets/tokenizer"))

    def run_one(drawn: Drawn, root: Path, output: Path) -> str:
        if not (root / "base").exists():
            write_tiny_checkpoint(root / "base", vocabulary, config=NARROW)
        return check(drawn, root, output)

    run_drawn(__doc__.splitlines()[0], 20, draws, run_one)


if __name__ == "__main__":
    main()
