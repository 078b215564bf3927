"""Serves exports with vLLM on a CPU, beside our answers, and converts them for llama.cpp.

Run as ``make test-serving`` (some sixty minutes on two cores), or of some of the families as
``make test-serving FAMILY=qwen3_vl``: it installs vLLM in an environment of its own. Checkpoints
are tiny and random, written by ``tune-vl run``, ``export`` and ``merge``;
what is compared is what ``tune-vl validate --server`` compares, for 50 conversations made here
beside the built-in ones. It prints the table of docs/serving.md as Markdown, and ends with status 1
if a case is not as expected.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from quickstart.checkpoint import CONFIG, QWEN3_VL_CONFIG, write_tiny_checkpoint
from tests.finetune_runs import NARROW_QWEN3_VL_MOE, command, run, write_config
from tests.gguf_files import check, fetch_llama_cpp
from tests.videos import NTSC, Clip, write_clip, x264
from torchtune_vl.chat._chat_template import without_marks
from torchtune_vl.models import qwen3_vl
from torchtune_vl.validation import ServerComparison, read_conversations
from torchtune_vl.validation._compare import Comparison
from torchtune_vl.validation._compare_server import ROWS, compare_server
from torchtune_vl.validation._ours_and_reference import Ours, Reference

NEW_TOKENS = 32
PORT = 8471
_STARTS_WITHIN = 300
# Of tokens of a medium, too: by default that is the most of an image, which may be small
_BUDGET = ("--max-num-batched-tokens", "8192")
# It ends when it encodes images and videos in one step
_TOWER = "--enable-tower-connector-lora"
# Those of the server, which finds no GPU and no network
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
# A video of 30 seconds is more than 4,000 tokens
_CONFIG = {**CONFIG, "max_position_embeddings": 8192}
QWEN2_VL_CONFIG = {
    **_CONFIG,
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vision_config": {
        "depth": 3,
        "embed_dim": 128,
        "hidden_act": "quick_gelu",
        "hidden_size": CONFIG["hidden_size"],
        "in_chans": 3,
        "mlp_ratio": 2,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}
QWEN3_VL_TEXT = {**QWEN3_VL_CONFIG["text_config"], "max_position_embeddings": 8192}
QWEN3_VL = {**QWEN3_VL_CONFIG, "text_config": QWEN3_VL_TEXT}
QWEN3_VL_UNTIED = {
    **QWEN3_VL,
    "text_config": {**QWEN3_VL_TEXT, "tie_word_embeddings": False},
    "tie_word_embeddings": False,
}
QWEN3_VL_MOE = {
    **QWEN3_VL_UNTIED,
    "architectures": NARROW_QWEN3_VL_MOE["architectures"],
    "model_type": "qwen3_vl_moe",
    "text_config": {
        **QWEN3_VL_UNTIED["text_config"],
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
# Sides that are odd, less than a patch, or 190 times the other; and modes of images
_SIZES = [(28, 28), (1, 1), (29, 57), (13, 1300), (1900, 10), (333, 517), (640, 480), (1001, 77)]
_MODES = ["RGB", "L", "P", "CMYK", "1", "I;16", "LA", "RGBA"]
_WORDS = ["What", "how many", "red", "数字", "größer", "👍", "is left of", "the 3rd", "?"]
_LORA = {
    "model.lora_rank": 8,
    "model.lora_alpha": 64,
    "model.apply_lora_to_mlp": True,
    "optimizer.lr": 2e-2,
}
_EVERYWHERE = {
    "model.lora_attn_modules": ["q_proj", "k_proj", "v_proj", "qkv", "output_proj"],
    "model.encoder_trainable": "lora",
    "model.fusion_trainable": "lora",
}


@dataclass(frozen=True)
class Case:
    """What is served.

    Args:
        name: as the table has it.
        checkpoint: directory that the server and we read.
        serve: further arguments of the server.
        adapter: directory of an adapter on it.
        dtype: of both.
        differs: whether answers are known to differ.
        questions: file of the conversations.
        builtin: whether the built-in ones are asked, too.
    """

    name: str
    checkpoint: Path
    serve: Sequence[str] = ()
    adapter: Path | None = None
    dtype: str = "float32"
    differs: bool = False
    questions: str = "questions.json"
    builtin: bool = True


def main() -> None:
    """Make the checkpoints, serve each, and print the table."""
    # Not resolved: the link is what makes it the environment's. Servers run elsewhere
    python, vocabulary = str(Path(sys.argv[1]).absolute()), Path(sys.argv[2])
    families = sys.argv[3:] or [*CASES]
    with TemporaryDirectory(prefix="serving-") as folder:
        root = Path(folder)
        write_questions(root)
        failed = []
        print(f"vLLM {served_version(python)}, transformers {version('transformers')}\n")
        print("| export | prompts | answers | of these | largest difference of a log-probability |")
        print("|---|---|---|---|---|")
        for case in chain.from_iterable(CASES[family](root, vocabulary) for family in families):
            with serving(python, case, root / "server.log"):
                compare_them = compare if case.builtin else compare_given
                rows = compare_them(case, root / case.questions, root / "report.md")
            equal = {
                name: f"{total - fails} of {total}" for name, (total, fails, _) in rows.items()
            }
            row = [
                case.name,
                equal["served prompts"],
                equal["served answers"],
                rows["served answers"][2],
            ]
            print(f"| {' | '.join(row)} | {rows['served logprobs'][2]} |", flush=True)
            if any(fails for _, fails, _ in rows.values()) != case.differs:
                failed.append(case.name)
                print((root / "report.md").read_text("utf-8"), file=sys.stderr)
        print("\n| converted to GGUF | tensors equal |\n|---|---|")
        sources = fetch_llama_cpp(vocabulary.parent / "llama.cpp")
        for name in chain.from_iterable(CONVERTED[family] for family in families):
            (config,) = (root / name).glob("**/config.json")
            problems, number = check(config.parent, sources, root)
            print(f"| {name} | {number - len(problems)} of {number} |", flush=True)
            failed += problems
    if failed:
        sys.exit(f"not as expected: {', '.join(failed)}")


def qwen2_5_vl_cases(root: Path, vocabulary: Path) -> Iterator[Case]:
    """Train and export, and tell what is to be served: of Qwen2.5-VL and Qwen2-VL."""
    full = train(root, "full", base(root / "base", vocabulary))
    yield Case("full", full)
    videos = "videos of 8 to 30 frames a second"
    yield Case(f"full, {videos}", full, differs=True, questions="videos.json")
    command("export", str(full), str(root / "bfloat16"), "--dtype", "bfloat16")
    yield Case("bfloat16 weights", root / "bfloat16")
    command("export", str(full), str(root / "shards"), "--max-shard-size", "5MB")
    assert len([*(root / "shards").glob("*.safetensors")]) > 2
    yield Case("in shards", root / "shards")
    # Answers of random weights are as good as equally likely; of these they are not
    learned = train(root, "learned", full, epochs=20, max_steps=60)
    command("export", str(learned), str(root / "learned_bfloat16"), "--dtype", "bfloat16")
    bfloat16 = "bfloat16 weights, computed in bfloat16"
    yield Case(bfloat16, root / "learned_bfloat16", dtype="bfloat16")
    untied = base(root / "untied_base", vocabulary, {**_CONFIG, "tie_word_embeddings": False})
    yield Case("output layer of its own", train(root, "untied", untied))
    limits = {"tokenizer.max_pixels": 50_000, "tokenizer.video_max_pixels": 110_000}
    yield Case("limits of images and videos", train(root, "limits", full, **limits))
    qwen2_vl = base(root / "qwen2_vl_base", vocabulary, QWEN2_VL_CONFIG)
    yield Case("Qwen2-VL", train(root, "qwen2_vl", qwen2_vl, name="qwen2_vl/full"))

    decoder = train(root, "decoder", full, name="qwen2_5_vl/lora", **_LORA)
    enabled = ["--enable-lora", "--lora-modules", f"adapter={decoder / 'adapter'}"]
    yield Case("adapter of the decoder", full, enabled, decoder / "adapter")
    both = train(root, "both", full, name="qwen2_5_vl/lora", **_LORA, **_EVERYWHERE)
    yield Case("adapter of all parts, merged", both)
    enabled = ["--enable-lora", "--lora-modules", f"adapter={both / 'adapter'}"]
    name, stills = f"adapter of all parts, `{_TOWER}`, no videos", "images.json"
    yield Case(name, full, [*enabled, _TOWER], both / "adapter", questions=stills, builtin=False)
    yield Case("adapter of all parts without it", full, enabled, both / "adapter", differs=True)


def qwen3_vl_cases(root: Path, vocabulary: Path) -> Iterator[Case]:
    """Train and export, and tell what is to be served: of Qwen3-VL, dense and with experts."""
    asked: dict[str, Any] = {"questions": "qwen3_vl.json"}

    def trained(output: str, checkpoint: Path, kind: str = "full", **settings: Any) -> Path:
        return train(root, output, checkpoint, name=f"qwen3_vl/{kind}", **settings)

    full = trained("qwen3_vl", base(root / "qwen3_vl_base", vocabulary, QWEN3_VL))
    yield Case("Qwen3-VL", full, **asked)
    name = "Qwen3-VL, 5 videos, the template as published: two tokens more"
    published = root / "published.jinja"
    text = (files(qwen3_vl) / "instruct.jinja").read_text("utf-8")
    published.write_text(without_marks(text), encoding="utf-8")
    as_published = ["--chat-template", str(published)]
    yield Case(name, full, as_published, differs=True, questions="videos.json", builtin=False)
    untied = base(root / "qwen3_vl_untied_base", vocabulary, QWEN3_VL_UNTIED, "thinking")
    thinking = trained("qwen3_vl_untied", untied)
    asks_thinking: dict[str, Any] = {"questions": "thinking.json"}
    yield Case("Qwen3-VL, output layer of its own, Thinking", thinking, **asks_thinking)
    learned = trained("qwen3_vl_learned", full, epochs=20, max_steps=60)
    command("export", str(learned), str(root / "qwen3_vl_bfloat16"), "--dtype", "bfloat16")
    bfloat16 = "Qwen3-VL, bfloat16 weights, computed in bfloat16"
    yield Case(bfloat16, root / "qwen3_vl_bfloat16", dtype="bfloat16", **asked)
    limits = {
        "tokenizer.max_pixels": 50_000,
        "tokenizer.video_max_pixels": 110_000,
        "tokenizer.fps": 1.0,
    }
    frames = ["--media-io-kwargs", json.dumps({"video": {"fps": 1.0}})]
    limited = trained("qwen3_vl_limits", full, **limits)
    yield Case("Qwen3-VL, limits of images and videos", limited, frames, **asked)

    decoder = trained("qwen3_vl_decoder", full, "lora", **_LORA)
    enabled = ["--enable-lora", "--lora-modules", f"adapter={decoder / 'adapter'}"]
    yield Case("Qwen3-VL, adapter of the decoder", full, enabled, decoder / "adapter", **asked)
    both = trained("qwen3_vl_both", full, "lora", **_LORA, **_EVERYWHERE)
    yield Case("Qwen3-VL, adapter of all parts, merged", both, **asked)
    enabled = ["--enable-lora", "--lora-modules", f"adapter={both / 'adapter'}"]
    name = f"Qwen3-VL, adapter of all parts, `{_TOWER}`, no videos"
    stills: dict[str, Any] = {"questions": "images.json", "builtin": False}
    yield Case(name, full, [*enabled, _TOWER], both / "adapter", **stills)
    without = "Qwen3-VL, adapter of all parts without it"
    yield Case(without, full, enabled, both / "adapter", differs=True, **stills)

    moe = base(root / "qwen3_vl_moe_base", vocabulary, QWEN3_VL_MOE)
    experts = train(root, "qwen3_vl_moe", moe, name="qwen3_vl_moe/full")
    yield Case("Qwen3-VL MoE", experts, **asked)


CASES: dict[str, Callable[[Path, Path], Iterator[Case]]] = {
    "qwen2_5_vl": qwen2_5_vl_cases,
    "qwen3_vl": qwen3_vl_cases,
}
# For llama.cpp
CONVERTED = {
    "qwen2_5_vl": ("full", "bfloat16", "shards", "untied", "qwen2_vl"),
    "qwen3_vl": ("qwen3_vl", "qwen3_vl_untied", "qwen3_vl_bfloat16", "qwen3_vl_moe"),
}


def base(
    directory: Path,
    vocabulary: Path,
    config: Mapping[str, Any] = _CONFIG,
    template: str | None = None,
) -> Path:
    """Write a checkpoint whose answers depend on all that is asked."""
    write_tiny_checkpoint(directory, vocabulary, config=config)
    if template:
        published = (files(qwen3_vl) / f"{template}.jinja").read_text("utf-8")
        content = {"chat_template": without_marks(published)}
        (directory / "chat_template.json").write_text(json.dumps(content), encoding="utf-8")
    path = directory / "model.safetensors"
    weights = load_file(path)
    larger = {n: t * 3 if t.ndim > 1 and "embed" not in n else t for n, t in weights.items()}
    save_file(larger, path, metadata={"format": "pt"})
    return directory


def train(
    root: Path, output: str, checkpoint: Path, name: str = "qwen2_5_vl/full", **settings: Any
) -> Path:
    """Train a checkpoint a little with a shipped config, and return what was exported."""
    settings = {
        "dataset.data_files": str(root / "train.json"),
        "checkpoint_dir": str(checkpoint),
        "rows.max_tokens": 1024,
        "epochs": 1,
        "max_steps": 4,
        **settings,
    }
    rate = settings.pop("optimizer.lr", 1e-3)
    settings["optimizer"] = {"_component_": "torch.optim.AdamW", "lr": rate}
    run(write_config(root, root / output, settings, name))
    (exported,) = (root / output).glob("epoch_*")
    return exported


def write_questions(root: Path) -> None:
    """Write 50 conversations, some about videos of other rates, and short ones to train on."""
    rng = np.random.default_rng(0)

    def image(size: tuple[int, int], mode: str = "RGB", turned: bool = False) -> dict[str, str]:
        path = root / f"{len([*root.glob('*.*')])}.{'jpg' if mode == 'CMYK' or turned else 'png'}"
        pixels = rng.integers(0, 256, (size[1], size[0], 4), np.uint8)
        drawn = Image.fromarray(pixels, "RGBA")
        if mode == "I;16":
            drawn = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        elif mode not in ("RGBA", "LA"):
            drawn = drawn.convert("RGB").convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6 if turned else 1
        drawn.convert(mode).save(path, exif=exif)
        return {"type": "image", "image": path.name}

    def video(rate: Any, size: tuple[int, int]) -> dict[str, str]:
        path = root / f"{len([*root.glob('*.*')])}.mp4"
        write_clip(
            path, Clip("mp4", rate=rate, frames=round(30 * rate), size=size, options=x264(""))
        )
        return {"type": "video", "video": path.name}

    def text() -> dict[str, str]:
        return {"type": "text", "text": " ".join(rng.choice(_WORDS, 8))}

    asked = [[image(size), text()] for size in _SIZES]
    asked += [[image((200 + 9 * i, 150), mode), text()] for i, mode in enumerate(_MODES)]
    asked += [[image((300, 100), turned=True), text()], [text(), image((100, 300))]]
    asked += [[*(image((60 + 40 * i, 90 * j)) for j in (1, 2, 3)), text()] for i in range(6)]
    asked += [[image((80, 80)), text(), image((500, 40)), text()] for _ in range(4)]
    asked += [[video(rate, size), text()] for rate, size in ((1, (64, 96)), (2, (120, 90)))]
    asked += [[video(2, size), text()] for size in ((96, 64), (200, 64), (480, 270))]
    asked += [[image((90, 70)), video(1, (64, 64)), text()]]
    asked += [[text()] for _ in range(6)]
    conversations = [[{"role": "user", "content": content}] for content in asked]
    for i in range(50 - len(conversations)):
        turns = [{"role": "system", "content": "Answer briefly."}] if i % 2 else []
        for turn in range(2 + i % 2):
            shown = [image((50 + 30 * i, 60 + 50 * turn))] if (i + turn) % 3 else []
            turns += [{"role": "user", "content": [*shown, text()]}]
            turns += [{"role": "assistant", "content": "Two of them."}]
        conversations.append(turns[:-1])
    assert len(conversations) == 50
    (root / "questions.json").write_text(json.dumps([{"messages": t} for t in conversations]))
    # Of these vLLM takes other frames than qwen-vl-utils
    moving = [[video(rate, (96, 64)), text()] for rate in (8, 12, 24, NTSC, 30)]
    is_still = [t for t in conversations if '"video"' not in json.dumps(t)]
    (root / "images.json").write_text(json.dumps([{"messages": turns} for turns in is_still]))
    videos = [{"messages": [{"role": "user", "content": content}]} for content in moving]
    (root / "videos.json").write_text(json.dumps(videos))
    short = [
        [
            {"role": "user", "content": [image((56, 84)), text()]},
            {"role": "assistant", "content": answer},
        ]
        for answer in ("Two of them.", "Red, left of the third.", "größer 数字 👍") * 10
    ]
    (root / "train.json").write_text(json.dumps([{"messages": turns} for turns in short]))
    # Of Qwen3-VL, with videos of other rates among them, whose frames are the same
    conversations += ([{"role": "user", "content": content}] for content in moving)
    for name, reasons in (("qwen3_vl.json", False), ("thinking.json", True)):
        rows = [{"messages": turns} for turns in conversations] + with_tools(image, text, reasons)
        (root / name).write_text(json.dumps(rows))


def with_tools(
    image: Callable[[tuple[int, int]], dict[str, str]],
    text: Callable[[], dict[str, str]],
    reasons: bool,
) -> list[dict[str, Any]]:
    """Make conversations with functions, whose answers are texts and images, and reasonings."""
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"where": "größer"}}}]
    asked = {"role": "user", "content": [image((90, 60)), text()]}
    thought = {"reasoning_content": "It is\nred?"} if reasons else {}
    called = {"role": "assistant", "content": "", "tool_calls": calls, **thought}
    told = {"role": "tool", "content": '{"red": 3}'}
    shown = {"role": "tool", "content": [image((70, 110)), text()]}
    turns = [[asked], [asked, called, told], [asked, called, shown, told]]
    turns += [[asked, {"role": "assistant", "content": "Two.", **thought}, asked, called, told]]
    tools = [{"type": "function", "function": function}]
    return [{"messages": some, "tools": tools} for some in turns]


@contextmanager
def serving(python: str, case: Case, log: Path) -> Iterator[None]:
    """Serve a case while the block runs."""
    line = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(case.checkpoint)]
    line += ["--dtype", case.dtype, "--port", str(PORT), "--served-model-name", "base"]
    line += ["--enforce-eager", "--max-model-len", "8192", *_BUDGET, *case.serve]
    environment = {**os.environ, **_ENVIRONMENT}
    with log.open("w") as file:
        server = subprocess.Popen(
            line, cwd=log.parent, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            wait_for(server, log)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for(server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until it answers; ``SystemExit`` with its messages if it ends or takes too long."""
    end = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    sys.exit(f"the server did not start:\n{log.read_text()[-4000:]}")


