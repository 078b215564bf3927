"""transformers' tokenizer, and the table of figures at the end of a run."""

from collections import defaultdict
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.parity.figures import record_into


@pytest.fixture(autouse=True)
def _figures(record_property) -> None:
    record_into(record_property)


@pytest.fixture(scope="session")
def reference_tokenizer(vocabulary: Path):
    return AutoTokenizer.from_pretrained(vocabulary)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests compared."""
    inputs: dict[str, int] = defaultdict(int)
    largest: dict[str, float] = defaultdict(float)
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "parity":
                what, count, difference = value
                inputs[what] += count
                largest[what] = max(largest[what], difference)
    if inputs:
        terminalreporter.section("parity with transformers")
        terminalreporter.write_line(f"{'compared':54} {'inputs':>8}  largest difference")
        for what in sorted(inputs):
            terminalreporter.write_line(f"{what:54} {inputs[what]:8,}  {largest[what]:.2g}")
