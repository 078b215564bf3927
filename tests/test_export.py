"""tune-vl merge and tune-vl export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference import QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE, reference_config, reference_model
from tests.test_checkpoint_metadata import WRONG
from torchtune_vl.checkpoint import HubCheckpointer
from torchtune_vl.checkpoint._adapters import Adapter, load_adapter, save_adapter
from torchtune_vl.cli import main
from torchtune_vl.files._safetensors import weight_files
from torchtune_vl.generation._load import load_model
from torchtune_vl.models._registry import family_of
from torchtune_vl.models._weights import load_weights
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_tune_to_peft
from torchtune_vl.training import merge

LAYER = "decoder.layers.0.attn.q_proj"
PUBLISHED = "model.layers.0.self_attn.q_proj.weight"


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    reference_model(reference_config()).save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        f"{LAYER}.lora_a.weight": torch.randn(4, 256),
        f"{LAYER}.lora_b.weight": torch.randn(256, 4),
    }
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_adapter(Adapter(tensors, 4, 6, str(base), family_of(base).names), directory)
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return {
        name: tensor
        for file in set(index["weight_map"].values())
        for name, tensor in load_file(directory / file).items()
    }


def test_merging(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    assert status("merge", base, adapter, output, "--max-shard-size", "1MB") == 0
    before = load_file(base / "model.safetensors")
    after = weights(output)
    assert after.keys() == {
        n.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        for n in before
    }
    tensors = load_adapter(adapter).tensors
    product = tensors[f"{LAYER}.lora_b.weight"] @ tensors[f"{LAYER}.lora_a.weight"]
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, _of(before, name))}
    assert changed == {PUBLISHED}
    torch.testing.assert_close(after[PUBLISHED], _of(before, PUBLISHED) + 1.5 * product)


@pytest.mark.parametrize("shape", [QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE])
def test_an_adapter_of_the_decoder_is_of_its_base(shape: str, tmp_path: Path) -> None:
    """Its names are those of any family."""
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    reference_model(reference_config(shape)).save_pretrained(base)
    torch.manual_seed(0)
    before = load_weights(base, weight_files(base))
    rows, columns = before[f"{LAYER}.weight"].shape
    a, b = torch.randn(4, columns), torch.randn(rows, 4)
    tensors = {f"{LAYER}.lora_a.weight": a, f"{LAYER}.lora_b.weight": b}
    adapter.mkdir()
    save_adapter(Adapter(tensors, 4, 6, str(base), family_of(base).names), adapter)
    assert status("merge", base, adapter, merged) == 0
    after = load_weights(merged, weight_files(merged))
    assert after.keys() == before.keys()
    expected = {**before, f"{LAYER}.weight": before[f"{LAYER}.weight"] + 1.5 * (b @ a)}
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, msg=name)
    answering = load_model(base, adapter=adapter).state_dict()
    assert torch.equal(answering[f"{LAYER}.weight"], after[f"{LAYER}.weight"])
    small = load_model(base, adapter=adapter, quantize="int8").state_dict()
    merged_small = load_model(merged, quantize="int8").state_dict()
    assert small.keys() == merged_small.keys()
    assert all(torch.equal(tensor, merged_small[name]) for name, tensor in small.items())
    checkpointer = HubCheckpointer(base, tmp_path / "output", adapter_dir=adapter)
    loaded = checkpointer.load_checkpoint()["model"]
    assert torch.equal(loaded[f"{LAYER}.lora_b.weight"], b)


def _of(before: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return next(t for n, t in before.items() if n in (name, f"model.{name}") or n == _older(name))


def _older(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


def test_exporting_in_another_dtype(base: Path, adapter: Path, tmp_path: Path) -> None:
    sharded = ("--dtype", "bfloat16", "--max-shard-size", "500KB")
    assert status("export", base, tmp_path / "exported", *sharded) == 0
    assert {t.dtype for t in weights(tmp_path / "exported").values()} == {torch.bfloat16}
    assert '"bfloat16"' in (tmp_path / "exported" / "config.json").read_text()

    assert status("export", adapter, tmp_path / "small", "--dtype", "float16") == 0
    small, full = load_adapter(tmp_path / "small"), load_adapter(adapter)
    assert (small.rank, small.alpha, small.base) == (4, 6, str(base))
    for name, tensor in full.tensors.items():
        assert torch.equal(small.tensors[name], tensor.half())


def test_sums_are_rounded_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    """To the dtype that is asked for, and not to that of the base before."""
    half = tmp_path / "half"
    assert status("export", base, half, "--dtype", "bfloat16") == 0
    merged, norm = tmp_path / "merged", torch.rand(256)
    trained = load_adapter(adapter)
    whole = {**trained.tensors, "decoder.norm.weight": norm}
    save_adapter(trained._replace(tensors=whole), adapter)
    assert status("merge", half, adapter, merged, "--dtype", "float32") == 0
    before, after = load_file(half / "model.safetensors"), load_file(merged / "model.safetensors")
    tensors = load_adapter(adapter).tensors
    delta = 6 / 4 * (tensors[f"{LAYER}.lora_b.weight"] @ tensors[f"{LAYER}.lora_a.weight"])
    assert torch.equal(after[PUBLISHED], before[PUBLISHED].float() + delta)
    assert torch.equal(after["model.norm.weight"], norm)
    others = [name for name in before if name not in (PUBLISHED, "model.norm.weight")]
    assert all(torch.equal(after[name], before[name].float()) for name in others)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_what_cannot_be_done(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert status(*arguments) == 2
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err

    assert "exists: name a new directory" in refused("merge", base, adapter, tmp_path)
    assert "has no adapter_config.json" in refused("merge", base, base, tmp_path / "new")
    assert "model.safetensors" in refused("export", tmp_path, tmp_path / "new")
    wide = {
        f"{LAYER}.lora_a.weight": torch.zeros(4, 512),
        f"{LAYER}.lora_b.weight": torch.zeros(256, 4),
    }
    save_adapter(Adapter(wide, 4, 6, "", family_of(base).names), adapter)
    assert "is [256, 512], and in checkpoint_dir it is [256, 256]: name the base it" in refused(
        "merge", base, adapter, tmp_path / "new"
    )
    tensors = adapter / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    assert f"{tensors} is {{'size': " in refused("merge", base, adapter, tmp_path / "new")
    (adapter / "checksums.json").unlink()  # as in a directory that peft wrote
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_rslora": True}))
    assert "adapter_config.json: use_rslora is True" in refused(
        "merge", base, adapter, tmp_path / "new"
    )


DAMAGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rank": ({"r": 8}, {}, "r is 8 and .*_a.weight \\[4, 256\\], .*_b.weight \\[256, 4\\]"),
    "negative rank": ({"r": -4}, {}, "r is -4, expected a whole number from 1"),
    "rank as text": ({"r": "4"}, {}, "r is '4', expected a whole number"),
    "no alpha": ({"lora_alpha": None}, {}, "lora_alpha is None, expected a number"),
    "alpha that is NaN": ({"lora_alpha": float("nan")}, {}, "lora_alpha is nan"),
    "infinite alpha": ({"lora_alpha": float("inf")}, {}, "lora_alpha is inf"),
    "negative alpha": ({"lora_alpha": -6}, {}, "lora_alpha is -6, expected a number from"),
    "no magnitudes": ({"use_dora": True}, {}, "use_dora is True, .*lora_b.weight \\[256, 4\\]:"),
    "magnitudes": ({}, {"magnitude": torch.ones(256)}, "use_dora is False, .*magnitude \\[256"),
    "magnitudes of another size": (
        {"use_dora": True},
        {"magnitude": torch.ones(255)},
        "use_dora is True, .* magnitude \\[255\\]",
    ),
    "A alone": ({}, {"lora_b.weight": None}, "has for .*q_proj.weight lora_a.weight \\[4, 256\\]:"),
    "B alone": ({}, {"lora_a.weight": None}, "has for .*q_proj.weight lora_b.weight \\[256, 4\\]:"),
    "empty": ({}, {"lora_a.weight": torch.empty(0)}, "_a.weight \\[0\\].*not gathered"),
    "empty columns": (
        {},
        {"lora_a.weight": torch.empty(4, 0)},
        "_a.weight \\[4, 0\\].*not gathered",
    ),
    "a vector": ({}, {"lora_b.weight": torch.ones(256)}, "lora_b.weight \\[256\\]"),
    "matrices of two ranks": ({}, {"lora_a.weight": torch.ones(3, 256)}, "r is 4 and"),
    "NaN": ({}, {"lora_b.weight": torch.full((256, 4), torch.nan)}, "lora_B.weight is not finite"),
    "list": ({"modules_to_save": "x"}, {}, "modules_to_save is 'x', expected a list"),
    "base": ({"base_model_name_or_path": 3}, {}, "base_model_name_or_path is 3, expected a str"),
    "another kind": ({"peft_type": "LOHA"}, {}, "peft_type is 'LOHA', expected plain LoRA"),
    "no kind": ({"peft_type": None}, {}, "peft_type is None, expected plain LoRA"),
    "a key of another release": ({"new_kind": "x"}, {}, "new_kind is 'x', expected plain LoRA"),
    "a key that is off": ({"new_kind": False, "r": 5}, {}, "r is 5 and"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_adapters_that_contradict_themselves(adapter: Path, damage: str) -> None:
    changes, tensors, message = DAMAGES[damage]
    (adapter / "checksums.json").unlink()
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    stored = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in qwen2_5_vl_tune_to_peft(
        {f"{LAYER}.{suffix}": tensor for suffix, tensor in tensors.items()}
    ).items():
        stored[name] = tensor
    save_file(
        {name: tensor for name, tensor in stored.items() if tensor is not None},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(adapter)
    assert str(adapter) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_base_of_another_name_is_told(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Any weights of the same shapes can be merged with it."""
    tensors = load_adapter(adapter)
    for number, name in enumerate((str(base), f"someone/{base.name}", "")):
        save_adapter(tensors._replace(base=name), adapter)
        merge(base, adapter, tmp_path / f"same{number}")
    assert not caplog.records
    save_adapter(tensors._replace(base="Qwen/Qwen2.5-VL-7B-Instruct"), adapter)
    merge(base, adapter, tmp_path / "other")
    assert "was trained on Qwen/Qwen2.5-VL-7B-Instruct: see that" in caplog.text


