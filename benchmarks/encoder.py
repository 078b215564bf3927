"""Time and memory of the vision encoder for more and more images, beside transformers' sdpa.

Run as ``python -m benchmarks.encoder``. Both encoders have the width of the published ones, the
same weights and the same patches; the layers are fewer by default, so that it ends within minutes
on two cores.
"""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from torchtune_vl.models.qwen2_5_vl import GEOMETRY, qwen2_5_vl, qwen2_5_vl_hf_to_tune
from torchtune_vl.modules import encoder_index, vision_index

COUNTS = (1, 4, 16)
PATCH_SIZE = 14
OUT_DIM = 2048
MMAP_THRESHOLD, M_MMAP_THRESHOLD = 1 << 16, -3  # mallopt's

Forwards = dict[str, Callable[[], torch.Tensor]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=336, help="height and width of an image, px")
    parser.add_argument(
        "--layers", type=int, default=4, help="layers; the last attends over frames"
    )
    parser.add_argument("--repeats", type=int, default=3, help="paired runs")
    arguments = parser.parse_args()
    reference, ours = encoders(arguments.layers)
    side = arguments.size // PATCH_SIZE

    print(
        f"{arguments.layers} layers, images of {arguments.size}x{arguments.size} px "
        f"({side * side} patches), float32, {torch.get_num_threads()} threads"
    )
    runs = {count: forwards(reference, ours, count, side) for count in COUNTS}
    print_times(runs, arguments.repeats)
    print_memory(runs)


def print_times(runs: dict[int, Forwards], repeats: int) -> None:
    """Print ratios of time, and growth over that of one image."""
    print(f"\nTime, median (least to most) of {repeats} paired runs")
    print("images   ours / transformers     ours / linear growth   transformers / linear growth")
    base: dict[str, float] = {}
    for count, run in runs.items():
        times = paired_times(run, repeats)
        ratios = [a / b for a, b in zip(times["ours"], times["transformers"], strict=True)]
        medians = {name: statistics.median(values) for name, values in times.items()}
        base = base or medians
        growth = {name: medians[name] / base[name] / count for name in medians}
        print(
            f"{count:6}   {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            f"   {growth['ours']:22.2f}   {growth['transformers']:28.2f}"
        )


def print_memory(runs: dict[int, Forwards]) -> None:
    """Print ratios of peak memory, which do not vary between runs."""
    print("\nPeak memory of a forward, ours / transformers")
    print("images   without gradients   with gradients")
    for count, run in runs.items():
        ratio = {}
        for inference in (True, False):
            with torch.inference_mode(inference):
                peaks = {name: peak_memory(forward) for name, forward in run.items()}
            ratio[inference] = peaks["ours"] / peaks["transformers"]
        print(f"{count:6}   {ratio[True]:17.2f}   {ratio[False]:14.2f}")


def encoders(layers: int) -> tuple[nn.Module, nn.Module]:
    """Return transformers' encoder and ours with the same random weights."""
    config = Qwen2_5_VLVisionConfig(
        depth=layers,
        hidden_size=1280,
        out_hidden_size=OUT_DIM,
        fullatt_block_indexes=[layers - 1],
        tokens_per_second=2,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    reference = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    model = qwen2_5_vl(
        vocab_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        embed_dim=OUT_DIM,
        intermediate_dim=8,
        mrope_sections=(OUT_DIM // 2 - 2, 1, 1),
        tie_word_embeddings=True,
        vision_intermediate_dim=config.intermediate_size,
        vision_num_layers=layers,
        full_attention_layers=(layers - 1,),
    )
    ours = model.encoders["vision"].eval()
    weights = {f"visual.{name}": tensor for name, tensor in reference.state_dict().items()}
    renamed = qwen2_5_vl_hf_to_tune(weights)
    ours.load_state_dict({n.removeprefix("encoders.vision."): t for n, t in renamed.items()})
    return reference, ours


def forwards(reference: nn.Module, ours: nn.Module, count: int, side: int) -> Forwards:
    """Return the two forwards on the same images, after a check that they agree."""
    grid_thw = torch.tensor([[1, side, side]] * count)
    patches = torch.randn(count * side * side, 1176)
    index: dict[str, Any] = encoder_index(vision_index(grid_thw, GEOMETRY))
    run = {
        "ours": lambda: ours(patches, grid_thw, **index),
        "transformers": lambda: reference(patches, grid_thw=grid_thw).pooler_output,
    }
    with torch.inference_mode():
        torch.testing.assert_close(run["ours"](), run["transformers"](), atol=1e-4, rtol=1e-4)
    return run


@torch.inference_mode()
def paired_times(run: Forwards, repeats: int) -> dict[str, list[float]]:
    """Return seconds of each forward, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(repeats):
        for name, forward in run.items():
            start = time.perf_counter()
            forward()
            times[name].append(time.perf_counter() - start)
    return times


def peak_memory(forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that a forward adds at its peak to what the process holds (Linux)."""
    gc.collect()
    return_what_is_freed()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak to the present
    before = status("VmRSS")
    forward()
    return status("VmHWM") - before


def return_what_is_freed() -> None:
    """Let tensors go back to the system when freed: no heap that depends on what ran before."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def status(field: str) -> int:
    """Return the bytes that the kernel tells of this process (Linux)."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
