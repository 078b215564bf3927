"""The formats that records have: which columns, and which messages these make."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from torchtune_vl.files._json import from_json_text
from torchtune_vl.media._errors import shortened

Values = Mapping[str, Any]
KEYS_OF_MEDIA = ("image", "images", "video", "videos")
# What a record of every format may have beside its own columns
_COMMON = ("id", "system", *KEYS_OF_MEDIA, "tools", "objects")
# Those who speak in LLaVA's, LLaMA-Factory's and Qwen's files
_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant"}
_ROLES |= {"function_call": "assistant", "observation": "tool"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Format(NamedTuple):
    """Which columns a record has, and a function that makes messages of their values.

    ``needed`` are groups of columns, of each of which a record has at least one, ``others`` those
    that it may have. Tags and items without a source are the places of media in the messages.
    """

    messages: Callable[[Values], list[Any]]
    needed: tuple[tuple[str, ...], ...]
    others: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """All columns that it reads, its own first."""
        own = (*(column for group in self.needed for column in group), *self.others)
        return [*dict.fromkeys((*own, *_COMMON))]

    def lacks(self, columns: Collection[str]) -> list[str]:
        """Name what it needs and what is not among columns, alternatives joined by "or"."""
        return [" or ".join(group) for group in self.needed if not {*group} & {*columns}]


def names_of_columns(columns: Collection[str], column_map: Mapping[str, str]) -> dict[str, str]:
    """Find how a record calls columns; one whose own name is another's now, it does not have."""
    taken = {*column_map.values()}
    names = {column: column_map.get(column, column) for column in columns}
    return {c: name for c, name in names.items() if c in column_map or name not in taken}


def recognised(columns: Collection[str], column_map: Mapping[str, str]) -> str:
    """Find the one format that the columns of a record or a table fit.

    A record with messages or conversations may have any other column. ``ValueError`` if columns fit
    no format or several, or have a chosen and a rejected answer.
    """
    names = names_of_columns(COLUMNS, column_map)
    present = {column for column, name in names.items() if name in columns}
    fitting = [name for name, each in FORMATS.items() if not each.lacks(present)]
    have = f"the records have {shortened(', '.join(map(repr, sorted(columns))))}"
    if "chosen" in fitting:
        raise ValueError(
            f"{have}, which are pairs of answers: read them by torchtune_vl.datasets."
            "preference_pairs, or set format='chosen' to train on the chosen answers alone"
        )
    if "messages" in fitting or len(fitting) == 1:
        return "messages" if "messages" in fitting else fitting[0]
    if fitting:
        raise ValueError(f"{have}, which fit the formats {', '.join(fitting)}: set format=...")
    known = "; ".join(f"{name}: {', '.join(each.lacks(()))}" for name, each in FORMATS.items())
    raise ValueError(f"{have}, which fit no format: name columns by column_map ({known})")


def _chat(values: Values) -> list[Any]:
    column = "conversations" if values.get("messages") is None else "messages"
    messages = from_json_text(values[column], column)
    if not isinstance(messages, list):
        raise ValueError(f"its {column} are {shortened(repr(messages))}, expected a list")
    return [*(messages if column == "messages" else map(_read_turn, messages))]


