"""``tune-vl merge`` and ``export``: checkpoints and adapters written anew."""

import argparse
from collections.abc import Callable
from pathlib import Path

from torchtune_vl.files._printable import shown

_MERGE = """\
Add an adapter, of torchtune-vl or of peft, to the weights of its base model, and write the
checkpoint that results: in the published layout, which transformers, vLLM and SGLang load."""
_EXAMPLE = "  tune-vl merge Qwen2.5-VL-3B-Instruct output/epoch_0/adapter merged --dtype bfloat16"
_EXPORT = """\
Write a checkpoint anew in the published layout, or an adapter in peft's: in another dtype, in files
of another size, or with the published names where a trainer wrote others."""
_EXPORT_EXAMPLES = """\
  tune-vl export output/epoch_0 exported --dtype bfloat16 --max-shard-size 2GB
  tune-vl export output/epoch_0/adapter exported-adapter --dtype bfloat16"""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add both."""
    merge = add("merge", _write, "merge an adapter into its base model", _EXAMPLE, _MERGE)
    merge.add_argument("base", type=Path, help="checkpoint directory of the base model")
    merge.add_argument("adapter", type=Path, help="directory with adapter_config.json")
    purpose = "write a checkpoint or an adapter in another dtype or file size"
    export = add("export", _write, purpose, _EXPORT_EXAMPLES, _EXPORT)
    export.add_argument("source", type=Path, help="directory of a checkpoint or of an adapter")
    for parser in (merge, export):
        parser.add_argument("output", type=Path, help="directory to make")
        what = "dtype of the tensors (default: as they are)"
        parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help=what)
        what = "most bytes of tensors in a file, such as 500MB (default: %(default)s)"
        parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help=what)


def _write(options: argparse.Namespace) -> int:
    import torch

    from torchtune_vl.training import export, merge

    how = (options.output, options.dtype and getattr(torch, options.dtype), options.max_shard_size)
    if options.command == "merge":
        merge(options.base, options.adapter, *how)
    else:
        export(options.source, *how)
    print(f"Written to {shown(str(options.output))}")
    return 0
