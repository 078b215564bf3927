"""A server that answers conversations by OpenAI's protocol, such as vLLM, SGLang or llama.cpp."""

import http.client
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
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address: write it as http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._named = model

    @cached_property
    def model(self) -> str:
        """The name of the model; ``ValueError`` if the server does not list it."""
        names = [str(model["id"]) for model in _list_of(self._request("/v1/models"), "data")]
        if not names or self._named not in (None, *names):
            wanted = self._named or "model"
            raise ValueError(f"{self.url} serves no {wanted}, but {', '.join(names) or 'nothing'}")
        return self._named or names[0]

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
        (choice,) = _list_of(reply, "choices", 1)
        entries = (choice.get("logprobs") or {}).get("content")
        return Served(
            _ids(reply.get("prompt_token_ids")),
            (reply.get("usage") or {}).get("prompt_tokens"),
            _ids(choice.get("token_ids")) or _ids_of(entries),
            choice["message"].get("content") or "",
            _logprobs_of(entries),
        )

    def _request(self, path: str, content: Any = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            if not key.isprintable():  # an error of the library would show it
                raise ValueError("OPENAI_API_KEY has characters that no key has")
            headers["Authorization"] = f"Bearer {key}"
        data = None if content is None else json.dumps(content).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode("utf-8", "replace").split())
            raise ValueError(f"status {error.code}, {shortened(said)}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(
                f"{self.url} does not answer as OpenAI's servers do: {error}"
            ) from error


def _list_of(reply: Any, key: str, number: int | None = None) -> list[Any]:
    """Read a list of a reply; ``ValueError`` with what it has instead."""
    found = reply.get(key) if isinstance(reply, dict) else None
    if not isinstance(found, list) or (number is not None and len(found) != number):
        raise ValueError(f"the server's reply has no {key}: {shortened(json.dumps(reply))}")
    return found


def _ids(found: Any) -> list[int] | None:
    """Read ids; ``ValueError`` if they are none."""
    if found is None:
        return None
    if not all(isinstance(i, int) and i >= 0 for i in found):
        raise ValueError(f"the server tells ids that are none: {shortened(json.dumps(found))}")
    return list(found)


def _logprobs_of(entries: Sequence[dict[str, Any]] | None) -> list[float] | None:
    """Read log-probabilities, if all are told."""
    told = [entry.get("logprob") for entry in entries or ()]
    return (
        None if not told or None in told else [float(value) for value in told if value is not None]
    )


def _ids_of(entries: Sequence[dict[str, Any]] | None) -> list[int] | None:
    """Read the ids that are told with log-probabilities, as vLLM or llama.cpp tells them."""
    if not entries:
        return None
    if all("id" in entry for entry in entries):
        return _ids([entry["id"] for entry in entries])
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
        # As servers write it: of an empty text templates may make another line break
        written["content"] = content or None
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
