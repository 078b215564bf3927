"""How runs end that are stopped or cannot go on: what they say, how often, and their status."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from tests.finetune_runs import start, write_config, write_inputs
from torchtune_vl.cli import main
from torchtune_vl.recipes._check_config import read_config
from torchtune_vl.recipes._datasets import datasets_of
from torchtune_vl.recipes._launch import run_recipe, sentence_of
from torchtune_vl.recipes.finetune import FinetuneRecipe


class FailingSGD(torch.optim.SGD):
    """Fails in its third step, on the last process."""

    def __init__(self, params: object, lr: float, failure: str) -> None:
        super().__init__(params, lr)  # type: ignore[arg-type]
        self.failure = failure
        self.steps = 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.steps += 1
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        if self.steps == 3 and last:
            if self.failure == "full disk":
                raise OSError(28, "No space left on device", "/full/file")
            if self.failure == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise TypeError(self.failure)
        super().step()


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("endings")
    write_inputs(root, vocabulary, 6)
    return root


def failing(root: Path, output: Path, failure: str) -> Path:
    optimizer = {"_component_": "tests.test_endings.FailingSGD", "lr": 1e-3, "failure": failure}
    return write_config(root, output, {"optimizer": optimizer, "max_steps": 9})


def read_until(process: subprocess.Popen, text: str) -> str:
    read = ""
    assert process.stdout is not None
    while text not in read:
        character = process.stdout.read(1)
        assert character, read
        read += character
    return read


@pytest.mark.parametrize(
    ("processes", "number"),
    [(1, signal.SIGINT), pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_signal_is_answered_at_once_and_by_one_process(
    root: Path, tmp_path: Path, processes: int, number: signal.Signals
) -> None:
    settings = {"max_steps": 3000, "log_every_n_steps": 7, "lr_scheduler": None}
    config = write_config(root, tmp_path / "run", settings)
    process = start(config, processes)
    read_until(process, " 2/3000")
    process.send_signal(number)
    answer = read_until(process, "stops when step ")
    messages = answer + process.communicate()[0]
    assert process.returncode == 128 + number
    (step,) = re.findall(rf"{number.name}: stops when step (\d+) is saved, at once on", messages)
    assert int(step) % 7 == 0
    assert f"{step}/3000" not in answer
    assert re.findall(r"Stopped after step (\d+)", messages) == [step]
    assert [path.name for path in (tmp_path / "run" / "steps").iterdir()] == [f"step_{step}"]
    assert "death signal" not in messages


@pytest.mark.slow
def test_a_second_signal_stops_at_once(root: Path, tmp_path: Path) -> None:
    every = ("log_every_n_steps", "save_every_n_steps", "eval_every_n_steps")
    settings = {"max_steps": 3000, **dict.fromkeys(every, 3000)}
    process = start(write_config(root, tmp_path / "run", settings), 2)
    read_until(process, " 2/3000")
    process.send_signal(signal.SIGINT)
    read_until(process, "stops when the export is written")
    process.send_signal(signal.SIGINT)
    messages, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in messages, messages[-4000:]
    assert not (tmp_path / "run" / "steps").exists()


def test_what_a_user_can_cause_is_one_sentence_of_one_process(root: Path, tmp_path: Path) -> None:
    process = start(failing(root, tmp_path / "run", "full disk"), 2)
    messages, _ = process.communicate()
    assert process.returncode == 2
    assert messages.count("tune-vl run: ") == 1
    assert "\ntune-vl run: /full/file: No space left on device\n" in messages
    assert messages.count("train.jsonl: 6 records in the format 'messages' (messages)\n") == 1
    for wall in ("Traceback", "[rank", "ChildFailedError"):
        assert wall not in messages


def ended(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The status of a recipe that raises, and what it says."""

    def main(config: DictConfig) -> int:
        raise error

    monkeypatch.setattr("sys.argv", ["recipe", "--config", "quickstart/digits.yaml"])
    return run_recipe(main), capsys.readouterr().err


def test_faults_of_programs_show_their_traceback_and_others_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = ended(TypeError("a bug"), monkeypatch, capsys)
    assert (status, said.splitlines()[0], said.splitlines()[-1]) == (
        1, "Traceback (most recent call last):", "TypeError: a bug",
    )  # fmt: skip
    full = OSError(28, "No space left on device", "/full/file")
    assert ended(full, monkeypatch, capsys) == (
        2, "tune-vl run: /full/file: No space left on device\n",
    )  # fmt: skip
    monkeypatch.setenv("TORCHTUNE_VL_TRACEBACK", "1")
    status, said = ended(full, monkeypatch, capsys)
    assert status == 2
    assert "test_endings.py" in said
    status, said = ended(KeyboardInterrupt(), monkeypatch, capsys)
    assert (status, said) == (130, "tune-vl run: interrupted before the first step\n")


