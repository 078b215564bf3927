"""Chat templates: two published ones, followed by code, and any other, run by Jinja."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from torchtune_vl.chat._messages import ROLES
from torchtune_vl.chat._vocabulary import STRUCTURAL_TOKENS

_FILES = files(__package__)
# That of the published checkpoints for conversations without tools, as they ship it (Apache-2.0)
CHAT_TEMPLATE = (_FILES / "chat_template.jinja").read_text(encoding="utf-8")
# Of conversations without tools, and with: `chat_template` of the published tokenizer_config.json
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
# Of the second one's text
_SHA256_WITH_TOOLS = "55b2f4a26ac9ee719330a61a0c39d9e538b0e9322212f048326318cff4f8674a"
# What that one has around the schemas of tools
_TOOLS = (_FILES / "tools_prompt.txt").read_text(encoding="utf-8").split("{schemas}")


def is_followed(template: str) -> bool:
    """Whether code follows a template: that without tools or that with tools, as published."""
    text = template.strip()
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return text == CHAT_TEMPLATE or digest == _SHA256_WITH_TOOLS


def call_text(call: Mapping[str, Any]) -> str:
    """A function's call in an answer. As published: its name is not escaped."""
    arguments = as_json(call["arguments"])
    return f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>'


def tools_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """What stands behind the system prompt when there are tools."""
    schemas = "".join(f"\n{as_json(tool)}" for tool in tools)
    return schemas.join(_TOOLS) if tools else ""


def as_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """What transformers' templates know as ``tojson``, with ``indent`` and so on."""
    try:
        text = json.dumps(value, ensure_ascii=False, **layout)
    except (TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"a tool or call cannot be written as JSON: {error}") from error
    # Not those that stand for other things, which would not be found again
    return _OTHERS.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


# Noncharacters of Unicode stand for other things while a template is run: for the beginning and the
# end of what the loss is taken of, or the beginning of an answer that is left out of it, for
# structural tokens within texts of messages, and for the end of a text that another may complete to
# one
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
_OTHERS = re.compile("[^\x00-\x7f\ufdd0-\ufdef]")
START, END, LEFT_OUT = "\ufdd0", "\ufdd1", "\ufddf"
# How a template writes these three itself, in its texts
_ESCAPES = (r"\ufdd0", r"\ufdd1", r"\ufddf")
_STAND_INS = {0xFDD2 + number: token for number, token in enumerate(STRUCTURAL_TOKENS)}
_SEAM = 0xFDE0
_STOOD_FOR = {**_STAND_INS, _SEAM: ""}
_BEGUN = re.compile(r"<(\|\w*\|?)?\Z")


def has_noncharacter(text: str) -> bool:
    """Whether a text has one of those that stand for other things."""
    return not text.isascii() and bool(_NONCHARACTERS.search(text))


def without_stand_ins(text: str) -> str:
    """A text with the structural tokens that characters stand for."""
    # Most have none, and translating takes fifteen times as long as searching
    return text.translate(_STOOD_FOR) if has_noncharacter(text) else text


def without_marks(template: str) -> str:
    """A template without the escapes of these characters that were put into its texts."""
    for escape in _ESCAPES:
        template = template.replace(escape, "")
    return template


class _Generation(Extension):
    """``{% generation %}``, which says what the loss is taken of."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (START, END))
        return [start, nodes.Scope(body).set_lineno(line), end]


def render(template: str, hides_structure: bool, **variables: Any) -> str:
    """Run a chat template as transformers' ``apply_chat_template`` does.

    The text has ``START`` and ``END`` around what stands between ``{% generation %}`` and
    ``{% endgeneration %}``, and, if ``hides_structure``, noncharacters for the structural tokens in
    variables, see :func:`without_stand_ins`. ``ValueError`` if the template fails.
    """
    try:
        return _compile(template).render(_hide(variables, hides_structure))
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template fails: {error}") from error


def _hide(value: Any, hides_structure: bool) -> Any:
    """A copy of JSON-like data, whose texts may hold none of the noncharacters."""
    if isinstance(value, str):
        if has_noncharacter(value):
            raise ValueError("a text has a noncharacter of Unicode (U+FDD0 to U+FDEF): remove it")
        if hides_structure and "<" in value:  # as all of them begin
            for stand_in, token in _STAND_INS.items():
                value = value.replace(token, chr(stand_in))
            return value + chr(_SEAM) if _BEGUN.search(value) else value
        return value
    if isinstance(value, list | tuple):
        return [_hide(entry, hides_structure) for entry in value]
    if isinstance(value, dict) or isinstance(value, Mapping):  # noqa: SIM101 (ten times as fast)
        return {_hide(k, hides_structure): _hide(v, hides_structure) for k, v in value.items()}
    return value


@lru_cache(maxsize=8)
def known_roles(template: str | None) -> frozenset[str]:
    """The roles of the published templates (None), and every text constant of another one.

    One that it does not name it treats like any other, an answer's perhaps as one without loss.
    """
    try:
        parsed = _ENVIRONMENT.parse(template or "")
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template fails: {error}") from error
    constants = (node.value for node in parsed.find_all(nodes.Const))
    return frozenset((*ROLES, *(value for value in constants if isinstance(value, str))))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which a message's keys are found without the errors that cost most."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is not dict or hasattr(dict, attribute):
            return super().getattr(obj, attribute)
        return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)


_ENVIRONMENT = _Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
)
_ENVIRONMENT.filters["tojson"] = as_json
_ENVIRONMENT.globals["raise_exception"] = _raise
_ENVIRONMENT.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    compiled = _ENVIRONMENT.from_string(template)
    # Copied for each text, of which a chain of dicts would take as long as all else
    compiled.globals = {**compiled.globals}
    return compiled