def compare(case: Case, questions: Path, report: Path) -> dict[str, tuple[int, int, str]]:
    """Compare by the real command; returns inputs, those that fail, and the difference of rows."""
    options = ["--server", f"http://127.0.0.1:{PORT}", "--max-new-tokens", str(NEW_TOKENS)]
    options += ["--conversations", str(questions), "--dtype", case.dtype]
    if case.adapter is not None:
        options += ["--adapter", str(case.adapter), "--served-model", "adapter"]
    line = [sys.executable, "-m", "torchtune_vl.cli", "validate", str(case.checkpoint), *options]
    done = subprocess.run([*line, "--markdown", str(report)], capture_output=True, text=True)
    if done.returncode not in (0, 1) or not report.exists():
        sys.exit(f"{' '.join(line)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    text = report.read_text("utf-8")
    rows = {}
    for name, inputs, figure in re.findall(r"\| (served \w+) \| ([\d,]+) \|[^|]*\|([^|]*)\|", text):
        fails = re.search(rf"## {name}: ([\d,]+) of", text)
        rows[name] = int(inputs), int(fails[1]) if fails else 0, figure.split(",")[0].strip()
    if rows.keys() != {*ROWS}:
        sys.exit(f"{case.name}: not answered, or not by both sides:\n{text[-4000:]}")
    return rows


def compare_given(case: Case, questions: Path, report: Path) -> dict[str, tuple[int, int, str]]:
    """Compare the conversations of a file alone; as :func:`compare` otherwise."""
    run = Comparison(Ours(case.checkpoint), Reference(case.checkpoint))
    served = "adapter" if case.adapter else "base"
    how = ServerComparison(f"http://127.0.0.1:{PORT}", served, case.adapter, NEW_TOKENS)
    compare_server(run, read_conversations(questions), how, getattr(torch, case.dtype))
    rows = {name: run.rows[name] for name in ROWS}
    report.write_text("\n".join(map(str, rows.values())))
    return {
        name: (len(row.cases), len(row.failed), row.figure.split(",")[0])
        for name, row in rows.items()
    }


def served_version(python: str) -> str:
    """The release of vLLM's build for CPUs."""
    asks = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return subprocess.check_output([python, "-c", asks], text=True).strip()


if __name__ == "__main__":
    main()
