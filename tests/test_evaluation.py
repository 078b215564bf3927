"""``tune-vl evaluate``: scores of answers to a dataset, by columns and beside another model's."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from quickstart.checkpoint import write_tiny_checkpoint
from tests.test_answering_commands import called, read
from torchtune_vl.datasets import open_dataset
from torchtune_vl.evaluation import Sources, evaluate, metrics_of
from torchtune_vl.generation import generate, load_model
from torchtune_vl.generation._answer_file import choices_of
from torchtune_vl.models import transform_from_pretrained

COUNT, BAD = 12, 5


@pytest.fixture(scope="module")
def directory(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and questions half of which the first answers rightly, the second none."""
    directory = tmp_path_factory.mktemp("evaluation")
    for seed in (0, 1):
        write_tiny_checkpoint(directory / f"model{seed}", vocabulary, seed=seed)
    asked = []
    for number in range(COUNT):
        path = directory / f"{number}.png"
        Image.new("RGB", (56 + 3 * number, 70), (number * 20, 100, 255 - number * 20)).save(path)
        question = [
            {"type": "image", "image": str(path)},
            {"type": "text", "text": f"No. {number}?"},
        ]
        asked.append([{"role": "user", "content": question}])
    transform = transform_from_pretrained(directory / "model0")
    answers = generate(load_model(directory / "model0"), transform, asked, max_new_tokens=5)
    records = []
    for number, (turns, answer) in enumerate(zip(asked, answers, strict=True)):
        truth = answer.text.strip() if number % 2 else f"other {number}"
        turns = [*turns, {"role": "assistant", "content": truth}]
        records.append(
            {"id": f"q{number}", "messages": turns, "kind": ["odd", "even"][number % 2 == 0]}
        )
    (directory / f"{BAD}.png").unlink()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "test.jsonl").write_text(lines)
    return directory


