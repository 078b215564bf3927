"""The configs that are shipped: complete, of components that exist, and with the right memory."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config as torchtune_config
from torchtune.config._utils import _get_component_from_path

from tests.parity.test_sizes import QWEN2_VL_SIZES, QWEN3_VL_MOE_SIZES, QWEN3_VL_SIZES, SIZES
from torchtune_vl.models._registry import families
from torchtune_vl.recipes import config_names, config_path
from torchtune_vl.training._memory import estimate_memory

METHODS = ("full", "lora", "qlora")
SIZES_OF = {
    "qwen2_5_vl": SIZES,
    "qwen2_vl": QWEN2_VL_SIZES,
    "qwen3_vl": QWEN3_VL_SIZES,
    # A size is called by its first number
    "qwen3_vl_moe": {name.split("-")[0]: facts for name, facts in QWEN3_VL_MOE_SIZES.items()},
}
NAMES = [f"{family}/{method}" for family in SIZES_OF for method in METHODS]
KEYS = """
    output_dir checkpoint_dir tokenizer model checkpointer dataset dataset_val rows rows_per_step
    epochs max_steps seed shuffle num_workers optimizer learning_rates lr_scheduler clip_grad_norm
    device dtype compute_dtype float8 compile activation_checkpointing activation_offloading
    parallel save_every_n_steps keep_last eval_every_n_steps export resume log_every_n_steps
    metric_logger
"""
# What the recipe adds to each component
GIVEN: dict[str, list[Any]] = {
    "dataset": ["tokenizer"],
    "optimizer": [["parameters"]],
    "lr_scheduler": ["optimizer"],
    "parallel.plan": ["model"],
}


def read(name: str, directory: Path = Path("nowhere")) -> DictConfig:
    cfg = OmegaConf.load(config_path(name))
    assert isinstance(cfg, DictConfig)
    cfg.checkpoint_dir = str(directory)
    return cfg


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    directories = {}
    for family, sizes in SIZES_OF.items():
        for size, (_, config, *_) in sizes.items():
            directories[family, size] = tmp_path_factory.mktemp(size)
            (directories[family, size] / "config.json").write_text(json.dumps(config))
    return directories


def test_there_is_one_for_each_family_and_method_and_for_stock_recipes() -> None:
    names = config_names()
    assert set(names.pop("finetune")) == {*NAMES}
    assert names == {
        "full_finetune_single_device": ["qwen2_5_vl/stock_full"],
        "lora_finetune_single_device": ["qwen2_5_vl/stock_lora"],
    }
    files = config_path("qwen2_5_vl/full").parent.iterdir()
    assert {path.stem for path in files} == {*METHODS, "stock_full", "stock_lora"}


@pytest.mark.parametrize("name", ["stock_full", "stock_lora"])
def test_text_of_stock_configs_names_recipe_and_config(name: str) -> None:
    text = config_path(f"qwen2_5_vl/{name}").read_text()
    (recipe,) = re.findall(r"tune-vl run (\S+) --config", text)
    assert config_names()[recipe] == [f"qwen2_5_vl/{name}"]
    assert f"--config qwen2_5_vl/{name} " in text
    assert f"output_dir: /tmp/torchtune-vl/qwen2_5_vl_{name}\n" in text
    cfg = read(f"qwen2_5_vl/{name}")
    assert ("lora_rank" in cfg.model) == (name == "stock_lora")


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_components(name: str) -> None:
    cfg = read(name)
    # Of weights that are trained in full
    assert list(cfg) == [key for key in KEYS.split() if key != "float8" or "full" in name]
    assert list(cfg.learning_rates) == ["encoder", "merger", "decoder"]
    shares = ["replicate", "shard", "context", "tensor"]
    shares += ["experts"] if "moe" in name and "qlora" not in name else []  # of plain weights
    assert [*cfg.parallel] == [*shares, "plan", "cpu_offload"]
    found = 0
    for key in (*cfg, "parallel.plan"):
        node = OmegaConf.select(cfg, key)
        if not isinstance(node, DictConfig) or "_component_" not in node:
            continue
        component = _get_component_from_path(node._component_)
        arguments = {name: value for name, value in node.items() if name != "_component_"}
        if key == "lr_scheduler":
            arguments["num_training_steps"] = 1
        inspect.signature(component).bind(*GIVEN.get(key, []), **arguments)
        found += 1
    assert found == 9


@pytest.mark.parametrize("name", NAMES)
def test_text_names_its_family_and_method(name: str) -> None:
    family, method = name.split("/")
    text = config_path(name).read_text()
    assert text.startswith(f"# {family_names()[family]} of any size: ")
    assert set(re.findall(r"--config (\S+)", text)) == {name}
    cfg = read(name)
    assert cfg.output_dir.endswith(f"{family}_{method}")
    assert ("lora_rank" in cfg.model) == (method != "full")
    assert cfg.model.get("quantize_base", False) == (method == "qlora")


def is_quick(name: str, size: str) -> bool:
    return size in ("2B", "3B") and not name.endswith("/lora")


def family_names() -> dict[str, str]:
    names = {f.package: f.name for f in families()}
    assert set(names) == set(SIZES_OF)
    return names


# The larger take up to half a minute each, and are computed as the small ones, and lora as qlora
@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[] if is_quick(name, size) else pytest.mark.slow)
        for name in NAMES
        for size in SIZES_OF[name.split("/")[0]]
        if not (size == "7B" and name.startswith("qwen2_vl"))  # as that of Qwen2.5-VL
    ],
)
def test_model_builds_and_memory_is_what_the_comment_says(
    name: str, size: str, checkpoints: dict[tuple[str, str], Path]
) -> None:
    family, method = name.split("/")
    parameters = SIZES_OF[family][size][2]
    cfg = read(name, checkpoints[family, size])
    with torch.device("meta"):
        model = torchtune_config.instantiate(cfg.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == parameters if method == "full" else 0 < trained < parameters / 50
    text = config_path(name).read_text()
    (said,) = re.findall(rf"^# +{size}((?: +\d+ devices? +[\d.]+ GB)+)$", text, re.MULTILINE)
    figures = re.findall(r"(\d+) devices? +([\d.]+) GB", said)
    assert len(figures) == 2
    for num_devices, gigabytes in figures:
        memory = sum(estimate_memory(cfg, int(num_devices)).values())
        assert float(gigabytes) == pytest.approx(memory / 1e9, abs=0.051)