@pytest.mark.parametrize(
    "message",
    [
        "[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4242",
        "Gloo connectFullMesh failed with [/gloo/pair.cc:152] timed out connecting: SO_ERROR",
        "NCCL error in: NCCLUtils.cpp:77, remote process exited, NCCL version 2.29.7\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exit",
    ],
)
def test_another_process_that_has_gone_is_no_error_of_this_one(
    message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = ended(RuntimeError(message), monkeypatch, capsys)
    assert status == 128 + signal.SIGHUP
    assert said == "tune-vl run: another process of this run has ended, or cannot be reached\n"


def test_machines_that_do_not_come(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    meeting = f"--rdzv_backend c10d --rdzv_endpoint {place} --rdzv_conf join_timeout=1"
    run = "finetune --config quickstart/digits.yaml"
    command = f"run --nnodes 2 --nproc_per_node 1 {meeting} {run}"
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 128 + signal.SIGHUP
    said = "tune-vl run: fewer than 2 machines have come: start this command on each\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [("KeyboardInterrupt", 130, []), ("ValueError('a')", 1, ["Traceback", "ValueError: a"])],
)
def test_recipes_of_others_end_without_a_word_of_ours(
    error: str,
    status: int,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("number: 1")
    recipe = Path(f"recipe_{status}.py")
    recipe.write_text(f"raise {error}")
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe), "--config", "config.yaml"])
    assert stopped.value.code == status
    told = capsys.readouterr().err
    assert bool(told) == bool(said)
    assert all(text in told for text in said)
    assert "tune-vl" not in told


@pytest.mark.slow
def test_a_killed_process_is_named(root: Path, tmp_path: Path) -> None:
    process = start(failing(root, tmp_path / "run", "killed"), 2)
    messages, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert "tune-vl run: process 1 was ended by SIGKILL" in messages
    assert "Traceback" not in messages


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("parallel.tensor=3", "parallel.tensor is 3, and does not divide the 2 processes"),
        ("parallel.tensor=2 parallel.plan=null", "parallel.tensor is 2, which needs a parallel.pl"),
        ("rows_per_step=3", "2 devices cannot share the 3 rows of a step equally: set rows_per_st"),
        (
            "activation_offloading=True",
            "activation_offloading needs activation_checkpointing: full",
        ),
        ("activation_offloading=True activation_checkpointing=full", "offloading is for a GPU's"),
        ("flash_attention=FA3", "flash_attention is for GPUs: set flash_attention=null"),
        ("export=best dataset_val=null", "export: best is that of the best validation"),
        pytest.param(
            "device=cuda",
            "device is cuda, and torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_settings_that_do_not_fit(
    overrides: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = read_config(["--config", "quickstart/digits.yaml", *overrides.split()])
    with pytest.raises(ValueError, match=message):
        FinetuneRecipe(cfg)


def stream(tokenizer: object) -> Iterator[dict]:
    """A dataset without indices."""
    return iter(())


def test_streams_that_never_end() -> None:
    recipe = FinetuneRecipe.__new__(FinetuneRecipe)
    recipe.begun = None
    arguments = ["~dataset", f"dataset._component_={__name__}.stream", "shuffle=False"]
    recipe.cfg = read_config(["--config", "quickstart/digits.yaml", *arguments])
    recipe.cfg.max_steps = None
    with pytest.raises(ValueError, match="no known end: set shuffle=False and max_steps"):
        recipe._make_rows(None)
    mixture = datasets_of(recipe.cfg, "dataset", None)
    with pytest.raises(ValueError, match=r"^dataset_val has no known end: read"):
        recipe._make_table_rows("dataset_val", mixture)


def test_sentences() -> None:
    def raised(error: Exception) -> Exception:
        try:
            raise error
        except Exception as caught:
            return caught

    assert sentence_of(raised(FileNotFoundError(2, "No such file", "a\x1b[2Jb"))) == (
        "a\\x1b[2Jb: No such file"
    )
    assert sentence_of(raised(ValueError("raised elsewhere"))) is None
    assert sentence_of(raised(KeyError("a"))) is None
    worker = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "/torch/fetch.py", line 54, in fetch\n    data = next(x)\n'
        f'  File "{Path("torchtune_vl/data/_training_rows.py").resolve()}", line 7, in __iter__\n'
        "    raise ValueError(message)\nValueError: sample 3: too long\n"
    )
    assert sentence_of(raised(ValueError(worker))) == "sample 3: too long\n"
    assert sentence_of(raised(ValueError(worker.replace("torchtune_vl/data", "mine")))) is None


@pytest.mark.slow
def test_signals_at_the_same_moment_are_one(capfd: pytest.CaptureFixture[str]) -> None:
    """The second is dropped by Python when the first has taken its handler away."""
    program = """
import os, signal, sys
both = (signal.SIGINT, signal.SIGTERM)
signal.pthread_sigmask(signal.SIG_BLOCK, both)  # in threads that libraries start, too
from torchtune_vl.recipes.finetune import _tell_unless_dropped_signal
def first(number, frame):
    for each in both:
        signal.signal(each, signal.SIG_DFL)
for each in both:
    signal.signal(each, first)
sys.unraisablehook = _tell_unless_dropped_signal
for each in both:
    os.kill(os.getpid(), each)
signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_that_torchrun_sends_on_is_not_a_second_one() -> None:
    program = """
import os, signal
from threading import Timer
from torchtune_vl.recipes.finetune import FinetuneRecipe
recipe = FinetuneRecipe.__new__(FinetuneRecipe)
recipe.is_main = False
signal.signal(signal.SIGTERM, recipe._ask_to_stop)
sent_on = Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
sent_on.start()
os.kill(os.getpid(), signal.SIGTERM)
sent_on.join()
print("stops by", recipe.stop_signal, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("stops by 15\n", -signal.SIGTERM)
