"""Captured steps, where a plain call stands for a graph: when they are captured, and answers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from quickstart.checkpoint import write_tiny_checkpoint
from tests.parity.test_generation_parity import conversation
from tests.parity.test_mixed_media_parity import LIMITS
from tests.reference import Conversation, reference_config
from tests.test_generation import Tokenizer
from torchtune_vl.chat import ChatTransform
from torchtune_vl.generation import Chat, Rules, Sampling, decode, generate, load_model
from torchtune_vl.generation import _decoding as decoding_module
from torchtune_vl.generation._captured import CapturedSteps, can_capture
from torchtune_vl.models import model_from_pretrained, transform_from_pretrained
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config
from torchtune_vl.modules import kv_cache
from torchtune_vl.modules.kv_cache import Cache, Prefill
from torchtune_vl.modules.vision import VisionLanguageModel

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def directory(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory, vocabulary)
    return directory


@pytest.fixture(scope="module")
def tiny(directory: Path) -> tuple[VisionLanguageModel, ChatTransform]:
    return load_model(directory), transform_from_pretrained(directory, **LIMITS)


class Captures:
    """What was captured, as (number of sequences, reach), and the replays of all."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.rooms: set[int] = set()
        self.replays = 0

    def capture(self, steps: CapturedSteps, rows: int, reach: int) -> Callable[[], None]:
        """A call that has to find everything where it was, as a graph would."""
        self.shapes.append((rows, reach))
        self.rooms.add(steps._cache.room)
        places = self._places(steps)

        def replay() -> None:
            assert self._places(steps) == places
            steps._run(rows, reach)
            assert self._places(steps) == places
            self.replays += 1

        return replay

    @staticmethod
    def _places(steps: CapturedSteps) -> list[int]:
        kept = [layer.kept for layer in steps._cache._layers.values()]
        return [x.data_ptr() for x in (*kept, steps._last_S3, steps._logits_SV)]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Steps on the CPU are captured; many reaches occur, and the cache grows often."""
    captures = Captures()
    monkeypatch.setattr(decoding_module, "can_capture", lambda *_: True)
    monkeypatch.setattr(CapturedSteps, "_capture", lambda steps, *at: captures.capture(steps, *at))
    monkeypatch.setattr(decoding_module, "_REACH", 8)
    monkeypatch.setattr(kv_cache, "_MORE", 8)
    return captures


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Calls without captures."""

    def call(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(decoding_module, "can_capture", lambda *_: False)
            return function()

    return call


@pytest.mark.parametrize("slots", [1, 5, 6])
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_answers_are_those_of_steps_that_are_not_captured(
    tmp_path: Path,
    captures: Captures,
    plainly: Callable[[Callable[[], Any]], Any],
    drawn: bool,
    slots: int,
) -> None:
    reference_config().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = qwen2_5_vl_from_config(tmp_path).eval()
    generator = torch.Generator().manual_seed(0)
    talks = [Conversation([(1, 4, 4)] * (n % 3), 3 + n**2) for n in range(9)]
    prompts = [talk.sample(generator) for talk in talks]
    sampling = Sampling(1.5, top_p=0.9, repetition_penalty=1.2) if drawn else Sampling()
    rules = Rules(40, sampling, num_answers=2 if drawn else 1)
    # Some answers end early, and others take their places
    tokenizer = Tokenizer(range(0, 600, 40))

    def answers() -> list[Any]:
        found = decode(model, tokenizer, enumerate(prompts), rules, slots)
        return sorted(found, key=lambda numbered: numbered[:2])

    rows = set()
    hook = model.register_forward_pre_hook(
        lambda module, args: rows.add(len(args[0])) if args[0].shape[1] == 1 else None
    )
    ours = answers()
    hook.remove()
    for (*numbers, a), (*others, b) in zip(ours, plainly(answers), strict=True):
        assert (numbers, a.tokens, a.ended) == (others, b.tokens, b.ended)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert len({len(answer.tokens) for *_, answer in ours}) > 3
    assert rows <= {1, 2, 4, slots}
    assert captures.replays > len(captures.shapes) > 2
    assert len(captures.rooms) > 1  # the cache grew


def test_turns_of_a_chat(
    tiny: tuple[VisionLanguageModel, ChatTransform],
    captures: Captures,
    plainly: Callable[[Callable[[], Any]], Any],
) -> None:
    model, transform = tiny
    chat = Chat(model, transform, Rules(30))
    history: list[dict[str, Any]] = []
    for turn, kind in enumerate(("one image", "text", "video")):
        history = [*history, *conversation(kind, turn)[:1]]
        (expected,) = plainly(partial(generate, model, transform, [history], max_new_tokens=30))
        text = "".join(chat.stream(history))
        assert text == expected.text
        assert (chat.num_kept > 0) == (turn > 0)
        history.append({"role": "assistant", "content": text})
    assert captures.replays > 30


@torch.no_grad()
def test_the_second_call_of_a_shape_is_captured(
    tiny: tuple[VisionLanguageModel, ChatTransform], captures: Captures
) -> None:
    model, _ = tiny
    cache = Cache(6)
    steps = CapturedSteps(model, cache, torch.device("cpu"))

    def read(length: int) -> None:
        tokens = torch.arange(length)[None]
        model(tokens, mask=Prefill(cache, [length], [0], [0]), input_pos=tokens)

    read(9)
    last = [(7, 4, 4), (8, 3, 3), (9, 5, 5)]
    first = steps(last, 16).clone()
    assert first.shape == (3, model.tok_embeddings.weight.shape[0])
    assert (captures.shapes, captures.replays) == ([], 0)
    steps(last, 16)  # the first one made room
    assert torch.equal(steps(last, 16), first)
    assert (captures.shapes, captures.replays) == ([(4, 16)], 1)
    assert torch.equal(steps([*last, (1, 0, 0)], 16)[:3], first)  # as many rows
    assert (captures.shapes, steps.num_replays) == ([(4, 16)], 2)
    steps([*last, *last[:2]], 16)
    steps([*last, *last[:2]], 16)  # no more than there are slots
    assert captures.shapes == [(4, 16), (6, 16)]
    read(100)
    for _ in range(3):
        steps(last, 16)
    assert captures.shapes == [(4, 16), (6, 16), (4, 16)]
    assert captures.replays == 5


@torch.no_grad()
def test_rows_that_are_added_touch_nothing_but_the_beginning_of_free_slots(
    tiny: tuple[VisionLanguageModel, ChatTransform], captures: Captures
) -> None:
    model, _ = tiny
    cache = Cache(8)
    tokens = torch.arange(8 * 5)[None]
    mask = Prefill(cache, [5] * 8, range(8), [0] * 8)
    model(tokens, mask=mask, input_pos=tokens % 5)
    before = [layer.kept.clone() for layer in cache._layers.values()]
    CapturedSteps(model, cache, torch.device("cpu"))([(1, 5, 5)] * 5, 8)
    for layer, kept in zip(cache._layers.values(), before, strict=True):
        changed = (layer.kept != kept).any(0).any(1).any(-1)  # of slots and places
        expected = torch.zeros_like(changed)
        expected[:5, 5] = True
        expected[5:, 0] = True
        assert torch.equal(changed, expected)


def test_what_is_captured(directory: Path) -> None:
    model = load_model(directory)
    assert can_capture(model, CUDA)
    assert not can_capture(model, torch.device("cpu"))
    assert can_capture(load_model(directory, quantize="int8"), CUDA)
    model.encoders["vision"].merger.mlp.w1.weight.requires_grad = True
    assert not can_capture(model, CUDA)  # a decoder that is not trained, in a training
    assert not can_capture(model_from_pretrained(directory), CUDA)


def test_sharded_weights_are_not_captured(directory: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = load_model(directory)
        fully_shard(model.decoder.layers[0], mesh=init_device_mesh("cpu", (1,)))
        assert not can_capture(model, CUDA)
    finally:
        torch.distributed.destroy_process_group()
