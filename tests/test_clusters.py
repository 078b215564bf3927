"""docs/clusters.md and its files: commands that parse, jobs that ask for what they use."""

import os
import re
import shlex
import string
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from torchtune_vl.cli import main
from torchtune_vl.cli.run import _split
from torchtune_vl.recipes import _launch, recipe_path
from torchtune_vl.recipes._check_config import check_components, read_config

ROOT = Path(__file__).parents[1]
FILES = ROOT / "docs" / "clusters"
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
SLURM = (FILES / "slurm.sh").read_text(encoding="utf-8")
SBATCH = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", SLURM, re.MULTILINE))
PYTORCHJOB = yaml.safe_load((FILES / "pytorchjob.yaml").read_text(encoding="utf-8"))
WORKER = PYTORCHJOB["spec"]["pytorchReplicaSpecs"]["Worker"]
POD = WORKER["template"]["spec"]
(CONTAINER,) = POD["containers"]
LIMITS = CONTAINER["resources"]["limits"]
SKYPILOT = yaml.safe_load((FILES / "skypilot.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def commands(text: str, variables: Mapping[str, str] = {}) -> Iterator[list[str]]:
    """The arguments of each call of ``tune-vl`` in a shell script, and only of these."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(string.Template(line).safe_substitute(variables), comments=True)
        starts = [i for i, word in enumerate(words) if Path(word).name == "tune-vl"]
        for start in starts[-1:]:
            end = next((i for i, w in enumerate(words) if i > start and w in ("||", "|")), None)
            yield words[start + 1 : end]


def command_of(text: str, variables: Mapping[str, str]) -> list[str]:
    (command,) = commands(text, variables)
    return command


JOBS = {
    "slurm.sh": command_of(
        SLURM, {"SLURM_JOB_NUM_NODES": SBATCH["nodes"], "first": "node-1", "port": "29500"}
    ),
    "pytorchjob.yaml": CONTAINER["args"][1:],
    "skypilot.yaml": command_of(
        SKYPILOT["run"], {"SKYPILOT_NUM_NODES": str(SKYPILOT["num_nodes"]), "is_host": "true"}
    ),
}
COMMANDS = {**JOBS, **{" ".join(c)[:40]: c for block in BLOCKS for c in commands(block)}}
RUNS = {name: command for name, command in COMMANDS.items() if command[0] == "run"}


def started(command: list[str]) -> tuple[int, int, Any]:
    """Machines, processes of each, and the config."""
    launcher, recipe, arguments = _split(command[1:])
    parsed = get_args_parser().parse_args([*launcher, "script"])
    assert recipe_path(recipe)
    config = read_config(arguments)
    check_components(config)
    return int(parsed.nnodes.split(":")[0]), int(parsed.nproc_per_node), config


def test_all_commands_are_found() -> None:
    assert CONTAINER["args"][0] == "tune-vl"
    assert len(COMMANDS) == 7
    assert len(RUNS) == 5


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_parse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "ended", lambda *_: 0)  # would run them
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 0


@pytest.mark.parametrize("command", RUNS.values(), ids=RUNS)
def test_runs_have_configs_that_fit_their_devices(command: list[str]) -> None:
    machines, processes, config = started(command)
    assert config.rows_per_step % (machines * processes // config.parallel.tensor) == 0
    assert config.resume is True
    assert config.output_dir in ("/shared/receipts", "$output")
    assert config.dataset.data_files == "/shared/receipts.jsonl"


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("slurm.sh", (int(SBATCH["nodes"]), int(SBATCH["gpus-per-node"]))),
        (
            "pytorchjob.yaml",
            (WORKER["replicas"], LIMITS["nvidia.com/gpu"]),
        ),
        (
            "skypilot.yaml",
            (SKYPILOT["num_nodes"], int(SKYPILOT["resources"]["accelerators"].split(":")[1])),
        ),
    ],
)
def test_jobs_ask_for_the_devices_that_they_use(name: str, asked: tuple[int, int]) -> None:
    machines, processes, config = started(JOBS[name])
    assert (machines, processes) == asked
    if name == "slurm.sh":
        assert processes * (config.num_workers + 1) <= int(SBATCH["cpus-per-task"])
        assert SBATCH["ntasks-per-node"] == "1"
    if name == "pytorchjob.yaml":
        assert processes * (config.num_workers + 1) <= LIMITS["cpu"]
        assert PYTORCHJOB["spec"]["nprocPerNode"] == str(processes)


def test_processes_have_less_time_to_save_than_the_scheduler_gives() -> None:
    def seconds(name: str) -> int:
        launcher, *_ = _split(JOBS[name][1:])
        return get_args_parser().parse_args([*launcher, "script"]).shutdown_timeout

    signal, given = SBATCH["signal"].split("@")
    assert signal == "TERM"
    assert seconds("slurm.sh") < int(given)
    assert seconds("pytorchjob.yaml") < POD["terminationGracePeriodSeconds"]


def test_pods() -> None:
    assert (PYTORCHJOB["apiVersion"], PYTORCHJOB["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert CONTAINER["name"] == "pytorch"
    assert WORKER["restartPolicy"] == "ExitCode"
    assert "command" not in CONTAINER  # would take the place of the image's tini
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert {*mounts.values()} == {*volumes}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volumes[mounts["/shared"]]


def test_skypilot_file() -> None:
    keys = {"name", "num_nodes", "workdir", "resources", "volumes", "envs", "setup", "run"}
    assert {*SKYPILOT} == keys
    assert "/shared" in SKYPILOT["volumes"]
    recovered = SKYPILOT["resources"]["job_recovery"]["recover_on_exit_codes"]
    restarted = re.findall(r"^\| ([\d, ]+) \|.*\| yes \|$", PAGE, re.MULTILINE)
    assert {*recovered} < {int(code) for codes in restarted for code in codes.split(",")}
    assert not {0, 1, 2} & {*recovered}


@pytest.mark.parametrize(
    "script", [SLURM, SKYPILOT["setup"], SKYPILOT["run"], *BLOCKS], ids=lambda text: text[:20]
)
def test_scripts_are_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("status", "saves", "is_requeued"),
    [(0, True, False), (2, True, False), (143, True, True), (143, False, False), (137, True, True)],
)
def test_slurm_script_requeues_what_was_stopped(
    status: int, saves: bool, is_requeued: bool, tmp_path: Path
) -> None:
    """With the commands of Slurm replaced."""
    (tmp_path / "steps" / "step_1").mkdir(parents=True)
    script = SLURM.replace("output=/shared/receipts", f"output={tmp_path}")
    replaced = f"""
        scontrol() {{
            if [ "$1" = show ]; then printf 'node-7\\nnode-8\\n'; else echo "scontrol $*"; fi
        }}
        srun() {{ echo "srun $*"; {f"mkdir {tmp_path}/steps/step_2;" * saves} return {status}; }}
    """
    variables = {
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "96",
    }
    done = subprocess.run(
        ["bash"],
        input=replaced + script,
        text=True,
        capture_output=True,
        env={**os.environ, **variables},
    )
    srun, *requeue = done.stdout.splitlines()
    assert "tune-vl run --nnodes 2 " in srun
    assert " --rdzv_endpoint node-7:24567 --rdzv_id 1234567 " in srun
    assert requeue == ["scontrol requeue 1234567"] * is_requeued
    assert (done.returncode, done.stderr) == (status, "")


def test_image() -> None:
    copies = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {source for line in copies for source in line.split()}
    assert all((ROOT / source).exists() for source in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r"^(?:readme|license-files) = \W*([\w.]+)", project, re.MULTILINE)
    assert copied == {"pyproject.toml", "constraints.txt", "torchtune_vl", *named}
    (installed,) = re.findall(r"^RUN pip install (.*)$", DOCKERFILE, re.MULTILINE)
    assert shlex.split(installed) == ["--no-cache-dir", "--constraint", "constraints.txt", "."]
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    assert int(user) == POD["securityContext"]["runAsUser"] != 0


def test_page_shows_its_files() -> None:
    shown = re.findall(r"^```{literalinclude} clusters/(\S+)$", PAGE, re.MULTILINE)
    assert sorted(shown) == sorted(path.name for path in FILES.iterdir())
