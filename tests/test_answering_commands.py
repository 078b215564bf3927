"""``tune-vl generate`` and ``tune-vl chat``: many answers, killed and gone on with; talk."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from quickstart.checkpoint import write_tiny_checkpoint
from torchtune_vl.cli import main
from torchtune_vl.cli.chat import Talk
from torchtune_vl.generation import generate, load_model
from torchtune_vl.models import transform_from_pretrained

COUNT, BAD = 30, 11


@pytest.fixture(scope="module")
def directory(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and questions about images, one of which is not there."""
    directory = tmp_path_factory.mktemp("answering")
    write_tiny_checkpoint(directory / "model", vocabulary)
    (directory / "images" / "more").mkdir(parents=True)
    records = []
    for number in range(COUNT):
        name = f"images/{'more/' * (number % 2)}{number}.png"
        if number != BAD:
            color = (number * 8, 100, 255 - number * 8)
            Image.new("RGB", (56 + number, 70), color).save(directory / name)
        asked = [{"type": "image", "image": name}, {"type": "text", "text": f"What is {number}?"}]
        turns = [{"role": "user", "content": asked}]
        if number % 3:
            turns.append({"role": "assistant", "content": f"It is {number}."})
        records.append({"id": f"question {number}", "messages": turns})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "test.jsonl").write_text(lines)
    return directory


def command(directory: Path, output: Path, *more: str) -> list[str]:
    run = [sys.executable, "-m", "torchtune_vl.cli", "generate", str(directory / "model")]
    asked = [str(directory / "test.jsonl"), "--output", str(output), "--max-new-tokens", "24"]
    return [*run, "--temperature", "1", *asked, "--batch-size", "3", *more]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def called(name: str, *arguments: object) -> int:
    with pytest.raises(SystemExit) as ending:
        main([name, *map(str, arguments)])
    return ending.value.code


@pytest.mark.slow
def test_killed_and_given_again_every_question_is_answered_once(
    directory: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    undisturbed = subprocess.run(command(directory, whole), capture_output=True, text=True)
    assert undisturbed.returncode == 1
    assert f"Not answered: 1\n  sample 'question {BAD}'" in undisturbed.stderr
    for processes, answers in (("1", 6), ("2", 14)):
        with subprocess.Popen(
            command(directory, killed, "--processes", processes),
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        ) as process:
            while sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("*-?")) < answers:
                assert process.poll() is None
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            time.sleep(2)  # until processes that the launcher started have seen it
        assert not killed.exists()
    left = tmp_path / "killed.jsonl.unfinished-0"
    left.write_bytes(left.read_bytes()[:-7])  # a line that was not written to its end
    status = subprocess.run(command(directory, killed, "--processes", "2"), capture_output=True)
    assert status.returncode == 1
    expected, found = read(whole), read(killed)
    for record in (*expected, *found):
        record.pop("logprob", None)
    assert found == expected
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "killed.jsonl"}


def test_answers_of_a_dataset(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    how = (directory / "model", "--output", output, "--max-new-tokens", 6)
    data = (directory / "test.jsonl", "--num-answers", 2, "transform.max_pixels=3136")
    assert called("generate", *how, "--temperature", 1, *data) == 1
    assert "58 answers" in capsys.readouterr().out
    records = read(output)
    pairs = [(n, k) for n in range(COUNT) for k in range(1 if n == BAD else 2)]
    assert [(r["sample"], r.get("answer_number", 0)) for r in records] == pairs

    transform = transform_from_pretrained(directory / "model", max_pixels=3136)
    asked = []
    for number, line in enumerate((directory / "test.jsonl").read_text().splitlines()):
        (image, text), *_ = (turn["content"] for turn in json.loads(line)["messages"])
        image["image"] = str(directory / image["image"])
        # Another question keeps its place, as the numbers of questions are part of what is drawn
        content = [text] if number == BAD else [image, text]
        asked.append([{"role": "user", "content": content}])
    drawn = {"max_new_tokens": 6, "temperature": 1.0, "num_answers": 2}
    answers = generate(load_model(directory / "model"), transform, asked, **drawn)
    texts = [answer.text for answer in answers]
    del texts[2 * BAD + 1]
    for record, text in zip(records, texts, strict=True):
        number = record["sample"]
        assert record["id"] == f"question {number}"
        if number == BAD:
            assert "11.png" in record["error"]
            continue
        assert record["answer"] == text
        assert record.get("truth") == (f"It is {number}." if number % 3 else None)


def test_a_file_of_another_command_is_not_gone_on_with(directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    part = tmp_path / "answers.jsonl.unfinished-3"
    part.write_text('{"unfinished": {"checkpoint": "another", "seed": "0"}}\n')
    asked = (directory / "model", directory / "test.jsonl", "--output", output)
    assert called("generate", *asked) == 2
    assert [*tmp_path.iterdir()] == [part]


@pytest.mark.parametrize(
    "name", ["answers[v2].jsonl", "answers?.jsonl", "Antworten über alles.jsonl"]
)
def test_names_of_files(directory: Path, tmp_path: Path, name: str) -> None:
    """Also a header of which a crash left half."""
    records = read(directory / "test.jsonl")[:2]
    asked = [{**record, "id": f"\u2028 {n} \ud800"} for n, record in enumerate(records)]
    for record in asked:
        for item in record["messages"][0]["content"]:
            if "image" in item:
                item["image"] = str(directory / item["image"])
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in asked))
    (tmp_path / f"{name}.unfinished-0").write_text('{"unfini')
    how = (directory / "model", data, "--output", tmp_path / name, "--max-new-tokens", 2)
    assert called("generate", *how) == 0
    assert [record["id"] for record in read(tmp_path / name)] == [r["id"] for r in asked]
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", name}


