"""Answers beside transformers' generate, and its rules of sampling beside ours."""

import json
import random
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quickstart.checkpoint import CONFIG, CONFIGS, PREPROCESSOR_CONFIG, write_tiny_checkpoint
from tests.conversations import TEXTS, images_of
from tests.parity.figures import record
from tests.parity.test_mixed_media_parity import LIMITS, VIDEO_SIZE
from tests.positions import IMAGE, VIDEO
from tests.reference import QWEN2_VL, QWEN3_VL, family_prefix, reference_config, reference_model
from torchtune_vl.generation import Rules, Sampling, decode, generate
from torchtune_vl.models import model_from_pretrained, transform_from_pretrained
from torchtune_vl.validation._compare_models import continue_behind_media

TINY = "quickstart's architecture"
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
KINDS = ("text", "one image", "three images", "video", "mixed", "turns")
Chat = list[dict[str, Any]]


def conversation(kind: str, seed: int) -> Chat:
    """A conversation that ends with a question."""
    rng = random.Random(f"{kind} {seed}")
    numbers = np.random.default_rng(rng.randrange(2**32))

    def text() -> dict[str, Any]:
        return {"type": "text", "text": "".join(rng.choices(TEXTS[:-1], k=rng.randint(1, 3)))}

    def image() -> dict[str, Any]:
        shape = rng.randint(20, 200), rng.randint(20, 200), 3
        return {
            "type": "image",
            "image": Image.fromarray(numbers.integers(0, 256, shape, np.uint8)),
        }

    def video() -> dict[str, Any]:
        shape = rng.randint(2, 13), rng.randint(20, 120), rng.randint(20, 120), 3
        frames = numbers.integers(0, 256, shape, np.uint8)
        return {"type": "video", "video": frames, "sample_fps": rng.choice((0.5, 1, 2.0, 7.5, 30))}

    contents: dict[str, list[list[dict[str, Any]]]] = {
        "text": [[text()]],
        "one image": [[image(), text()]],
        "three images": [[image(), image(), text(), image(), text()]],
        "video": [[video(), text()]],
        "mixed": [[text(), video(), image(), text(), image(), video(), text()]],
        "turns": [[image(), text()], [text()], [video(), text()], [text()], [text()]],
    }
    roles = ("user", "assistant")
    return [
        {"role": roles[number % 2], "content": content}
        for number, content in enumerate(contents[kind])
    ]


# The three random models and the one of the quickstart
SHAPES = ["head_dim_128", "grouped_untied", "ungrouped", QWEN2_VL, QWEN3_VL, TINY]
LEFT_OUT = {name: pytest.param(name, marks=pytest.mark.slow) for name in SHAPES[:3:2]}


@pytest.fixture(scope="module", params=[LEFT_OUT.get(name, name) for name in SHAPES])
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(shape: str, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory, vocabulary, config=CONFIGS.get(shape, CONFIG))
    if shape == QWEN2_VL:
        settings = {**PREPROCESSOR_CONFIG, "processor_class": "Qwen2VLProcessor"}
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    if shape != TINY:
        config = reference_config(shape, vocab_size=151936, **SPECIAL)
        reference_model(config).save_pretrained(directory)
    return directory


def limits_of(shape: str) -> dict[str, Any]:
    """What our transform is given beside the checkpoint's settings, which Qwen3-VL's are."""
    return {} if shape == QWEN3_VL else LIMITS


class Reference:
    """transformers' processor and model."""

    def __init__(self, directory: Path, shape: str) -> None:
        self.shape = shape
        self.processor = AutoProcessor.from_pretrained(directory)
        self.model = AutoModelForImageTextToText.from_pretrained(directory).eval()
        usual = self.model.model.get_rope_index

        def moved(input_ids: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            """Of a single prompt, and behind its media as the weights have learned it."""
            positions, _ = usual(input_ids, **inputs)
            kinds = inputs["mm_token_type_ids"][0]
            positions = continue_behind_media(positions[:, 0].T, kinds).T[:, None]
            return positions, positions.max()[None, None] + 1 - input_ids.shape[1]

        self.model.model.get_rope_index = moved

    def inputs(self, chat: Chat, answer: str = "") -> dict[str, Any]:
        items = [item for turn in chat for item in turn["content"]]
        videos = [item for item in items if item["type"] == "video"]
        media: dict[str, Any] = {"images": images_of(chat) or None}
        if videos:
            media["videos"] = [torch.from_numpy(v["video"]).permute(0, 3, 1, 2) for v in videos]
            size = {} if self.shape == QWEN3_VL else {"size": VIDEO_SIZE}
            media["videos_kwargs"] = {**size, "do_sample_frames": False}
            media["video_metadata"] = [
                {
                    "fps": video["sample_fps"],
                    "total_num_frames": len(video["video"]),
                    "frames_indices": list(range(len(video["video"]))),
                }
                for video in videos
            ]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True) + answer
        if self.shape == QWEN3_VL:  # whose steps have their own, which alone the weights have seen
            text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
        inputs = self.processor(text=[text], return_tensors="pt", **media)
        return {name: value for name, value in inputs.items() if name != "video_metadata"}

    def answer(self, chat: Chat, new_tokens: int) -> list[int]:
        inputs = self.inputs(chat)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        output = self.model.generate(**inputs, max_new_tokens=new_tokens, **settings)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def logprob(self, chat: Chat, answer: str) -> float:
        """Of an answer with its end, by one forward of prompt and answer, tokenized as one text."""
        length = self.inputs(chat)["input_ids"].shape[1]
        inputs = self.inputs(chat, answer + "<|im_end|>")
        ids = inputs["input_ids"][0, length:, None]
        logits = self.model(**inputs, logits_to_keep=len(ids) + 1).logits[0, :-1].double()
        return float(logits.log_softmax(-1).gather(1, ids).sum())


