"""A server's answers beside ours: here one that answers with our own model, or not quite."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quickstart.checkpoint import CONFIG, write_tiny_checkpoint
from tests.finetune_runs import NARROW_QWEN3_VL
from tests.test_cli import status
from torchtune_vl.generation import generate, load_model
from torchtune_vl.models import transform_from_pretrained
from torchtune_vl.validation import Conversation, Row, ServerComparison, read_conversations
from torchtune_vl.validation._compare import Comparison
from torchtune_vl.validation._compare_server import ROWS, compare_server
from torchtune_vl.validation._inputs import builtin_inputs
from torchtune_vl.validation._ours_and_reference import Ours, Reference
from torchtune_vl.validation._server import Server, _message

Reply = dict[str, Any]
NEW_TOKENS = 6


class FakeServer:
    """Answers by OpenAI's protocol with our model, through ``change``, and keeps what was asked."""

    def __init__(self, directory: Path) -> None:
        self.model = load_model(directory, dtype=torch.float32)
        self.transform = transform_from_pretrained(directory, parse_special="all", alpha="white")
        self.change: Callable[[Reply, Reply], Any] = lambda reply, asked: reply
        self.asked: list[Reply] = []
        self.keys: set[str | None] = set()
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send({"data": [{"id": "tiny"}, {"id": "other"}]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.keys.add(self.headers["Authorization"])
                with lock:
                    fake.asked.append(asked)
                    try:
                        self.send(fake.change(fake.reply(asked), asked))
                    except ValueError as error:
                        self.send({"error": {"message": str(error)}}, 400)

            def send(self, content: Any, status: int = 200) -> None:
                self.send_response(status)
                self.end_headers()
                text = content if isinstance(content, str) else json.dumps(content)
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def reply(self, asked: Reply) -> Reply:
        def item(part: Reply) -> Reply:
            kind = part["type"].removesuffix("_url")
            return {
                "type": kind,
                kind: part["text"] if kind == "text" else part[f"{kind}_url"]["url"],
            }

        sample: Reply = {"messages": []}
        for message in asked["messages"]:
            content = message["content"]
            content = content if isinstance(content, str) else [*map(item, content)]
            sample["messages"].append({**message, "content": content})
        if "tools" in asked:
            assert asked["tool_choice"] == "none"
            sample["tools"] = asked["tools"]
        prompt = self.transform.to_answer(sample)["tokens"]
        (answer,) = generate(
            self.model, self.transform, [sample], max_new_tokens=asked["max_tokens"]
        )
        entries = [
            {"token": f"token_id:{token}", "logprob": logprob}
            for token, logprob in zip(answer.tokens, answer.logprobs, strict=True)
        ]
        message = {"role": "assistant", "content": answer.text}
        choice = {"message": message, "token_ids": answer.tokens, "logprobs": {"content": entries}}
        usage = {"prompt_tokens": len(prompt)}
        return {"choices": [choice], "prompt_token_ids": prompt, "usage": usage}


@contextmanager
def serving(checkpoint: Path) -> Iterator[FakeServer]:
    fake = FakeServer(checkpoint)
    thread = threading.Thread(target=fake.http.serve_forever)
    thread.start()
    yield fake
    fake.http.shutdown()
    thread.join()
    fake.http.server_close()


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served")
    write_tiny_checkpoint(directory, vocabulary, config={**CONFIG, "num_hidden_layers": 2})
    return directory


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[FakeServer]:
    with serving(checkpoint) as fake:
        yield fake


@pytest.fixture
def fake(running: FakeServer) -> FakeServer:
    running.change, running.asked, running.keys = (lambda reply, asked: reply), [], set()
    return running


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    return builtin_inputs(tmp_path_factory.mktemp("builtin")).conversations


def served(checkpoint: Path, fake: FakeServer, chats: list[Conversation]) -> list[Row]:
    """The rows of the report, of prompts, answers and log-probabilities."""
    run = Comparison(Ours(checkpoint), Reference(checkpoint))
    how = ServerComparison(fake.url, max_new_tokens=NEW_TOKENS)
    compare_server(run, chats, how, torch.float32)
    return [run.rows[name] for name in ROWS]


def status_of(rows: list[Row]) -> list[str]:
    return [row.status for row in rows]


def test_the_same_model_answers_the_same(
    checkpoint: Path, fake: FakeServer, builtin: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    report = served(checkpoint, fake, builtin)
    prompts, answers, logprobs = report
    assert status_of(report) == ["pass"] * 3
    assert len(prompts.cases) == len(answers.cases) == len(logprobs.cases) == len(fake.asked)
    assert len(fake.asked) > 10
    assert prompts.compared > 2000
    assert answers.compared == logprobs.compared == NEW_TOKENS * len(fake.asked)
    # Written alone there, and here among others
    assert 0 < max(case.largest for case in logprobs.cases) < 1e-5
    assert fake.keys == {"Bearer abc"}
    # Against what a server takes from generation_config.json
    greedy = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
    assert all(asked | greedy == asked for asked in fake.asked)
    assert {asked["model"] for asked in fake.asked} == {"tiny"}
    assert all(asked["messages"][-1]["role"] != "assistant" for asked in fake.asked)
    kinds = [
        p["type"]
        for a in fake.asked
        for m in a["messages"]
        for p in m["content"]
        if isinstance(p, dict)
    ]
    assert {"image_url", "video_url", "text"} <= {*kinds}


def test_another_answer_fails(
    checkpoint: Path, fake: FakeServer, builtin: list[Conversation]
) -> None:
    def change(reply: Reply, asked: Reply) -> Reply:
        if len(fake.asked) == 3:
            reply["choices"][0]["token_ids"][4] = 17
        if len(fake.asked) == 5:
            reply["choices"][0]["logprobs"]["content"][2]["logprob"] -= 1e-3
        if len(fake.asked) == 7:
            reply["prompt_token_ids"].insert(5, 198)
        return reply

    fake.change = change
    report = served(checkpoint, fake, builtin)
    assert status_of(report) == ["fail"] * 3
    prompts, answers, logprobs = report
    assert [len(row.failed) for row in (prompts, answers, logprobs)] == [1, 1, 1]
    assert "first difference at 5: ours" in prompts.failed[0].detail
    assert "first difference at 4: ours" in answers.failed[0].detail
    assert "the server 17" in answers.failed[0].detail
    assert logprobs.failed[0].largest == pytest.approx(1e-3, rel=0.01)
    # Behind another token nothing is compared
    assert logprobs.compared == answers.compared - 2


def test_a_pair_of_tokens_around_a_video_is_told(
    vocabulary: Path, builtin: list[Conversation], tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path, vocabulary, config=NARROW_QWEN3_VL)
    start, end = "<|vision_start|>", "<|vision_end|>"

    def change(reply: Reply, asked: Reply) -> Reply:
        ids, token = reply["prompt_token_ids"], fake.transform.special_tokens
        if fake.transform.video_pad_id in ids:
            last = len(ids) - 1 - ids[::-1].index(token[end])
            ids.insert(last, token[end])
            ids.insert(ids.index(token[start]) - 6, token[start])  # before the time
            reply["choices"][0]["token_ids"][4] = 17
        return reply

    videos = [chat for chat in builtin if chat.name == "built-in video"]
    with serving(tmp_path) as fake:
        prompts, answers, _ = served(tmp_path, fake, videos)
        assert prompts.status == answers.status == "pass"
        assert not prompts.note
        assert not answers.note
        fake.change = change
        prompts, answers, _ = served(tmp_path, fake, videos)
    assert prompts.status == answers.status == "fail"
    assert "serve a chat template that has <|video_pad|> alone" in prompts.note
    assert not answers.note  # not of other frames


def test_a_call_without_a_text_is_sent_as_servers_send_it() -> None:
    call = {"function": {"name": "look", "arguments": {"at": 1}}}
    (sent,) = [_message({"role": "assistant", "content": "", "tool_calls": [call]})]
    assert sent["content"] is None
    assert sent["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": 1}'}
    for content in ("Look.", [{"type": "text", "text": "Look."}]):
        sent = _message({"role": "assistant", "content": content, "tool_calls": [call]})
        assert sent["content"] == content
    assert _message({"role": "assistant", "content": ""})["content"] == ""


def test_an_answer_as_likely_is_rounding(
    checkpoint: Path, fake: FakeServer, builtin: list[Conversation]
) -> None:
    # The output of two tokens is the same: which of them is the likeliest is a matter of rounding
    served(checkpoint, fake, builtin[:4])
    first = min(fake.asked, key=str)  # not the one that came first, which differs
    token = fake.reply(first)["choices"][0]["token_ids"][2]
    twin = 140_000  # in no conversation
    embeddings = fake.model.tok_embeddings.weight.data
    kept = embeddings[twin].clone()
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    original = {name: tensor.clone() for name, tensor in weights.items()}
    weights["model.embed_tokens.weight"][twin] = weights["model.embed_tokens.weight"][token]
    try:
        save_file(weights, path, metadata={"format": "pt"})
        embeddings[twin] = embeddings[token]

        def change(taken: int, reply: Reply, asked: Reply) -> Reply:
            ids = reply["choices"][0]["token_ids"]
            reply["choices"][0]["token_ids"] = [taken if i in (token, twin) else i for i in ids]
            return reply

        told = []
        for taken in (token, twin):  # of which ours takes one
            fake.change = partial(change, taken)
            _, answers, logprobs = served(checkpoint, fake, builtin[:4])
            assert answers.status == logprobs.status == "pass"
            told += [case.detail for case in answers.cases]
        assert any("as good as equal" in detail for detail in told)
    finally:
        embeddings[twin] = kept
        save_file(original, path, metadata={"format": "pt"})


def test_servers_that_tell_less(
    checkpoint: Path, fake: FakeServer, builtin: list[Conversation]
) -> None:
    def plain(reply: Reply, asked: Reply) -> Reply:
        (choice,) = reply["choices"]
        return {"choices": [{"message": choice["message"]}], "usage": reply["usage"]}

    fake.change = plain
    report = served(checkpoint, fake, builtin[:4])
    prompts, answers, logprobs = report
    assert status_of(report) == ["pass", "pass", "not compared"]
    assert prompts.compared == answers.compared == len(fake.asked)
    assert logprobs.skipped == "the server tells none of tokens that agree"

    def worse(reply: Reply, asked: Reply) -> Reply:
        if len(fake.asked) == 3:
            reply["choices"][0]["message"]["content"] += "."
            reply["usage"]["prompt_tokens"] += 1
        return plain(reply, asked)

    fake.asked, fake.change = [], worse
    assert status_of(served(checkpoint, fake, builtin[:4])) == ["fail", "fail", "not compared"]

    # As llama.cpp tells ids, and without the token that ended the answer
    def ids_with_logprobs(reply: Reply, asked: Reply) -> Reply:
        (choice,) = reply["choices"]
        entries = choice["logprobs"]["content"]
        told = [{**e, "id": int(e["token"][9:]), "token": "?"} for e in entries]
        choice = {"message": choice["message"], "logprobs": {"content": told}}
        return {"choices": [choice]}

    fake.change = ids_with_logprobs
    report = served(checkpoint, fake, builtin[:4])
    assert status_of(report)[1:] == ["pass", "pass"]
    assert report[1].compared == NEW_TOKENS * len(report[1].cases)
    assert report[0].skipped == "the server tells neither ids nor their number"


def test_what_a_server_refuses_is_told(
    checkpoint: Path, fake: FakeServer, builtin: list[Conversation]
) -> None:
    def change(reply: Reply, asked: Reply) -> Reply:
        if "video_url" in json.dumps(asked):
            raise ValueError("At most 0 video(s) may be provided")
        return reply

    fake.change = change
    report = served(checkpoint, fake, builtin)
    assert status_of(report) == ["fail", "pass", "pass"]
    failed = report[0].failed
    assert {case.name for case in failed} == {"built-in video", "built-in video between images"}
    assert failed[0].detail.startswith("Only the server refuses it. the server: status 400, ")
    assert "At most 0 video(s) may be provided" in failed[0].detail


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer as OpenAI's"),
        (["--server", "URL", "--served-model", "x"], "serves no x, but tiny, other"),
        (["--server", "URL", "--adapter", "x"], "give --served-model, too: what the server calls"),
        (["--adapter", "x"], "--served-model and --adapter say what a server has: give --server"),
    ],
)
def test_a_server_that_is_not_there(
    options: list[str],
    message: str,
    checkpoint: Path,
    fake: FakeServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [fake.url if option == "URL" else option for option in options]
    assert status("validate", checkpoint, *options) == 2
    assert message in capsys.readouterr().err


def test_the_command(
    checkpoint: Path,
    fake: FakeServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    page = tmp_path / "report.html"
    options = ["--server", f"{fake.url}/v1/", "--served-model", "other", "--max-new-tokens", "2"]
    assert status("validate", checkpoint, *options, "--html", page) == 0
    assert "served logprobs" in capsys.readouterr().out
    assert {(asked["model"], asked["max_tokens"]) for asked in fake.asked} == {("other", 2)}
    assert "served answers" in page.read_text()


def test_a_conversation_too_long_to_answer_is_told(
    checkpoint: Path, fake: FakeServer, tmp_path: Path
) -> None:
    asked = tmp_path / "asked.json"
    texts = ["A word. " * 2100, "Why?"]
    asked.write_text(json.dumps([[{"role": "user", "content": text}] for text in texts]))
    report = served(checkpoint, fake, read_conversations(asked))
    assert status_of(report) == ["pass"] * 3
    (case,) = [case for case in report[0].cases if case.refused]
    assert case.refused == "both"
    assert "exceed the model's max_seq_len of 4096" in case.detail


@pytest.mark.parametrize(
    ("change", "statuses"),
    [
        (lambda choice: choice.update(token_ids=choice["token_ids"][:2]), ["fail", "pass"]),
        (lambda choice: choice.update(token_ids=[*choice["token_ids"], 5]), ["fail", "pass"]),
        (lambda choice: choice.update(token_ids=[10**6] * 6), ["fail", "not compared"]),
        (
            lambda choice: choice.update(
                token_ids=None, logprobs={"content": []}, message={"content": "another"}
            ),
            ["fail", "not compared"],
        ),
        (
            lambda choice: choice["logprobs"]["content"][0].update(logprob=None),
            ["pass", "not compared"],
        ),
        (lambda choice: choice.update(token_ids=["a"]), ["not compared", "not compared"]),
        (lambda choice: choice.update(token_ids=[-1]), ["not compared", "not compared"]),
    ],
)
def test_odd_replies(
    change: Callable[[Any], None],
    statuses: list[str],
    checkpoint: Path,
    fake: FakeServer,
    builtin: list[Conversation],
) -> None:
    def changed(reply: Reply, asked: Reply) -> Reply:
        change(reply["choices"][0])
        return reply

    fake.change = changed
    assert status_of(served(checkpoint, fake, builtin[:1]))[1:] == statuses


@pytest.mark.parametrize("reply", [{"error": {"message": "overloaded"}}, [], {"choices": []}])
def test_replies_without_an_answer(
    reply: Any, checkpoint: Path, fake: FakeServer, builtin: list[Conversation]
) -> None:
    fake.change = lambda answered, asked: reply
    rows = served(checkpoint, fake, builtin[:1])
    assert status_of(rows) == ["fail", "not compared", "not compared"]
    assert "the server's reply has no choices: " + json.dumps(reply) in rows[0].failed[0].detail


@pytest.mark.parametrize(
    ("key", "url", "message"),
    [
        ("sk-secret\nX: 1", "URL", "OPENAI_API_KEY has characters that no key has"),
        ("", "", "'' is no address: write it as http://localhost:8000"),
        ("", "localhost:80", "'localhost:80' is no address"),
        ("", "http://localhost:port", "does not answer as OpenAI's servers do"),
    ],
)
def test_addresses_and_keys(
    key: str, url: str, message: str, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Server(fake.url if url == "URL" else url).model  # noqa: B018
    assert "secret" not in str(error.value)
