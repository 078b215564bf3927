"""Runs on data of which some samples cannot be trained on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.finetune_runs import (
    kill_after,
    read_losses,
    read_samples,
    run,
    start,
    write_config,
    write_inputs,
)
from torchtune_vl.training._bad_samples import BadSample, BadSamples

LINES = 60


def _ask(content: Any, answer: Any = "A cat.") -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def _see(name: str, **item: Any) -> dict[str, Any]:
    return _ask([{"type": "image", "image": name, **item}, {"type": "text", "text": "What?"}])


def bad_records(root: Path) -> Mapping[str, Any]:
    """Fifteen kinds of samples that cannot be trained on, the last four only known when decoded."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (120, 90, 3), np.uint8))
    noise.save(root / "whole.jpg")
    noise.save(root / "whole.png")
    whole = (root / "whole.jpg").read_bytes()
    (root / "no_image.jpg").write_bytes(b"<html>Not found</html>")
    (root / "empty.jpg").write_bytes(b"")
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    png = bytearray((root / "whole.png").read_bytes())
    (root / "cut.png").write_bytes(png[: len(png) // 2])
    png[len(png) // 2] ^= 255
    (root / "flipped.png").write_bytes(png)
    noise.save(root / "whole.bmp")
    bmp = (root / "whole.bmp").read_bytes()
    (root / "cut.bmp").write_bytes(bmp[: len(bmp) // 2])
    boxes = {"type": "boxes", "boxes": [{"bbox_2d": [5, 5, 900, 50], "label": "cat"}]}
    return {
        "no such file": _see("absent.jpg"),
        "no image": _see("no_image.jpg"),
        "an empty file": _see("empty.jpg"),
        "no answer": {"messages": [{"role": "user", "content": "What?"}]},
        "an empty answer": _ask("What?", ""),
        "too long for a row": _ask("word " * 600),
        "a place without a medium": _ask([{"type": "image"}, {"type": "text", "text": "What?"}]),
        "a medium without a place": {**_ask("What?"), "images": ["whole.jpg"]},
        "an unknown role": {"messages": [{"role": "gpt", "content": "x"}, *_ask("y")["messages"]]},
        "no messages": {"text": "What?"},
        "a box outside": _ask([{"type": "image", "image": "whole.jpg"}], [boxes]),
        "a cut JPEG": _see("cut.jpg"),
        "a cut PNG": _see("cut.png"),
        "a flipped byte": _see("flipped.png"),
        "a cut BMP": _see("cut.bmp"),
    }


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    write_inputs(root, vocabulary, LINES, [("image",), (), ("image", "image")])
    lines = (root / "train.jsonl").read_text().splitlines()
    shutil.copy(root / "train.jsonl", root / "good.jsonl")
    for number, record in enumerate(bad_records(root).values()):
        lines.insert(4 * number + 2, json.dumps(record))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    return root


BAD = [4 * number + 2 for number in range(15)]


def settings(root: Path, **others: Any) -> dict[str, Any]:
    return {
        "dataset.data_files": str(root / "train.jsonl"),
        "on_bad_sample": "skip",
        "max_bad_share": 0.25,
        "epochs": 4,
        **others,
    }


def listed(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "bad_samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_first_is_named(root: Path, tmp_path: Path) -> None:
    config = write_config(root, tmp_path / "run", settings(root, on_bad_sample="raise"))
    process = start(config)
    messages, _ = process.communicate()
    assert process.returncode == 2
    told = messages[messages.index("tune-vl run: ") :]
    assert told.startswith("tune-vl run: 11 of 75 samples cannot be trained on")
    found = [line for line in told.splitlines() if line.startswith("sample ")]
    assert [int(line.split(":")[0].split()[1]) for line in found] == BAD[:11]
    for line, sample in zip(found, BAD, strict=False):
        assert line.endswith(f"train.jsonl, line {sample + 1})")
    # Of those that only decoding shows, the first ends the run in its step
    lines = (root / "train.jsonl").read_text().splitlines()
    kept = [line for number, line in enumerate(lines) if number not in BAD[:11]]
    (tmp_path / "rest.jsonl").write_text("\n".join(kept))
    other = {"dataset.data_files": str(tmp_path / "rest.jsonl"), "dataset.media_dir": str(root)}
    config = write_config(root, tmp_path / "rest", settings(root, on_bad_sample="raise", **other))
    process = start(config)
    messages, _ = process.communicate()
    assert process.returncode == 2
    assert "tune-vl run: sample " in messages
    assert any(name in messages for name in ("cut.jpg", "cut.png", "flipped.png", "cut.bmp"))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 1)])
def test_exactly_the_bad_are_left_out(
    root: Path, tmp_path: Path, processes: int, workers: int
) -> None:
    config = write_config(root, tmp_path / "one", settings(root))
    losses = run(config)
    expected = listed(tmp_path / "one")
    assert sorted(line["sample"] for line in expected) == BAD
    assert [line["sample"] for line in expected if line["step"] == 0] == BAD[:11]
    for line in expected:
        assert line["dataset"] == "dataset"
        assert line["reason"].startswith(f"sample {line['sample']}: ")
    steps = read_samples(tmp_path / "one")
    seen = [sample for samples in steps.values() for sample in samples]
    assert sorted(seen) == sorted([*({*range(75)} - {*BAD})] * 4)
    # The same with workers and processes, and after kills
    config = write_config(root, tmp_path / "other", settings(root, num_workers=workers))
    for at in (2, 5):
        kill_after(at, config, processes, "resume=True", "save_every_n_steps=2")
    others = run(config, processes, "resume=True", "save_every_n_steps=2")
    assert listed(tmp_path / "other") == expected
    for step, loss in others.items():
        assert abs(loss - losses[step]) < 1e-5
    assert max(others) == max(losses)
    assert read_losses(tmp_path / "one") == losses


@pytest.mark.slow
def test_too_many_end_the_run(root: Path, tmp_path: Path) -> None:
    config = write_config(root, tmp_path / "run", settings(root, max_bad_share=0.1))
    process = start(config)
    messages, _ = process.communicate()
    assert process.returncode == 2
    assert "11 of 75 samples of dataset are bad, more than max_bad_share, 0.1: look at" in messages
    assert [line["sample"] for line in listed(tmp_path / "run")] == BAD[:11]
    # Also when only decoding shows the last of them
    config = write_config(root, tmp_path / "late", settings(root, max_bad_share=0.16))
    process = start(config)
    messages, _ = process.communicate()
    assert process.returncode == 2
    # Found in the step in which they became too many
    bad = len(listed(tmp_path / "late"))
    assert 13 <= bad <= 15
    assert f"{bad} of 75 samples of dataset are bad, more than max_bad_share, 0.16" in messages


def test_a_list_has_each_once_and_forgets_what_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    found = [BadSample(4, "dataset", 7, "x"), BadSample(2, "dataset", 9, "y")]
    bad = BadSamples(path, 0.5, writes=True)
    bad.add([BadSample(0, "dataset", 3, "z")])
    assert not path.exists()  # what is there is of an earlier part until all of it is known
    bad.begin([])
    bad.add(found)
    bad.add([BadSample(5, "dataset", 9, "y"), BadSample(5, "dataset_val", 9, "y")])
    assert [line["sample"] for line in listed(tmp_path)] == [3, 9, 7, 9]
    with path.open("a") as file:
        file.write('{"step": 4, "data')  # torn
    again = BadSamples(path, 0.5, writes=True)
    # One of before the first step, too: of validation it would come again later
    assert again.read_until(4) == [BadSample(0, "dataset", 3, "z"), found[1], found[0]]
    again.add([BadSample(0, "dataset", 3, "z")])
    again.begin(again.read_until(4))
    assert [line["sample"] for line in listed(tmp_path)] == [3, 9, 7]
    with pytest.raises(ValueError, match=r"3 of 1 samples of dataset are bad, more than.*0\.5"):
        again.refuse_many("dataset", 1)
