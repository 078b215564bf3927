"""How recipes are started, and with which sentence or traceback they and commands end."""

import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from torchtune_vl.files._printable import shown
from torchtune_vl.recipes._check_config import check_components, read_config
from torchtune_vl.recipes._config_keys import Config

_PACKAGE = Path(__file__).parents[1]
_with_code = warnings.formatwarning
# Of gloo and NCCL, in a process whose run is gone
_BY_ANOTHER = re.compile("gloo.*by peer|Gloo connectFullMesh failed|ncclRemoteError", re.DOTALL)
# What a DataLoader makes of an error of its workers
_IN_WORKER = re.compile(
    r"Caught (?P<kind>\w+) in DataLoader worker .*"
    r'\n  File "(?P<file>[^"\n]+)", line \d+, in \w+\n(?:    .*\n)+(?P=kind): (?P<message>.*)',
    re.DOTALL,
)


def run_recipe(main: Callable[[DictConfig], int], description: type = Config) -> int:
    """Run a recipe on the command line's config, with ``description``'s keys; return its status."""

    def start() -> int:
        config = read_config(sys.argv[1:], description)
        check_components(config, description)
        return main(config)

    return ended("run", start, "tune-vl run: interrupted before the first step\n")


def ended(command: str, start: Callable[[], int], if_interrupted: str = "") -> int:
    """Run a command, tell what ended it before its end, and return the exit status.

    It is 2 after an error that its user can cause, which is told in a sentence; 1 after any other,
    told by its traceback; 129 if another process of the run has ended, as if by SIGHUP, so that it
    is neither; 130 if it was interrupted. ``TORCHTUNE_VL_TRACEBACK=1`` shows all tracebacks. Of a
    node's processes the first to fail speaks alone: it made the others fail.
    """
    _show_log_of_datasets()
    warnings.formatwarning = _as_sentence
    try:
        return start()
    except KeyboardInterrupt:
        if _is_first_to_fail():
            sys.stderr.write(if_interrupted)
        return 130
    except Exception as error:
        sentence = sentence_of(error)
        # What a recipe calls can be anything, what other commands call has arguments of users
        if sentence is None and command != "run" and isinstance(error, ValueError):
            sentence = shown(str(error))
        if _is_first_to_fail():
            if sentence is None or os.environ.get("TORCHTUNE_VL_TRACEBACK") == "1":
                traceback.print_exception(error)
            else:
                # Below the progress bar of another process
                lead = "\n" if "TORCHELASTIC_ERROR_FILE" in os.environ else ""
                print(f"{lead}tune-vl {command}: {sentence}", file=sys.stderr)
        if _is_by_another(error):
            return 128 + signal.SIGHUP
        return 1 if sentence is None else 2


def _show_log_of_datasets() -> None:
    """Show what datasets log of what they read and leave out, as by default Python does warnings.

    All processes of a run read the same, and the first tells it.
    """
    if os.environ.get("RANK", "0") == "0" and logging.lastResort:
        logging.lastResort.setLevel(logging.INFO)
        logging.getLogger("torchtune_vl.datasets").setLevel(logging.INFO)


def _as_sentence(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Write a warning of ours without the line of code that gives it."""
    if Path(filename).is_relative_to(_PACKAGE):
        return f"{shown(str(message))}\n"
    return _with_code(message, category, filename, lineno, line)


def sentence_of(error: Exception) -> str | None:
    """Say an error that a user can cause; None for what only a change of a program mends."""
    in_worker = _IN_WORKER.fullmatch(str(error))
    if in_worker:
        file, kind, message = in_worker.group("file", "kind", "message")
        is_told = kind == "ValueError" and Path(file).is_relative_to(_PACKAGE)
        return shown(message) if is_told else None
    if isinstance(error, OSError):
        named = error.filename is not None and error.strerror is not None
        return shown(f"{error.filename}: {error.strerror}" if named else str(error))
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported yet
        return "the device is out of memory: `tune-vl estimate` computes what takes it"
    if _is_by_another(error):
        return "another process of this run has ended, or cannot be reached"
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename) if frames else Path()
    # Sentences of this package are meant for users
    is_told = isinstance(error, ValueError) and raised_in.is_relative_to(_PACKAGE)
    return shown(str(error)) if is_told else None


def _is_by_another(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and bool(_BY_ANOTHER.search(str(error)))


def _is_first_to_fail() -> bool:
    """Whether no other process of this node that torchrun started has failed before."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        if error_file:
            # torchrun makes this directory anew for each start, and one below it for each process
            (Path(error_file).parents[1] / "failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
