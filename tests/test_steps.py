"""Which saved steps a run has, keeps and goes on from."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from socket import gethostname

import pytest

from torchtune_vl.files._directory import open_locked
from torchtune_vl.training._saved_steps import Steps, drop_steps_after


def save(steps: Steps, number: int, best: int | None = None) -> None:
    partial = steps.begin(number, {"step": number, "best": {"step": best}})
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (partial / name).write_bytes(bytes([number]) * 5000)
    steps.finish(partial)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "steps", keep_last=2)
    assert steps.newest() is None
    assert steps.newest_whole() is None
    for number in (2, 4, 9, 10, 100):
        save(steps, number, best=4 if number > 2 else None)
    assert names(tmp_path / "steps") == {"step_4", "step_10", "step_100"}
    assert steps.newest() == tmp_path / "steps" / "step_100"
    newest = steps.newest_whole()
    assert newest == (steps.newest(), {"step": 100, "best": {"step": 4}})
    # That of step 100 stays too, which a run goes on from if 101 is damaged
    save(steps, 101, best=101)
    assert names(tmp_path / "steps") == {"step_4", "step_100", "step_101"}
    save(steps, 102, best=101)
    assert names(tmp_path / "steps") == {"step_101", "step_102"}


def test_what_a_crash_left_does_not_count_and_goes(tmp_path: Path) -> None:
    steps = Steps(tmp_path, keep_last=1)
    save(steps, 3)
    steps.begin(5, {"step": 5})
    assert steps.newest() == tmp_path / "step_3"
    steps.tidy()
    assert names(tmp_path) == {"step_3"}


def test_what_others_made_stays_and_does_no_harm(tmp_path: Path) -> None:
    steps = Steps(tmp_path, keep_last=1)
    save(steps, 3)
    strange = ["step_5.bak", "step_6.old", "step_foo", "step_", "step_07", "step_x.partial", "a"]
    for name in strange:
        (tmp_path / name).mkdir()
    (tmp_path / "step_9").write_text("a file")
    (tmp_path / "step_8.old").write_text("a file")
    steps.tidy()
    assert steps.newest() == tmp_path / "step_3"
    save(steps, 4)
    assert names(tmp_path) == {"step_4", "step_9", "step_8.old", *strange}


def test_a_step_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Steps(tmp_path, keep_last=1)
    save(steps, 1)

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    save(steps, 2)
    (message,) = caplog.messages
    assert "step_1.partial cannot be removed (" in message
    assert "Permission denied" in message
    assert steps.newest() == tmp_path / "step_2"
    assert names(tmp_path) == {"step_1.partial", "step_2"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_json(name: str, text: str) -> Callable[[Path], object]:
    return lambda step: (step / name).write_text(text)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no progress": lambda step: (step / "progress.json").unlink(),
    "no metadata": lambda step: (step / ".metadata").unlink(),
    "no data of a process": lambda step: (step / "__1_0.distcp").unlink(),
    "no checksums": lambda step: (step / "checksums.json").unlink(),
    "truncated data": lambda step: os.truncate(step / "__0_0.distcp", 100),
    "a flipped bit": lambda step: flip(step / "__1_0.distcp"),
    "a flipped bit of metadata": lambda step: flip(step / ".metadata"),
    "empty progress": of_json("progress.json", ""),
    "progress of another type": of_json("progress.json", "[1]"),
    "progress of other types": of_json("progress.json", '{"step": "2", "best": {"step": []}}'),
    "a directory for a file": lambda step: (
        (step / "progress.json").unlink(),
        (step / "progress.json").mkdir(),
    ),
    "empty checksums": of_json("checksums.json", ""),
    "checksums of another type": of_json("checksums.json", "[]"),
    "checksums of nothing": of_json("checksums.json", '{"files": {}}'),
    "checksums of other types": of_json("checksums.json", '{"files": {"progress.json": 7}}'),
    "checksums no text": lambda step: (step / "checksums.json").write_bytes(b"\xff\xfe\x00"),
    "deep checksums": of_json("checksums.json", "[" * 100_000),
    "nothing in it": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_step_is_put_aside(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Steps(tmp_path, keep_last=3)
    for number in (1, 2, 3):
        save(steps, number, best=3)
    damage(tmp_path / "step_3")
    whole = steps.newest_whole()
    assert whole is not None
    assert whole.progress["step"] == 2
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/step_3 is damaged (")
    assert message.endswith("it is step_3.damaged now, and the run goes on from step_2")
    assert "\n" not in message
    assert names(tmp_path) == {"step_1", "step_2", "step_3.damaged"}
    save(steps, 3, best=None)  # its number comes again
    for number in (1, 2, 3):
        damage(tmp_path / f"step_{number}")
    with pytest.raises(ValueError, match=r"no step in .* can be gone on from"):
        steps.newest_whole()
    assert names(tmp_path) == {"step_1", "step_2", "step_3", "step_3.damaged"}


def test_a_directory_is_locked_until_its_process_dies(tmp_path: Path) -> None:
    held = open_locked(tmp_path / ".lock")
    other = [
        sys.executable,
        "-c",
        "import sys, time\n"
        "from pathlib import Path\n"
        "from torchtune_vl.files._directory import open_locked\n"
        "try:\n"
        "    held = open_locked(Path(sys.argv[1]))\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
        "except OSError as error:\n"
        "    print(error)\n",
        str(tmp_path / ".lock"),
    ]
    refused = subprocess.run(other, capture_output=True, text=True, check=True).stdout
    assert refused.strip() == (
        f"another process ({os.getpid()} on {gethostname()}) is writing there, and holds "
        f"{tmp_path}/.lock: wait until it has ended, end it, or name another output_dir"
    )
    held.close()
    with subprocess.Popen(other, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match=rf"another process \({process.pid} on .* is"):
            open_locked(tmp_path / ".lock")
        process.kill()
    open_locked(tmp_path / ".lock").close()


def test_lines_of_later_steps_and_torn_ones_go(tmp_path: Path) -> None:
    path = tmp_path / "process_0.jsonl"
    lines = [json.dumps({"step": step, "samples": [step, 7]}) + "\n" for step in (1, 1, 2, 3)]
    path.write_bytes("".join(lines).encode() + b'{"step": 2, "samples": [\xc3')
    drop_steps_after(2, path)
    assert path.read_text() == "".join(lines[:3])
    assert names(tmp_path) == {path.name}