def test_two_names_of_one_tensor(adapter: Path) -> None:
    """transformers' name of before release 4.52 and today's, as after two saves into one file."""
    (adapter / "checksums.json").unlink()
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    older = {name.replace("language_model.", ""): tensor * 3 for name, tensor in tensors.items()}
    save_file({**tensors, **older}, path)
    with pytest.raises(ValueError, match="are two names of one tensor: remove one"):
        load_adapter(adapter)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "modules_to_save"])
def test_which_layers_by_values_that_say_nothing(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    (adapter / "checksums.json").unlink()
    config = adapter / "adapter_config.json"
    content = json.loads(config.read_text())
    for value in (3.5, True, {"q_proj": 1}, [["q_proj"]], "(", [None], -1):
        config.write_text(json.dumps({**content, key: value}))
        assert status("merge", base, adapter, tmp_path / "new") == 2, value
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("tune-vl")]
        assert f"{config}: {key}" in line, value


def test_settings_of_an_adapter_of_another_kind(adapter: Path) -> None:
    """Every value of its config by each of a list of others: a sentence, or the same adapter."""
    (adapter / "checksums.json").unlink()
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text())
    expected = load_adapter(adapter)._replace(base="")
    for key in content:
        for value in WRONG:
            if (key, value) in [("base_model_name_or_path", "x"), ("lora_alpha", 1.5)]:
                continue
            path.write_text(json.dumps({**content, key: value}))
            message, result = _attempt(adapter)
            if result is None:
                assert str(path) in message, (key, value)
                assert key in message, (key, value)
                assert len(message.splitlines()) == 1, (key, value)
            else:
                assert result[1:] == expected[1:], (key, value)
                assert result.tensors.keys() == expected.tensors.keys()


def _attempt(directory: Path) -> tuple[str, Adapter | None]:
    try:
        return "", load_adapter(directory)._replace(base="")
    except ValueError as error:
        return str(error), None