def _read_turn(turn: Any) -> dict[str, Any]:
    """A message of ShareGPT's turn."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise ValueError(f"{turn!r} is no turn such as {{'from': 'human', 'value': ...}}")
    speaker, text = turn.get("from"), turn["value"]
    if speaker not in _ROLES:
        raise ValueError(f"a turn is from {speaker!r}; known are {', '.join(_ROLES)}")
    # Such as what says whether it carries loss
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message["role"] = _ROLES[speaker]
    if speaker == "function_call":
        calls = from_json_text(text, f"the function call {text!r}")
        return {**message, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {**message, "content": text}


def _alpaca(values: Values) -> list[Any]:
    return [*_alpaca_prompt(values), _says("assistant", _text(values, "output"))]


def _alpaca_prompt(values: Values) -> list[Any]:
    history = from_json_text(values.get("history"), "history") or []
    is_list = isinstance(history, list)
    if not is_list or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        problem = f"its history is {shortened(repr(history))}"
        raise ValueError(f"{problem}, expected a list of [instruction, output]")
    question = _text(values, "instruction")
    if values.get("input"):
        question += "\n" + _text(values, "input")
    earlier = [(_says("user", asked), _says("assistant", said)) for asked, said in history]
    return [*(message for pair in earlier for message in pair), _says("user", question)]


def _prompt_and_completion(values: Values) -> list[Any]:
    prompt = _as_messages(values["prompt"], "user")
    return [*map(_without_loss, prompt), *_as_messages(values["completion"], "assistant")]


def _vqa(values: Values) -> list[Any]:
    question = _text(values, "question")
    answer = _most_frequent(_one_of(values, "answer", "answers"))
    if choices := _one_of(values, "choices", "options"):
        are_texts = isinstance(choices, list) and all(isinstance(each, str) for each in choices)
        if not are_texts or len(choices) > len(_LETTERS):
            problem = f"its choices are {shortened(repr(choices))}"
            raise ValueError(f"{problem}, expected a list of at most {len(_LETTERS)} texts")
        lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
        question, answer = "\n".join([question, *lines]), _among(choices, answer)
    return [_says("user", question), _says("assistant", _checked_text(answer, "answer"))]


def references(values: Values) -> dict[str, list[str]]:
    """What an answer is compared with, if a record has more than one: ``references``, ``choices``.

    Of columns that :func:`_vqa` has read.
    """
    answers = _one_of(values, "answer", "answers")
    if choices := _one_of(values, "choices", "options"):
        return {"choices": choices}
    return {"references": _texts_of(answers)} if isinstance(answers, list) else {}


def _most_frequent(answers: Any) -> Any:
    """The answer itself, or of a list the most frequent one."""
    if not isinstance(answers, list):
        return answers
    (answer, _), *_ = Counter(_texts_of(answers)).most_common(1)
    return answer


def _texts_of(answers: list[Any]) -> list[str]:
    """The texts of a list of answers, or of objects with an answer."""
    if not answers:
        raise ValueError("its list of answers is empty: give one, or remove the record")
    texts = (each.get("answer") if isinstance(each, Mapping) else each for each in answers)
    return [_checked_text(text, "answer") for text in texts]


def _among(choices: list[str], answer: Any) -> Any:
    """An answer to choices as the letter of the one whose index, from 0, or whose letter it is."""
    letters = _LETTERS[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return letters[answer]
    is_letter = isinstance(answer, str) and len(answer) == 1 and answer in letters
    is_other = is_letter and answer in choices and choices[letters.index(answer)] != answer
    if is_other or not (is_letter or answer in choices):
        expected = "the index, the letter or the text of one of them, and no two of these"
        raise ValueError(f"its answer to the choices {choices} is {answer!r}, expected {expected}")
    return answer


def _caption(values: Values) -> list[Any]:
    text = _checked_text(_one_of(values, "caption", "text"), "caption")
    return [_says("user", values["prompt"]), _says("assistant", text)]


def _coco(values: Values) -> list[Any]:
    boxes = {"type": "boxes", "boxes": values["annotations"]}
    return [_says("user", values["prompt"]), _says("assistant", [boxes])]


def _answer_of_pair(answer: str) -> Callable[[Values], list[Any]]:
    def messages(values: Values) -> list[Any]:
        chosen, rejected = (
            _as_messages(values[column], "assistant") for column in ("chosen", "rejected")
        )
        same = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        shared = [message for message, _ in same]
        if shared in (chosen, rejected):
            raise ValueError("chosen and rejected do not differ: correct one or remove the record")
        prompt = _prompt_of_pair(values)
        if shared and prompt and prompt not in (shared, shared[-1:]):
            raise ValueError("chosen and rejected begin with something else than the prompt")
        of_answer = chosen if answer == "chosen" else rejected
        return [*map(_without_loss, shared or prompt), *of_answer[len(shared) :]]

    return messages


def _prompt_of_pair(values: Values) -> list[Any]:
    if values.get("prompt") is not None:
        return _as_messages(values["prompt"], "user")
    if values.get("messages") is not None or values.get("conversations") is not None:
        return _chat(values)
    return _alpaca_prompt(values) if values.get("instruction") is not None else []


def _as_messages(value: Any, role: str) -> list[Any]:
    """Messages or turns, one or a list of them, or a text of a role."""
    if isinstance(value, str):
        return [_says(role, value)]
    messages = value if isinstance(value, list) else [value]
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{shortened(repr(value))} is neither a text nor a list of messages")
    return [_read_turn(message) if "from" in message else message for message in messages]


def _without_loss(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "weight": 0} if message.get("role") == "assistant" else message


def _says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _text(values: Values, column: str) -> str:
    return _checked_text(values[column], column)


def _checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"its {what} is {shortened(repr(value))}, expected a text")
    return value


def _one_of(values: Values, column: str, other: str) -> Any:
    """The value of one of two columns that mean the same."""
    given = [values[name] for name in (column, other) if values.get(name) is not None]
    if len(given) == 2:
        remedy = f"choose by column_map, such as {{{column!r}: {other!r}}}"
        raise ValueError(f"it has both {column!r} and {other!r}: {remedy}")
    return given[0] if given else None


COCO = "coco"
_PAIR = (("chosen",), ("rejected",))
_PROMPTS = ("prompt", "messages", "conversations", "instruction", "input", "history")
FORMATS = {
    "messages": Format(_chat, (("messages", "conversations"),)),
    "alpaca": Format(_alpaca, (("instruction",), ("output",)), ("input", "history")),
    "prompt_completion": Format(_prompt_and_completion, (("prompt",), ("completion",))),
    "vqa": Format(_vqa, (("question",), ("answer", "answers")), ("choices", "options")),
    "caption": Format(_caption, (("caption", "text"), KEYS_OF_MEDIA)),
    # A record of CocoRecords; a file has the same keys
    COCO: Format(_coco, (("images",), ("annotations",))),
    "chosen": Format(_answer_of_pair("chosen"), _PAIR, _PROMPTS),
    "rejected": Format(_answer_of_pair("rejected"), _PAIR, _PROMPTS),
}
# Whose question is the dataset's prompt
ASKED = ("caption", COCO)
COLUMNS = tuple(dict.fromkeys(c for each in FORMATS.values() for c in each.columns))
