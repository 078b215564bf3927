"""What generation promises beside transformers' answers: rules, limits, turns that are kept."""

import random
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtune.generation import generate as torchtune_generate
from torchtune.modules import local_kv_cache

from quickstart.checkpoint import write_tiny_checkpoint
from tests.conversations import TEXTS
from tests.parity.test_generation_parity import KINDS, begins_with_line_breaks, conversation
from tests.parity.test_mixed_media_parity import LIMITS
from tests.reference import IMAGE_PAD, VIDEO_PAD, Conversation, reference_config, reference_model
from torchtune_vl.chat import ChatTransform
from torchtune_vl.data import packed_collate_vision
from torchtune_vl.data._collate import padded_collate_vision_targets
from torchtune_vl.generation import Chat, Rules, Sampling, decode, generate
from torchtune_vl.models import model_from_pretrained, transform_from_pretrained
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config
from torchtune_vl.modules.layout import mrope_positions
from torchtune_vl.modules.vision import VisionLanguageModel, _blank


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    reference_config().save_pretrained(tmp_path)
    torch.manual_seed(0)
    return qwen2_5_vl_from_config(tmp_path).eval()


@pytest.fixture(scope="module")
def tiny(
    vocabulary: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VisionLanguageModel, ChatTransform]:
    """A model whose answers vary, and a transform."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory, vocabulary)
    return model_from_pretrained(directory), transform_from_pretrained(directory, **LIMITS)


class Tokenizer:
    """Its tokens say their numbers."""

    def __init__(self, stop_tokens: Collection[int] = ()) -> None:
        self.stop_tokens = stop_tokens

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        return b"".join(b"%d " % i for i in ids)


def answers(
    model: torch.nn.Module,
    prompts: list[dict[str, Any]],
    new_tokens: int,
    *stops: int,
    batch_size: int = 4,
    seed: int = 0,
    num_answers: int = 1,
    **sampling: Any,
) -> list[list[int]]:
    rules = Rules(new_tokens, Sampling(**sampling), (), seed, num_answers)
    answered = decode(model, Tokenizer(stops), enumerate(prompts), rules, batch_size)
    found = sorted(answered, key=lambda numbered: numbered[:2])
    return [answer.tokens for _, _, answer in found]


def samples(*conversations: Conversation, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [c.sample(generator) for c in conversations]


def questions(count: int) -> list[list[dict[str, Any]]]:
    return [conversation(KINDS[number % len(KINDS)], 100 + number) for number in range(count)]


# What is drawn


def test_top_1_is_greedy_and_temperature_varies(model: torch.nn.Module) -> None:
    prompts = samples(Conversation([(1, 4, 4)]), Conversation([]))
    greedy = answers(model, prompts, 6)
    assert answers(model, prompts, 6, temperature=1.0, top_k=1) == greedy
    hot = [answers(model, prompts, 6, temperature=3.0, seed=seed) for seed in range(3)]
    assert hot[0] != hot[1] != hot[2]
    assert hot[0] == answers(model, prompts, 6, temperature=3.0, seed=0)


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    scores = torch.tensor([[1.0, 3.0, -torch.inf, 2.0, 0.0]]).expand(100_000, -1)
    noise = torch.empty(scores.shape).exponential_(generator=torch.Generator().manual_seed(0))
    counts = Sampling(1.0).choose(scores, noise).bincount(minlength=5) / 100_000
    # Four times the deviation that such a count has
    torch.testing.assert_close(counts, scores[0].softmax(-1), atol=0.0064, rtol=0)
    assert counts[2] == 0


@pytest.mark.parametrize("batch_size", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_answers_do_not_depend_on_what_else_is_decoded(
    model: torch.nn.Module, batch_size: int
) -> None:
    prompts = samples(*[Conversation([(1, 4, 4)] * (n % 3), 3 + n) for n in range(7)])
    drawn = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "num_answers": 3}
    stops = range(0, 600, 9)  # some answers end early, and prompts take their places
    together = answers(model, prompts, 12, *stops, **drawn, batch_size=batch_size)
    assert len(together) == 21
    assert len({len(ids) for ids in together}) > 3
    for number, prompt in enumerate(prompts):
        rest = [prompts[0]] * number  # the number of a prompt is part of its seed
        alone = answers(model, [*rest, prompt], 12, *stops, **drawn, batch_size=1)[-3:]
        assert alone == together[3 * number : 3 * number + 3]


def test_each_answer_to_a_prompt_is_penalized_for_its_own_tokens(model: torch.nn.Module) -> None:
    (prompt,) = samples(Conversation([], 4))
    drawn = {"temperature": 1.0, "repetition_penalty": 1e6}
    penalized = answers(model, [prompt], 40, **drawn, num_answers=3, batch_size=2)
    for ids in penalized:
        assert len({*ids, *prompt["tokens"]}) == 40 + len({*prompt["tokens"]})
    assert penalized[0] != penalized[1] != penalized[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("num_answers", 0),
    ],
)
def test_settings_that_make_no_sense(
    tiny: tuple[VisionLanguageModel, ChatTransform], name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}: make it"):
        generate(*tiny, [], max_new_tokens=1, **{"temperature": 1.0, name: value})


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "num_answers"])
def test_settings_of_what_is_not_drawn(
    tiny: tuple[VisionLanguageModel, ChatTransform], name: str
) -> None:
    value = 1 if name.endswith("p") else 2
    with pytest.raises(ValueError, match="set temperature"):
        generate(*tiny, [], max_new_tokens=1, **{name: value})
    with pytest.raises(ValueError, match="the batch size is 0"):
        generate(*tiny, [], max_new_tokens=1, batch_size=0)


# What an answer has


def test_logprobs_are_those_of_the_model(tiny: tuple[VisionLanguageModel, ChatTransform]) -> None:
    model, transform = tiny
    chat = questions(5)[4]
    drawn = {"temperature": 2.0, "repetition_penalty": 1.5}
    (answer,) = generate(model, transform, [chat], max_new_tokens=9, **drawn)
    prompt = transform.to_answer({"messages": chat})
    sample = {**prompt, "tokens": prompt["tokens"] + answer.tokens}
    rest = prompt["input_pos"].max() + 1 + torch.arange(9)
    sample["input_pos"] = torch.cat([prompt["input_pos"], rest[:, None].expand(-1, 3)])
    sample["labels"] = [-100] * len(prompt["tokens"]) + answer.tokens
    with torch.no_grad():
        losses = model(**packed_collate_vision([sample]))
    assert answer.logprobs == pytest.approx((-losses).tolist(), abs=1e-5)


def test_why_an_answer_ended(tiny: tuple[VisionLanguageModel, ChatTransform]) -> None:
    model, transform = tiny
    (chat,) = questions(1)
    (whole,) = generate(model, transform, [chat], max_new_tokens=30, temperature=1.5)
    assert whole.ended == "length"
    assert whole.text == transform.decode(whole.tokens)
    settings = {"max_new_tokens": 30, "temperature": 1.5}

    transform.stop_tokens = [whole.tokens[7]]
    (stopped,) = generate(model, transform, [chat], **settings)
    transform.stop_tokens = [transform.eos_id, transform.pad_id]
    end = whole.tokens.index(whole.tokens[7]) + 1
    assert stopped.ended == "stop token"
    assert stopped.tokens == whole.tokens[:end]
    assert stopped.text == transform.decode(whole.tokens[: end - 1])

    # A text that lies across tokens
    middle = len(transform.decode(whole.tokens[:10]))
    stop = whole.text[middle - 2 : middle + 2]
    (cut,) = generate(model, transform, [chat], stop=["never there", stop], **settings)
    assert cut.ended == "stop string"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert stop in transform.decode(cut.tokens)
    assert stop not in transform.decode(cut.tokens[:-1])


def test_an_empty_stop_string(tiny: tuple[VisionLanguageModel, ChatTransform]) -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        generate(*tiny, [], max_new_tokens=1, stop=[""])


def test_prompts_that_leave_no_room(model: torch.nn.Module) -> None:
    model.decoder.max_seq_len = 30
    prompts = samples(Conversation([], 11), Conversation([], 12))
    assert len(answers(model, prompts[:1], 19)[0]) == 19
    with pytest.raises(ValueError, match=r"12 tokens of prompt and 19 new ones exceed .* of 30"):
        answers(model, prompts, 19)


def test_prompts_longer_together_than_one_may_be(model: torch.nn.Module) -> None:
    prompts = samples(*[Conversation([], n) for n in (11, 12, 13)])
    expected = answers(model, prompts, 5)
    model.decoder.max_seq_len = 18
    assert answers(model, prompts, 5) == expected


def test_logits_that_are_not_finite(model: torch.nn.Module) -> None:
    model.decoder.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits for prompt 0 are not finite"):
        answers(model, samples(Conversation([])), 5)


def test_a_model_in_training_is_left_so(tiny: tuple[VisionLanguageModel, ChatTransform]) -> None:
    model, transform = tiny
    model.train()
    model.encoders.eval()
    for layer in model.decoder.layers:
        layer.attn.dropout = 0.5
    try:
        first, second = (
            generate(model, transform, questions(3), max_new_tokens=5) for _ in range(2)
        )
        assert first == second
        assert model.training
        assert model.decoder.training
        assert not model.encoders["vision"].training
    finally:
        model.eval()
        for layer in model.decoder.layers:
            layer.attn.dropout = 0.0


def test_samples_are_answered_with_their_media_and_tools(
    tiny: tuple[VisionLanguageModel, ChatTransform],
) -> None:
    model, transform = tiny
    chat = questions(2)[1]
    image = next(item["image"] for item in chat[0]["content"] if item["type"] == "image")
    nameless = [i if i["type"] == "text" else {"type": "image"} for i in chat[0]["content"]]
    sample = {"messages": [{"role": "user", "content": nameless}], "images": [image]}
    assert generate(model, transform, [sample], max_new_tokens=5) == generate(
        model, transform, [chat], max_new_tokens=5
    )


def test_an_error_of_a_conversation_ends_what_is_prepared(
    tiny: tuple[VisionLanguageModel, ChatTransform],
) -> None:
    bad = [{"role": "user", "content": [{"type": "image", "image": "missing.jpg"}]}]
    with pytest.raises(ValueError, match=r"missing\.jpg"):
        generate(*tiny, [*questions(3), bad, *questions(50)], max_new_tokens=2)


# Turns


@pytest.mark.parametrize("kind", KINDS)
def test_turns_with_what_is_kept_are_as_read_anew(
    tiny: tuple[VisionLanguageModel, ChatTransform], kind: str
) -> None:
    model, transform = tiny
    chat = Chat(model, transform, Rules(12))
    history = conversation(kind, 7)
    encoded: list[int] = []
    hook = model.encoders["vision"].register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    media = [sum(i["type"] != "text" for turn in history for i in turn["content"])]
    for turn in range(3):
        (expected,) = generate(model, transform, [history], max_new_tokens=12)
        encoded.clear()
        text = "".join(chat.stream(history))
        assert text == expected.text, turn
        assert sum(encoded) == media[-1], turn
        assert (chat.num_kept > 0) == (turn > 0)
        more = conversation(random.Random(turn).choice(KINDS), turn)[:1]
        media.append(sum(item["type"] != "text" for item in more[0]["content"]))
        history = [*history, {"role": "assistant", "content": text}, *more]
    hook.remove()


def test_what_is_kept_is_only_what_is_the_same(
    tiny: tuple[VisionLanguageModel, ChatTransform],
) -> None:
    """Images of one size look alike in ids, and videos of one size but another speed."""
    model, transform = tiny
    chat = Chat(model, transform, Rules(8))
    first = conversation("one image", 1)
    (picture, *rest) = first[0]["content"]
    other = [
        {"role": "user", "content": [{**picture, "image": picture["image"].rotate(180)}, *rest]}
    ]
    clip = conversation("video", 1)
    slow = [{"role": "user", "content": [{**clip[0]["content"][0], "sample_fps": 0.25}]}]
    slow[0]["content"] += clip[0]["content"][1:]
    for history in (first, other, first, first, clip, slow, clip, conversation("text", 1), first):
        (expected,) = generate(model, transform, [history], max_new_tokens=8)
        assert "".join(chat.stream(history)) == expected.text
    assert "".join(chat.stream(first)) == expected.text
    assert chat.num_kept == len(transform.to_answer({"messages": first})["tokens"]) - 1


def test_a_chat_that_is_left_in_the_middle(
    tiny: tuple[VisionLanguageModel, ChatTransform],
) -> None:
    model, transform = tiny
    chat = Chat(model, transform, Rules(20))
    history = conversation("turns", 3)
    stream = chat.stream(history)
    begun = next(stream) + next(stream)
    stream.close()
    history = [*history, {"role": "assistant", "content": begun}, *conversation("one image", 4)]
    (expected,) = generate(model, transform, [history], max_new_tokens=20)
    assert "".join(chat.stream(history)) == expected.text
    assert chat.num_kept > 0


def test_a_begun_answer_is_gone_on_with(tiny: tuple[VisionLanguageModel, ChatTransform]) -> None:
    model, transform = tiny
    compared = 0
    for chat in questions(6):
        (whole,) = generate(model, transform, [chat], max_new_tokens=20)
        for end in (2, 7, 15):
            text = transform.decode(whole.tokens[:end])
            if transform.encode(text, add_eos=False) != whole.tokens[:end]:
                continue  # the model did not write the ids that the text has
            begun = [*chat, {"role": "assistant", "content": text}]
            (rest,) = generate(model, transform, [begun], max_new_tokens=20 - end)
            assert rest.tokens == whole.tokens[end:]
            compared += 1
    assert compared > 2


# Choices


def test_answers_are_tokenized_as_training_has_them(
    tiny: tuple[VisionLanguageModel, ChatTransform],
) -> None:
    """Behind the line break of the prompt, unless they begin with another."""
    _, transform = tiny
    asked = {"role": "user", "content": "Which?"}
    prompt = transform.to_answer({"messages": [asked]})["tokens"]
    line_break = transform.encode("\n", add_eos=False)
    chance = random.Random(0)
    pieces = [*TEXTS, *" \t.,:;('\"-_#0123456789abcABCéß白猫\u0301\u200d\xa0\u3000\u2028\x85"]
    pieces += ["\n", "\r\n", "'s", "//", "```", "<|im_end|>", "<|im_start|>", "assistant", "A. "]
    num_joined = 0
    for text in ("".join(chance.choices(pieces, k=chance.randint(0, 5))) for _ in range(3000)):
        answered = {"messages": [asked, {"role": "assistant", "content": text}]}
        whole = transform(answered)["tokens"]
        is_same = whole == [*prompt, *transform.answer_tokens(text), *line_break]
        assert is_same or begins_with_line_breaks(text), repr(text)
        num_joined += not is_same
    assert num_joined > 100


def test_processes_run_the_layers_as_often_as_one_that_scores_choices(
    tiny: tuple[VisionLanguageModel, ChatTransform],
) -> None:
    model, transform = tiny
    prompts = [transform.to_answer({"messages": chat}) for chat in questions(5)]
    for prompt in prompts[1::2]:
        prompt["choices"] = [transform.answer_tokens(text) for text in ("A", "B", "neither")]
    said: list[bool] = []
    runs: list[str] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(type(kwargs["mask"]).__name__), with_kwargs=True
    )
    busy = [
        *decode(model, transform, enumerate(prompts), Rules(3), 1, lambda x: said.append(x) or x)
    ]
    of_busy = [*runs]
    runs.clear()
    heard = iter(said)
    assert [*decode(model, transform, [], Rules(3), 1, lambda _: next(heard))] == []
    hook.remove()
    assert next(heard, None) is None
    assert len(busy) == 5
    assert of_busy.count("Continuations") == 2
    assert runs == [run.replace("Continuations", "Step") for run in of_busy]


def test_choices_leave_the_answers_as_they_are(
    tiny: tuple[VisionLanguageModel, ChatTransform],
) -> None:
    model, transform = tiny
    plain = [transform.to_answer({"messages": chat}) for chat in questions(3)]
    texts = ("A", "a dog", "")
    asked = [{**p, "choices": [*map(transform.answer_tokens, texts)]} for p in plain]
    of_plain, of_asked = (
        {
            number: answer.tokens
            for number, _, answer in decode(model, transform, [*enumerate(p)], Rules(4), 4)
        }
        for p in (plain, [*plain[:1], *asked[1:]])
    )
    assert of_plain == of_asked


def test_a_medium_is_encoded_once_for_all_choices(
    tiny: tuple[VisionLanguageModel, ChatTransform],
) -> None:
    model, transform = tiny
    prompt = transform.to_answer({"messages": conversation("three images", 0)})
    prompt["choices"] = [transform.answer_tokens(text) for text in ("A", "a dog", "")]
    encoded: list[int] = []
    read: list[int] = []
    hooks = [
        model.encoders["vision"].register_forward_hook(lambda *_: encoded.append(1)),
        model.decoder.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1])),
    ]
    ((_, _, answer),) = decode(model, transform, [(0, prompt)], Rules(1), 4)
    for hook in hooks:
        hook.remove()
    assert len(encoded) == 1
    assert read == [len(prompt["tokens"]), 1 + 2]
    assert len(answer.choice_logprobs) == 3


def test_log_probabilities_of_choices_are_those_of_whole_answers(
    tiny: tuple[VisionLanguageModel, ChatTransform],
) -> None:
    model, transform = tiny
    prompts = [transform.to_answer({"messages": chat}) for chat in questions(5)]
    texts = (["A", "a dog runs", "10"], None, ["1"], ["B. two", "B"], ["neither of these", "A"])
    expected: list[list[float]] = []
    for prompt, choices in zip(prompts, texts, strict=True):
        expected.append([])
        if choices is None:
            continue
        prompt["choices"] = [transform.answer_tokens(text) for text in choices]
        for ids in prompt["choices"]:
            rest = prompt["input_pos"].max() + 1 + torch.arange(len(ids))
            input_pos = torch.cat([prompt["input_pos"], rest[:, None].expand(-1, 3)])
            sample = {**prompt, "tokens": prompt["tokens"] + ids, "input_pos": input_pos}
            sample["labels"] = [-100] * len(prompt["tokens"]) + ids
            del sample["choices"]
            with torch.no_grad():
                losses = model(**packed_collate_vision([sample]))
            expected[-1].append(-float(losses.sum()))
    for batch_size in (2, 5):
        answered = decode(model, transform, enumerate(prompts), Rules(1), batch_size)
        found = [answer.choice_logprobs for _, _, answer in sorted(answered, key=lambda a: a[0])]
        assert [*map(len, found)] == [3, 0, 1, 2, 2]
        for ours, whole in zip(found, expected, strict=True):
            assert ours == pytest.approx(whole, abs=5e-5)


def test_choices_of_no_text(tiny: tuple[VisionLanguageModel, ChatTransform]) -> None:
    model, transform = tiny
    prompt = transform.to_answer({"messages": conversation("text", 0)})
    prompt["choices"] = [transform.answer_tokens("")]
    ((_, _, answer),) = decode(model, transform, [(0, prompt)], Rules(1), 4)
    with torch.no_grad():
        logits = model(torch.tensor([prompt["tokens"]])).log_softmax(-1)[0, -1]
    assert answer.choice_logprobs == pytest.approx([float(logits[transform.im_end_id])], abs=1e-5)


def test_no_room_for_a_choice(tiny: tuple[VisionLanguageModel, ChatTransform]) -> None:
    model, transform = tiny
    prompt = transform.to_answer({"messages": conversation("text", 0)})
    prompt["choices"] = [[0] * model.decoder.max_seq_len, [0, 0]]
    with pytest.raises(ValueError, match=f"{model.decoder.max_seq_len} new ones exceed"):
        next(decode(model, transform, [(0, prompt)], Rules(1), 4))


# Processes, training, torchtune


def test_training_after_generation(model: torch.nn.Module) -> None:
    # So that the encoder runs without media, as it does beside other processes
    model.decoder.requires_grad_(False)
    _blank.cache_clear()
    model.train()
    (sample,) = samples(Conversation([]))
    row = packed_collate_vision([sample])
    with torch.inference_mode():
        model(**row)
    model(**row).sum().backward()
    assert all(not p.grad.any() for p in model.encoders.parameters())


@pytest.mark.parametrize("sharded", [False, True])
def test_tokens_are_decoded_without_the_encoder(model: torch.nn.Module, sharded: bool) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        runs = []
        model.encoders["vision"].register_forward_hook(lambda *_: runs.append(1))
        if sharded:
            for layer in model.encoders["vision"].layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        (answer,) = answers(model, samples(Conversation([])), 6)
        assert len(answer) == 6
        assert len(runs) == sharded  # other processes could have media in their prompts
        model(**packed_collate_vision([]))
        assert len(runs) == 2 * sharded  # and in their rows, where this one's is empty
    finally:
        torch.distributed.destroy_process_group()


MIXES = [
    Conversation([], 7),
    Conversation([(1, 4, 6)]),
    Conversation([(1, 4, 6), (1, 12, 4)], 3),
    Conversation([(20, 4, 4)], 4, [1.0]),
    Conversation([(6, 4, 4), (1, 4, 6)], 5, [2.5]),
    Conversation([(1, 8, 4), (9, 2, 4), (12, 4, 2)], 2, [2.0, 0.5]),
]


def answered(conversation: Conversation, prompt: dict[str, Any], answer: list[int]) -> dict:
    """The sample that trains an answer to a prompt."""
    tokens = prompt["tokens"] + answer
    grid_thw = torch.tensor(conversation.grids, dtype=torch.int64).reshape(-1, 3)
    positions = mrope_positions(
        tokens,
        grid_thw,
        conversation.intervals,
        placeholder_ids=(IMAGE_PAD, VIDEO_PAD),
        merge_size=2,
    )
    labels = [-100] * len(prompt["tokens"]) + answer
    return {**prompt, "tokens": tokens, "labels": labels, "input_pos": positions}


def test_answers_are_written_where_training_has_them(tmp_path: Path) -> None:
    """Positions of each new token, and the logits that chose it, in padded and packed rows."""
    reference_model(reference_config("head_dim_128")).save_pretrained(tmp_path / "model")
    model = model_from_pretrained(tmp_path / "model")
    prompts = samples(*MIXES, seed=3)
    written: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: written.append(kwargs["input_pos"]), with_kwargs=True
    )
    answers_ = answers(model, prompts, 8, batch_size=len(MIXES))
    hook.remove()
    steps = torch.cat(written[1:], dim=1)  # the last token is not read again

    trained = [answered(*each) for each in zip(MIXES, prompts, answers_, strict=True)]
    for sample, prompt, positions in zip(trained, prompts, steps, strict=True):
        expected = sample["input_pos"][len(prompt["tokens"]) : -1]
        assert expected.tolist() == positions[:, None].expand(-1, 3).tolist()
    for collate in (padded_collate_vision_targets, packed_collate_vision):
        row = collate(trained)
        targets = row.pop("targets").tolist()
        assert targets == [token for answer in answers_ for token in answer]
        with torch.no_grad():
            assert model(**row).argmax(-1).flatten().tolist() == targets


@pytest.mark.parametrize("rng", [None, torch.Generator()], ids=["greedy", "drawn from one"])
@pytest.mark.parametrize("cached", [True, False])
def test_torchtunes_own_generation(
    cached: bool, rng: torch.Generator | None, model: torch.nn.Module
) -> None:
    """Of text, with its caches and without, as ours."""
    (sample,) = samples(Conversation([], 7))
    ours = answers(model, [sample], 5)
    prompt = torch.tensor(sample["tokens"])
    arguments = {"batch_size": 1, "device": torch.device("cpu"), "dtype": torch.float32}
    cache = local_kv_cache(model, **arguments, decoder_max_seq_len=len(prompt) + 5)
    with cache if cached else nullcontext():
        assert model.caches_are_enabled() == cached
        theirs, _ = torchtune_generate(model, prompt, max_generated_tokens=5, top_k=1, rng=rng)
    assert theirs[0, len(prompt) :].tolist() == ours[0]
    assert not model.caches_are_setup()