def test_scores_groups_and_comparison(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (directory / "test.jsonl", "--max-new-tokens", 5, "--by", "kind")
    metrics = ("--metrics", "exact_match,edit_similarity")
    assert (
        called("evaluate", directory / "model1", *data, *metrics, "--output", tmp_path / "b") == 1
    )
    more = ("--against", tmp_path / "b", "--output", tmp_path / "a")
    capsys.readouterr()
    assert called("evaluate", directory / "model0", *data, *metrics, *more) == 1
    output = capsys.readouterr()
    first_table = output.out.partition(" kind ")[0]
    assert "edit_similarity" in first_table
    assert f"Not answered: 1\n  sample 'q{BAD}'" in output.err

    report = json.loads((tmp_path / "a" / "scores.json").read_text())
    assert (report["num_answers"], report["num_errors"]) == (11, 1)
    found = report["metrics"]["exact_match"]
    assert found["total"] == pytest.approx(5 / 11)
    assert 0 <= found["low"] < 5 / 11 < found["high"] <= 1
    groups = report["groups"]["kind"]
    totals = {kind: group["metrics"]["exact_match"]["total"] for kind, group in groups.items()}
    assert totals == {"even": 0.0, "odd": 1.0}
    assert groups["odd"]["num_answers"] == 5
    compared = report["comparison"]["metrics"]["exact_match"]
    assert (compared["other_total"], compared["difference"]) == (0.0, pytest.approx(5 / 11))
    assert report["comparison"]["num_answers"] == 11
    first = report["samples"][1]
    assert first["other_scores"]["exact_match"] == 0.0
    assert first["other_answer"] != first["answer"]
    assert first["question"] == "No. 1?"
    assert first["scores"]["exact_match"] == 1.0
    assert first["answer"].strip() == first["truths"][0]
    assert report["samples"][BAD]["error"].startswith(f"sample 'q{BAD}'")

    with (tmp_path / "a" / "scores.csv").open(newline="") as file:
        table = [*csv.DictReader(file)]
    assert [row["kind"] for row in table[:2]] == ["even", "odd"]
    assert [row["exact_match"] for row in table[:2]] == ["0.0", "1.0"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *("answers.jsonl", "scores.json", "scores.csv", "settings.json", "evaluation.html")
    }
    asked = (directory / "model0", *data, "--metrics", "box_iou", "--output", tmp_path / "a")
    assert called("evaluate", *asked) == 2
    assert "no answer of the data has boxes, which box_iou needs" in capsys.readouterr().err


def test_answers_that_are_there_are_scored_without_the_model(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    how = ("evaluate", directory / "model0", directory / "test.jsonl", "--output", tmp_path)
    assert called(*how, "--metrics", "anls", "--max-new-tokens", 5) == 1
    answers = read(tmp_path / "answers.jsonl")
    monkeypatch.setattr("torchtune_vl.generation.load_model", None)
    assert called(*how, "--metrics", "exact_match", "--max-new-tokens", 5) == 1
    assert [*json.loads((tmp_path / "scores.json").read_text())["metrics"]] == ["exact_match"]
    assert read(tmp_path / "answers.jsonl") == answers
    assert called(*how, "--metrics", "exact_match", "--max-new-tokens", 6) == 2
    assert "which differs in max_new_tokens" in capsys.readouterr().err


def test_the_answers_are_those_of_generate(directory: Path, tmp_path: Path) -> None:
    how = (directory / "model0", directory / "test.jsonl", "--max-new-tokens", 5)
    assert called("generate", *how, "--output", tmp_path / "answers.jsonl") == 1
    called("evaluate", *how, "--metrics", "exact_match", "--output", tmp_path / "scores")
    assert read(tmp_path / "answers.jsonl") == read(tmp_path / "scores" / "answers.jsonl")


def test_boxes_are_compared_in_pixels_of_the_file(directory: Path, tmp_path: Path) -> None:
    """An image that is enlarged: boxes of answers are of what the model sees."""
    Image.new("RGB", (50, 100)).save(tmp_path / "small.png")
    box = {"bbox_2d": [10, 20, 30, 80], "label": "cat"}
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "small.png"}]},
        {"role": "assistant", "content": [{"type": "boxes", "boxes": [box]}]},
    ]
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    transform = transform_from_pretrained(directory / "model0")
    dataset = open_dataset(transform, [str(tmp_path / "test.jsonl")])
    sample = dataset.read(0)
    truth = transform.answer_of(sample)
    assert transform.read_boxes(truth) == [{"bbox_2d": [11, 22, 34, 90], "label": "cat"}]
    half = truth.replace("90", "56")
    records = [{"sample": 0, "id": 0, "answer": half, "ended": "stop token", "truth": truth}]
    report = evaluate(
        records, Sources([dataset], ["data"]), transform, metrics_of(["box_iou", "box_map"])
    )
    (found,) = report["samples"]
    assert found["truth_boxes"][0]["bbox_2d"] == pytest.approx(box["bbox_2d"], abs=0.5)
    (_, top, _, bottom), (_, _, _, lower) = (
        entries[0]["bbox_2d"] for entries in (found["boxes"], found["truth_boxes"])
    )
    assert bottom == 56 * 100 / 112
    expected = (bottom - top) / (lower - top)
    assert report["metrics"]["box_iou"]["total"] == pytest.approx(expected)


def test_several_right_answers_and_choices(directory: Path, tmp_path: Path) -> None:
    records = [
        {"question": "Which?", "answers": ["cat", "cat", "kitten"]},
        {"question": "Which?", "choices": ["cat", "dog"], "answer": 1},
    ]
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    transform = transform_from_pretrained(directory / "model0")
    dataset = open_dataset(transform, [str(tmp_path / "vqa.jsonl")])
    assert dataset.read(0)["references"] == ["cat", "cat", "kitten"]
    assert dataset.read(1)["choices"] == ["cat", "dog"]
    asked = dataset.read(1)
    answers = [
        {"sample": 0, "id": 0, "answer": "kitten", "ended": "length", "truth": "cat"},
        {
            "sample": 1,
            "id": 1,
            "answer": "B. dog",
            "ended": "length",
            "truth": transform.answer_of(asked),
        },
    ]
    exact = evaluate(answers, Sources([dataset], ["data"]), transform, metrics_of(["exact_match"]))
    assert [s["scores"]["exact_match"] for s in exact["samples"]] == [1.0, 0.0]
    chosen = evaluate(answers[1:], Sources([dataset], ["data"]), transform, metrics_of(["choice"]))
    assert chosen["metrics"]["choice"]["total"] == 1.0


