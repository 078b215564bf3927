"""Checkpoints that crash, do not fit on the disk, or are damaged."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch

from tests.reference import reference_config
from torchtune_vl.files import _directory, _safetensors
from torchtune_vl.files._directory import (
    MANIFEST,
    check_manifest,
    new_directory,
    new_file,
    open_locked,
)
from torchtune_vl.files._safetensors import (
    INDEX,
    read_tensors,
    stored_tensors,
    weight_files,
    write_shards,
)
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config
from torchtune_vl.training import Qwen2_5_VLCheckpointer, export

ROOT = Path(__file__).parents[1]
FIRST_SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run starts from: a config and three files of weights, as published."""
    directory = tmp_path_factory.mktemp("base")
    reference_config("head_dim_128").save_pretrained(directory)
    weights = {name: torch.rand(shape) for name, shape in _shapes(directory).items()}
    write_shards(weights, directory, max_shard_size="5MB")
    assert (directory / FIRST_SHARD).is_file()
    return directory


def _shapes(directory: Path) -> dict[str, torch.Size]:
    from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_tune_to_hf

    with torch.device("meta"):
        state = qwen2_5_vl_from_config(directory).state_dict()
    return {name: tensor.shape for name, tensor in qwen2_5_vl_tune_to_hf(state).items()}


def save(base: Path, output: Path, epoch: int = 0, value: float = 0.0) -> None:
    checkpointer = Qwen2_5_VLCheckpointer(base, output)
    weights = checkpointer.load_checkpoint()["model"]
    state = {"model": {name: torch.full_like(t, value) for name, t in weights.items()}}
    state["value"] = value
    checkpointer.save_checkpoint(state, epoch, intermediate_checkpoint=True)


def resumed(base: Path, output: Path) -> float:
    """The value that was saved, from weights and state that belong together."""
    checkpointer = Qwen2_5_VLCheckpointer(base, output, should_load_recipe_state=True)
    state = checkpointer.load_checkpoint()
    assert all((tensor == state["value"]).all() for tensor in state["model"].values())
    return state["value"]


def load(directory: Path) -> dict[str, Any]:
    return Qwen2_5_VLCheckpointer(directory, directory.parents[1] / "elsewhere").load_checkpoint()


