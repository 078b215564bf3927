"""Sizes on disk: what earlier runs measured holds as long as records, media and settings do."""

import json
import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from torchtune_vl.datasets import VisionChatDataset, measure, measure_all, vision_chat_dataset
from torchtune_vl.datasets._record_cache import cache_directory
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHTUNE_VL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each sample was measured, by index."""
    counts: Counter[int] = Counter()
    original = VisionChatDataset.measure_to_keep

    def counting(self: VisionChatDataset, index: int) -> Any:
        counts[index] += 1
        return original(self, index)

    monkeypatch.setattr(VisionChatDataset, "measure_to_keep", counting)
    return counts


def record(number: int, **columns: Any) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"<image>What is {number}?"},
        {"role": "assistant", "content": "a " * (1 + number % 7)},
    ]
    return {"messages": turns, "images": [f"{number % 5}.png"], **columns}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    directory = tmp_path / "media"
    directory.mkdir()
    for number in range(5):
        Image.new("RGB", (56 + 28 * number, 56)).save(directory / f"{number}.png")
    return directory


def transform_of(vocabulary: Path, **settings: Any) -> Qwen2_5_VLTransform:
    return Qwen2_5_VLTransform(vocabulary / "tokenizer.json", **settings)


def dataset_of(transform: Any, directory: Path, records: list[Any], **settings: Any) -> Any:
    file = directory / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return vision_chat_dataset(transform, source="json", data_files=str(file), **settings)


def sizes_of(dataset: Any, num_workers: int = 0) -> np.ndarray:
    return measure_all(dataset, range(len(dataset)), num_workers, show_progress=False)


def plain(dataset: Any) -> list[list[int]]:
    return [list(dataset.measure(index)) for index in range(len(dataset))]


def test_only_new_and_changed_records_are_measured(
    vocabulary: Path, media: Path, measured: Counter[int]
) -> None:
    transform = transform_of(vocabulary)
    records = [record(i) for i in range(20)]
    first = dataset_of(transform, media, records)
    assert sizes_of(first).tolist() == plain(first)
    assert measured == Counter(range(20))
    assert sizes_of(first).tolist() == plain(first)
    assert measured == Counter(range(20))
    records[7]["messages"][1]["content"] = "Another answer, which is longer."
    second = dataset_of(transform, media, [*records[3:], record(20), record(21)])
    assert sizes_of(second).tolist() == plain(second)
    assert measured - Counter(range(20)) == Counter([4, 17, 18])


def test_media_that_changed_are_measured_again(
    vocabulary: Path, media: Path, measured: Counter[int]
) -> None:
    dataset = dataset_of(transform_of(vocabulary), media, [record(i) for i in range(10)])
    sizes_of(dataset)
    Image.new("RGB", (280, 280)).save(media / "2.png")
    assert sizes_of(dataset).tolist() == plain(dataset)
    assert measured == Counter(range(10)) + Counter([2, 7])
    (media / "3.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 10 samples.*\nsample 3: .*3.png"):
        sizes_of(dataset)


SETTINGS = [
    {"max_pixels": 56 * 56},
    {"max_seq_len": 24, "truncation": "left"},
    {"train_on": "last"},
    {"parse_special": "all"},
    {"add_vision_id": True},
    {"video_max_pixels": 200_000},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_other_settings_are_another_cache(
    vocabulary: Path, media: Path, measured: Counter[int], settings: dict[str, Any]
) -> None:
    records = [record(i) for i in range(4)]
    sizes_of(dataset_of(transform_of(vocabulary), media, records))
    other = dataset_of(transform_of(vocabulary, **settings), media, records)
    assert sizes_of(other).tolist() == plain(other)
    assert measured == Counter([*range(4)] * 2)
    # And again found, by a transform that is made anew
    sizes_of(dataset_of(transform_of(vocabulary, **settings), media, records))
    assert measured == Counter([*range(4)] * 2)


def test_other_columns_and_directories_too(
    vocabulary: Path, media: Path, tmp_path: Path, measured: Counter[int]
) -> None:
    transform = transform_of(vocabulary)
    other = tmp_path / "other"
    other.mkdir()
    for number in range(5):
        Image.new("RGB", (280, 280)).save(other / f"{number}.png")
    records = [record(i, system="Be brief.", hint="Be very, very brief.") for i in range(4)]
    settings: list[dict[str, Any]] = [
        {},
        {"media_dir": str(other)},
        {"column_map": {"system": "hint"}},
    ]
    for given in settings:
        dataset = dataset_of(transform, media, records, **given)
        assert sizes_of(dataset).tolist() == plain(dataset)
    assert measured == Counter([*range(4)] * 3)


def test_what_is_cut_is_told_again(
    vocabulary: Path, media: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transform = transform_of(vocabulary, max_seq_len=26, truncation="left")
    dataset = dataset_of(transform, media, [record(i) for i in range(12)])
    first = measure(dataset, range(12), shown=None)
    again = measure(dataset, range(12), 2, shown=None)
    assert again.counts == first.counts
    assert again.example == first.example
    assert first.counts["truncated"] > 0
    assert first.counts["media"] == 12 - first.counts["images"]
    first.tell_truncated()
    again.tell_truncated()
    one, two = [r.getMessage() for r in caplog.records if "and are cut" in r.getMessage()]
    assert one == two


def test_bad_samples_are_not_kept(vocabulary: Path, media: Path, measured: Counter[int]) -> None:
    records = [record(i) for i in range(6)]
    records[2]["images"] = ["absent.png"]
    dataset = dataset_of(transform_of(vocabulary), media, records)
    for _ in range(2):
        found = measure(dataset, range(6), shown=None)
        assert [index for index, _ in found.bad] == [2]
        assert found.sizes[2].tolist() == [0, 0, 0]
        assert found.sizes[3].tolist() == list(dataset.measure(3))
    assert measured == Counter(range(6)) + Counter([2])
    Image.new("RGB", (56, 56)).save(media / "absent.png")
    assert sizes_of(dataset).tolist() == plain(dataset)


def test_rows_of_tables_are_kept(
    vocabulary: Path, media: Path, tmp_path: Path, measured: Counter[int]
) -> None:
    records = [record(i) for i in range(9)]
    Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    settings: dict[str, Any] = {"source": str(tmp_path / "saved"), "media_dir": str(media)}
    for split in ("train", "train[:5]", "train[3:]+train[:2]"):
        dataset = vision_chat_dataset(transform_of(vocabulary), split=split, **settings)
        assert sizes_of(dataset).tolist() == plain(dataset)
        assert sizes_of(dataset).tolist() == plain(dataset)
    assert measured[0] <= 3


def test_parts_of_json_files_share_what_is_kept(
    vocabulary: Path, media: Path, measured: Counter[int]
) -> None:
    for name, numbers in (("a", range(6)), ("b", range(6, 11))):
        lines = "".join(json.dumps(record(i)) + "\n" for i in numbers)
        (media / f"{name}.jsonl").write_text(lines)
    files = [str(media / "a.jsonl"), str(media / "b.jsonl")]
    transform = transform_of(vocabulary)
    settings: dict[str, Any] = {"source": "json", "data_files": files}
    whole = vision_chat_dataset(transform, **settings)
    assert sizes_of(whole).tolist() == plain(whole)
    part = vision_chat_dataset(transform, split="train[8:]+train[2:4]+train[5:7]", **settings)
    assert sizes_of(part).tolist() == plain(part)
    assert sum(measured.values()) == 11


def test_a_cache_that_cannot_be_used_is_told_and_not_needed(
    vocabulary: Path, media: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the directory should be")
    dataset = dataset_of(transform_of(vocabulary), media, [record(i) for i in range(3)])
    caplog.clear()
    assert sizes_of(dataset).tolist() == plain(dataset)
    (message,) = [r.getMessage() for r in caplog.records]
    assert "cannot be used" in message
    assert "set TORCHTUNE_VL_CACHE" in message
    caplog.clear()
    cache.unlink()
    sizes_of(dataset)
    assert not caplog.records
    (database,) = (cache / "sizes").iterdir()
    database.write_bytes(b"no database" * 1000)
    assert sizes_of(dataset).tolist() == plain(dataset)
    assert "file is not a database" in caplog.text


def test_media_that_are_fetched_or_changed_while_read_are_not_kept(
    vocabulary: Path, media: Path, measured: Counter[int]
) -> None:
    url = (media / "0.png").as_uri()
    images = [["0.png"], [url], [f"data:image/png;base64,{'A' * 10}"], ["https://a.b/c.png"]]
    items = [
        {"type": "image", "image": "1.png"},
        {"type": "image_url", "image_url": {"url": "1.png"}},
        {"type": "video", "video": ["0.png", "1.png"]},
    ]
    asked = [[{"type": "image"}]] * 4 + [[item] for item in items]
    records = [
        {"messages": [{"role": "user", "content": content}], "images": given}
        for content, given in zip(asked, [*images, None, None, None], strict=True)
    ]
    dataset = dataset_of(transform_of(vocabulary), media, records)
    from torchtune_vl.datasets._record_formats import files_of

    samples = [dataset._read(dataset._records[i][0], i) for i in range(len(records))]
    here = [str(media / f"{n}.png") for n in range(2)]
    expected = [[here[0]], [here[0]], [], None, [here[1]], [here[1]], here]
    assert [files_of(sample) for sample in samples] == expected


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHTUNE_VL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "torchtune_vl"


def test_two_processes_share_a_cache(vocabulary: Path, media: Path, cache: Path) -> None:
    dataset = dataset_of(transform_of(vocabulary), media, [record(i) for i in range(40)])
    child = os.fork()
    if not child:
        try:
            sizes_of(dataset)
        finally:
            os._exit(0)
    assert sizes_of(dataset, 2).tolist() == plain(dataset)
    os.waitpid(child, 0)
    (file,) = (cache / "sizes").iterdir()
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT COUNT(*) FROM samples").fetchone() == (40,)
