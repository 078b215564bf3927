"""The benchmark of a GPU, without one: which parts run, what is kept of them, and its tables."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import (
    BEGIN,
    END,
    MISSING,
    OPTIONS,
    PARTS,
    PEERS,
    TRAINED,
    keep,
    last_line,
    read,
    run_parts,
    tables,
    write_page,
)

KEEP = "from pathlib import Path; from benchmarks.gpu import keep; keep(Path({!r}), {!r}, rows=[1])"
# What each part does after it has kept a row
ENDS = {
    "good": "",
    "crashes": "raise MemoryError('none left | here')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "hangs": "import time; time.sleep(60)",
}


def command(name: str, output: Path, until: float) -> list[str]:
    return [sys.executable, "-c", f"{KEEP.format(str(output), name)}; {ENDS[name] or 'pass'}"]


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    return tmp_path / "gpu" / "results.json"


def test_a_part_that_fails_is_lost_alone_with_what_it_raised(output: Path) -> None:
    run_parts({"crashes": 20, "killed": 20, "hangs": 0.8, "good": 20}, output, 60, command)
    results = read(output)
    assert [*results] == ["crashes", "killed", "hangs", "good"]
    assert results["crashes"]["error"] == "MemoryError: none left | here"
    assert results["killed"]["error"] == "was killed by SIGKILL"
    assert results["hangs"]["error"] == "took more than 1 s"
    assert results["good"]["error"] is None
    assert all(results[name]["rows"] == [1] for name in ("crashes", "killed", "good"))


def test_no_part_begins_when_the_time_is_up(output: Path) -> None:
    run_parts({"good": 20}, output, 5, command)
    assert read(output)["good"] == {"error": "not begun: the time was up"}
    run_parts({"good": 20}, output, 60, command)
    assert read(output)["good"]["rows"] == [1]


def test_what_has_results_is_not_measured_again(output: Path) -> None:
    keep(output, "good", rows=["before"])
    run_parts({"good": 20}, output, 60, command)
    assert read(output)["good"]["rows"] == ["before"]


def test_results_are_kept_after_each_measurement(output: Path) -> None:
    keep(output, "a", rows=[1], error="begun")
    keep(output, "b", rows=[2])
    keep(output, "a", error=None)
    assert json.loads(output.read_text()) == {"a": {"rows": [1], "error": None}, "b": {"rows": [2]}}
    assert [*output.parent.iterdir()] == [output]


def test_the_error_is_that_of_the_traceback_also_if_others_print_after_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "Traceback\n  line\ntorch.OutOfMemoryError: CUDA out of memory\n[W1] destroyed\n"
    )
    assert last_line(log) == "torch.OutOfMemoryError: CUDA out of memory"
    log.write_text("Segmentation fault\n\n")
    assert last_line(log) == "Segmentation fault"
    log.write_text("")
    assert last_line(log) == "failed without a word"


def test_tables_without_any_result_have_a_row_for_each() -> None:
    text = tables({})
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for name in (*TRAINED, *PEERS, *OPTIONS):
        assert any(row.startswith(f"| {name} |") and MISSING in row for row in rows), name
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def trained(rate: float) -> dict[str, Any]:
    return {
        "what": "training",
        "tokens_per_second": [rate, 2 * rate, 3 * rate],
        "mfu": 0.5,
        "waiting": 0.01,
        "allocated": 70e9,
        "reserved": 80e9,
        "estimate": {"weights": 60e9, "activations": 16e9},
        "attention": "sdpa",
    }


def results() -> dict[str, Any]:
    comparison = {"what": "comparison", "name": "logits", "value": 1e-5, "bound": 1e-4}
    profile = {
        "what": "profile",
        "steps": 2,
        "waits": 4,
        "copies_to_host": 2,
        "synchronising": 2,
        "kernels": [{"name": "gemm<a|b>", "share": 0.25, "calls": 7}],
    }
    decoding = {"what": "decoding", "weights": "bfloat16", "batch": 8}
    found: dict[str, list[Any]] = {
        "correctness": [comparison, {**comparison, "name": "gradients", "value": 1.0}],
        "3B, full": [trained(1000), profile],
        PEERS["3B, full"]: [trained(500)],
        "`compile: False`": [trained(250)],
        "decoding": [
            {**decoding, "step": [0.004, 0.004], "theirs": [0.01, 0.01]},
            {**decoding, "weights": "int4", "error": "RuntimeError: no kernel"},
        ],
        "losses": [
            {"what": "loss", "way": "ours", "times": [0.1, 0.2], "allocated": 3e9},
            {"what": "loss", "way": "torch", "times": [0.2, 0.4], "allocated": 6e9},
            {"what": "loss", "way": "Liger", "error": "ImportError: a|b"},
        ],
        "data": [{"what": "loading", "tokens_per_second": 123456.0}],
    }
    about = {"GPU": "NVIDIA H200", "torch": "2.11"}
    return {name: {"rows": rows, "error": None, "about": about} for name, rows in found.items()} | {
        "7B, LoRA": {"rows": [], "error": "OutOfMemoryError: a|b"},
        "resuming": {"error": "not begun: the time was up"},
    }


def test_tables_say_what_was_found_and_what_was_not() -> None:
    text = tables(results())
    for line in (
        "GPU NVIDIA H200, torch 2.11.",
        "| logits | 1e-05 | 0.0001 | yes |",
        "| gradients | 1 | 0.0001 | **no** |",
        f"| resuming | {MISSING} | | |",
        "| 3B, full | 2,000 | 50.0% | 1.0% | 70.0 | 80.0 | 76.0 |",
        "| 7B, LoRA | failed: OutOfMemoryError: a/b | | | | | |",
        "| 3B, full | sdpa | 2.00 (2.00 to 2.00) | 1.00 |",
        "| bfloat16 | 8 | 2,000 | 2.50 (2.50 to 2.50) |",
        "| int4 | 8 | failed: RuntimeError: no kernel | |",
        "| torch | 2.00 (2.00 to 2.00) | 2.00 |",
        "| Liger | failed: ImportError: a/b | |",
        "| host waiting for the device | 2.0 |",
        "| `gemm<a/b>` | 25.0% | 7 |",
        "| `compile: False` | 3B, full | 4.00 (4.00 to 4.00) | 1.00 |",
    ):
        assert line in text.splitlines()
    assert "123,456 tokens per second" in text


def test_zeros_as_a_rehearsal_gives_them_are_no_error() -> None:
    found = results()
    for part in ("3B, full", PEERS["3B, full"], "`compile: False`"):
        found[part]["rows"][0] |= {"tokens_per_second": [0.0, 0.0], "mfu": None, "allocated": 0}
    assert "| 3B, full | 0 | unknown |" in tables(found)


def test_a_page_keeps_what_is_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for _ in range(2):
        write_page(page, results())
    text = page.read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n\nGPU NVIDIA H200")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text


def test_the_page_has_the_place_for_tables() -> None:
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    assert page.count(BEGIN) == page.count(END) == 1


def test_what_tables_compare_is_measured_and_in_time() -> None:
    compared = {*TRAINED, *PEERS, *PEERS.values(), *OPTIONS}
    compared |= {plain for plain, _ in OPTIONS.values()}
    assert compared <= PARTS.keys()
    # The most valuable fit eight minutes even if each takes all of its time
    names = [*PARTS][:6]
    assert sum(PARTS[name].most for name in names) < 8 * 60


# What `make gpu-wheels` does not collect, and torch and transformers do not bring
HIDDEN = "av datasets matplotlib pyarrow pandas blobfile kagglehub peft requests scipy torchvision"
ALONE = f"""
import runpy, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {HIDDEN.split()} else find(name, path, target)
PathFinder.find_spec = staticmethod(find_others)
runpy.run_module("benchmarks.gpu_parts", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["correctness", "resuming"])
def test_comparisons_hold_on_a_cpu_with_the_packages_that_are_collected(
    part: str, output: Path, vocabulary: Path
) -> None:
    limit = ["--until", str(time.time() + 600)]
    command = [sys.executable, "-c", ALONE, part, "--output", str(output), *limit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = read(output)[part]["rows"]
    assert len(rows) == {"correctness": 9, "resuming": 2}[part]
    for row in rows:
        assert row["value"] <= row["bound"], row
