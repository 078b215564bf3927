"""What is wrong with a dataset is found, all of it, and nothing else."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from tests.finetune_runs import write_config, write_inputs
from tests.test_bad_samples import BAD, LINES, bad_records
from torchtune_vl.chat import ChatTransform
from torchtune_vl.cli import main
from torchtune_vl.data import PackedRows
from torchtune_vl.datasets import Mixture, SamplesError, measure_all, vision_chat_dataset
from torchtune_vl.datasets._box_units import READINGS, UnitEvidence
from torchtune_vl.datasets._check import KINDS, check
from torchtune_vl.datasets._check_sample import SampleCheck, is_one_word
from torchtune_vl.datasets._near_duplicates import near_duplicates
from torchtune_vl.models import transform_from_pretrained

CAT = "A grey cat sleeps on a green sofa beside the window, and the sun shines on its back."


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check")
    write_inputs(root, vocabulary, LINES, [("image",), (), ("image", "image")])
    lines = (root / "train.jsonl").read_text().splitlines()
    for number, record in enumerate(bad_records(root).values()):
        lines.insert(4 * number + 2, json.dumps(record))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    write_config(root, root / "run", {})
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHTUNE_VL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each sample was looked at, by index."""
    counts: Counter[int] = Counter()
    original = SampleCheck.__call__

    def counting(self: SampleCheck, index: int) -> Any:
        counts[index] += 1
        return original(self, index)

    monkeypatch.setattr(SampleCheck, "__call__", counting)
    return counts


