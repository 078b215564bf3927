"""Answers to many questions, in a file that goes on where it was stopped."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Protocol

from torchtune_vl.chat import ChatTransform
from torchtune_vl.files._directory import new_file, open_locked
from torchtune_vl.generation._decoding import Prompt, Rules, check_room, decode
from torchtune_vl.generation._generate import BATCH_SIZE, ahead
from torchtune_vl.media._errors import refusing
from torchtune_vl.modules.vision import VisionLanguageModel

Record = dict[str, Any]


class Questions(Protocol):
    """Conversations by number, with what is to be answered at their ends."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, index: int) -> Mapping[str, Any]:
        """Return one as a transform takes it, or raise ``ValueError``."""


def question_of(sample: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A sample without the answer at its end, and whether it had one."""
    messages = [*sample["messages"]]
    last = messages[-1] if messages else None
    role = last.get("role") if isinstance(last, Mapping) else getattr(last, "role", None)
    had_answer = role == "assistant"
    return {**sample, "messages": messages[:-1] if had_answer else messages}, had_answer


def choices_of(
    sample: Mapping[str, Any], truth: str, transform: ChatTransform
) -> dict[str, list[int]]:
    """The choices of a sample as answers, with their ids: letters or texts, as its truth is one.

    There are none if it is neither, or if answers begin with a reasoning, which choices have not.
    """
    texts = [] if transform.writes_reasoning else sample.get("choices") or []
    for answers in (ascii_uppercase[: len(texts)], texts):
        ids = map(transform.answer_tokens, answers)
        found = {transform.decode(each[:-1]): each for each in ids}  # as truths are written
        if truth in found:
            return found
    return {}


class AnswerFile:
    """JSON Lines of answers, whole under its name, or unfinished in parts beside it.

    Each line is of one answer: ``sample``, the number of its conversation, and ``id``;
    ``answer_number``, from 0; ``answer``, its text; ``ended``, by what; ``num_tokens``; ``logprob``
    of all of them; and ``truth``, the answer that the conversation had, if it had one. If that is
    the letter or the text of one of its ``choices``, ``choice_logprobs`` has the logarithm of the
    probability of each, by letter or by text, as an answer with its end. Of a conversation that
    cannot be answered, ``error`` says why.

    Args:
        path: of the file. ``ValueError`` if it is there.
        about: what the answers depend on. Parts that are there are of the same, or else it is a
            ``ValueError``.
        num_answers: to each conversation.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], num_answers: int = 1) -> None:
        if path.exists():
            raise ValueError(f"{path} is there, and finished: remove it, or name another file")
        self.path = path
        self.num_answers = num_answers
        self._header = json.loads(json.dumps({"unfinished": about}))

    def records(self) -> dict[tuple[int, int], Record]:
        """What is there already, by number of the conversation and of the answer to it."""
        found: dict[tuple[int, int], Record] = {}
        for part in self._parts():
            header, *records = _lines(part) or [self._header]
            if header != self._header:
                differing = _differences(header.get("unfinished", {}), self._header["unfinished"])
                raise ValueError(
                    f"{part} has unfinished answers of another command, which differs in "
                    f"{', '.join(differing)}: remove it, or name another file"
                )
            found |= {(r["sample"], r.get("answer_number", 0)): r for r in records}
        return found

    def unanswered(self, count: int) -> list[int]:
        """The numbers of conversations, of so many, to which not all answers are there."""
        counts: dict[int, int] = {}
        for (sample, _), record in self.records().items():
            counts[sample] = counts.get(sample, 0) + (self.num_answers if "error" in record else 1)
        return [number for number in range(count) if counts.get(number, 0) < self.num_answers]

    @contextmanager
    def part(self, rank: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Yield what adds a line to the part of a process, to which it alone adds."""
        self.records()  # of another command: nothing is added beside them
        path = self.path.with_name(f"{self.path.name}.unfinished-{rank}")
        locked = path.with_name(f".{path.name}.lock")
        with open_locked(locked), path.open("a+b") as file:
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)  # what a crash left half

            def add(record: Mapping[str, Any]) -> None:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()

            try:
                if not end:
                    add(self._header)
                yield add
            finally:
                locked.unlink()

    def finish(self, count: int) -> list[Record]:
        """Give the file its name, with all answers in the order of so many conversations.

        ``ValueError`` if some are not answered.
        """
        found = self.records()
        if left := self.unanswered(count):
            raise ValueError(f"{self.path}: {len(left)} questions are not answered: go on with it")
        records = [found[key] for key in sorted(found)]
        with new_file(self.path) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        for part in self._parts():
            part.unlink()
        return records

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{escape(self.path.name)}.unfinished-*"))


def answer_questions(
    model: VisionLanguageModel,
    transform: ChatTransform,
    questions: Questions,
    numbers: Iterable[int],
    rules: Rules,
    batch_size: int = BATCH_SIZE,
    any_of: Callable[[bool], bool] = bool,
) -> Iterator[Record]:
    """Answer questions of some numbers, and yield the lines of :class:`AnswerFile` as they end.

    ``any_of`` is that of :func:`decode`.
    """
    about: dict[int, Record] = {}
    choices: dict[int, list[str]] = {}
    bad: list[Record] = []

    def prepared(number: int) -> tuple[int, Prompt | None]:
        record: Record = {"sample": number, "id": number}
        try:
            sample = questions.read(number)
            record["id"] = sample.get("id", number)
            question, had_answer = question_of(sample)
            prompt = transform.to_answer(question)
            if had_answer:
                record["truth"] = transform.answer_of(sample)
                if answers := choices_of(sample, record["truth"], transform):
                    choices[number] = [*answers]
                    prompt["choices"] = [*answers.values()]
            check_room(model, prompt, rules.max_new_tokens)
            about[number] = record
            return number, prompt
        except ValueError as error:
            bad.append({**record, "error": str(error)})
            return number, None

    made = ahead(prepared, numbers, batch_size)
    prompts = ((number, prompt) for number, prompt in made if prompt is not None)
    answered = decode(model, transform, prompts, rules, batch_size, any_of)
    for number, answer_number, answer in answered:
        while bad:
            yield bad.pop()
        record = {
            **{key: about[number][key] for key in ("sample", "id")},
            "answer_number": answer_number,
            "answer": answer.text,
            "ended": answer.ended,
            "num_tokens": len(answer.tokens),
            "logprob": sum(answer.logprobs),
            **about[number],
        }
        if number in choices:
            pairs = zip(choices[number], answer.choice_logprobs, strict=True)
            record["choice_logprobs"] = dict(pairs)
        yield record
    yield from bad


def _lines(path: Path) -> list[Record]:
    *whole, _ = path.read_bytes().split(b"\n")  # behind the last line break is what a crash left
    lines = []
    for number, line in enumerate(whole):
        with refusing(f"{path}: line {number + 1} is damaged", "remove it, or the file"):
            lines.append(json.loads(line))
    return lines


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} ({a.get(key)!r} and {b.get(key)!r})"
        for key in [*a, *(b.keys() - a.keys())]
        if a.get(key) != b.get(key)
    ]
