"""What `benchmarks.gpu_parts` measures with one GPU in a few minutes, part by part.

Run as ``python -m benchmarks.gpu --minutes 8``. It needs no network and, beside torch and
transformers, only what ``make gpu-wheels`` collects. Parts run in the order of their worth, each in
a process of its own: one that crashes, runs out of memory or takes too long is lost alone, and its
error is noted. Results are kept after each measurement; what they have already is not measured
again, so that the same command goes on where the time was up. At its end, and with ``--tables``
alone, it writes the tables of docs/benchmarks.md.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import spread

RESULTS = Path("build/gpu/results.json")
PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- tables of benchmarks.gpu begin -->", "<!-- tables of benchmarks.gpu end -->"
MISSING = "not measured yet"
LONGEST_ERROR = 200

Results = dict[str, Any]  # by part: ``rows``, ``error`` or None, ``seconds`` and ``about``


class Part(NamedTuple):
    """Something to measure.

    Args:
        most: seconds that it may take if there are eight minutes in all, in others as many more.
        function: of `benchmarks.gpu_parts`, which yields rows of results.
        settings: its arguments.
    """

    most: float
    function: str
    settings: Mapping[str, Any] = {}


def trained(most: float, size: str, config: str, **overrides: Any) -> Part:
    """Training by the recipe, with one of its configs and what differs from that."""
    return Part(most, "training", {"size": size, "config": config, "overrides": overrides})


def profiled(part: Part) -> Part:
    """The same, and then a look into some of its steps."""
    return part._replace(settings={**part.settings, "is_profiled": True})


_BF16 = {"dtype": "bf16", "compute_dtype": None}
_FROZEN = {"model.encoder_trainable": False, "model.fusion_trainable": False}
_ADAMW8BIT = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-5}
# In full, rows of 16,384 tokens leave no room for activations that are not computed anew
_SHORT = {"rows.max_tokens": 8192, "rows.max_patches": 32_768}
_FULL, _LORA, _SHORTER = "3B, full", "3B, LoRA", "`rows.max_tokens: 8192`"


def option(plain: str, most: float, **overrides: Any) -> tuple[str, Part]:
    """What an option of a plain setting of 3B costs."""
    return plain, trained(most, "3B", "lora" if plain == _LORA else "full", **overrides)


# Of docs/training.md, each beside a plain setting
OPTIONS: dict[str, tuple[str, Part]] = {
    "`dtype: bf16`, `compute_dtype: null`": option(_FULL, 60, **_BF16),
    "`compile: False`": option(_FULL, 45, compile=False),
    "LoRA, `activation_checkpointing: selective`": option(
        _LORA, 60, activation_checkpointing="selective"
    ),
    "LoRA, `activation_checkpointing: none`": option(_LORA, 60, activation_checkpointing="none"),
    "LoRA, `flash_attention: FA3`, where it is installed": option(_LORA, 60, flash_attention="FA3"),
    "encoder and merger frozen": option(_FULL, 60, **_FROZEN),
    "`optimizer`: `torchao.optim.AdamW8bit`": option(_FULL, 80, optimizer=_ADAMW8BIT),
    "`activation_offloading: True`": option(_FULL, 60, activation_offloading=True),
    _SHORTER: option(_FULL, 60, **_SHORT),
    f"{_SHORTER}, `activation_checkpointing: selective`": option(
        _SHORTER, 60, **_SHORT, activation_checkpointing="selective"
    ),
    f"{_SHORTER}, `activation_checkpointing: none`": option(
        _SHORTER, 60, **_SHORT, activation_checkpointing="none"
    ),
    "`parallel.cpu_offload: True`": option(_FULL, 90, **{"parallel.cpu_offload": True}),
}
_IN_BF16 = "7B, full, bf16"
PEERS = {_FULL: f"{_FULL}, transformers", _IN_BF16: f"{_IN_BF16}, transformers"}
PARTS: dict[str, Part] = {
    "correctness": Part(50, "correctness"),
    "resuming": Part(50, "resuming"),
    _FULL: profiled(trained(130, "3B", "full")),
    PEERS[_FULL]: Part(45, "peer", {"size": "3B", "dtype": "fp32", "like": _FULL}),
    "7B, LoRA": trained(80, "7B", "lora"),
    "decoding": Part(60, "decoding"),
    _IN_BF16: trained(90, "7B", "full", **_BF16),
    PEERS[_IN_BF16]: Part(50, "peer", {"size": "7B", "dtype": "bf16", "like": _IN_BF16}),
    "data": Part(30, "loading"),
    _LORA: trained(60, "3B", "lora"),
    "7B, QLoRA": trained(80, "7B", "qlora"),
    "losses": Part(30, "losses"),
    **{name: part for name, (_, part) in OPTIONS.items()},
    "3B, QLoRA": trained(80, "3B", "qlora"),
}
TRAINED = (_FULL, _LORA, "3B, QLoRA", _IN_BF16, "7B, LoRA", "7B, QLoRA")


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help="these alone")
    parser.add_argument("--tables", type=Path, help="measure nothing: tables of these results")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the tables are written")
    arguments = parser.parse_args()
    if not arguments.tables:
        chosen = {name: PARTS[name] for name in arguments.parts or PARTS}
        scale = arguments.minutes / 8
        limits = {name: part.most * scale for name, part in chosen.items()}
        run_parts(limits, arguments.output, 60 * arguments.minutes, command_of)
    results = read(arguments.tables or arguments.output)
    print(tables(results))
    write_page(arguments.page, results)


def command_of(name: str, output: Path, until: float) -> list[str]:
    """The command that measures a part."""
    options = ["--output", str(output), "--until", str(until)]
    return [sys.executable, "-m", "benchmarks.gpu_parts", name, *options]


def run_parts(
    limits: Mapping[str, float],
    output: Path,
    seconds: float,
    command: Callable[[str, Path, float], list[str]],
) -> None:
    """Run parts that have no results yet, one by one, none longer than its limit.

    None is begun that has less than a third of it left.
    """
    end = time.monotonic() + seconds
    for name, most in limits.items():
        if read(output).get(name, {}).get("rows"):
            continue
        limit = min(most, end - time.monotonic())
        if limit < most / 3:
            keep(output, name, error="not begun: the time was up")
            continue
        print(f"{name}: at most {limit:.0f} s", flush=True)
        keep(output, name, rows=[], error="the benchmark was ended before this part was")
        start = time.monotonic()
        log = output.parent / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"
        error = run_part(command(name, output, time.time() + limit), log, limit)
        taken = time.monotonic() - start
        keep(output, name, error=error, seconds=taken)
        print(f"{name}: {error or 'done'}, {taken:.0f} s", flush=True)


def run_part(command: Sequence[str], log: Path, limit: float) -> str | None:
    """Run a command with all processes that it starts, and say in a line what went wrong, if so."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"took more than {limit:.0f} s"
        finally:  # data workers, too, which would go on
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return last_line(log) if status else None


