"""Files of checkpoints: what is read, written and refused."""

import json
from pathlib import Path

import pytest
import torch
import torchao.optim
from safetensors.torch import load_file, save_file

from tests.reference import reference_config, reference_model
from torchtune_vl.checkpoint._checkpointer import _load_state, _save_state
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config, qwen2_5_vl_hf_to_tune
from torchtune_vl.training import Qwen2_5_VLCheckpointer


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published")
    reference_model(reference_config("head_dim_128")).save_pretrained(directory)
    return directory


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    directory = tmp_path / "source"
    directory.mkdir()
    for path in published.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def load(source: Path) -> dict:
    return Qwen2_5_VLCheckpointer(source, source.parent / "output").load_checkpoint()


def alter_weights(source: Path, **changes: torch.Tensor | None) -> None:
    path = source / "model.safetensors"
    weights = {**load_file(path), **changes}
    save_file({n: t for n, t in weights.items() if t is not None}, path)


def alter_config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_all_differences_are_listed_at_once(source: Path) -> None:
    alter_weights(
        source,
        **{
            "model.layers.0.mlp.up_proj.bias": torch.zeros(3),
            "visual.blocks.1.norm1.weight": None,
            "model.norm.weight": torch.zeros(7),
        },
    )
    with pytest.raises(ValueError, match="do not fit") as error:
        load(source)
    message = str(error.value)
    first, *others = message.splitlines()
    assert first == f"3 tensors do not fit {source / 'config.json'}:"
    assert others == [
        "  model.layers.0.mlp.up_proj.bias is [3] in model.safetensors, expected none",
        "  model.norm.weight is [7] in model.safetensors, expected [256]",
        "  visual.blocks.1.norm1.weight is missing, expected [160]",
    ]


def test_tied_output_layer_is_accepted_if_equal(source: Path) -> None:
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    alter_weights(source, **{"lm_head.weight": embedding.clone()})
    assert "decoder.output.weight" not in load(source)["model"]
    alter_weights(source, **{"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load(source)


def test_a_tensor_by_both_of_its_names_is_refused(source: Path) -> None:
    alter_weights(source, **{"model.language_model.norm.weight": torch.zeros(256)})
    with pytest.raises(ValueError, match=r"is in .* too \("):
        load(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "another model"),
        ({"vision_config": {"window_size": 56}}, "window_size"),
        ({"vision_config": {"spatial_merge_size": 4}}, "spatial_merge_size"),
        ({"vision_config": {"out_hidden_size": 100}}, "out_hidden_size"),
        ({"text_config": {"use_sliding_window": True}}, "sliding"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 4}}}, "yarn"),
    ],
)
def test_configs_that_the_model_does_not_follow(source: Path, change: dict, message: str) -> None:
    config = json.loads((source / "config.json").read_text())
    merged = {k: {**config[k], **v} if isinstance(v, dict) else v for k, v in change.items()}
    alter_config(source, **merged)
    with pytest.raises(ValueError, match=message) as error:
        qwen2_5_vl_from_config(source)
    assert str(source / "config.json") in str(error.value)


def test_missing_and_damaged_files(source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .* download"):
        load(source)
    weights.unlink()
    with pytest.raises(ValueError, match="checkpoint_files"):
        load(source)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ValueError, match="model-00001-of-00001"):
        load(source)
    index.write_text("{}")
    with pytest.raises(ValueError, match="index"):
        load(source)
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match="no such file"):
        qwen2_5_vl_from_config(source)


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ValueError, match=r"2 names .* a\.weight, visual\.b"):
        qwen2_5_vl_hf_to_tune({"visual.b": 1, "model.norm.weight": 2, "a.weight": 3})


def test_output_directory_is_complete(source: Path, tmp_path: Path) -> None:
    companions = ["tokenizer.json", "preprocessor_config.json", "merges.txt", "chat_template.jinja"]
    for name in companions:
        (source / name).write_text(name)
    (source / "old.bin").write_text("weights in another format")
    checkpointer = Qwen2_5_VLCheckpointer(source, tmp_path / "output", model_type="LLAMA3_VISION")
    state = checkpointer.load_checkpoint()
    for _ in range(2):  # the second time in place of the first
        checkpointer.save_checkpoint(dict(state), epoch=1)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["epoch_1"]
    written = {path.name for path in (tmp_path / "output" / "epoch_1").iterdir()}
    assert {"config.json", "model.safetensors", *companions} <= written
    assert "old.bin" not in written


