"""All that the command line takes of torchtune, for recipes and configs of torchtune's own.

Its command ``tune`` lists, copies, prints and runs them. It is found as what was installed under
this name, so no module behind it is named here. ``torchtune.config.validate`` checks their configs.
"""

import io
import sys
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import distribution
from typing import Any


def tune(*arguments: str) -> None:
    """Run torchtune's command in this process.

    Args:
        *arguments: what stands behind ``tune``.
    """
    import torchtune_vl._torchao  # noqa: F401 (torchtune does not import beside later releases alone)

    scripts = distribution("torchtune").entry_points
    (script,) = scripts.select(group="console_scripts", name="tune")
    sys.argv = ["tune", *arguments]  # it counts them to tell whether torchrun is asked for
    script.load()()


def output_of_tune(*arguments: str) -> str:
    """Run torchtune's command.

    Args:
        *arguments: what stands behind ``tune``.

    Returns:
        What it prints.
    """
    output = io.StringIO()
    with redirect_stdout(output):
        tune(*arguments)
    return output.getvalue()


@cache
def suffix_of(name: str) -> str | None:
    """Tell what torchtune has under a name.

    Args:
        name: of a recipe or a config.

    Returns:
        ``.py`` for a recipe, ``.yaml`` for a config, None for neither.
    """
    rows = output_of_tune("ls").splitlines()[1:]  # two columns, the first 40 characters wide
    if name in {row[:40].strip() for row in rows} - {""}:
        return ".py"
    return ".yaml" if name in {row[40:].strip() for row in rows} - {"<>"} else None


def check_config(config: Any) -> None:
    """Check that the components of a config exist, and that none gets an argument it does not take.

    Args:
        config: of omegaconf, for a recipe of torchtune.

    Raises:
        ValueError: if one is wrong.
    """
    from torchtune_vl._torchtune import validate

    try:
        validate(config)
    except Exception as error:  # those it raises have no public name
        errors = getattr(error, "errors", [error])
        raise ValueError("; ".join(" ".join(str(x).split()) for x in errors)) from error