def last_line(log: Path) -> str:
    """The end of a traceback: what was raised."""
    text = log.read_text(errors="replace")
    lines = [re.sub(r"^(\[rank\d+\]: )+", "", line).strip() for line in text.splitlines()]
    raised = [line for line in lines if "Error: " in line] or [line for line in lines if line]
    return (raised or ["failed without a word"])[-1][:LONGEST_ERROR]


def read(output: Path) -> Results:
    """The results so far."""
    return json.loads(output.read_text()) if output.exists() else {}


def keep(output: Path, name: str, **values: Any) -> None:
    """Note values of a part; whoever reads meanwhile finds the old ones or the new ones."""
    results = read(output)
    results[name] = {**results.get(name, {}), **values}
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".partial")
    unfinished.write_text(json.dumps(results, indent=1))
    os.replace(unfinished, output)


def write_page(page: Path, results: Results) -> None:
    """Replace what a page has between the markers."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    content = f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}"
    page.write_text(content, encoding="utf-8")


def tables(results: Results) -> str:
    """All tables, complete even if nothing is measured."""
    parts = (
        about(results),
        correctness_table(results),
        training_table(results),
        peers_table(results),
        decoding_table(results),
        losses_table(results),
        profile_tables(results),
        options_table(results),
    )
    return "\n\n".join(parts)


def about(results: Results) -> str:
    """Where the results come from."""
    found: list[dict[str, str]] = []
    for part in results.values():
        if part.get("about") and part["about"] not in found:
            found.append(part["about"])
    if not found:
        return f"{MISSING.capitalize()}."
    return "\n\n".join(", ".join(f"{k} {v}" for k, v in one.items()) + "." for one in found)


def first(results: Results, part: str, what: str) -> dict[str, Any]:
    """The first row of a kind of a part, empty if there is none."""
    rows = results.get(part, {}).get("rows", [])
    return next((row for row in rows if row["what"] == what), {})


def why_missing(results: Results, part: str) -> str:
    """What stands in a table instead of a result."""
    error = results.get(part, {}).get("error")
    return f"failed: {in_cell(error)}" if error and "time was up" not in error else MISSING


def in_cell(text: str) -> str:
    """Text that does not end a cell."""
    return text.replace("|", "/")


def table(*heads: str, rows: Sequence[Sequence[str]]) -> str:
    """Format a table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("  |", " |")


def correctness_table(results: Results) -> str:
    """Comparisons with transformers, and of our own ways with each other."""
    rows = []
    for part in ("correctness", "resuming"):
        found = results.get(part, {}).get("rows", [])
        for row in found:
            held = "yes" if row["value"] <= row["bound"] else "**no**"
            rows.append([row["name"], f"{row['value']:.2g}", f"{row['bound']:.2g}", held])
        if not found or results[part]["error"]:
            rows.append([part, why_missing(results, part), "", ""])
    return table("on this GPU", "found", "bound", "within", rows=rows)


