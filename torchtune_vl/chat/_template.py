"""Turns to the text of a chat template, media in their places.

The two published templates are followed by code: that of conversations, and that of conversations
with tools (``chat_template`` of the published ``tokenizer_config.json``). Any other one is run by
Jinja.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import torch
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from torchtune_vl.chat._messages import ROLES, Kind

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
DEFAULT_SYSTEM_PROMPT_WITH_TOOLS = (
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
)
_TOOLS_HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_NAMES: dict[Kind, str] = {"image": "Picture", "video": "Video"}


class EncodedMedium(NamedTuple):
    """An image or video as the encoder takes it."""

    kind: Kind
    patches: torch.Tensor
    grid_thw: torch.Tensor
    num_tokens: int
    seconds_per_step: float = 1.0


Part = str | EncodedMedium


class EncodedTurn(NamedTuple):
    """A turn whose media are encoded and whose boxes are text."""

    role: str
    content: list[Part]
    masked: bool
    tool_calls: list[tuple[str, Any]]
    given: dict[str, Any]


class Block(NamedTuple):
    """What stands between ``<|im_start|>`` and ``<|im_end|>``: ``role``, line break, parts."""

    role: str
    parts: list[Part]
    masked: bool


def number_media(turns: Iterable[EncodedTurn]) -> list[EncodedTurn]:
    """Put "Picture 1: ", "Video 1: " and so on before media, as ``add_vision_id`` does."""
    counts = dict.fromkeys(_NAMES, 0)

    def numbered(content: Sequence[Part]) -> Iterator[Part]:
        for part in content:
            if isinstance(part, EncodedMedium):
                counts[part.kind] += 1
                yield f"{_NAMES[part.kind]} {counts[part.kind]}: "
            yield part

    return [turn._replace(content=list(numbered(turn.content))) for turn in turns]


def blocks_of(turns: Sequence[EncodedTurn], tools: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Apply the published template, that with tools if there are tools, calls or answers of tools.

    Args:
        turns: the conversation.
        tools: JSON schemas of functions.

    Returns:
        The blocks of the prompt.

    Raises:
        ValueError: if a tool cannot be rendered.
    """
    if tools or any(turn.tool_calls or turn.role == "tool" for turn in turns):
        return _blocks_with_tools(turns, tools)
    blocks = [Block(turn.role, turn.content, _carries_no_loss(turn)) for turn in turns]
    if turns[0].role != "system":
        blocks.insert(0, Block("system", [DEFAULT_SYSTEM_PROMPT], True))
    return blocks


def _blocks_with_tools(
    turns: Sequence[EncodedTurn], tools: Sequence[Mapping[str, Any]]
) -> list[Block]:
    if turns[0].role == "system":
        system, turns = turns[0].content, turns[1:]
    else:
        system = [DEFAULT_SYSTEM_PROMPT_WITH_TOOLS]
    if tools:
        schemas = "".join(f"\n{_json(tool)}" for tool in tools)
        system = [*system, f"{_TOOLS_HEAD}{schemas}{_TOOLS_TAIL}"]
    blocks = [Block("system", system, True)]
    previous = None
    for turn in turns:
        if turn.role == "tool":
            response = ["<tool_response>\n", *turn.content, "\n</tool_response>"]
            if previous == "tool":
                blocks[-1].parts.extend(["\n", *response])
            else:
                blocks.append(Block("user", response, True))
        else:
            blocks.append(Block(turn.role, _with_calls(turn), _carries_no_loss(turn)))
        previous = turn.role
    return blocks


def _with_calls(turn: EncodedTurn) -> list[Part]:
    parts = list(turn.content)
    if turn.role != "assistant":
        return parts
    for name, arguments in turn.tool_calls:
        # As published: the name is not escaped
        call = f'<tool_call>\n{{"name": "{name}", "arguments": {_json(arguments)}}}\n</tool_call>'
        parts.append(f"\n{call}" if any(parts) else call)
    return parts


def _carries_no_loss(turn: EncodedTurn) -> bool:
    return turn.masked or turn.role != "assistant"


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """What transformers' templates know as ``tojson``."""
    try:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
    except (TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"a tool or call cannot be written as JSON: {error}") from error


class TrainedText(NamedTuple):
    """A rendered prompt, and where in it stands what the loss is taken of."""

    text: str
    spans: list[tuple[int, int]]


# Noncharacters of Unicode: what stands for something else while a template is run
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_START, _END = _NONCHARACTERS[:2]
_RESERVED = re.compile(f"[{_NONCHARACTERS[0]}-{_NONCHARACTERS[-1]}]")


class _Generation(Extension):
    """``{% generation %}``, which says what the loss is taken of."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_START, _END))
        return [start, nodes.Scope(body).set_lineno(line), end]


def hide(value: Any, tokens: Sequence[str]) -> Any:
    """Put a noncharacter for each of these tokens in the texts of JSON-like data.

    Args:
        value: dicts, lists and texts.
        tokens: at most 30.

    Returns:
        A copy of it.

    Raises:
        ValueError: if a text has such a noncharacter already.
    """
    if isinstance(value, str):
        if _RESERVED.search(value):
            raise ValueError("a text has a noncharacter of Unicode (U+FDD0 to U+FDEF): remove it")
        for token, stand_in in zip(tokens, _NONCHARACTERS[2:], strict=False):
            value = value.replace(token, stand_in)
        return value
    if isinstance(value, Mapping):
        return {hide(k, tokens): hide(v, tokens) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [hide(v, tokens) for v in value]
    return value


def reveal(text: str, tokens: Sequence[str]) -> str:
    """Undo :func:`hide` in a rendered text."""
    for token, stand_in in zip(tokens, _NONCHARACTERS[2:], strict=False):
        text = text.replace(stand_in, token)
    return text


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    **variables: Any,
) -> TrainedText:
    """Run a chat template as transformers' ``apply_chat_template`` does.

    Args:
        template: Jinja source. What stands between ``{% generation %}`` and ``{% endgeneration %}``
            is what the loss is taken of.
        messages: what the template calls ``messages``.
        tools: what it calls ``tools``; None to it if there are none.
        add_generation_prompt: whether it is to end with the prompt for an answer.
        **variables: what else it may read.

    Returns:
        The text and the spans of its answers.

    Raises:
        ValueError: if the template is wrong, or refuses the conversation.
    """
    try:
        rendered = _compile(template).render(
            messages=messages,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template fails: {error}") from error
    text, spans, start = "", [], 0
    for piece in re.split(f"([{_START}{_END}])", rendered):
        if piece == _START:
            start = len(text)
        elif piece == _END:
            spans.append((start, len(text)))
        else:
            text += piece
    return TrainedText(text, spans)


@lru_cache(maxsize=8)
def known_roles(template: str | None) -> frozenset[str]:
    """Tell which roles a chat template knows.

    Args:
        template: Jinja source; None for the published ones.

    Returns:
        Those of the published templates, and every text constant of this one: a role that it does
        not name it treats like any other, an answer's perhaps as one without loss.

    Raises:
        ValueError: if the template is wrong.
    """
    if template is None:
        return frozenset(ROLES)
    try:
        parsed = _environment().parse(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template fails: {error}") from error
    constants = {node.value for node in parsed.find_all(nodes.Const)}
    return frozenset((*ROLES, *(value for value in constants if isinstance(value, str))))


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
