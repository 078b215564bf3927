"""The commands of recipes and configs, of ours and torchtune's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torchtune._recipe_registry import get_all_recipes

from torchtune_vl.cli import main
from torchtune_vl.recipes import config_path, recipe_path

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


def test_ls_has_ours_and_on_request_the_stock_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("ls") == 0
    ours = capsys.readouterr().out
    assert ours.splitlines()[1].split() == ["finetune", "qwen2_5_vl/full"]
    assert ours.count("qwen2_5_vl/lora") == 1
    assert re.search("^lora_finetune_single_device +qwen2_5_vl/stock_lora$", ours, re.MULTILINE)
    assert "llama" not in ours
    assert status("ls", "--all") == 0
    every = capsys.readouterr().out
    assert every.startswith(ours)
    assert re.search("^lora_finetune_distributed +llama2/7B_lora *$", every, re.MULTILINE)


def test_cp_and_cat(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("cp", "qwen2_5_vl/lora", "copy") == 0
    original = config_path("qwen2_5_vl/lora")
    assert (here / "copy.yaml").read_bytes() == original.read_bytes()
    assert status("cp", "finetune", ".") == 0
    recipe = recipe_path("finetune")
    assert recipe is not None
    assert (here / "finetune.py").read_bytes() == recipe.read_bytes()
    capsys.readouterr()
    assert status("cat", "qwen2_5_vl/lora") == 0
    assert capsys.readouterr().out == original.read_text()
    assert status("cat", "copy.yaml", "--sort") == 0
    keys = re.findall(r"^\w+", capsys.readouterr().out, re.MULTILINE)
    assert keys == sorted(keys)
    assert len(keys) > 20


def test_cp_and_cat_of_stock_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("cp", "full_finetune_single_device", "stock") == 0
    assert "FullFinetuneRecipeSingleDevice" in (here / "stock.py").read_text()
    assert status("cp", "qwen2_5/0.5B_full_single_device", "mine") == 0
    assert "qwen2_5_0_5b" in (here / "mine" / "0.5B_full_single_device.yaml").read_text()
    capsys.readouterr()
    assert status("cat", "qwen2_5/0.5B_full_single_device") == 0
    assert "_component_: torchtune.models.qwen2_5.qwen2_5_0_5b" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen2_5_vl/full", "llama2/7B_full"])
def test_cp_overwrites_nothing(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine" / f"{name.split('/')[1]}.yaml").write_text("mine")
    assert status("cp", name, "mine") == 2
    said = capsys.readouterr().err
    file = f"mine/{name.split('/')[1]}.yaml"
    assert said == f"tune-vl cp: {file} exists: remove it first, or name another file\n"
    assert (here / file).read_text() == "mine"


def test_cp_makes_directories_when_told_to(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("cp", "finetune", "a/b/mine.py") == 2
    assert capsys.readouterr().err == ("tune-vl cp: a/b is no directory: --make-parents makes it\n")
    assert status("cp", "finetune", "a/b/mine.py", "--make-parents") == 0
    assert (here / "a" / "b" / "mine.py").is_file()


def test_run_passes_overrides_and_the_status(here: Path) -> None:
    assert status("run", "mine/recipe.py", "--config", "mine/config.yaml", "number=7") == 0
    assert (here / "seen-alone").read_text() == "7 of 1"
    assert status("run", "mine/recipe", "--config", "mine/config.yaml", "number=13") == 3


def test_run_starts_processes(here: Path) -> None:
    command = [sys.executable, "-m", "torchtune_vl.cli", "run", "--nproc_per_node", "2"]
    recipe = ["mine/recipe.py", "--config", "mine/config.yaml", "number=7"]
    (here / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(here / "temporary")}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([*command, *recipe], capture_output=True, text=True, env=environment)
    # torchao and torchrun have something to say that helps nobody
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [(here / f"seen-{rank}").read_text() for rank in (0, 1)] == ["7 of 2"] * 2
    assert not [*(here / "temporary").iterdir()]


def test_run_starts_processes_of_torchtunes_recipes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["full_finetune_single_device", "--config", "mine/config.yaml"]
    assert status("run", "--nproc_per_node", "2", *recipe) == 2
    assert capsys.readouterr().err == (
        "tune-vl run: full_finetune_single_device runs in one process: leave --nproc_per_node out\n"
    )
    for each in get_all_recipes():
        assert ("_distributed" in each.name) == each.supports_distributed
    command = [sys.executable, "-m", "torchtune_vl.cli", "run", "--nproc_per_node", "1"]
    recipe[0] = "full_finetune_distributed"
    done = subprocess.run([*command, *recipe], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Missing key device" in done.stderr


def test_all_names_of_torchtune_are_known() -> None:
    for recipe in get_all_recipes():
        path = recipe_path(recipe.name)
        assert str(path).endswith(f"/recipes/{recipe.file_path}")
        for each in recipe.configs:
            if each.name == "llama2/7B_full_early_exit":  # its file was not released
                continue
            assert str(config_path(each.name)).endswith(f"/recipes/configs/{each.file_path}")
    assert recipe_path("nothing") is None


def test_run_finds_stock_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    """A component that is not there is what the recipe itself stops at, in its set-up."""
    recipe = ["full_finetune_single_device", "--config", "qwen2_5_vl/stock_full", "device=cpu"]
    assert status("run", *recipe, "metric_logger=nowhere.Logger") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "InstantiationError: Error loading 'nowhere.Logger'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing", "--config", "mine/config.yaml"], "no file is called 'nothing'"),
        (["run", "finetune", "--config", "nothing"], "no file is called 'nothing'"),
        (["run", "finetune"], "a config is needed"),
        (["run", "--config", "mine/config.yaml"], "a recipe is needed"),
        (["run", "../recipe.py", "--config", "mine/config.yaml"], "../recipe.py is not below this"),
        (["run", "finetune", "--config"], "a config is needed"),
        (["cp", "nothing", "."], "no config and no file is called 'nothing': see `tune-vl ls"),
        (["cat", "nothing.yaml"], "tune-vl cat: no config and no file is called 'nothing.yaml'"),
        (["validate-config", "mine/wrong.yaml"], "no_such_argument"),
        (["validate-config"], "name a config, and only one"),
        (["validate-config", "mine.yaml", "--config", "mine.yaml"], "name a config, and only one"),
        (["validate-config", "qwen2_5_vl/lora", "seeds=1"], "the nearest is seed"),
        (["validate-config", "llama2/7B_full", "seed=1"], "write seed=1 into a copy"),
    ],
)
def test_wrong_usage(
    here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here.parent / "recipe.py").touch()
    (here / "mine" / "wrong.yaml").write_text(
        "optimizer: {_component_: torch.optim.AdamW, params: [], no_such_argument: 1}"
    )
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("tune-vl ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["qwen2_5_vl/lora"],
        ["--config", "qwen2_5_vl/stock_lora"],
        ["llama2/7B_full"],
        ["qwen2_5_vl/lora", "seed=1", "rows_per_step=64"],
        ["seed=1", "--config", "qwen2_5_vl/lora", "rows_per_step=64"],
    ],
)
def test_validate_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status("validate-config", *arguments) == 0
    name = next(word for word in arguments if "/" in word)
    assert capsys.readouterr().out == f"{name} fits its recipe\n"


def test_validate_config_knows_our_recipe_by_any_of_its_keys(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config_path("qwen2_5_vl/lora").read_text()
    (here / "mine.yaml").write_text(text.replace("\nrows_per_step:", "\nrows_per_steps:"))
    assert status("validate-config", "--config", "mine.yaml") == 2
    error = capsys.readouterr().err
    assert error.startswith("tune-vl validate-config: mine.yaml: 2 keys of the config are wrong\n")
    assert "rows_per_steps is no key of this recipe; the nearest is rows_per_step\n" in error


@pytest.mark.parametrize("command", ["ls", "cp", "cat", "run", "validate-config"])
def test_help_has_our_name_and_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: tune-vl {command}" in text
    assert f"\n  tune-vl {command}" in text
    assert "llama" not in text
