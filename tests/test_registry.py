"""torchtune's commands as ``tune-vl`` has them, over its recipes and ours."""

import subprocess
import sys
from pathlib import Path

import pytest
from torchtune.config._errors import InstantiationError

from tests.stock_recipes import CONFIG
from torchtune_vl.cli import main
from torchtune_vl.recipes import config_path, register_recipes

# Writes what reached it to a file of its own for each process
RECIPE = """
import os, sys
from omegaconf import DictConfig
from torchtune import config

@config.parse
def main(cfg: DictConfig) -> int:
    rank = os.environ.get("RANK", "alone")
    with open(f"{cfg.output}-{rank}", "w") as file:
        file.write(f"{cfg.number} of {os.environ.get('WORLD_SIZE', 1)}")
    return 3 if cfg.number == 13 else 0

if __name__ == "__main__":
    sys.exit(main())
"""


def status(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    return stopped.value.code


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.py").write_text(RECIPE)
    (tmp_path / "mine" / "config.yaml").write_text(f"output: {tmp_path / 'seen'}\nnumber: 1\n")
    return tmp_path


def test_ls_has_ours_and_the_stock_ones_once(capsys: pytest.CaptureFixture[str]) -> None:
    register_recipes()
    assert status("ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["finetune", "qwen2_5_vl/32B_full"]
    assert sum("qwen2_5_vl/3B_lora" in line for line in lines) == 1
    assert any(line.startswith("lora_finetune_distributed ") for line in lines)


def test_cp_and_cat(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("cp", "qwen2_5_vl/3B_lora", "copy") == 0
    original = config_path("qwen2_5_vl/3B_lora")
    assert (here / "copy.yaml").read_bytes() == original.read_bytes()
    assert status("cp", "finetune", ".") == 0
    assert (here / "finetune.py").read_bytes() == original.parents[2].joinpath(
        "finetune.py"
    ).read_bytes()
    capsys.readouterr()
    assert status("cat", "qwen2_5_vl/3B_lora") == 0
    assert "checkpoint_dir: Qwen2.5-VL-3B-Instruct" in capsys.readouterr().out
    assert status("cp", "full_finetune_single_device", "stock.py") == 0
    assert "FullFinetuneRecipeSingleDevice" in (here / "stock.py").read_text()


def test_run_passes_overrides_and_the_status(here: Path) -> None:
    assert status("run", "mine/recipe.py", "--config", "mine/config.yaml", "number=7") == 0
    assert (here / "seen-alone").read_text() == "7 of 1"
    assert status("run", "mine/recipe", "--config", "mine/config.yaml", "number=13") == 3


def test_run_starts_processes(here: Path) -> None:
    command = [sys.executable, "-m", "torchtune_vl.cli", "run", "--nproc_per_node", "2"]
    recipe = ["mine/recipe.py", "--config", "mine/config.yaml", "number=7"]
    done = subprocess.run([*command, *recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(here / f"seen-{rank}").read_text() for rank in (0, 1)] == ["7 of 2"] * 2


def test_run_finds_stock_recipes() -> None:
    """A component that is not there is what the recipe itself stops at, in its set-up."""
    recipe = ["full_finetune_single_device", "--config", str(CONFIG)]
    with pytest.raises(InstantiationError, match=r"nowhere\.Logger"):
        main(["run", *recipe, "metric_logger=nowhere.Logger"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing", "--config", "mine/config.yaml"], "no file is called 'nothing'"),
        (["run", "finetune", "--config", "nothing"], "no file is called 'nothing'"),
        (["run", "finetune"], "a config is needed"),
        (["run", "finetune", "--config"], "a config is needed"),
        (["cp", "nothing", "."], "Try `tune-vl ls`"),
        (["cat", "nothing.yaml"], "tune-vl cat: error: Config 'nothing.yaml' not found"),
        (["validate-config", "mine/wrong.yaml"], "no_such_argument"),
    ],
)
def test_wrong_usage(
    here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine" / "wrong.yaml").write_text(
        "optimizer: {_component_: torch.optim.AdamW, params: [], no_such_argument: 1}"
    )
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "tune-vl " in error
    assert "Traceback" not in error


def test_validate_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("validate-config", config_path("qwen2_5_vl/3B_lora")) == 0
    assert "well-formed" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["ls", "cp", "cat", "run", "validate-config"])
def test_help_has_our_name_and_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: tune-vl {command}" in text
    assert f"\n  tune-vl {command}" in text
    assert "llama" not in text