def compare_greedy(shape: str, checkpoint: Path, each: int, new_tokens: int) -> None:
    chats = [conversation(kind, seed) for seed in range(each) for kind in KINDS]
    reference = Reference(checkpoint, shape)
    expected = [reference.answer(chat, new_tokens) for chat in chats]
    del reference
    model = model_from_pretrained(checkpoint)
    transform = transform_from_pretrained(checkpoint, **limits_of(shape))
    transform.stop_tokens = []
    together = generate(model, transform, chats, max_new_tokens=new_tokens)
    assert [answer.tokens for answer in together] == expected
    for number, chat in enumerate(chats):
        (alone,) = generate(model, transform, [chat], max_new_tokens=new_tokens)
        assert alone.tokens == expected[number], number
    # A token of the middle of one ends all: some end early, and others take their place
    stop = expected[0][new_tokens // 2]
    transform.stop_tokens = [stop]
    ended = generate(model, transform, chats, max_new_tokens=new_tokens, batch_size=3)
    assert [answer.tokens for answer in ended] == [
        ids[: ids.index(stop) + 1] if stop in ids else ids for ids in expected
    ]
    record(f"{family_prefix(shape)}prompts: tokens of greedy answers", 3 * len(chats), 0)


def test_greedy_answers(shape: str, checkpoint: Path) -> None:
    compare_greedy(shape, checkpoint, each=1, new_tokens=12)


@pytest.mark.slow
def test_greedy_answers_of_120_prompts(shape: str, checkpoint: Path) -> None:
    compare_greedy(shape, checkpoint, each=20, new_tokens=64)


def begins_with_line_breaks(text: str) -> bool:
    """Whether its tokens are others behind the line break of the prompt."""
    return re.match(r"\s*[\r\n]", text) is not None


# Of which some begin others, as texts or in their tokens; blanks, and no text at all
CHOICES = ["A", "B", "1", "10", "a dog", "a dog and a cat", "", " dog", "dog\n", "  \t", "(b) 白猫"]
CHOICES += [text for text in TEXTS if text and not begins_with_line_breaks(text)]


@pytest.mark.slow
def test_likelihoods_of_choices(shape: str, checkpoint: Path) -> None:
    chats = [conversation(kind, seed) for seed in range(8) for kind in KINDS]
    rng = random.Random(8)
    choices = [rng.sample(CHOICES, rng.randint(2, 6)) for _ in chats]
    reference = Reference(checkpoint, shape)
    expected = [
        [reference.logprob(chat, text) for text in texts]
        for chat, texts in zip(chats, choices, strict=True)
    ]
    del reference
    model = model_from_pretrained(checkpoint)
    transform = transform_from_pretrained(checkpoint, **limits_of(shape))
    for number in range(0, len(chats), 7):
        choices[number] = []  # prompts without choices among the others
        expected[number] = []
    prompts = [transform.to_answer({"messages": chat}) for chat in chats]
    for prompt, texts in zip(prompts, choices, strict=True):
        if texts:
            prompt["choices"] = [transform.answer_tokens(text) for text in texts]
    for batch_size in (16, 3):
        answered = decode(model, transform, enumerate(prompts), Rules(1), batch_size)
        found = [answer.choice_logprobs for _, _, answer in sorted(answered, key=lambda a: a[0])]
        assert [*map(len, found)] == [*map(len, expected)]
        each = zip(chain(*found), chain(*expected), chain(*choices), strict=True)
        difference = max(
            abs(ours - theirs) / len(transform.answer_tokens(text)) for ours, theirs, text in each
        )
        assert difference < 5e-6  # of a token, as their sum has up to fifty
    what = f"{family_prefix(shape)}choices: log-probabilities as answers, per token"
    record(what, len([*chain(*expected)]), difference)


RULES = [
    {"temperature": 1.0},
    {"temperature": 0.3, "top_k": 7},
    {"temperature": 1.7, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_p": 0.001, "repetition_penalty": 1.05},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 10_000, "top_p": 1.0, "min_p": 1.0},
]


@pytest.mark.parametrize("rules", RULES, ids=[" ".join(rules) for rules in RULES])
def test_candidates_and_their_probabilities(rules: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    sampling = Sampling(**rules)
    for spread in (0.1, 1.0, 5.0, 30.0):
        logits = spread * torch.randn(16, 2000, generator=generator)
        ids = torch.randint(0, 2000, (16, 40), generator=generator)
        seen = torch.zeros(16, 2000, dtype=torch.bool).scatter(1, ids, True)
        processors = LogitsProcessorList()
        if "repetition_penalty" in rules:
            processors.append(RepetitionPenaltyLogitsProcessor(rules["repetition_penalty"]))
        processors.append(TemperatureLogitsWarper(rules["temperature"]))
        for name, warper in (
            ("top_k", TopKLogitsWarper),
            ("top_p", TopPLogitsWarper),
            ("min_p", MinPLogitsWarper),
        ):
            if name in rules:
                processors.append(warper(rules[name]))
        expected = processors(ids, logits.clone())
        scores = sampling.scores(logits, seen if "repetition_penalty" in rules else None)
        assert torch.equal(scores == -torch.inf, expected == -torch.inf)
        difference = float((scores.softmax(-1) - expected.softmax(-1)).abs().max())
        assert difference < 1e-6
        record("candidates and probabilities of what is drawn", len(logits), difference)