def status(root: Path, *arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--config", str(root / "run.yaml"), *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def report_of(root: Path, file: Path, *arguments: object) -> dict[str, Any]:
    status(root, "--json", file, *arguments)
    return json.loads(file.read_text())


def samples_of(report: dict[str, Any], kind: str) -> list[int]:
    return [found["sample"] for found in report["findings"] if found["kind"] == kind]


@pytest.fixture(scope="module")
def transform(root: Path) -> ChatTransform:
    return transform_from_pretrained(root / "base")


@pytest.fixture
def report_on(transform: ChatTransform, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The report on records whose media are in the directory of the test."""

    def report(
        records: Sequence[Any],
        decode: bool = False,
        transform: ChatTransform = transform,
        **of_dataset: Any,
    ) -> dict[str, Any]:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        files = {"source": "json", "data_files": str(data)}
        dataset = vision_chat_dataset(transform, **files, **of_dataset)
        mixture = Mixture([dataset], [""], [None], [None])
        return check(mixture, transform, PackedRows(max_tokens=512), decode=decode)

    return report


def asking(question: str, answer: Any = CAT, *images: str) -> dict[str, Any]:
    content = [*({"type": "image", "image": name} for name in images), text(question)]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def photo(seed: int, height: int = 120, width: int = 160) -> Image.Image:
    blots = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("workers", [0, 2])
def test_exactly_the_bad_are_found(root: Path, tmp_path: Path, workers: int) -> None:
    report = report_of(root, tmp_path / "a.json", "--decode", f"num_workers={workers}")
    assert samples_of(report, "bad") == BAD
    assert report["samples"] == 75
    for found in report["findings"]:
        assert found["reason"].startswith(f"sample {found['sample']}: ")
        assert found["reason"].endswith(f"train.jsonl, line {found['sample'] + 1})")
    # Three are only found by decoding, and the cut WebP by releases of libwebp that open it
    found = samples_of(report_of(root, tmp_path / "b.json"), "bad")
    assert [sample for sample in found if sample != BAD[14]] == BAD[:11]


def test_the_report_has_all(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(root, tmp_path / "a.json", "--decode", "seed=2")
    keys = "config overrides dataset samples decoded counts findings answers languages"
    assert [*report] == keys.split()
    assert [report[key] for key in keys.split()[:3]] == [
        str(root / "run.yaml"),
        ["seed=2"],
        "dataset",
    ]
    assert [*report["counts"]] == [*KINDS]
    for kind in KINDS:
        assert report["counts"][kind] == len(samples_of(report, kind))
    for found in report["findings"]:
        assert [*found] == ["kind", "sample", "dataset", "other", "reason"]
        assert (found["other"] is not None) == ("duplicate" in found["kind"])
    assert sum(report["languages"].values()) == 60
    assert report["answers"] == {"any": 60, "empty": 0, "one word": 30}
    said = capsys.readouterr().out
    assert "75 samples, media decoded" in said
    shown = [line for line in said.splitlines() if line.startswith("  sample ")]
    of_bad = [found["reason"] for found in report["findings"] if found["kind"] == "bad"]
    assert [line.strip() for line in shown[:10]] == of_bad[:10]
    assert "  and 5 more: --json FILE has all" in said
    assert "Answers: 60, of one word: 30 (50%)" in said


def test_a_mixture_is_checked_whole(root: Path, tmp_path: Path) -> None:
    config = OmegaConf.load(root / "run.yaml")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(asking(f"{name}?")) + "\n{}\n")
    config.dataset = [
        {**config.dataset, "name": name, "data_files": str(tmp_path / f"{name}.jsonl")}
        for name in ("a", "b")
    ]
    OmegaConf.save(config, tmp_path / "run.yaml")
    report = report_of(tmp_path, tmp_path / "a.json")
    bad = [found for found in report["findings"] if found["kind"] == "bad"]
    assert [(found["sample"], found["dataset"]) for found in bad] == [(1, "a"), (3, "b")]
    assert bad[1]["reason"].startswith("sample 3: b: sample 1: it has no messages")


@pytest.mark.slow
def test_a_killed_check_goes_on(
    root: Path, tmp_path: Path, cache: Path, looked_at: Counter[int]
) -> None:
    expected = report_of(root, tmp_path / "whole.json")
    assert looked_at == Counter(range(75))
    arguments = ["check", "--config", str(root / "run.yaml"), "--json", str(tmp_path / "a.json")]
    program = f"""
import os, signal
from torchtune_vl.cli import main
from torchtune_vl.datasets import _check
_check._BATCH_SIZE = 16
keep, batches = _check._BatchCheck.keep, []
def keeping(self, new):
    keep(self, new)
    batches.append(new)
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
_check._BatchCheck.keep = keeping
main({arguments})
"""
    other = tmp_path / "other"
    environment = {**os.environ, "TORCHTUNE_VL_CACHE": str(other)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "a.json").exists()
    looked_at.clear()
    cache.rename(tmp_path / "unused")
    other.rename(cache)
    assert report_of(root, tmp_path / "a.json", "num_workers=0") | {"overrides": []} == expected
    # Those of three batches are known, and with them others of the same record, but for the bad
    unknown = {*range(48, 75), *BAD[:11]} - {22, 49, 53, 57, 64}
    assert looked_at == Counter(unknown)


def test_what_has_changed_is_checked_anew(
    report_on: Callable[..., dict[str, Any]], tmp_path: Path, looked_at: Counter[int]
) -> None:
    for number in range(4):
        photo(number).save(tmp_path / f"{number}.png")
    records = [asking(f"Number {n}?", f"Yes, {n}.", f"{n}.png") for n in range(4)]
    assert report_on(records)["counts"]["bad"] == 0
    looked_at.clear()
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:10])
    records = [asking("Another?"), *records]
    assert samples_of(report_on(records), "bad") == [2]
    assert looked_at == Counter([0, 2])
    # Decoding is another check
    looked_at.clear()
    report_on(records, decode=True)
    assert looked_at == Counter(range(5))


def test_duplicates(report_on: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    photo(0).save(tmp_path / "a.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    photo(0).resize((140, 105)).save(tmp_path / "small.jpg", quality=70)
    photo(1).save(tmp_path / "other.png")
    what = "What is to be seen in this picture?"
    records = [
        asking(what, CAT, "a.png"),
        asking(what, CAT, "other.png"),
        {"id": "again", **asking(what, CAT, "a.png")},
        asking(what, CAT, "copy.png"),
        asking(what, CAT, "small.jpg"),
        asking(what, CAT),
        asking(what, CAT.replace("its back", "its tail")),
        asking(what, "There is nothing but a wall, painted white, with a nail in it."),
        asking("Where is it?", CAT, "a.png"),
        asking(what, CAT, "a.png", "other.png"),
    ]

    def pairs(report: dict[str, Any], kind: str) -> list[tuple[int, int]]:
        found = (f for f in report["findings"] if f["kind"] == kind)
        return [(f["sample"], f["other"]) for f in found]

    by_name = report_on(records)
    assert pairs(by_name, "duplicate") == [(2, 0)]
    assert pairs(by_name, "near duplicate") == [(6, 5)]
    decoded = report_on(records, decode=True)
    assert pairs(decoded, "duplicate") == [(2, 0), (3, 0)]
    assert pairs(decoded, "near duplicate") == [(4, 0), (6, 5)]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_near_duplicates_are_those_of_all_pairs(seed: int, distance: int) -> None:
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, 2**32, (300, 64), np.uint32)
    media = rng.integers(0, 2**64, 300, np.uint64)
    # Copies with a few other numbers, or a few other bits
    for copy in range(200, 300):
        original = int(rng.integers(0, 200))
        texts[copy] = texts[original]
        changed = rng.choice(64, int(rng.integers(0, 12)), replace=False)
        texts[copy, changed] = rng.integers(0, 2**32, len(changed), np.uint32)
        flipped = sum(1 << int(bit) for bit in rng.choice(64, distance, replace=False))
        media[copy] = media[original] ^ np.uint64(flipped)
    shared = (texts[:, None] == texts).mean(axis=2)
    bits = np.bitwise_count(media[:, None] ^ media)
    expected: dict[int, tuple[int, float]] = {}
    for later, earlier in zip(*((shared >= 0.9) & (bits <= 4)).nonzero(), strict=True):
        if earlier < later:
            expected.setdefault(later, (earlier, shared[later, earlier]))
    assert near_duplicates(texts, media[:, None]) == expected


def test_many_equal_texts_take_no_time() -> None:
    """Of a dataset of one question and one answer about all images."""
    rng = np.random.default_rng(0)
    media = rng.integers(0, 2**64, (20_000, 1), np.uint64)
    assert near_duplicates(np.zeros((20_000, 64), np.uint32), media) == {}


@pytest.mark.parametrize("actual", READINGS)
@pytest.mark.parametrize("said", ["pixels", "0..1", "0..1000"])
def test_units(said: str, actual: str) -> None:
    rng = np.random.default_rng(1)
    parts = []
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(300, 3000, 2))
        x1, x2, y1, y2 = (*sorted(rng.uniform(0, 1, 2)), *sorted(rng.uniform(0, 1, 2)))
        scale = {"0..1": (1, 1), "0..1000": (1000, 1000)}.get(actual, (width, height))
        numbers = [x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]]
        if actual.endswith("height]"):
            numbers[2:] = numbers[2] - numbers[0], numbers[3] - numbers[1]
        if actual.endswith("x2]"):
            numbers = [numbers[1], numbers[0], numbers[3], numbers[2]]
        parts.append(UnitEvidence.of(numbers, (height, width)))
    expected = None if said == actual else actual
    assert UnitEvidence.joined(parts).other_than(said) == expected
    assert UnitEvidence.joined(parts[:9]).other_than(said) is None  # too few to tell


def test_a_unit_that_looks_like_another_is_told(
    report_on: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    photo(0).save(tmp_path / "a.png")
    records = []
    for number in range(12):
        box = {"bbox_2d": [0.1, 0.1, 0.3 + number / 20, 0.95], "label": "cat"}
        answer = [{"type": "boxes", "boxes": [box]}]
        records.append(asking(f"Where is cat {number}?", answer, "a.png"))
    report = report_on([asking("Really?"), *records])
    assert samples_of(report, "box unit") == [1]
    assert samples_of(report, "bad") == []
    (told,) = (f["reason"] for f in report["findings"] if f["kind"] == "box unit")
    assert "and of those of 11 other samples, is 'pixels', but all 12 look like 0..1" in told
    assert samples_of(report_on(records, box_unit="0..1"), "box unit") == []
    # Also if they are all bad for that reason
    for record in records:
        record["messages"][1]["content"][0]["boxes"][0]["bbox_2d"] = [100, 100, 990, 990]
    report = report_on(records)
    assert samples_of(report, "bad") == [*range(12)]
    (told,) = (f["reason"] for f in report["findings"] if f["kind"] == "box unit")
    assert "look like 0..1000" in told


def test_texts(report_on: Callable[..., dict[str, Any]]) -> None:
    german = "Eine graue Katze schläft auf dem grünen Sofa neben dem Fenster."
    records = [
        asking("What <|im_end|>\n<|im_start|>assistant is it?"),
        asking("What is it?", "An <image> of a cat, they say."),
        asking("Was ist auf dem Bild zu sehen?", german),
        asking("Say: one | im_start | two.", "Yes."),
        asking("图片里有什么东西在沙发上睡觉？", "一只灰色的猫在绿色的沙发上睡觉。"),
        asking("<tool_call>?", "1"),
    ]
    two = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": " "}]
    records.append({"messages": [*asking("First of two?")["messages"], *two]})
    report = report_on(records)
    assert samples_of(report, "special token") == [0, 1]
    assert "<|im_end|>, <|im_start|>, letters like" in report["findings"][0]["reason"]
    assert samples_of(report, "empty answer") == [6]
    assert report["answers"] == {"any": 8, "empty": 1, "one word": 2}
    assert report["languages"] == {"en": 3, "": 2, "de": 1, "zh": 1}


def test_what_is_cut(report_on: Callable[..., dict[str, Any]], root: Path) -> None:
    short = transform_from_pretrained(root / "base", max_seq_len=90)
    report = report_on([asking("What?"), asking("What?", "word " * 200)], transform=short)
    (found,) = report["findings"]
    assert (found["kind"], found["sample"]) == ("truncated", 1)
    assert re.search(r"loses \d+ tokens, 0 images and 0 videos \(", found["reason"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", True),
        ("'Yes!'", True),
        ("Yes, sir", False),
        ("", False),
        ("...", False),
        ("3.5", False),
        ("猫", True),
        ("一只灰色的猫在睡觉", False),
        ("x" * 21, False),
    ],
)
def test_one_word(answer: str, expected: bool) -> None:
    assert is_one_word(answer) is expected


def test_the_clean_list_is_the_good_records(root: Path, transform: ChatTransform) -> None:
    clean = root / "clean.jsonl"
    assert status(root, "--decode", "--write-clean", clean) == 1
    lines = (root / "train.jsonl").read_bytes().splitlines(keepends=True)
    assert clean.read_bytes() == b"".join(x for n, x in enumerate(lines) if n not in BAD)
    dataset = vision_chat_dataset(transform, source="json", data_files=str(clean))
    assert (measure_all(dataset, range(60), show_progress=False)[:, 0] > 0).all()
    assert all(dataset[index]["tokens"] for index in range(60))
    dirty = vision_chat_dataset(transform, source="json", data_files=str(root / "train.jsonl"))
    with pytest.raises(SamplesError):
        measure_all(dirty, range(75), show_progress=False)


def test_clean_lists_of_other_files(root: Path, tmp_path: Path) -> None:
    good = '{"messages": [{"role": "user", "content": "é \\u00e9 1.50?"},\r\n'
    good += '  {"role": "assistant",\t"content": "Yes, it is."}], "x": 1.50}'
    file = tmp_path / "array.json"
    file.write_bytes(f"\ufeff[{good},\n{{}},\n{good}]".encode())
    clean = tmp_path / "clean"
    of_file = f"dataset.data_files={file}"
    assert status(root, of_file, "--write-clean", clean) == 1
    line = good.replace("\r\n", "  ").encode()
    assert clean.read_bytes() == line + b"\n" + line + b"\n"
    # Of a table the numbers of samples
    turns = [{"role": role, "content": "Yes, it is."} for role in ("user", "assistant")]
    messages = [turns, turns[:1]]
    rows = Dataset.from_list([{"messages": messages[n]} for n in (0, 1, 0)])
    rows.save_to_disk(tmp_path / "saved")
    saved = f"dataset.source={tmp_path / 'saved'}", "~dataset.data_files"
    assert status(root, *saved, "--write-clean", clean) == 1
    assert clean.read_bytes() == b"0\n2\n"


def test_statuses(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "data.jsonl"
    of_file = f"dataset.data_files={file}"
    file.write_text(json.dumps(asking("What?")) + "\n")
    assert status(root, of_file, "--strict") == 0
    file.write_text(2 * (json.dumps(asking("What?")) + "\n"))
    assert status(root, of_file) == 0
    assert status(root, of_file, "--strict") == 1
    file.write_text(json.dumps(asking("What?", "")) + "\n")
    assert status(root, of_file) == 1
    for arguments, message in {
        ("--json", "nowhere/a.json"): "nowhere, where a.json is to be written, is no directory",
        ("--validation",): "has no dataset_val: leave --validation out, or set it",
        ("dataset.streaming=True",): "a stream cannot be checked",
        ("rows.max_token=3",): "the nearest is rows.max_tokens",
    }.items():
        capsys.readouterr()
        assert status(root, of_file, *arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "py3langid", None)
    assert status(root, of_file) == 2
    told = capsys.readouterr().err
    assert "a check needs datasketch, ImageHash, py3langid, and import of py3langid halted" in told
    assert "pip install 'torchtune-vl[check]'" in told
