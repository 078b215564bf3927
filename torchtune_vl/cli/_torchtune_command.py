"""torchtune's own command, ``tune``, whose recipes and configs stand beside ours.

It is found as what was installed under this name, so no module behind it is named here.
"""

import io
import sys
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from torchtune_vl.recipes import config_path


def tune(*arguments: str) -> None:
    """Run ``tune`` with these arguments in this process."""
    import torchtune_vl._torchao  # noqa: F401 (torchtune does not import beside later releases alone)

    scripts = distribution("torchtune").entry_points
    (script,) = scripts.select(group="console_scripts", name="tune")
    sys.argv = ["tune", *arguments]  # it counts them to tell whether torchrun is asked for
    script.load()()


def output_of_tune(*arguments: str) -> str:
    """Run ``tune`` with these arguments, and return what it prints."""
    output = io.StringIO()
    with redirect_stdout(output):
        tune(*arguments)
    return output.getvalue()


@cache
def suffix_of(name: str) -> str | None:
    """Tell what torchtune has under a name: ``.py``, a recipe; ``.yaml``, a config; or None."""
    suffixes: dict[str, str] = {}
    for row in output_of_tune("ls").splitlines()[1:]:  # a recipe, if it is another, and a config
        names = row.split()
        if not row.startswith(" "):
            suffixes[names.pop(0)] = ".py"
        suffixes.update(dict.fromkeys(names, ".yaml"))
    return suffixes.get(name)


def config_file(name: str) -> Path | None:
    """Find the file of a config, ours or a user's; None for one that torchtune has.

    Raises ``ValueError`` if nobody has it.
    """
    path = config_path(name)
    if path.is_file():
        return path
    if suffix_of(name) != ".yaml":
        raise ValueError(f"no config and no file is called {name!r}: see `tune-vl ls --all`")
    return None
