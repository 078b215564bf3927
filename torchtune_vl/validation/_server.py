"""A server that answers conversations by OpenAI's protocol, such as vLLM, SGLang or llama.cpp."""

import json
import mimetypes
import os
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torchtune_vl.media._errors import shortened
from torchtune_vl.validation._inputs import Conversation

# Seconds: a server may have queued others' requests
_PATIENCE = 600
# What servers say in place of a token's text where they were asked for its id
_TOKEN_ID = "token_id:"


@dataclass(frozen=True)
class Served:
    """A server's answer.

    Args:
        prompt: ids of the prompt that the server read, or None if it does not tell them.
        prompt_length: their number, or None if it does not tell that.
        tokens: ids of the answer, or None if it does not tell them.
        text: of the answer.
        logprobs: of each token of the answer, or None if it does not tell them.
    """

    prompt: list[int] | None
    prompt_length: int | None
    tokens: list[int] | None
    text: str
    logprobs: list[float] | None


class Server:
    """The address of a server, such as http://localhost:8000, and the model that is asked there.

    The model is the first that the server lists, unless one is named. The environment variable
    OPENAI_API_KEY is sent as the key, if it is set.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._named = model

    @cached_property
    def model(self) -> str:
        """The name of the model; ``ValueError`` if the server does not list it."""
        names = [str(model["id"]) for model in self._request("/v1/models")["data"]]
        name = self._named or next(iter(names), None)
        if name not in names:
            raise ValueError(f"{self.url} serves no {name}, but {', '.join(names) or 'nothing'}")
        return name

    def answer(self, conversation: Conversation, max_new_tokens: int) -> Served:
        """Let the server answer greedily; ``ValueError`` if it refuses."""
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [*map(_message, conversation.messages)],
            "max_tokens": max_new_tokens,
            "temperature": 0.0,
            "logprobs": True,
            # Against what a server takes from generation_config.json
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            # What vLLM is asked for ids by; others know it not
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": True,
        }
        if conversation.tools:
            request |= {"tools": conversation.tools, "tool_choice": "none"}
        reply = self._request("/v1/chat/completions", request)
        (choice,) = reply["choices"]
        entries = (choice.get("logprobs") or {}).get("content")
        return Served(
            reply.get("prompt_token_ids"),
            (reply.get("usage") or {}).get("prompt_tokens"),
            choice.get("token_ids") or _ids_of(entries),
            choice["message"].get("content") or "",
            None if entries is None else [entry["logprob"] for entry in entries],
        )

    def _request(self, path: str, content: Any = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode("utf-8", "replace").split())
            raise ValueError(f"status {error.code}, {shortened(said)}") from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.url} does not answer as OpenAI's servers do: {error}"
            ) from error


def _ids_of(entries: Sequence[dict[str, Any]] | None) -> list[int] | None:
    """Read the ids that are told with log-probabilities, as vLLM or llama.cpp tells them."""
    if entries is None:
        return None
    if all("id" in entry for entry in entries):
        return [int(entry["id"]) for entry in entries]
    told = [str(entry.get("token", "")) for entry in entries]
    if all(token.startswith(_TOKEN_ID) for token in told):
        return [int(token.removeprefix(_TOKEN_ID)) for token in told]
    return None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Write a message of transformers' format as OpenAI's protocol has it, with its files."""
    content = message["content"]
    if not isinstance(content, str):
        content = [_part(item) for item in content]
    written = {**message, "content": content}
    if message.get("tool_calls"):
        written["tool_calls"] = [_call(i, call) for i, call in enumerate(message["tool_calls"])]
    return written


def _part(item: dict[str, Any]) -> dict[str, Any]:
    kind = item["type"]
    if kind == "text":
        return item
    name = f"{kind}_url"
    return {"type": name, name: {"url": _data_url(kind, item[kind])}}


def _data_url(kind: str, source: str) -> str:
    if source.startswith("data:"):
        return source
    media_type = mimetypes.guess_type(source)[0] or f"{kind}/*"
    return f"data:{media_type};base64,{b64encode(Path(source).read_bytes()).decode()}"


def _call(number: int, call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    named = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id", f"call_{number}"), "type": "function", "function": named}
