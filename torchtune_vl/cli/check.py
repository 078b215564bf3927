"""``tune-vl check``: all that is wrong with a dataset, before anything is trained on it."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtune_vl.cli._dataset import add_arguments, check_directory_of, read_dataset
from torchtune_vl.files._printable import shown

_DESCRIPTION = """\
Look at all samples of the dataset of a config of the recipe finetune, in num_workers processes.
Bad samples cannot be trained on: they cannot be read, nothing of them is supervised, or they exceed
a row; some only show when their media are decoded. Warnings are of samples that are cut, that are
the same as others or almost, that spell out special tokens, that have an empty answer, and of boxes
that look like those of another unit. Beside them it counts answers of one word, and languages.

No weights are read and no GPU is needed. What is found is kept on the way: a check that was stopped
goes on where it was, and a second one looks at what has changed, and at bad samples, only.

The exit status is 1 if there are bad samples, and with --strict also if there are warnings."""
_EXAMPLES = """\
  tune-vl check --config mine.yaml
  tune-vl check --config mine.yaml --decode --json found.json num_workers=16
  tune-vl check --config mine.yaml --decode --write-clean clean.jsonl
  tune-vl check --config qwen2_5_vl/lora --strict \\
    checkpoint_dir=Qwen2.5-VL-7B-Instruct dataset.data_files=train.jsonl"""
_NUM_SHOWN = 10
_LINES_AT_ONCE = 10_000


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    purpose = "find what is wrong with a dataset"
    command = add("check", _run, purpose, _EXAMPLES, _DESCRIPTION)
    add_arguments(command)
    argument = command.add_argument
    what = "decode all media, which finds damage and images that are alike"
    argument("--decode", action="store_true", help=what)
    argument("--strict", action="store_true", help="exit with status 1 for warnings, too")
    argument("--json", type=Path, metavar="FILE", help="write all that is found here")
    what = "write the samples that are not bad: the records of JSON files as they are, one a line; "
    what += "of other sources the numbers of samples"
    argument("--write-clean", type=Path, metavar="FILE", help=what)


def _run(options: argparse.Namespace) -> int:
    for path in (options.json, options.write_clean):
        if path is not None:
            check_directory_of(path)
    config, key, mixture, transform = read_dataset(options)
    if options.write_clean and len(mixture.datasets) > 1:
        raise ValueError("--write-clean takes one dataset, not a list: check each alone")
    from torchtune_vl._torchtune import instantiate
    from torchtune_vl.datasets._check import BAD, check
    from torchtune_vl.files._directory import write_json

    rows = instantiate(config.rows)
    how = {"decode": options.decode, "num_workers": config.num_workers}
    report = {"config": options.config, "overrides": options.overrides, "dataset": key}
    report |= check(mixture, transform, rows, **how)
    _show(report)
    if options.json:
        write_json(options.json, report)
    if options.write_clean:
        bad = {found["sample"] for found in report["findings"] if found["kind"] == BAD}
        good = [sample for sample in range(report["samples"]) if sample not in bad]
        _write_clean(options.write_clean, mixture.table, good)
    counts = report["counts"]
    return int(bool(counts[BAD] or (options.strict and sum(counts.values()))))


def _write_clean(path: Path, dataset: Any, good: Sequence[int]) -> None:
    from torchtune_vl.files._directory import new_file

    with new_file(path) as partial, partial.open("wb") as file:
        for first in range(0, len(good), _LINES_AT_ONCE):
            some = good[first : first + _LINES_AT_ONCE]
            lines = dataset.lines(some)
            file.writelines(b"%b\n" % line for line in lines or [b"%d" % n for n in some])
    print(f"Written to {shown(str(path))}: {len(good):,} samples")


def _show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from torchtune_vl.datasets._check import BAD, KINDS

    samples = report["samples"]
    decoded = "decoded" if report["decoded"] else "not decoded: --decode finds more"
    table = Table("", "samples", "share", title=f"{samples:,} samples, media {decoded}")
    for kind, count in report["counts"].items():
        name = f"{'' if kind == BAD else 'warning: '}{KINDS[kind]}"
        table.add_row(name, f"{count:,}", f"{count / samples:.2%}")
    Console().print(table)
    for kind in KINDS:
        reasons = [found["reason"] for found in report["findings"] if found["kind"] == kind]
        if reasons:
            print(f"\n{kind}:")
            print("\n".join(shown(f"  {reason}") for reason in reasons[:_NUM_SHOWN]))
            if len(reasons) > _NUM_SHOWN:
                print(f"  and {len(reasons) - _NUM_SHOWN:,} more: --json FILE has all")
    print("\n" + "\n".join(_facts(report)))


def _facts(report: Mapping[str, Any]) -> Iterator[str]:
    answers, languages = report["answers"], report["languages"]
    share = answers["one word"] / max(answers["any"], 1)
    yield f"Answers: {answers['any']:,}, of one word: {answers['one word']:,} ({share:.0%})"
    told = (f"{name or 'too short to tell'} {count:,}" for name, count in languages.items())
    yield f"Languages: {', '.join(told)}"