def training_table(results: Results) -> str:
    """Speed and memory of the configs."""
    rows = []
    for part in TRAINED:
        row = first(results, part, "training")
        if not row:
            rows.append([part, why_missing(results, part), "", "", "", "", ""])
            continue
        rows.append(
            [
                part,
                f"{statistics.median(row['tokens_per_second']):,.0f}",
                "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}",
                f"{row['waiting']:.1%}",
                f"{row['allocated'] / 1e9:.1f}",
                f"{row['reserved'] / 1e9:.1f}",
                f"{sum(row['estimate'].values()) / 1e9:.1f}",
            ]
        )
    supply = first(results, "data", "loading").get("tokens_per_second")
    rate = f"{supply:,.0f} tokens per second" if supply else why_missing(results, "data")
    heads = ("config", "tokens per second", "MFU", "waiting for data", "GB allocated", "reserved")
    found = table(*heads, "computed", rows=rows)
    return f"{found}\n\nWhat 8 data workers make of JPEGs of 1920x1080 px, alone: {rate}."


def peers_table(results: Results) -> str:
    """Training beside transformers, on the same samples."""
    rows = []
    for ours, theirs in PEERS.items():
        own, other = first(results, ours, "training"), first(results, theirs, "training")
        if own and other:
            pairs = zip(own["tokens_per_second"], other["tokens_per_second"], strict=False)
            faster = spread([a / b for a, b in pairs if b] or [0.0])
            memory = f"{own['allocated'] / (other['allocated'] or 1):.2f}"
            rows.append([ours, other["attention"], faster, memory])
        else:
            missing = ours if not own else theirs
            rows.append([ours, "", why_missing(results, missing), ""])
    heads = ("config", "transformers with", "tokens per second, ours / transformers")
    return table(*heads, "peak memory, ours / transformers", rows=rows)


def decoding_table(results: Results) -> str:
    """Steps of decoding, beside transformers where it has the same weights."""
    found = [row for row in results.get("decoding", {}).get("rows", []) if "step" in row]
    rows = [
        [
            row["weights"],
            str(row["batch"]),
            f"{row['batch'] / statistics.median(row['step']):,.0f}",
            spread([b / a for a, b in zip(row["step"], row["theirs"], strict=True)])
            if row.get("theirs")
            else "",
        ]
        for row in found
    ]
    failed = [row for row in results.get("decoding", {}).get("rows", []) if "error" in row]
    rows += [
        [row["weights"], str(row["batch"]), f"failed: {in_cell(row['error'])}", ""]
        for row in failed
    ]
    if not rows or results["decoding"]["error"]:
        rows.append(["3B", "", why_missing(results, "decoding"), ""])
    heads = ("weights of 3B", "prompts of 600 tokens", "tokens per second")
    return table(*heads, "time of a step, transformers / ours", rows=rows)


def losses_table(results: Results) -> str:
    """The output layer's loss, beside those of torch and Liger."""
    ours, *others = results.get("losses", {}).get("rows", []) or [{}]
    rows = []
    for other in others:
        if "error" in other:
            rows.append([other["way"], f"failed: {in_cell(other['error'])}", ""])
            continue
        pairs = zip(other["times"], ours["times"], strict=True)
        memory = f"{other['allocated'] / (ours['allocated'] or 1):.2f}"
        rows.append([other["way"], spread([a / b for a, b in pairs if b] or [0.0]), memory])
    if not rows or results["losses"]["error"]:
        rows.append(["", why_missing(results, "losses"), ""])
    heads = ("loss of 16,384 tokens of 3B", "time / ours", "memory / ours")
    return table(*heads, rows=rows)


def profile_tables(results: Results) -> str:
    """What the host waits for in a step, and where the device's time goes."""
    row = first(results, _FULL, "profile")
    missing = why_missing(results, _FULL)
    counted = {
        "host waiting for the device": "waits",
        "copies to the host": "copies_to_host",
        "operations that torch says synchronise": "synchronising",
    }
    counts = [
        [what, f"{row[key] / row['steps']:.1f}" if row else missing]
        for what, key in counted.items()
    ]
    waits = table(f"{_FULL}, a step", "times", rows=counts)
    kernels = [
        [f"`{in_cell(kernel['name'])}`", f"{kernel['share']:.1%}", str(kernel["calls"])]
        for kernel in row.get("kernels", [])
    ]
    rows = kernels or [["" if row else missing, "", ""]]
    return f"{waits}\n\n{table('kernel', 'share of the time', 'calls', rows=rows)}"


def options_table(results: Results) -> str:
    """What options cost and save."""
    rows = []
    for name, (plain, _) in OPTIONS.items():
        own, base = first(results, name, "training"), first(results, plain, "training")
        left_out = first(results, name, "left out")
        if own and base:
            pairs = zip(base["tokens_per_second"], own["tokens_per_second"], strict=False)
            time_ratio = spread([a / b for a, b in pairs if b] or [0.0])
            memory = f"{own['allocated'] / (base['allocated'] or 1):.2f}"
        else:
            missing = left_out.get("reason") or why_missing(results, name if not own else plain)
            time_ratio, memory = missing, ""
        rows.append([name, plain, time_ratio, memory])
    return table("option", "beside", "time of a token / plain", "memory / plain", rows=rows)


if __name__ == "__main__":
    main()
