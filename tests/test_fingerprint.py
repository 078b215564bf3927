"""By what a run knows its data again."""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from torchtune_vl.training._fingerprint import data_fingerprint


def test_every_file_of_the_data_counts(tmp_path: Path) -> None:
    paths = [tmp_path / name / "train.jsonl" for name in "abc"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    sizes = np.arange(4)

    def found(data_files: Any, sizes: np.ndarray = sizes) -> dict[str, str]:
        return data_fingerprint(OmegaConf.create({"data_files": data_files}), sizes)

    everywhere = found(f"{tmp_path}/**/*.jsonl")
    assert everywhere.keys() == {"train.jsonl", "the number or the sizes of samples"}
    assert found([*map(str, paths)]) == everywhere
    assert found({"train": [str(paths[0])], "more": f"{tmp_path}/[bc]/*"}) == everywhere
    assert found(str(paths[0])) != everywhere
    assert found(None).keys() == {"the number or the sizes of samples"}
    assert found(f"{tmp_path}/**/*.jsonl", sizes[1:]) != everywhere
    for path in paths:  # all of the same name
        path.write_text("changed")
        assert found(f"{tmp_path}/**/*.jsonl") != everywhere
        path.write_text(path.parent.name)
    assert found(f"{tmp_path}/**/*.jsonl") == everywhere
