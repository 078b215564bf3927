"""``tune-vl evaluate``: scores of a model's answers to a dataset."""

import argparse
import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchtune_vl.cli._answering import (
    DIGESTS,
    about_of,
    add_data,
    add_model,
    add_processes,
    add_rules,
    answer_many,
    read_files,
    rules_of,
    split_settings,
    tell_errors,
)
from torchtune_vl.files._printable import shown

_DESCRIPTION = """\
Let a model answer the questions of a dataset, and score its answers by the dataset's own: in
total, with 95 % intervals, by the values of columns, and beside another model's answers.

DIR gets answers.jsonl, scores.json, scores.csv and a page, evaluation.html, of images, questions,
answers and truths, worst first. A command that was stopped goes on where it was when it is given
again. Answers that are there are scored without the model: another --metrics takes seconds."""
_EXAMPLES = """\
  tune-vl evaluate output/epoch_0 test.jsonl --metrics exact_match --output scores
  tune-vl evaluate output/epoch_0 test.jsonl --metrics vqa_accuracy,anls --by category \\
    --against scores-of-base --output scores --processes 8
  tune-vl evaluate output/epoch_0 --config mine.yaml --metrics json_f1 --output scores"""

ANSWERS = "answers.jsonl"
SETTINGS = "settings.json"


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = add("evaluate", _run, "score a model's answers", _EXAMPLES, _DESCRIPTION)
    add_model(command)
    argument = command.add_argument
    add_data(command)
    what = "take dataset_val, or else dataset, and the tokenizer of a config, instead of DATA"
    argument("--config", metavar="CONFIG", help=what)
    what = "names, by commas: docs/evaluation.md explains them, and a wrong one lists all"
    argument("--metrics", required=True, metavar="NAMES", help=what)
    argument("--output", type=Path, required=True, metavar="DIR", help="directory to write to")
    what = "column of the data by whose values scores are grouped; may be given several times"
    argument("--by", action="append", default=[], metavar="COLUMN", help=what)
    what = "DIR of another evaluation of the same questions to compare with"
    argument("--against", type=Path, metavar="DIR", help=what)
    add_rules(command, max_new_tokens=512)
    add_processes(command)


def _run(options: argparse.Namespace) -> int:
    from torchtune_vl.evaluation import metrics_of

    metrics = metrics_of(options.metrics.split(","))
    files, of_data, of_transform = split_settings(options.data)
    if bool(files) == bool(options.config):
        raise ValueError("give DATA, or --config")
    others = _answers_of(options.against) if options.against else None
    if options.config:
        transform, questions = _of_config(options)
    else:
        transform, questions = read_files(options, files, of_data, of_transform)
    for metric in metrics:
        metric.check_fits(transform)  # before answers are made, which may take long
    about = about_of(options, of_transform, questions, data=_data_of(options))
    status = _answer(options, about, transform, questions)
    if status is not None:
        return status
    from torchtune_vl.evaluation import evaluate
    from torchtune_vl.evaluation._page import to_html
    from torchtune_vl.evaluation._pictures import pictures_of
    from torchtune_vl.files._directory import new_file

    if options.against:
        theirs = json.loads((options.against / SETTINGS).read_text("utf-8"))
        if theirs["records"] != about["records"]:
            raise ValueError(f"{options.against} has answers to other questions")
    how = {"columns": options.by, "others": others}
    records = _answers_of(options.output)
    report = evaluate(records, questions, transform, metrics, **how)
    shown_about = {key: value for key, value in about.items() if key not in DIGESTS}
    named = {"data": " ".join(options.data), "config": options.config, "against": options.against}
    told = {key: str(value) for key, value in named.items() if value}
    report["facts"] = [*{**shown_about, **told}.items()]
    _write(options.output, report)
    page = to_html(report, pictures_of(records, questions, transform.image_transform))
    with new_file(options.output / "evaluation.html") as partial:
        partial.write_text(page, encoding="utf-8")
    _show(report)
    print(f"Written to {shown(str(options.output))}")
    return tell_errors(records)


def _data_of(options: argparse.Namespace) -> list[Any]:
    """What says how data are read: arguments, and of a config what it has of it."""
    if not options.config:
        return [a for a in options.data if not a.startswith("transform.")]
    from omegaconf import OmegaConf

    from torchtune_vl.recipes._check_config import read_config

    config = read_config(["--config", options.config, *options.data])
    parts = {key: config[key] for key in ("tokenizer", "dataset", "dataset_val")}
    return [OmegaConf.to_container(OmegaConf.create(parts, parent=config), resolve=True)]


