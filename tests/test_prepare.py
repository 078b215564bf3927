"""Samples that are stored before training: the same ones, all of them, each once."""

import json
import os
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from omegaconf import OmegaConf
from pyarrow import ipc

from tests.finetune_runs import read_losses, read_samples, write_config, write_inputs
from torchtune_vl.chat import ChatTransform
from torchtune_vl.cli import main
from torchtune_vl.datasets import (
    PreparedDataset,
    SamplesError,
    VisionChatDataset,
    measure,
    prepared_dataset,
    vision_chat_dataset,
)
from torchtune_vl.datasets._prepare import prepare
from torchtune_vl.datasets._prepared import differences
from torchtune_vl.datasets._shards import Shard, read_sample
from torchtune_vl.models import transform_from_pretrained
from torchtune_vl.recipes._check_config import read_config
from torchtune_vl.recipes.finetune import recipe_main

IMAGE = {"type": "image", "image": "0_0.png"}
BOXES = [{"bbox_2d": [2, 3, 20, 25], "label": "cat"}, {"point_2d": [9, 9], "label": "dot"}]
TOOL = {"type": "function", "function": {"name": "zoom", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"factor": 2}}}


def asking(*items: Any, answer: Any = "Yes.", **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": [*items]}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


MORE = [
    asking(IMAGE, text("Find it."), answer=[{"type": "boxes", "boxes": BOXES}], id="boxes"),
    {
        "messages": [
            {"role": "user", "content": "Zoom in."},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": [IMAGE]},
            {"role": "assistant", "content": "A cat."},
        ],
        "tools": [TOOL],
    },
    asking(text("A long answer?"), answer="word " * 700),
    asking(text("Which?"), IMAGE, answer="word " * 450 + "end", id=17),
]


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, and ten conversations of all kinds in ``train.jsonl``."""
    root = tmp_path_factory.mktemp("prepare")
    write_inputs(root, vocabulary, count=6)
    with (root / "train.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in MORE)
    return root


def transform_of(root: Path, **settings: Any) -> ChatTransform:
    settings = {"max_seq_len": 500, "patch_dtype": "uint8", **settings}
    return transform_from_pretrained(root / "base", **settings)


@pytest.fixture(scope="module")
def transform(root: Path) -> ChatTransform:
    return transform_of(root)


def read(transform: ChatTransform, path: Path, **how: Any) -> Any:
    return vision_chat_dataset(transform, source="json", data_files=str(path), **how)


@pytest.fixture(scope="module")
def dataset(root: Path, transform: ChatTransform) -> VisionChatDataset:
    return read(transform, root / "train.jsonl")


def write(dataset: Any, transform: ChatTransform, directory: Path, **how: Any) -> Any:
    how = {"settings": {"source": "json"}, "shard_size": 3, "show_progress": False, **how}
    return prepare(dataset, transform, directory, **how)


@pytest.fixture(scope="module")
def prepared(dataset: Any, transform: ChatTransform, root: Path) -> Path:
    """The dataset in four shards, which nobody changes."""
    write(dataset, transform, root / "prepared")
    return root / "prepared"


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def assert_same(found: Any, expected: Any) -> None:
    """Whether nested values are of the same types, and equal bit by bit."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_samples_are_what_they_were(dataset: Any, transform: Any, prepared: Path) -> None:
    stored = prepared_dataset(transform, directory=str(prepared))
    assert len(stored) == len(dataset) == 10
    widths = set[int]()
    for index in range(len(dataset)):
        assert_same(stored[index], dataset[index])
        assert stored.examine(index) == dataset.examine(index)
        assert stored.measure(index) == dataset.measure(index)
        assert stored.origin(index) == dataset.origin(index)
        vision = stored[index].get("encoder_input", {}).get("vision")
        widths |= {vision["patches"].shape[1]} if vision else set()
    assert widths == {588, 1176}  # with and without videos
    assert stored.origin(9) == (17, f"{prepared.parent}/train.jsonl, line 10")
    assert_same(stored[-1], dataset[9])
    assert stored[8]["truncated"]["tokens"] > 200
    with pytest.raises(IndexError):
        stored[10]
    # As data workers that are not forked get it
    assert_same(pickle.loads(pickle.dumps(stored))[4], dataset[4])


def test_sizes_are_known(dataset: Any, transform: ChatTransform, prepared: Path) -> None:
    stored = prepared_dataset(transform, directory=str(prepared))
    for indices in (range(10), range(1, 10, 3), [0, 4], []):
        found, expected = measure(stored, indices), measure(dataset, indices, shown=None)
        assert found.sizes.dtype == np.int32
        assert np.array_equal(found.sizes, expected.sizes)
        assert (found.counts, found.bad) == (expected.counts, [])
        assert found.example == expected.example
    found.sizes[:] = 0  # is the caller's own
    assert stored.measure(0) == dataset.measure(0)


def test_who_changes_a_sample_changes_no_file(transform: ChatTransform, copy: Path) -> None:
    stored, before = prepared_dataset(transform, directory=str(copy)), content(copy)
    patches = stored[0]["encoder_input"]["vision"]["patches"]
    patches ^= 255
    assert content(copy) == before
    # Nothing but its own bytes would go to another process with it
    assert patches.untyped_storage().nbytes() == patches.numel()


def test_any_reader_of_arrow_reads_it(dataset: Any, prepared: Path) -> None:
    with ipc.open_file(pa.memory_map(str(prepared / "shard_00001.arrow"))) as file:
        rows = file.read_all().to_pylist()
    for row, index in zip(rows, range(3, 6), strict=True):
        sample = dataset[index]
        assert row["tokens"] == sample["tokens"]
        assert row["mask"] == sample["mask"]
        assert row["input_pos"] == sample["input_pos"].flatten().tolist()
    assert rows[1]["patches"] == rows[1]["grid_thw"] == []
    vision = dataset[5]["encoder_input"]["vision"]
    assert rows[2]["patches"] == vision["patches"].flatten().tolist()
    assert rows[2]["grid_thw"] == vision["grid_thw"].flatten().tolist()


def test_data_workers_write_the_same(
    dataset: Any, transform: ChatTransform, prepared: Path, tmp_path: Path
) -> None:
    write(dataset, transform, tmp_path / "by_workers", num_workers=2)
    assert content(tmp_path / "by_workers") == content(prepared)


def test_it_is_killed_and_goes_on(
    dataset: Any,
    transform: ChatTransform,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory, make = tmp_path / "killed", VisionChatDataset.__getitem__

    def make_and_die(self: Any, index: int) -> Any:
        if index == 7:  # the second of the third shard
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(VisionChatDataset, "__getitem__", make_and_die)
        with pytest.raises(ChildProcessError, match="killed by SIGKILL"):
            write(dataset, transform, directory, num_workers=1)
    assert {"shard_00000.json", "shard_00001.json", "shard_00002.arrow.partial"} < {
        *content(directory)
    }
    with pytest.raises(ValueError, match="is not complete: run the same"):
        prepared_dataset(transform, directory=str(directory))
    made = list[int]()

    def make_and_tell(self: Any, index: int) -> Any:
        made.append(index)
        return make(self, index)

    monkeypatch.setattr(VisionChatDataset, "__getitem__", make_and_tell)
    # A shard without what is written after it, and one that is not what it was
    (directory / "shard_00000.json").unlink()
    damage(directory / "shard_00001.arrow", 2000)
    write(dataset, transform, directory)
    assert made == [*range(10)]
    assert content(directory) == content(prepared)
    made.clear()
    write(dataset, transform, directory)
    assert made == []
    assert content(directory) == content(prepared)


def damage(path: Path, place: int) -> None:
    changed = bytearray(path.read_bytes())
    changed[place] ^= 255
    path.write_bytes(changed)


def test_changed_records_are_made_anew(
    root: Path, transform: ChatTransform, copy: Path, tmp_path: Path
) -> None:
    lines = (root / "train.jsonl").read_text().splitlines()
    lines[4] = json.dumps(asking(text("Another?")))
    (root / "changed.jsonl").write_text("\n".join(lines[:8]))
    changed = read(transform, root / "changed.jsonl")
    whole = (copy / "shard_00000.arrow").stat().st_ino
    assert prepared_dataset(transform, directory=str(copy))[4]["tokens"] != changed[4]["tokens"]
    write(changed, transform, copy)
    assert (copy / "shard_00000.arrow").stat().st_ino == whole
    assert not (copy / "shard_00003.arrow").exists()  # of records 9 and on
    stored = prepared_dataset(transform, directory=str(copy))
    assert len(stored) == 8
    for index in range(8):
        assert_same(stored[index], changed[index])


@pytest.mark.parametrize(
    ("settings", "how", "message"),
    [
        (
            {"max_seq_len": 400, "max_pixels": 3136, "tokens_per_second": 3},
            {},
            "image.max_pixels was 12845056 and is 3136, max_seq_len was 500 and is 400, "
            "tokens_per_second was 2 and is 3",
        ),
        ({"add_vision_id": True}, {}, "add_vision_id was False and is True"),
        ({}, {"settings": {"source": "parquet"}}, "source was json and is parquet"),
        ({}, {"shard_size": 4}, "shard_size was 3 and is 4"),
    ],
)
def test_other_settings_are_refused(
    root: Path, dataset: Any, copy: Path, settings: Any, how: Any, message: str
) -> None:
    other, before = transform_of(root, **settings), content(copy)
    with pytest.raises(ValueError, match=message) as refused:
        write(read(other, root / "train.jsonl"), other, copy, **how)
    assert "\n" not in str(refused.value)
    assert content(copy) == before
    if settings:
        with pytest.raises(ValueError, match=f"prepared with other settings.*{message}"):
            prepared_dataset(other, directory=str(copy))


def test_what_no_setting_names_is_told_where_nothing_else_differs() -> None:
    before = {"max_seq_len": "1", "template or release": "a"}
    other = {**before, "template or release": "b"}
    assert differences(before, other) == "template or release was a and is b"
    assert differences(before, {**other, "max_seq_len": "2"}) == "max_seq_len was 1 and is 2"


def test_what_cannot_be_prepared(
    root: Path, transform: ChatTransform, dataset: Any, tmp_path: Path
) -> None:
    path = root / "train.jsonl"
    floats = transform_of(root, patch_dtype="float32")
    for wrong, with_transform, message in (
        (read(transform, path, streaming=True), transform, "as a table, without streaming"),
        (read(transform, path, augmentation={"flip": 0.5}), transform, "leave augmentation out"),
        (read(floats, path), floats, "set tokenizer.patch_dtype=uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            write(wrong, with_transform, tmp_path / "new")
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"has \w.*: name an empty or a new directory"):
        write(dataset, transform, root)


@pytest.mark.parametrize("what", ["half", "missing", "sizes", "byte", "other", "format", "nothing"])
def test_damage_is_found(transform: ChatTransform, dataset: Any, copy: Path, what: str) -> None:
    shard, manifest = copy / "shard_00001.arrow", copy / "manifest.json"
    size = shard.stat().st_size
    if what == "half":
        os.truncate(shard, size // 2)
        message = rf"shard_00001.arrow has {size // 2:,} bytes and not {size:,}: copy it again"
    elif what == "missing":
        shard.unlink()
        message = r"shard_00001.arrow is missing"
    elif what == "sizes":
        damage(copy / "samples.npy", 200)
        message = "samples.npy is damaged"
    elif what == "byte":
        damage(shard, size // 3)
        message = "sample 3: .*shard_00001.arrow is damaged"
    elif what == "other":
        shard.write_bytes(b"{" * size)
        message = "sample 3: .*shard_00001.arrow is damaged"
    elif what == "format":
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
        message = "format is 2, expected 1: prepare the data anew"
    else:
        manifest.unlink()
        message = "has no manifest.json: name a directory of `tune-vl prepare`"
    with pytest.raises(ValueError, match=message):
        prepared_dataset(transform, directory=str(copy))[3]
    if what in ("byte", "other"):  # and the others are read
        assert_same(prepared_dataset(transform, directory=str(copy))[6], dataset[6])


def test_every_byte_of_a_shard_counts(transform: ChatTransform, dataset: Any, copy: Path) -> None:
    """A byte that is another makes no difference, or an error that names the file."""
    whole, expected = (copy / "shard_00003.arrow").read_bytes(), dataset[9]
    errors = []
    for number, place in enumerate(range(0, len(whole), max(1, len(whole) // 150))):
        changed = bytearray(whole)
        changed[place] ^= 1 << number % 8
        other = copy / f"{number}.arrow"
        other.write_bytes(changed)
        try:
            sample = read_sample(Shard(other, ""), 0, transform.geometry)
        except ValueError as error:
            errors.append(str(error))
        else:
            assert_same(sample, expected)
    assert len(errors) > 75
    assert all(".arrow is damaged" in error for error in errors)


@pytest.fixture(scope="module")
def bad_records(root: Path) -> Path:
    (root / "cut.png").write_bytes((root / "0_0.png").read_bytes()[:500])
    records = [
        asking(text("Good?")),
        asking({"type": "image", "image": "missing.png"}),
        asking(IMAGE, text("Good, too?")),
        asking({"type": "image", "image": "cut.png"}, id="cut"),
        asking(text("Good?"), answer=""),
        asking(text("The last?")),
    ]
    path = root / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_bad_samples(
    transform: ChatTransform, bad_records: Path, tmp_path: Path, root: Path
) -> None:
    dataset, directory = read(transform, bad_records), tmp_path / "with_bad"
    with pytest.raises(SamplesError, match="3 of 6 samples cannot be trained on") as raised:
        write(dataset, transform, directory)
    assert [index for index, _ in raised.value.first] == [1, 3, 4]
    with pytest.raises(ValueError, match="is not complete"):
        prepared_dataset(transform, directory=str(directory))
    with pytest.raises(ValueError, match="3 of 6 samples are bad, more than max_bad_share"):
        write(dataset, transform, directory, skips_bad=True, largest_bad_share=0.4)
    assert write(dataset, transform, directory, skips_bad=True)["bad"] == 3
    listed = [json.loads(x) for x in (directory / "bad_samples.jsonl").read_text().splitlines()]
    assert [bad["sample"] for bad in listed] == [1, 3, 4]
    assert "missing.png" in listed[0]["reason"]
    assert "sample 'cut'" in listed[1]["reason"]
    stored = prepared_dataset(transform, directory=str(directory))
    assert len(stored) == 3
    for index, record in enumerate([0, 2, 5]):
        assert_same(stored[index], dataset[record])
        assert stored.origin(index) == (record, f"{bad_records}, line {record + 1}")
    # What is corrected is made when it is not skipped
    shutil.copy(root / "0_0.png", root / "missing.png")
    with pytest.raises(SamplesError, match="2 of 6"):
        write(dataset, transform, directory)
    (root / "missing.png").unlink()


class FakeRay(ModuleType):
    """What of Ray's documented interface is used, in one process: functions travel pickled."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[Any] = []
        self.data = SimpleNamespace(range=self._range)

    def init(self, address: str, ignore_reinit_error: bool) -> None:
        self.calls.append(address)

    def _range(self, count: int, override_num_blocks: int) -> Any:
        def rows(function: Callable[[Any], Any], concurrency: int | None) -> Any:
            self.calls += [override_num_blocks, concurrency]
            (cell,) = function.__closure__  # type: ignore[attr-defined]
            cell.cell_contents = pickle.loads(pickle.dumps(cell.cell_contents))
            made = [function({"id": np.int64(i)}) for i in reversed(range(count))]
            return SimpleNamespace(iter_rows=lambda: iter(made))

        return SimpleNamespace(map=rows)


def test_ray_is_asked_for_each_shard(
    dataset: Any,
    transform: ChatTransform,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'torchtune-vl\[ray\]'"):
        write(dataset, transform, tmp_path / "by_ray", ray_address="auto")
    monkeypatch.setitem(sys.modules, "ray", fake := FakeRay())
    write(dataset, transform, tmp_path / "by_ray", ray_address="auto", num_workers=2)
    assert fake.calls == ["auto", 4, 2]
    assert content(tmp_path / "by_ray") == content(prepared)


def test_ray_data_writes_the_same_with_two_workers(
    dataset: Any, transform: ChatTransform, prepared: Path, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        write(dataset, transform, tmp_path / "by_ray", ray_address="local", num_workers=2)
    finally:
        ray.shutdown()
    assert content(tmp_path / "by_ray") == content(prepared)


@pytest.fixture
def quiet_signals() -> Iterator[None]:
    """Take back what a run in this process does to signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    hook = sys.unraisablehook
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_losses_are_the_same(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quiet_signals: None,
) -> None:
    settings = {"max_steps": 3, "tokenizer.max_seq_len": 500, "rows.max_tokens": 1024}
    path = write_config(root, tmp_path / "run", settings)
    assert status("prepare", "--config", path, "--output", tmp_path / "prepared") == 0
    assert "GB): 10 samples\n" in capsys.readouterr().out
    stored = {
        "_component_": "torchtune_vl.datasets.prepared_dataset",
        "directory": str(tmp_path / "prepared"),
    }
    other = write_config(root, tmp_path / "other", {**settings, "dataset": stored})
    for config in (path, other):
        assert recipe_main(read_config(["--config", str(config)])) == 0
    losses = [read_losses(output) for output in (tmp_path / "run", tmp_path / "other")]
    assert losses[0].keys() == {1, 2, 3}
    assert losses[0] == losses[1]
    assert read_samples(tmp_path / "run") == read_samples(tmp_path / "other")


def test_the_command(
    root: Path, bad_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    component = "torchtune_vl.datasets.vision_chat_dataset"
    good, bad = (
        {"_component_": component, "source": "json", "data_files": str(path)}
        for path in (root / "train.jsonl", bad_records)
    )
    mixed = [{**good, "name": "good", "weight": 2.0}, {**bad, "name": "bad", "weight": 1.0}]
    path = write_config(root, tmp_path / "run", {"tokenizer.max_seq_len": 500})
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), {"dataset_val": mixed}), path)
    output = tmp_path / "mixed"
    command = ("prepare", "--config", path, "--output", output, "--shard-size", 4)
    assert status(*command, "--validation") == 2
    assert "3 of 6 samples cannot be trained on" in capsys.readouterr().err
    skipping = ("on_bad_sample=skip", "max_bad_share=0.5")
    assert status(*command, "--validation", "--num-workers", 2, *skipping) == 0
    told = capsys.readouterr().out
    assert re.search(r"mixed/good \(0\.00 GB\): 10 samples\n", told)
    assert re.search(r"mixed/bad .*: 3 samples, without 3 that cannot be read", told)
    transform = transform_of(root)
    stored = [prepared_dataset(transform, directory=str(output / x)) for x in ("good", "bad")]
    assert [len(each) for each in stored] == [10, 3]
    assert all(isinstance(each, PreparedDataset) for each in stored)
    for arguments, message in (
        ((*command, "--shard-size", 0), "--shard-size is 0: make it at least 1"),
        ((*command, "--num-workers", -1), "--num-workers is -1: make it at least 0"),
        ((*command, "dataset_val=null", "--validation"), "has no dataset_val"),
        ((*command, "tokenizer.patch_dtype=float32"), "set tokenizer.patch_dtype=uint8"),
        ((*command, "--validation", "dataset_val=null"), "has no dataset_val"),
        (("prepare", "--config", path, "--output", root), "name an empty or a new directory"),
    ):
        assert status(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("tune-vl prepare: ")
        assert message in error