def test_the_environment_of_another_launcher(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    output = tmp_path / "answers.jsonl"
    folder = ("--prompt", "What?", "--images", directory / "images" / "more", "--output", output)
    assert called("generate", directory / "model", *folder, "--max-new-tokens", 2) == 0
    assert len(read(output)) == len([*(directory / "images" / "more").iterdir()])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give one of"),
        (("--prompt", "Hi", "data.jsonl"), "give one of"),
        (("--images", "."), "give --prompt"),
        (("data.jsonl",), "give --output"),
        (("--prompt", "Hi", "--output", "x"), "leave --output out"),
        (("--prompt", "Hi", "split=test"), "split is of a dataset"),
        (("data.jsonl", "--output", "x", "--image", "y"), "are of one question"),
        (("data.jsonl", "--output", "missing/x"), "is no directory"),
        (("data.xyz", "--output", "x"), "set source="),
        (("--prompt", "Hi", "--num-answers", "2"), "leave --num-answers and --processes out"),
        (("--prompt", "Hi", "--top-k", "2"), "set temperature"),
        (("--prompt", "Hi", "--temperature", "-1"), "temperature is -1"),
        (("--prompt", "Hi", "transform.max_pixel=9"), "the nearest is 'max_pixels'"),
    ],
)
def test_what_does_not_fit(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert called("generate", directory / "model", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "unfinished" not in path.name]


def test_one_question_and_a_folder(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, output = directory / "images" / "0.png", tmp_path / "answers.jsonl"
    asked = ("--prompt", "What?", "--system", "Be short.", "--max-new-tokens", 8)
    assert called("generate", directory / "model", *asked, "--image", image) == 0
    printed = capsys.readouterr().out
    folder = ("--images", directory / "images", "--output", output)
    assert called("generate", directory / "model", *asked, *folder) == 0
    records = read(output)
    assert len(records) == COUNT - 1
    assert [r["id"] for r in records[:2]] == ["0.png", "10.png"]
    assert records[-1]["id"].startswith("more/")
    assert printed == records[0]["answer"] + "\n"
    empty = ("--prompt", "", "--image", image, "--max-new-tokens", 1)
    assert called("generate", directory / "model", *empty) == 0


# Talk


class Echo:
    """Answers by the number of messages, and is interrupted where it is told to be."""

    def __init__(self, writes_reasoning: bool = False) -> None:
        self.asked: list[Any] = []
        self.transform = SimpleNamespace(writes_reasoning=writes_reasoning)

    def stream(self, messages: list[dict[str, Any]]) -> Iterator[str]:
        self.asked = messages
        text = messages[-1]["content"][-1]["text"]
        if text == "stop at once":
            raise KeyboardInterrupt
        yield f"{len(messages)} "
        if text == "stop":
            raise KeyboardInterrupt
        yield "messages"


def test_talk(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    talk = Talk(echo, "Be short.")
    picture = directory / "images" / "0.png"
    talk.say(f"/image '{picture}'")
    talk.say("What is it?")
    assert [item["type"] for item in echo.asked[1]["content"]] == ["image", "text"]
    talk.say("stop")
    talk.say("stop at once")
    talk.say("  ")
    talk.say("And now?")
    roles = [message["role"] for message in echo.asked]
    assert roles == ["system", *["user", "assistant"] * 2, "user"]
    assert echo.asked[4]["content"] == "4 "
    assert [item["type"] for item in echo.asked[-1]["content"]] == ["text"]
    talk.say(f"/save {tmp_path / 'talk.jsonl'}")
    (saved,) = read(tmp_path / "talk.jsonl")
    assert saved["messages"][:-1] == echo.asked
    transform = transform_from_pretrained(directory / "model")
    assert transform(saved)["mask"].count(False) > 0
    with pytest.raises(ValueError, match="name another file"):
        talk.say(f"/save {tmp_path / 'talk.jsonl'}")
    with pytest.raises(ValueError, match="is no file"):
        talk.say("/video missing.mp4")
    with pytest.raises(ValueError, match="there is no /imgae"):
        talk.say("/imgae x.png")
    talk.say("/reset")
    talk.say("Hello")
    assert len(echo.asked) == 2
    assert "4  [stopped]" in capsys.readouterr().out


def test_a_reasoning_that_was_stopped_is_no_answer() -> None:
    echo = Echo(writes_reasoning=True)
    talk = Talk(echo, None)
    talk.say("stop")
    talk.say("And now?")
    assert echo.asked[1] == {"role": "assistant", "content": "", "reasoning_content": "1 "}
