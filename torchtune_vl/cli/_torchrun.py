"""Commands in several processes."""

import logging
import os
import signal
import sys
import time
from tempfile import TemporaryDirectory
from threading import Thread

# Of processes that a command of ours has started: others set RANK and WORLD_SIZE, too
_LAUNCHED = "TORCHTUNE_VL_LAUNCHED"


def is_launched() -> bool:
    """Whether this is one of the processes of :func:`torchrun`."""
    return _LAUNCHED in os.environ


def end_with_the_launcher() -> None:
    """Let a process that torchrun started end when torchrun has, even if that was killed."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=watch, daemon=True).start()


def torchrun(command: str, options: list[str], arguments: list[str]) -> int:
    """Run a command of ``tune-vl`` in several processes, as torchrun's options say.

    Each has its number and theirs in the environment. The status is that of the first to fail, and
    129, as if by SIGHUP, if other machines never came or have gone.
    """
    # Or else pages of C++ frames tell that the first machine has gone; the next import reads it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import (
        RendezvousConnectionError,
        RendezvousError,
        RendezvousTimeoutError,
    )

    parser = run.get_args_parser()
    parser.prog = f"tune-vl {command}"
    parsed = parser.parse_args([*options, "--module", "torchtune_vl.cli", command, *arguments])
    number = parsed.nproc_per_node
    if not (number.isdigit() and int(number) > 0) and number not in ("auto", "cpu", "gpu", "xpu"):
        raise ValueError(f"--nproc_per_node is {number!r}: give the number of processes")
    # Several runs on one machine then do not meet each other
    parsed.standalone |= parsed.nnodes in ("1", "1:1") and not parsed.rdzv_endpoint
    # Each process has one thread unless OMP_NUM_THREADS says another, which nobody needs to hear
    run.logger.addFilter(lambda record: "OMP_NUM_THREADS" not in record.getMessage())
    # What ended a process it has told itself. Each of these loggers has a level of its own
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[_LAUNCHED] = "1"
    try:
        with TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            # torchrun would leave one of its own behind, whether or not it has a use for it
            if (parsed.log_dir, parsed.redirects, parsed.tee) == (None, "0", "0"):
                parsed.log_dir = directory
            run.run(parsed)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        by = signal.Signals(-failure.exitcode).name
        print(f"tune-vl {command}: process {rank} was ended by {by}", file=sys.stderr)
        return 128 - failure.exitcode
    except RendezvousError as error:
        said = str(error)
        if isinstance(error, RendezvousTimeoutError):
            said = f"fewer than {parsed.nnodes} machines have come: start this command on each"
        if isinstance(error, RendezvousConnectionError):
            said = f"{parsed.rdzv_endpoint} cannot be reached, or its machine has left the run"
        print(f"tune-vl {command}: {said}", file=sys.stderr)
        return 128 + signal.SIGHUP
    finally:
        del os.environ[_LAUNCHED]
    return 0
