"""Memory and time of loading and saving a checkpoint, beside copying the same bytes.

Run as ``python -m benchmarks.checkpoint``. Prints a Markdown table. Times are the median of paired
runs with files in the page cache; memory is anonymous (``RssAnon``), so Linux only, sampled every
millisecond in a process of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from torchtune_vl.files import _directory, _safetensors
from torchtune_vl.files._directory import new_directory
from torchtune_vl.files._safetensors import weight_files, write_shards
from torchtune_vl.models import _weights
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config, qwen2_5_vl_tune_to_hf
from torchtune_vl.training import Qwen2_5_VLCheckpointer

MEASURES = ("load memory", "load time", "save memory", "save time")
TARGETS = {"load memory": "1.15", "load time": "2", "save memory": "1", "save time": "none"}
QUANTITIES = {
    "load memory": "loading: peak of RssAnon / the model's size",
    "load time": "loading: time / copying the files into memory that is there",
    "save memory": "saving: RssAnon beyond the model / largest file",
    "save time": "saving: time / writing and flushing the same bytes",
}
# As the published ones have it, but for size
CONFIG = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 17,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "depth": 8},
}
MAX_SHARD_SIZE = "500MB"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where to write; a temporary one by default")
    parser.add_argument("--repeats", type=int, default=5, help="paired runs")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--checked", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        ratio = measure(
            arguments.measure, arguments.directory, arguments.repeats, bool(arguments.checked)
        )
        print(json.dumps(ratio))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print_table(Path(directory), arguments.repeats)


def print_table(directory: Path, repeats: int) -> None:
    """Print one row for each measure, with and without checksums."""
    subprocess.run(
        [sys.executable, "-c", f"from {__spec__.name} import *; generate({str(directory)!r})"],
        check=True,
    )
    files = weight_files(directory / "epoch_0")
    sizes = [path.stat().st_size for path in files]
    print(f"{sum(sizes) / 1e9:.2f} GB in {len(files)} files, {os.cpu_count()} processors\n")
    print("| | with checksums | without | target |\n|---|---|---|---|")
    for name in MEASURES:
        ratios = []
        for checked in ("1", "0"):
            command = [sys.executable, "-m", __spec__.name, "--measure", name]
            command += ["--directory", str(directory), "--checked", checked]
            command += ["--repeats", str(repeats)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            ratios.append(f"{json.loads(output.splitlines()[-1]):.2f}")
        print(f"| {QUANTITIES[name]} | {' | '.join(ratios)} | {TARGETS[name]} |", flush=True)


def generate(directory: str) -> None:
    """Write a random checkpoint in shards, ``epoch_0``."""
    with new_directory(Path(directory) / "epoch_0") as target:
        (target / "config.json").write_text(json.dumps(CONFIG))
        write_shards(qwen2_5_vl_tune_to_hf(build(target).state_dict()), target, MAX_SHARD_SIZE)


def measure(name: str, directory: Path, repeats: int, checked: bool) -> float:
    """One figure of the table."""
    unchecked = mock.patch.object(_directory, "write_manifest", return_value=None)
    shards = mock.patch.object(
        _safetensors, "write_shards", lambda w, d, _: write_shards(w, d, MAX_SHARD_SIZE)
    )
    loaded = mock.patch.object(_weights, "check_manifest", return_value=None)
    with ExitStack() as patches:
        patches.enter_context(shards)
        for patch in () if checked else (unchecked, loaded):
            patches.enter_context(patch)
        if name == "load memory":
            return load_memory(directory)
        if name == "load time":
            return load_time(directory, repeats)
        if name == "save memory":
            return save_memory(directory)
        return save_time(directory, repeats)


def load_memory(directory: Path) -> float:
    """Peak of the process while a model is built and loaded, over the model's size."""
    before = anonymous_memory()
    with peak_memory() as peak:
        model = build(directory / "epoch_0")
        load(model, directory)
    return (peak() - before) / size(model)


def load_time(directory: Path, repeats: int) -> float:
    """Time to load into a model, over that to copy the files into memory."""
    model = build(directory / "epoch_0")
    files = weight_files(directory / "epoch_0")
    buffers = {path: torch.zeros(path.stat().st_size, dtype=torch.uint8) for path in files}

    def copy() -> None:
        for path, buffer in buffers.items():
            with path.open("rb", buffering=0) as file:
                view = memoryview(buffer.numpy())
                while count := file.readinto(view):
                    view = view[count:]

    return ratio_of_times(lambda: load(model, directory), copy, repeats)


def save_memory(directory: Path) -> float:
    """Memory that saving takes beside the model, over the largest file."""
    model = build(directory / "epoch_0")
    before = anonymous_memory()
    with peak_memory() as peak:
        save(model, directory)
    largest = max(path.stat().st_size for path in weight_files(directory / "output" / "epoch_0"))
    return (peak() - before) / largest


def save_time(directory: Path, repeats: int) -> float:
    """Time to save, over that to write and flush the same bytes."""
    model = build(directory / "epoch_0")
    contents = [path.read_bytes() for path in weight_files(directory / "epoch_0")]

    def write() -> None:
        shutil.rmtree(directory / "written", ignore_errors=True)
        (directory / "written").mkdir()
        for number, content in enumerate(contents):
            with (directory / "written" / str(number)).open("wb", buffering=0) as file:
                view = memoryview(content)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())

    return ratio_of_times(lambda: save(model, directory), write, repeats)


def build(directory: Path) -> nn.Module:
    """The model with its memory in use, in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    model = qwen2_5_vl_from_config(directory)
    for parameter in model.parameters():
        nn.init.uniform_(parameter)
    return model


def load(model: nn.Module, directory: Path) -> None:
    """Load as torchtune's recipes do."""
    checkpointer = Qwen2_5_VLCheckpointer(directory / "epoch_0", directory / "output")
    model.load_state_dict(checkpointer.load_checkpoint()["model"])


def save(model: nn.Module, directory: Path) -> None:
    """Save as torchtune's recipes do."""
    checkpointer = Qwen2_5_VLCheckpointer(directory / "epoch_0", directory / "output")
    checkpointer.save_checkpoint({"model": model.state_dict()}, epoch=0)


def size(model: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def ratio_of_times(ours: Callable[[], None], theirs: Callable[[], None], repeats: int) -> float:
    """Median of the ratios of paired runs, after one that does not count."""
    ratios = []
    for _ in range(repeats + 1):
        times = []
        for run in (ours, theirs):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])


def anonymous_memory() -> int:
    """Bytes of the process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Sample anonymous memory; the value gives the highest in bytes."""
    samples = [anonymous_memory()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(anonymous_memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield lambda: max(samples)
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