def _of_config(options: argparse.Namespace) -> tuple[Any, Any]:
    """Transform and validation data of a config, or else those that it trains on."""
    from torchtune_vl.cli._dataset import read_dataset
    from torchtune_vl.evaluation import Sources
    from torchtune_vl.recipes._check_config import read_config

    overrides = [argument for argument in options.data if "=" in argument]
    config = read_config(["--config", options.config, *overrides])
    named = argparse.Namespace(config=options.config, overrides=overrides)
    named.validation = config.dataset_val is not None
    _, _, mixture, transform = read_dataset(named)
    if mixture.is_stream:
        raise ValueError("a stream has no numbers of samples: read it as a table")
    return transform, Sources(mixture.datasets, mixture.names)


def _answer(
    options: argparse.Namespace, about: Mapping[str, str], transform: Any, questions: Any
) -> int | None:
    """Let the model answer what is not answered in the directory."""
    from torchtune_vl.files._directory import write_json
    from torchtune_vl.generation import AnswerFile

    directory = options.output
    directory.mkdir(parents=True, exist_ok=True)
    settings = directory / SETTINGS
    if settings.is_file() and (found := json.loads(settings.read_text("utf-8"))) != about:
        differing = [key for key in {**found, **about} if found.get(key) != about.get(key)]
        told = f"{directory} has answers of another evaluation, which differs in {differing[0]}"
        raise ValueError(f"{told}: name another --output")
    if (directory / ANSWERS).exists():
        if not settings.is_file():
            told = f"{directory} has {ANSWERS}, and no {settings.name} that says of which model"
            raise ValueError(f"{told}: name another --output")
        return None
    if not settings.is_file():
        write_json(settings, about)
    file = AnswerFile(directory / ANSWERS, about)
    status = answer_many(options, file, transform, questions, rules_of(options))
    if status is None:
        file.finish(len(questions))
    return status


def _answers_of(directory: Path) -> list[dict[str, Any]]:
    path = directory / ANSWERS
    if not path.is_file():
        raise ValueError(f"{directory} has no {ANSWERS}: it is no directory of an evaluation")
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def _write(directory: Path, report: Mapping[str, Any]) -> None:
    """Write scores as JSON, and as a table."""
    from torchtune_vl.files._directory import new_file, write_json

    write_json(directory / "scores.json", report)
    samples, names = report["samples"], [*report["metrics"]]
    columns = [*report["groups"]]
    has_logprobs = any("choice_logprobs" in sample for sample in samples)
    more = ["choice_logprobs"] if has_logprobs else []
    with (
        new_file(directory / "scores.csv") as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.writer(file)
        table.writerow(["sample", "id", *columns, *names, "answer", "truth", "error", *more])
        for s in samples:
            own = [*(s.get("values", {}).get(c) for c in columns)]
            own += [s.get("scores", {}).get(name) for name in names]
            said = [s.get("answer"), (s.get("truths") or [None])[0], s.get("error")]
            said += [json.dumps(s[key]) if key in s else None for key in more]
            table.writerow([s["sample"], s["id"], *own, *said])


def _show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    compared = report.get("comparison", {}).get("metrics", {})
    more = ["other", "difference", "95 %", "p"] if compared else []
    # In a narrow terminal numbers go on in the next line, and no name is cut
    names = Column("", no_wrap=True)
    table = Table(names, "score", "95 %", *more, title=f"{report['num_answers']:,} answers")
    for name, found in report["metrics"].items():
        table.add_row(name, *_cells(found), *_compared_cells(compared.get(name)))
    Console().print(table)
    for column, groups in report["groups"].items():
        table = Table(shown(column), "answers", *report["metrics"])
        for value, group in groups.items():
            totals = [f"{found['total']:.4g}" for found in group["metrics"].values()]
            table.add_row(shown(value), f"{group['num_answers']:,}", *totals)
        Console().print(table)


def _cells(found: Mapping[str, float]) -> list[str]:
    return [f"{found['total']:.4g}", f"{found['low']:.4g} to {found['high']:.4g}"]


def _compared_cells(found: Mapping[str, float] | None) -> list[str]:
    if found is None:
        return []
    interval = f"{found['low']:.4g} to {found['high']:.4g}"
    difference = f"{found['difference']:+.4g}"
    return [f"{found['other_total']:.4g}", difference, interval, f"{found['p_value']:.2g}"]
