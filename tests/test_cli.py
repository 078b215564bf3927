"""The command line: what it costs to ask for help, its exit status, and what it writes."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quickstart.checkpoint import write_tiny_checkpoint
from torchtune_vl.cli import main
from torchtune_vl.media import _images
from torchtune_vl.recipes import config_path


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("command") / "base"
    write_tiny_checkpoint(directory, vocabulary)
    return directory


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "validate-config"),
        (["validate", "--help"], "tune-vl validate"),
        (["run", "--help"], "--nproc_per_node"),
        (["check", "--help"], "--write-clean"),
        (["preview", "--help"], "--tokens-per-second"),
        (["prepare", "--help"], "--shard-size"),
        (["run", "finetune", "--help"], "rows_per_step"),
        (["ls"], "qwen2_5_vl/full"),
        (["cat", "qwen2_5_vl/full"], "rows_per_step"),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str], said: str) -> None:
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('imported', *sys.modules))\n"
        f"from torchtune_vl.cli import main\nmain({arguments})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, _, imported = done.stdout.partition("imported ")
    assert said in text
    assert done.stderr == ""
    heavy = {"torch", "torchtune", "transformers", "numpy", "PIL", "rich", "jinja2", "av"}
    assert not heavy & set(imported.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["validate"], "checkpoint_dir"),
        (["validate", "nowhere"], "nowhere is no directory"),
        (["validate", ".", "--reference", "nowhere"], "nowhere is no directory"),
        (["validate", ".", "--images", "nowhere.png"], "nowhere.png does not exist"),
        (["validate", ".", "--videos", "."], "holds no video"),
        (["validate", ".", "--conversations", "broken.json"], "cannot be read as conversations"),
        (["validate", ".", "--html", "nowhere/report.html"], "nowhere"),
        (["validate", ".", "--dtype", "int8"], "int8"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("[")
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "nowhere", "nowhere", "out"], "tune-vl merge: nowhere "),
        (["export", "run", "out"], "tune-vl export: run has neither"),
        (["estimate", "--config", "qwen2_5_vl/stock_lora"],
         "stock_lora is a config of torchtune's recipes, and no config of the recipe finetune"),
        (["run", "finetune", "--config", "qwen2_5_vl/stock_full"], "see `tune-vl ls`"),
        (["estimate", "--config", "llama2/7B_full"], "7B_full is a config of torchtune's recipes"),
        (["estimate", "--config", "nothing"], "tune-vl estimate: no config and no file"),
        (["estimate", "--config", "x", "--devices", "0"], "--devices is 0: give the number"),
        (["validate-config", "nothing"], "tune-vl validate-config: "),
        (["validate-config", "wrong.yaml"], "seeds is no key of this recipe; the nearest is seed"),
        (["run", "finetune", "--config", "run"], "/run: Is a directory"),
        (["run", "--nproc_per_node", "0", "finetune", "--config", "wrong.yaml", "~seeds"],
         "--nproc_per_node is '0'"),
        (["validate", "adapter"], "adapter is no checkpoint: merge an adapter into its base first"),
        (["validate", "run"], "run is no checkpoint: "),
        (["validate", "begun"], "begun is no checkpoint: "),
        (["validate", "a\x1b[2J"], "a\\x1b[2J is no directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_path("quickstart/digits.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(f"{config}\nseeds: 1\n")
    for path in ("adapter/adapter_config.json", "run/epoch_0/config.json", "begun/steps/step_1/x"):
        Path(path).parent.mkdir(parents=True)
        Path(path).touch()
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    if "usage:" not in error:
        assert error.count("\n") == 1


def test_warnings_of_ours_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert status("ls") == 0
    ours, other = (
        warnings.formatwarning("It is cut.", UserWarning, file, 1)
        for file in (_images.__file__, __file__)
    )
    assert ours == "It is cut.\n"
    assert other.startswith(f"{__file__}:1: UserWarning: It is cut.\n")


ROOT = Path(__file__).parents[1]
DOCUMENTED = sorted(
    line[line.index("tune-vl") :]
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    for block in re.findall(r"^```\w*\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r" *tune-vl ", line) and "[--" not in line
)


@pytest.mark.parametrize("line", DOCUMENTED)
def test_documents_have_commands_that_there_are(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, *arguments = shlex.split(line, comments=True)
    monkeypatch.setattr("torchtune_vl.recipes._launch.ended", lambda *_: 0)
    assert status(*arguments) == 0


def test_passes_and_writes_reports(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, text = tmp_path / "report.html", tmp_path / "report.md"
    assert status("validate", checkpoint, "--weights", "--html", page, "--markdown", text) == 0
    output = capsys.readouterr().out
    assert "14 rows pass, 0 fail, 2 not compared" in output
    assert str(checkpoint) in page.read_text()
    assert "14 rows pass" in text.read_text()


@pytest.mark.slow
def test_fails_with_status_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight, one line of the vocabulary and one mean, each in its own row."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][5] += 0.25
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    settings["image_mean"][2] += 1e-6
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    lines = (copy / "merges.txt").read_text(encoding="utf-8").split("\n")
    lines[100] = "q q"
    (copy / "merges.txt").write_text("\n".join(lines), encoding="utf-8")

    assert status("validate", copy, "--reference", checkpoint, "--weights") == 1
    output = capsys.readouterr().out
    for row in ("vocabulary: 1 of", "image settings: 2 of", "weights: 1 of"):
        assert row in output
    for row in ("text ids", "positions"):
        assert not re.search(rf"{row}: \d+ of", output)
    assert status("validate", copy) == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "nothing"),
    ],
)
def test_run_lets_reserved_memory_grow(given: dict[str, str], told: str, tmp_path: Path) -> None:
    recipe = "import os\nprint(os.environ.get('PYTORCH_ALLOC_CONF', 'nothing'))\n"
    (tmp_path / "mine.py").write_text(recipe)
    command = [sys.executable, "-m", "torchtune_vl.cli", "run", "mine.py"]
    inherited = {name: x for name, x in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    inherited["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [*command, "--config", "qwen2_5_vl/full"],
        env=inherited | given,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == told
