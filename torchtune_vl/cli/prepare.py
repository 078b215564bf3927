"""``tune-vl prepare``: samples transformed before training."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchtune_vl.cli._dataset import add_arguments, read_dataset
from torchtune_vl.files._printable import shown

_DESCRIPTION = """\
Write the samples of a config's dataset as training takes them, so that it decodes and resizes no
image again. It reads them by torchtune_vl.datasets.prepared_dataset, with the same losses.
A command that was stopped goes on when it is given again."""
_EXAMPLES = """\
  tune-vl prepare --config mine.yaml --output prepared --num-workers 32
  tune-vl prepare --config mine.yaml --output prepared_val --validation
  tune-vl prepare --config mine.yaml --output /shared/prepared --ray auto
  tune-vl run finetune --config mine.yaml "~dataset" \\
    dataset._component_=torchtune_vl.datasets.prepared_dataset dataset.directory=prepared"""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    purpose = "transform samples before training"
    command = add("prepare", _run, purpose, _EXAMPLES, _DESCRIPTION)
    add_arguments(command)
    argument = command.add_argument
    what = "directory to write; of several datasets one in it for each, by name"
    argument("--output", required=True, type=Path, metavar="DIRECTORY", help=what)
    what = "processes that work (default: num_workers of the config; on a cluster all)"
    argument("--num-workers", type=int, metavar="N", help=what)
    what = 'cluster that works, "auto" for the one this machine is in, "local" for a new one here'
    argument("--ray", metavar="ADDRESS", help=what)
    what = "samples of a file, which is what a worker does at a time (default: %(default)s)"
    argument("--shard-size", type=int, default=500, metavar="N", help=what)


def _run(options: argparse.Namespace) -> int:
    workers = options.num_workers
    if options.shard_size < 1:
        raise ValueError(f"--shard-size is {options.shard_size}: make it at least 1")
    if workers is not None and workers < 0:
        raise ValueError(f"--num-workers is {workers}: make it at least 0")
    config, key, mixture, transform = read_dataset(options)
    from omegaconf import OmegaConf

    from torchtune_vl.datasets._prepare import check_can_be_prepared, prepare
    from torchtune_vl.recipes._config_keys import SOURCE_KEYS

    for dataset in mixture.datasets:
        check_can_be_prepared(dataset, transform)
    content: Any = OmegaConf.to_container(config, resolve=True)
    entries = content[key] if isinstance(content[key], list) else [content[key]]
    outputs = _outputs(options.output, mixture.names)
    for dataset, entry, output in zip(mixture.datasets, entries, outputs, strict=True):
        manifest = prepare(
            dataset,
            transform,
            output,
            {name: value for name, value in entry.items() if name not in SOURCE_KEYS},
            shard_size=options.shard_size,
            # On a cluster, those of a device are no measure
            num_workers=(0 if options.ray else config.num_workers) if workers is None else workers,
            ray_address=options.ray,
            skips_bad=config.on_bad_sample == "skip",
            largest_bad_share=config.max_bad_share,
        )
        size = sum(shard["size"] for shard in manifest["shards"]) / 1e9
        told = f"{sum(shard['samples'] for shard in manifest['shards']):,} samples"
        if manifest["bad"]:
            told += f", without {manifest['bad']:,} that cannot be read, see bad_samples.jsonl"
        print(f"Written to {shown(str(output))} ({size:.2f} GB): {told}")
    return 0


def _outputs(output: Path, names: Sequence[str]) -> list[Path]:
    """Where each dataset goes: of several by its name."""
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"the dataset's name {name!r} is no name of a directory: change it")
    return [output / name for name in names] if len(names) > 1 else [output]
