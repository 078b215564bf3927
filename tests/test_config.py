"""The config of the recipe: which keys and values it takes, and what it says of others."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from omegaconf import DictConfig, OmegaConf

from torchtune_vl.cli import main
from torchtune_vl.recipes import config_path
from torchtune_vl.recipes._check_config import check_components, kind_of, read_config
from torchtune_vl.recipes._config_keys import Config, keys_of

CONFIG = "quickstart/digits.yaml"
DATASET = "torchtune_vl.datasets.vision_chat_dataset"


def error(*overrides: str, config: str = CONFIG) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        check_components(read_config(["--config", config, *overrides]))
    return str(caught.value)


def read(*overrides: str) -> dict[str, Any]:
    config = read_config(["--config", CONFIG, *overrides])
    check_components(config)
    values: Any = OmegaConf.to_container(config, resolve=True)
    return dict(values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_stepss=1", "max_stepss is no key of this recipe; the nearest is max_steps"),
        ("gradient_accumulation_steps=8", "gradient_accumulation_steps is no key of this recipe"),
        ("learning_rates.mergers=1", "learning_rates.mergers is no key of this recipe; the nearest"
         " is learning_rates.merger"),
        ("parallel.tensors=1", "the nearest is parallel.tensor"),
        ("rows.max_token=3", "rows.max_token is nothing that torchtune_vl.data.PackedRows takes; "
         "the nearest is rows.max_tokens"),
        ("optimizer.weight_decays=0", "the nearest is optimizer.weight_decay"),
        ("~dataset.source", "dataset.source is missing"),
        ("~rows_per_step", "rows_per_step is missing: rows of a step"),
        ("~rows_per_stepp", "takes out a key that the config does not have"),
        ("model=torchtune_vl.models.qwen2_5_vl.qwen2_5_vl_fromconfig",
         "the nearest is qwen2_5_vl_from_config"),
        ("model=no_such_package.model", "No module named 'no_such_package'"),
        ("lr_scheduler.num_training_steps=3", "is set by the recipe itself"),
        ("epochs=null", "epochs is null, and takes a whole number of at least 1"),
        ("epochs=0.5", "epochs is 0.5, and takes a whole number of at least 1"),
        ("optimizer=null", "optimizer is null, and takes a mapping with `_component_`"),
        ("max_steps=0", "max_steps is 0, and takes a whole number of at least 1 or null"),
        ("keep_last=0", "keep_last is 0, and takes a whole number of at least 1"),
        ("log_every_n_steps=0", "log_every_n_steps is 0"),
        ("seed=True", "seed is True, and takes a whole number of at least 0"),
        ("resume=yes please", "resume is 'yes please', and takes True or False"),
        ("clip_grad_norm=0", "clip_grad_norm is 0, and takes a number above 0 or null"),
        ("clip_grad_norm=.nan", "clip_grad_norm is nan"),
        ("dtype=bfloat16", "dtype is 'bfloat16', and takes fp32, bf16 or fp64"),
        ("activation_checkpointing=True", "takes full, selective or none"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast', and takes a number"),
        ("model.decoder_trainable=3", "model.decoder_trainable is 3, and takes True or False"),
        ("dataset_val=null2", "dataset_val._component_: 'null2' cannot be imported"),
        ("dataset=5", "dataset is "),
        ("output_dir=${nothing}", "'nothing' not found"),
        ("seed", "'seed' is no override: write key=value"),
        ("--seed=3", "'--seed=3' is no override: write key=value"),
        ("+seed=3", "+seed is no key: leave out the +"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(override: str, message: str) -> None:
    said = error(override)
    assert message in said
    assert "\n" not in said


def test_all_errors_are_listed() -> None:
    lines = error("max_stepss=1", "epochs=null", "parallel.x=1", "keep_last=-1").splitlines()
    assert lines[0] == f"{CONFIG}: 4 keys of the config are wrong"
    assert [line.split()[0] for line in lines[1:]] == [
        "max_stepss", "parallel.x", "epochs", "keep_last",
    ]  # fmt: skip


def test_null_where_it_means_something() -> None:
    keys = ("lr_scheduler", "save_every_n_steps", "eval_every_n_steps", "clip_grad_norm",
            "dataset_val", "max_steps", "compute_dtype")  # fmt: skip
    config = read(*(f"{key}=null" for key in keys))
    assert [config[key] for key in keys] == [None] * len(keys)
    absent = read(*(f"~{key}" for key in keys if key != "dataset_val"))
    assert [absent[key] for key in keys if key != "dataset_val"] == [None] * (len(keys) - 1)
    assert read("clip_grad_norm=None")["clip_grad_norm"] is None


def test_a_validation_set_is_the_training_set_but_for_what_it_says() -> None:
    train = {
        "_component_": DATASET,
        "source": "json",
        "data_files": "train.jsonl",
        "media_dir": "x",
    }
    given = ["dataset.data_files=train.jsonl", "dataset.media_dir=x"]
    config = read(*given, "~dataset_val", "dataset_val.data_files=a=b.jsonl")
    assert config["dataset"] == train
    assert config["dataset_val"] == {**train, "data_files": "a=b.jsonl"}
    # One of its own is complete
    assert "media_dir" not in read(*given)["dataset_val"]


def test_keys_for_others_to_refer_to() -> None:
    """They may have any content, but are an error where nothing refers to them."""
    others = ("mine._component_=nowhere.At_all", "mine.number=7")
    assert read(*others, "seed=${mine.number}")["seed"] == 7
    assert error(*others) == f"{CONFIG}: mine is no key of this recipe"


def test_overrides_replace_components_and_take_out_their_arguments() -> None:
    config = read("rows=torchtune_vl.data.PaddedRows", "~rows.max_tokens", "~rows.max_patches",
                  "rows.batch_size=2", "optimizer=torch.optim.SGD")  # fmt: skip
    assert config["rows"] == {"_component_": "torchtune_vl.data.PaddedRows", "batch_size": 2}
    assert config["optimizer"]["_component_"] == "torch.optim.SGD"
    assert config["optimizer"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "line 2, column 1: did not find"),
        (b"seed: 1\nseed: 2", "line 2, column 1: found duplicate key seed"),
        (b"- a", "no keys at its top"),
        (b"", "no keys at its top"),
        (b"a: \xff", "no text in UTF-8"),
    ],
)
def test_a_file_that_is_no_config(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    said = error(config=str(path))
    assert said.startswith(str(path))
    assert message in said


def test_a_wrong_key_costs_no_import_of_torch(tmp_path: Path) -> None:
    """On several processes, too; and nothing is written."""
    program = (
        "import sys, atexit\n"
        "heavy = {'torch', 'torchtune', 'datasets', 'transformers'}\n"
        "atexit.register(lambda: print(*heavy & {*sys.modules}))\n"
        "from torchtune_vl.cli import main\nmain(sys.argv[1:])"
    )
    output = tmp_path / "run"
    for options in ([], ["--nproc_per_node", "2"]):
        command = ["run", *options, "finetune", "--config", CONFIG, f"output_dir={output}", "x=1"]
        done = subprocess.run(
            [sys.executable, "-c", program, *command], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "\n")
        assert done.stderr == f"tune-vl run: {CONFIG}: x is no key of this recipe\n"
    assert not output.exists()


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "finetune", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    keys = re.findall(r"^  ([a-z0-9_.]+): (.+)\n {6}\S", text, re.MULTILINE)
    assert [name for name, _ in keys] == [key.name for key in keys_of(Config)]
    assert {"learning_rates", "parallel", "parallel.plan"} <= {name for name, _ in keys}
    assert ("parallel.tensor", "a whole number of at least 1 (default: 1)") in keys
    assert ("export", "last or best (default: last)") in keys
    assert ("max_steps", "a whole number of at least 1 or null (default: null)") in keys
    assert "rows of a step, over all devices" in text
    for markdown in ("](", "`_", "#"):
        assert markdown not in text
    assert max(map(len, text.splitlines())) <= 100


@dataclass
class Nothing:
    """A description without keys."""


class Custom:
    """Nothing that YAML can hold."""


@pytest.mark.parametrize(
    ("hint", "words", "good", "bad"),
    [
        (list[int], "a list of a whole number", [[], [1, 2]], [[1, "2"], 1, None, [True]]),
        (tuple[float, ...], "a list of a number", [[0.5], [1, 2, 3]], [["x"]]),
        (tuple[int, str], "a list of a whole number and a text", [[1, "x"]], [[1], [1, "x", 2]]),
        (Mapping[str, int], "a mapping", [{"a": "b"}], [1, None]),
        (dict, "a mapping", [{}], ["a"]),
        (Path | None, "a path or null", ["a", None], [1]),
        (float | Custom, "a number", [1, 0.5], ["fast", {}, True]),
        (Custom | Nothing, "a mapping", [{}], [1]),
        (Custom, "any value", [1, {}, None], []),
        (Any | None, "any value or null", [1, {}, None], []),
        (Callable[[int], int] | None, "any value or null", [1, "x", None], []),
        (Literal["a", 1], "a or 1", ["a", 1], ["b", True, 1.0]),
        (Annotated[int, "other notes"], "a whole number", [3], [0.5]),
    ],
)  # fmt: skip
def test_what_types_take(hint: Any, words: str, good: list[Any], bad: list[Any]) -> None:
    kind = kind_of(hint)
    assert kind.words == words
    assert [kind.fits(value) for value in good] == [True] * len(good)
    assert [kind.fits(value) for value in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("{_component_: torch.optim.AdamW, params: [], lrs: 1}", "model.lrs is nothing that torch"),
        ("{_component_: nowhere.Model}", "model._component_: 'nowhere.Model' cannot be imported"),
        ("{_component_: torch.optim}", "'torch.optim' cannot be called"),
        ("{_component_: 5}", "'5' cannot be imported"),
        ("{_component_: torch.optim.AdamW, lr: '${rate}'}", "'rate' not found"),
        ("{_component_: torch.optim.AdamW, lr: '???'}", "lr"),
    ],
)
def test_components_of_torchtunes_configs(component: str, message: str) -> None:
    """What its recipes add to the arguments is not known, nor what types they take."""
    good = OmegaConf.create("{optimizer: {_component_: torch.optim.AdamW, lr: fast}, seed: x}")
    check_components(good, None)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_components(OmegaConf.merge(good, OmegaConf.create(f"model: {component}")), None)
    assert "\n" not in str(error.value)


def test_docs_have_every_key() -> None:
    text = Path("docs/training.md").read_text(encoding="utf-8")
    documented = re.findall(r"^(\| `[\w.]+` \|.*\|) [^|]*\|$", text, re.MULTILINE)
    keys = [*keys_of(Config)]
    for key in keys:
        if not any(other.name.startswith(f"{key.name}.") for other in keys):
            assert f"| `{key.name}` | {kind_of(key.kind).words} | {key.meaning} |" in documented


def test_overrides_of_a_list_of_datasets(tmp_path: Path) -> None:
    content = OmegaConf.load(config_path("qwen2_5_vl/lora"))
    content.dataset = [{**content.dataset, "name": name} for name in ("one", "two", "three")]
    OmegaConf.save(content, tmp_path / "mine.yaml")

    def read(*overrides: str) -> DictConfig:
        return read_config(["--config", str(tmp_path / "mine.yaml"), *overrides])

    config = read("dataset.1.weight=2.5", "~dataset.0", "dataset.0.split=train[:3]")
    assert [entry.name for entry in config.dataset] == ["two", "three"]
    assert [entry.get("weight") for entry in config.dataset] == [None, 2.5]
    assert config.dataset[0].split == "train[:3]"
    check_components(config)
    with pytest.raises(ValueError, match=r"dataset\.0\.weight is -1, and takes a number above 0"):
        check_components(read("dataset.0.weight=-1"))
    with pytest.raises(ValueError, match=r"dataset\.2\.source is 3, and takes a text"):
        check_components(read("dataset.2.source=3"))
    for override in ("dataset.3.weight=1", "dataset.x.weight=1"):
        with pytest.raises(ValueError, match="names no entry of its list"):
            read(override)
    with pytest.raises(ValueError, match=r"~dataset\.3 takes out a key"):
        read("~dataset.3")