def write_choices(path: Path, directory: Path) -> list[dict[str, Any]]:
    """Questions about images, whose right choices are written as letters and as texts."""
    texts = ["a dog", "a dog and a cat", "cat", "10", "1"]
    records = []
    for number in range(7):
        choices = texts[number % 3 :][: 2 + number % 2]
        record = {"id": f"q{number}", "question": f"Which, {number}?", "choices": choices}
        record["answer"] = ["A", choices[0], 1][number % 3]
        if number % 2:
            record["image"] = str(directory / f"{number + 6}.png")
        records.append(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def logprobs_of(records: list[dict[str, Any]]) -> list[Any]:
    return [pytest.approx(record["choice_logprobs"], abs=1e-4) for record in records]


@pytest.mark.slow
def test_choices_by_likelihood_killed_and_given_again(directory: Path, tmp_path: Path) -> None:
    records = write_choices(tmp_path / "vqa.jsonl", directory)
    asked = (directory / "model0", tmp_path / "vqa.jsonl", "--max-new-tokens", 2)
    asked = (*asked, "--metrics", "choice_likelihood,choice_likelihood_norm,choice")
    more = ("--against", tmp_path / "other", "--output", tmp_path / "whole")
    other = (directory / "model1", *asked[1:])
    assert called("evaluate", *other, "--output", tmp_path / "other") == 0
    assert called("evaluate", *asked, *more) == 0
    answers = read(tmp_path / "whole" / "answers.jsonl")
    for record, answer in zip(records, answers, strict=True):
        letters = ["A", "B", "C"][: len(record["choices"])]
        is_text = record["answer"] in record["choices"]
        assert [*answer["choice_logprobs"]] == (record["choices"] if is_text else letters)
        assert all(logprob < 0 for logprob in answer["choice_logprobs"].values())

    report = json.loads((tmp_path / "whole" / "scores.json").read_text())
    with (tmp_path / "whole" / "scores.csv").open(newline="") as file:
        table = [*csv.DictReader(file)]
    for sample, answer, row in zip(report["samples"], answers, table, strict=True):
        logprobs = answer["choice_logprobs"]
        assert sample["choice_logprobs"] == logprobs == json.loads(row["choice_logprobs"])
        assert sample["other_choice_logprobs"].keys() == logprobs.keys()
        right = max(logprobs, key=logprobs.get) == answer["truth"]
        assert sample["scores"]["choice_likelihood"] == right
    assert {sample["scores"]["choice_likelihood"] for sample in report["samples"]} == {0, 1}

    # As if it had been killed in the middle of its fourth line
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "settings.json").write_bytes((tmp_path / "whole" / "settings.json").read_bytes())
    header = json.dumps({"unfinished": json.loads((cut / "settings.json").read_text())})
    lines = [header, *map(json.dumps, answers[:4])]
    (cut / "answers.jsonl.unfinished-0").write_text("\n".join(lines)[:-9])
    how = [sys.executable, "-m", "torchtune_vl.cli", "evaluate", *map(str, asked)]
    how += ["--output", str(cut), "--processes", "2"]
    done = subprocess.run(how, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = read(cut / "answers.jsonl")
    assert [r["answer"] for r in resumed] == [r["answer"] for r in answers]
    assert [r["choice_logprobs"] for r in resumed] == logprobs_of(answers)
    assert resumed[:3] == answers[:3]  # which were there


def test_truths_that_are_no_choice(directory: Path) -> None:
    transform = transform_from_pretrained(directory / "model0")

    def choices(truth: str, *texts: str) -> list[str]:
        return [*choices_of({"choices": texts}, truth, transform)]

    assert choices("B", "cat", "dog") == ["A", "B"]
    assert choices("dog", "cat", "dog", "cat") == ["cat", "dog"]
    assert choices("B", "B", "A") == ["A", "B"]  # as letters
    assert choices("B", "B", "x", "A") == ["A", "B", "C"]
    assert choices("caf\u00e9", "cafe\u0301", "tea") == ["caf\u00e9", "tea"]  # as it is tokenized
    assert (
        choices("C", "cat", "dog") == choices("b", "cat", "dog") == choices("B. dog", "dog") == []
    )
    assert choices("A") == [*choices_of({}, "A", transform)] == []


def test_answers_without_likelihoods(directory: Path, tmp_path: Path) -> None:
    transform = transform_from_pretrained(directory / "model0")
    write_choices(tmp_path / "vqa.jsonl", directory)
    dataset = Sources([open_dataset(transform, [str(tmp_path / "vqa.jsonl")])], ["data"])
    record = {"sample": 0, "id": "q0", "answer": "B", "ended": "length", "truth": "B. dog"}
    metrics = metrics_of(["choice_likelihood"])
    with pytest.raises(
        ValueError, match=r"'q0' has no log-probabilities of its choices, .*'B. dog'"
    ):
        evaluate([record], dataset, transform, metrics)
    record |= {"truth": "B", "choice_logprobs": {"A": -2.0, "B": -1.0}}
    assert evaluate([record], dataset, transform, metrics)["samples"][0]["scores"] == {
        "choice_likelihood": 1.0
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--metrics", "exact_match"), "give DATA, or --config"),
        (("x.jsonl", "--metrics", "exact"), "there is no metric 'exact'"),
        (("x.jsonl", "--metrics", "anls", "--against", "."), "no directory of an evaluation"),
        (("x.jsonl", "--metrics", "choice"), "sample 0 has no choices, which choice needs"),
        (
            ("x.jsonl", "--metrics", "choice_likelihood"),
            "no choices, which choice_likelihood needs",
        ),
        (("x.jsonl", "--metrics", "box_iou"), "no image that boxes could be of"),
        (("x.jsonl", "--metrics", "anls", "--by", "categroy"), "no record has a column 'categroy'"),
        (("x.jsonl", "--metrics", "anls", "--output", "strange"), "says of which model"),
    ],
)
def test_what_does_not_fit(
    directory: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    Path("x.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "answers.jsonl").touch()
    how = ("--output", "scores", "--max-new-tokens", 2)
    assert called("evaluate", directory / "model0", *how, *arguments) == 2
    assert said in capsys.readouterr().err


def test_the_truth_is_the_last_answer_whatever_carries_loss(directory: Path) -> None:
    transform = transform_from_pretrained(directory / "model0")
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "second", "weight": 0},
    ]
    assert transform.answer_of({"messages": turns}) == "second"
    assert transform.training_on("last").answer_of({"messages": turns[:2]}) == "first"
    assert transform.answer_of({"messages": turns[:3]}) == ""


def test_answers_to_other_questions_are_not_compared(
    directory: Path, tmp_path: Path, capsys: Any
) -> None:
    for name, text in (("a", "Hello"), ("b", "Goodbye")):
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    how = ("--metrics", "anls", "--max-new-tokens", 2)
    for name, more, status in (("a", (), 0), ("b", ("--against", tmp_path / "scores_a"), 2)):
        data, output = tmp_path / f"{name}.jsonl", ("--output", tmp_path / f"scores_{name}")
        assert called("evaluate", directory / "model0", data, *how, *output, *more) == status
    assert "has answers to other questions" in capsys.readouterr().err