@pytest.fixture
def saved(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sharded checkpoint that we wrote."""
    _small_shards(monkeypatch)
    save(base, tmp_path / "output", value=1.0)
    directory = tmp_path / "output" / "epoch_0"
    assert (directory / FIRST_SHARD).is_file()
    return directory


def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    split = _safetensors.split_torch_state_dict_into_shards
    monkeypatch.setattr(
        _safetensors,
        "split_torch_state_dict_into_shards",
        lambda weights, max_shard_size: split(weights, max_shard_size="5MB"),
    )


@pytest.mark.parametrize(
    ("kills", "megabytes"),
    [(8, 1), (50, 1000)],
)
@pytest.mark.slow
def test_killed_at_any_moment(kills: int, megabytes: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kill_checkpoint", tmp_path, "--kills", str(kills)]
    command += ["--megabytes", str(megabytes)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all well" in result.stdout


def test_the_index_is_written_after_the_weights_and_checksums_last(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_shards(monkeypatch)
    order: list[str] = []
    replace = Path.replace

    def noted(source: Path, target: Path) -> Path:
        order.append(target.name)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", noted)
    save(base, tmp_path / "output")
    shards = [i for i, name in enumerate(order) if name.startswith("model-")]
    assert len(shards) == 3
    assert max(shards) < order.index(INDEX) < order.index(MANIFEST)
    assert "recipe_state.pt" in order[: order.index(MANIFEST)]


def test_every_file_is_flushed_before_it_is_moved(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[Path] = set()
    flush = _directory.flush
    monkeypatch.setattr(_directory, "flush", lambda path: (flushed.add(path), flush(path)))
    replace = Path.replace

    def checked(source: Path, target: Path) -> Path:
        assert source in flushed or source.with_name(f"{source.name}.partial").name in {
            path.name for path in flushed
        }
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", checked)
    save(base, tmp_path / "output")
    partial = tmp_path / "output" / "epoch_0.partial"
    written = {path.name for path in (tmp_path / "output" / "epoch_0").iterdir()}
    assert {partial / f"{name}.partial" for name in written} <= flushed
    assert {partial, tmp_path / "output"} <= flushed


def test_what_a_crash_left_is_found_and_then_cleaned(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    save(base, output, epoch=0, value=1.0)
    (output / "epoch_0").rename(output / "epoch_0.replaced")
    (output / "epoch_0.partial").mkdir()
    (output / "epoch_7.partial").mkdir()
    (output / "epoch_7.partial" / "recipe_state.pt.partial").touch()
    assert resumed(base, output) == 1
    assert load(output / "epoch_0")["model"]
    save(base, output, epoch=1, value=1.5)
    (output / "epoch_0.replaced").mkdir()  # not deleted yet
    save(base, output, epoch=1, value=2.0)
    assert {path.name for path in output.iterdir()} == {"epoch_0", "epoch_1"}
    assert len(list(output.rglob("recipe_state*"))) == 1
    check_manifest(output / "epoch_0", required=("model.safetensors",))
    assert resumed(base, output) == 2


_WRITES_AN_EPOCH = """
import sys
from pathlib import Path
from torchtune_vl.files._directory import new_directory

with new_directory(Path(sys.argv[1])) as partial:
    (partial / "weights").write_text("half")
    print("begun", flush=True)
    sys.stdin.readline()
"""


def test_what_a_living_process_writes_stays(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = [sys.executable, "-c", _WRITES_AN_EPOCH, str(output / "epoch_1")]
    (output / "epoch_7.partial").mkdir(parents=True)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        assert living.stdin is not None
        assert living.stdout is not None
        assert living.stdout.readline() == b"begun\n"
        assert not (output / "epoch_7.partial").exists()
        export(base, output / "exported")
        for epoch in (0, 1):
            with pytest.raises(OSError, match=rf"epoch_{epoch} .*another process \(.*is writing"):
                save(base, output, epoch=epoch)
        assert (output / "epoch_1.partial" / "weights").read_text() == "half"
        living.stdin.write(b"\n")
    assert living.returncode == 0
    assert {path.name for path in output.iterdir()} == {"epoch_1", "exported"}
    (output / "merged.partial").mkdir()  # whose writer was killed
    export(base, output / "merged")
    assert not list(output.glob("*.partial"))


def test_a_lock_whose_file_was_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever held it removed the file between our opening and our locking it."""
    lockf, path = fcntl.lockf, tmp_path / "lock"
    monkeypatch.setattr(fcntl, "lockf", lambda *to: (lockf(*to), path.unlink(), path.touch()))
    with pytest.raises(BlockingIOError, match="another process is writing there"):
        open_locked(path)


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with new_directory(tmp_path / "epoch_0") as partial:
        (partial / "weights").touch()
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_0"}
    check_manifest(tmp_path / "epoch_0", required=("weights",))


def test_resuming_takes_the_state_that_was_written_last(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    save(base, output, epoch=1, value=1.0)
    older = (output / "epoch_1" / "recipe_state.pt").read_bytes()
    save(base, output, epoch=0, value=2.0)
    assert resumed(base, output) == 2
    # A crash after epoch 0 came to its place, before the state of epoch 1 was removed
    state = output / "epoch_1" / "recipe_state.pt"
    state.write_bytes(older)
    os.utime(state, (0, 0))
    assert resumed(base, output) == 2
    # ... and just before epoch 0 came there
    (output / "epoch_0").rename(output / "epoch_0.partial")
    assert resumed(base, output) == 1
    save(base, output, epoch=2, value=3.0)
    assert resumed(base, output) == 3
    truncate(output / "epoch_2" / "recipe_state.pt")
    with pytest.raises(ValueError, match=r"epoch_2/recipe_state\.pt is .*, and was "):
        resumed(base, output)


def test_recipe_checkpoint_is_in_an_epoch(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    save(base, output, epoch=0, value=1.0)
    older = output / "epoch_0" / "recipe_state.pt"
    content = older.read_bytes()
    save(base, output, epoch=1, value=2.0)
    older.write_bytes(content)
    state = Qwen2_5_VLCheckpointer(
        base, output, recipe_checkpoint=older, should_load_recipe_state=True
    ).load_checkpoint()
    assert state["value"] == 1
    elsewhere = output / "recipe_state" / "recipe_state.safetensors"
    elsewhere.parent.mkdir()
    older.rename(elsewhere)
    (output / "epoch_1" / "recipe_state.pt").unlink()
    for given in (elsewhere, None):
        with pytest.raises(ValueError, match=r"no epoch_N of .* as earlier releases wrote it"):
            Qwen2_5_VLCheckpointer(
                base, output, recipe_checkpoint=given, should_load_recipe_state=True
            )


def test_a_state_of_other_objects_is_refused(base: Path, tmp_path: Path) -> None:
    checkpointer = Qwen2_5_VLCheckpointer(base, tmp_path / "output")
    state = {**checkpointer.load_checkpoint(), "path": tmp_path}
    with pytest.raises(UnpicklingError, match="pathlib"):
        checkpointer.save_checkpoint(state, epoch=0, intermediate_checkpoint=True)
    assert not list((tmp_path / "output").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system for one checkpoint and a half."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def refused(base: Path, output: Path, message: str) -> None:
    """A second save fails, with the message, and leaves the first as it was."""
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    for epoch in (0, 1):  # in place of the first, beside it
        with pytest.raises(OSError, match=message) as error:
            save(base, output, epoch=epoch, value=2.0)
        assert str(output / f"epoch_{epoch} ") in str(error.value)
        assert "make room" in str(error.value)
        after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
        assert after == before
        assert not list(output.glob("*.partial"))
        assert resumed(base, output) == 1


def test_a_full_disk(base: Path, small_disk: Path) -> None:
    save(base, small_disk / "output", value=1.0)
    refused(base, small_disk / "output", r"model\.safetensors.*No space left on device")


def test_a_state_that_does_not_fit(base: Path, small_disk: Path) -> None:
    checkpointer = Qwen2_5_VLCheckpointer(base, small_disk / "output")
    state = {**checkpointer.load_checkpoint(), "optimizer": torch.zeros(5_000_000)}
    with pytest.raises(OSError, match=r"recipe_state\.pt.*make room"):
        checkpointer.save_checkpoint(state, epoch=0, intermediate_checkpoint=True)
    assert not list((small_disk / "output").iterdir())


def test_a_read_only_disk(base: Path, small_disk: Path) -> None:
    save(base, small_disk / "output", value=1.0)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(base, small_disk / "output", r"Read-only file system.*name another output_dir")


@pytest.mark.parametrize("place", ["model.safetensors", "config.json", MANIFEST, "recipe_state.pt"])
def test_a_write_that_fails(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    save(base, tmp_path / "output", value=1.0)
    flush = _directory.flush

    def full(path: Path) -> None:
        if path.name.endswith(f"{place}.partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flush(path)

    monkeypatch.setattr(_directory, "flush", full)
    refused(base, tmp_path / "output", rf"No space left on device.*{place}")


def test_a_rename_that_fails(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(base, tmp_path / "output", value=1.0)
    rename = Path.rename

    def broken(source: Path, target: Path) -> Path:
        if source.name.startswith("epoch_") and source.suffix == ".partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", broken)
    refused(base, tmp_path / "output", "Input/output error")


def alter_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (alter_a_byte, r"is \{'size': (\d+), .*, and was \{'size': \1, 'xxh3_128':"),
        (truncate, "is {'size': .*, and was {'size': .* when it was written"),
    ],
)
@pytest.mark.parametrize("name", [FIRST_SHARD, INDEX, "config.json"])
def test_damage_is_found(
    saved: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    load(saved)
    damage(saved / name)
    with pytest.raises(ValueError, match=message) as error:
        check_manifest(saved)
    assert str(saved / name) in str(error.value)
    assert str(saved / MANIFEST) in str(error.value)
    with pytest.raises(ValueError, match=name):
        load(saved)


def test_all_damages_are_listed_and_intended_ones_can_be_declared(saved: Path) -> None:
    truncate(saved / FIRST_SHARD)
    config = saved / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ValueError, match=rf"config\.json[^$]*{FIRST_SHARD}"):
        load(saved)
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["files"]["config.json"]
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="when it was written") as error:
        load(saved)
    assert "config.json" not in str(error.value)
    (saved / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=rf"{MANIFEST}: not a JSON file .* delete it"):
        load(saved)


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_damaged_weights_without_checksums(saved: Path, damage: Callable[[Path], None]) -> None:
    (saved / MANIFEST).unlink()
    damage(saved / FIRST_SHARD)
    with pytest.raises(ValueError, match=rf"{FIRST_SHARD} cannot be read .* download"):
        load(saved)


def test_a_config_of_another_model(saved: Path, tmp_path: Path) -> None:
    (saved / MANIFEST).unlink()
    config = json.loads((saved / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit .*config\.json"):
        load(saved)
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config\.json: .* another model"):
        load(saved)


@pytest.mark.parametrize("name", ["../base.safetensors", "/x.safetensors", "a/../../b", "..", ""])
def test_names_that_lead_out_of_their_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "base.safetensors").touch()
    directory = tmp_path / "copy"
    directory.mkdir()
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "a/b", "x": name}}))
    with pytest.raises(ValueError, match=rf"{INDEX}: weight_map.x is '.*', expected a file inside"):
        weight_files(directory)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "a/b", "x": "..a.safetensors"}}))
    assert weight_files(directory) == [directory / "..a.safetensors", directory / "a" / "b"]
    entry = {"size": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f"}
    (directory / MANIFEST).write_text(json.dumps({"files": {name: entry}}))
    with pytest.raises(ValueError, match=rf"{MANIFEST}: files\..* expected a file inside"):
        check_manifest(directory)


def test_checksums_of_another_directory_are_not_taken_over(saved: Path, tmp_path: Path) -> None:
    """A run that starts from a checkpoint of ours, without its dtype and shards."""
    save(saved, tmp_path / "next", value=3.0)
    assert resumed(saved, tmp_path / "next") == 3


def test_tensors_are_mapped_from_files_that_are_replaced(tmp_path: Path) -> None:
    """What is loaded stays what it was when the checkpoint is written anew."""
    weights = {"a": torch.arange(100.0), "b": torch.ones(3, 5).T, "c": torch.ones(2).bfloat16()}
    target = tmp_path / "epoch_0"
    with new_directory(target) as directory:
        write_shards(weights, directory)
    read = read_tensors(stored_tensors(weight_files(target)))
    with new_directory(target) as directory:
        write_shards({name: tensor + 1 for name, tensor in weights.items()}, directory)
    for name, tensor in weights.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype
    read["a"].zero_()  # in memory alone
    again = read_tensors(stored_tensors(weight_files(target)))
    assert torch.equal(again["a"], weights["a"] + 1)


def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), new_file(path) as partial:
        partial.write_text("half\ud800", encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
