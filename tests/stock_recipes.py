"""torchtune's own recipes on our components, run as users run them."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CONFIG = Path(__file__).with_name("stock_digits.yaml")


def run_recipe(name: str, output: Path, settings: Mapping[str, Any]) -> list[float]:
    """Run a recipe.

    Args:
        name: the recipe.
        output: its output directory; the config is written beside it.
        settings: what differs from `stock_digits.yaml`; None takes a key out.

    Returns:
        The loss of each step.
    """
    config = OmegaConf.load(CONFIG)
    for key, value in {"output_dir": str(output), **settings}.items():
        if value is None:
            del config[key]
        else:
            OmegaConf.update(config, key, value, merge=not isinstance(value, dict))
    path = output.with_suffix(".yaml")
    OmegaConf.save(config, path)
    command = [Path(sys.executable).with_name("tune"), "run", name, "--config", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # there are as many tests as cores
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    newest = max((output / "logs").glob("log_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    return [float(loss) for loss in re.findall(r"loss:(\S+)", newest.read_text())]
