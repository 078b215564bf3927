"""How a recipe is started, and how it ends when it cannot go on."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from torchtune_vl.files._printable import shown
from torchtune_vl.recipes._config import Config
from torchtune_vl.recipes._read_config import check_components, read_config

_PACKAGE = Path(__file__).parents[1]
# What a DataLoader makes of an error of its workers
_IN_WORKER = re.compile(
    r"Caught (?P<kind>\w+) in DataLoader worker .*"
    r'\n  File "(?P<file>[^"\n]+)", line \d+, in \w+\n(?:    .*\n)+(?P=kind): (?P<message>.*)',
    re.DOTALL,
)


def run_recipe(main: Callable[[DictConfig], int], description: type = Config) -> int:
    """Run a recipe on the config that the command line names.

    An error that its user can cause ends it with one sentence; any other with its traceback, and
    both with ``TORCHTUNE_VL_TRACEBACK=1``. Of a node's processes the first to fail speaks alone:
    the others fail because it did.

    Args:
        main: takes the config and returns the exit status.
        description: dataclass whose fields are the config's keys.

    Returns:
        The exit status: that of ``main``; 2 for an error of the first kind, 1 for one of the other,
        130 if the run was interrupted before it can be saved.
    """
    try:
        config = read_config(sys.argv[1:], description)
        check_components(config, description)
        return main(config)
    except KeyboardInterrupt:
        if _is_first_to_fail():
            print("tune-vl run: interrupted before the first step", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = sentence_of(error)
        if _is_first_to_fail():
            if sentence is None or os.environ.get("TORCHTUNE_VL_TRACEBACK") == "1":
                traceback.print_exception(error)
            else:
                # Below the progress bar of another process
                lead = "\n" if "TORCHELASTIC_ERROR_FILE" in os.environ else ""
                print(f"{lead}tune-vl run: {sentence}", file=sys.stderr)
        return 1 if sentence is None else 2


def sentence_of(error: Exception) -> str | None:
    """Say an error that a user can cause.

    Args:
        error: what was raised.

    Returns:
        What to show, without control characters; None for what only a change of a program mends.
    """
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
    if isinstance(error, RuntimeError) and re.search("gloo.*by peer", str(error)):
        return "another process of this run has ended"
    if isinstance(error, ValueError) and _is_ours(error):
        return shown(str(error))
    return None


def _is_ours(error: Exception) -> bool:
    """Whether this package raised an error: its sentence is meant for users."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and Path(last.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)


def _is_first_to_fail() -> bool:
    """Whether no other process of this node that torchrun started has failed before."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    try:
        # torchrun makes this directory anew for each start, and one below it for each process
        (Path(error_file).parents[1] / "failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