def test_what_servers_read_of_a_config(source: Path, tmp_path: Path) -> None:
    stated = {"chat_template": "of the tokenizer", "model_max_length": 7}
    (source / "tokenizer_config.json").write_text(json.dumps(stated))
    checkpointer = Qwen2_5_VLCheckpointer(source, tmp_path / "output")
    state = dict(checkpointer.load_checkpoint())

    def written(epoch: int, name: str) -> dict[str, object]:
        return json.loads((tmp_path / "output" / f"epoch_{epoch}" / name).read_text())

    alter_config(source, transformers_version="5.1.0")
    checkpointer.save_checkpoint(state, epoch=0, processor_files={"chat_template.json": "{}"})
    assert written(0, "config.json")["transformers_version"] == "5.1.0"
    assert written(0, "tokenizer_config.json") == stated
    config = json.loads((source / "config.json").read_text())
    del config["transformers_version"]
    (source / "config.json").write_text(json.dumps(config))
    checkpointer.save_checkpoint(state, epoch=1, processor_files={"chat_template.jinja": "{{ x }}"})
    assert written(1, "config.json")["transformers_version"] == "4.57.0"
    assert written(1, "tokenizer_config.json") == {**stated, "chat_template": "{{ x }}"}
    (source / "tokenizer_config.json").unlink()
    checkpointer.save_checkpoint(state, epoch=2, processor_files={"chat_template.jinja": "{{ x }}"})
    assert not (tmp_path / "output" / "epoch_2" / "tokenizer_config.json").exists()


def test_resuming(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(ValueError, match="cannot resume"):
        Qwen2_5_VLCheckpointer(source, output, should_load_recipe_state=True)
    checkpointer = Qwen2_5_VLCheckpointer(source, output)
    state = checkpointer.load_checkpoint()
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 3).T}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0], "fused": None}],
    }
    for epoch in (9, 10):  # the newest by number, not by name
        state["model"]["decoder.norm.weight"] = torch.full((256,), float(epoch))
        recipe_state = {"optimizer": optimizer, "epochs_run": epoch, "seed": 1}
        checkpointer.save_checkpoint(
            {**state, **recipe_state}, epoch=epoch, intermediate_checkpoint=True
        )

    resumed = Qwen2_5_VLCheckpointer(source, output, should_load_recipe_state=True)
    loaded = resumed.load_checkpoint()
    assert loaded["epochs_run"] == 10
    assert loaded["model"]["decoder.norm.weight"][0] == 10
    assert loaded["optimizer"]["param_groups"] == optimizer["param_groups"]
    exp_avg = loaded["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(exp_avg, optimizer["state"][0]["exp_avg"])


def test_weights_are_sharded_with_an_index(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchtune_vl.files import _safetensors

    split = _safetensors.split_torch_state_dict_into_shards
    monkeypatch.setattr(
        _safetensors,
        "split_torch_state_dict_into_shards",
        lambda weights, max_shard_size: split(weights, max_shard_size="1MB"),
    )
    checkpointer = Qwen2_5_VLCheckpointer(source, tmp_path / "output")
    state = checkpointer.load_checkpoint()
    checkpointer.save_checkpoint(dict(state), epoch=0)
    written = tmp_path / "output" / "epoch_0"
    assert len(list(written.glob("model-*-of-*.safetensors"))) > 1
    again = Qwen2_5_VLCheckpointer(written, tmp_path / "again").load_checkpoint()
    assert again["model"].keys() == state["model"].keys()
    assert all(torch.equal(again["model"][n], t) for n, t in state["model"].items())


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_state_of_low_bit_optimizers(name: str, tmp_path: Path) -> None:
    """As torchtune's recipes hand it to the checkpointer, and take it back."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 64, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [getattr(torchao.optim, name)(layer.parameters(), lr=1e-2) for layer in layers]

    def step(number: int) -> None:
        layers[number](torch.ones(3, 256)).square().sum().backward()
        with torch.compiler.set_stance("force_eager"):
            optimizers[number].step()
        optimizers[number].zero_grad()

    step(0)
    _save_state({"optimizer": optimizers[0].state_dict()}, tmp_path / "state")
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers[1].load_state_dict(_load_state(tmp_path / "state")["optimizer"])
    for number in (0, 1):
        step(number)
    assert torch.equal(layers[0].weight, layers[1].weight)
