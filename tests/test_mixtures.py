"""Runs that draw from several datasets."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from tests.finetune_runs import (
    kill_after,
    read_losses,
    read_metric,
    read_samples,
    run,
    write_config,
    write_inputs,
)
from torchtune_vl.datasets import Mixture


class Table:
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if index == 1:
            raise ValueError("sample 'a/1': it is torn")
        return index


class Stream:
    pass


def mixture(lengths: list[int], **settings: Any) -> Mixture:
    none = [None] * len(lengths)
    given = {"weights": none, "epochs": none, **settings}
    tables = [Table(length) for length in lengths]
    return Mixture(tables, [f"{length}" for length in lengths], **given)


def usable(*lengths: int) -> np.ndarray:
    return np.ones((sum(lengths), 3), np.int32)


def shares(mixed: Mixture, lengths: list[int]) -> list[float]:
    draws = mixed.draws(usable(*lengths))
    counts = np.array(draws.repeats) * lengths
    assert abs(counts.sum() - sum(lengths)) < 1e-9
    return (counts / counts.sum()).tolist()


def test_shares_are_those_of_weights_and_temperatures() -> None:
    lengths = [100, 400, 900]
    assert shares(mixture(lengths), lengths) == [100 / 1400, 400 / 1400, 900 / 1400]
    assert np.allclose(shares(mixture(lengths, weights=[3, 1, 4]), lengths), [3 / 8, 1 / 8, 1 / 2])
    # Of roots of the lengths: 10, 20 and 30
    assert np.allclose(shares(mixture(lengths, temperature=2), lengths), [1 / 6, 2 / 6, 3 / 6])
    repeated = mixture(lengths, epochs=[2.5, None, 0.5]).draws(usable(*lengths))
    assert repeated.repeats == [2.5, 1.0, 0.5]


def test_shares_hold_over_100_000_draws() -> None:
    lengths, weights = [700, 20_000, 50_000], [0.2, 0.5, 0.3]
    draws = mixture(lengths, weights=weights).draws(usable(*lengths))
    starts = np.cumsum([0, *lengths])
    for seed in range(3):
        epochs = [draws.of_epoch(e, usable(*lengths), seed, shuffle=True) for e in range(2)]
        drawn = np.concatenate(epochs)[:100_000]
        found = np.histogram(drawn, bins=starts)[0] / len(drawn)
        assert np.abs(found - weights).max() < 0.01
        counts = Counter(np.concatenate(epochs)[: sum(lengths)].tolist())
        of_small = [counts[index] for index in range(700)]
        assert max(of_small) - min(of_small) <= 1


def test_bad_samples_do_not_change_shares() -> None:
    sizes = usable(100, 400)
    sizes[:50] = 0
    draws = mixture([100, 400], weights=[1, 1]).draws(sizes)
    drawn = draws.of_epoch(0, sizes, 0, shuffle=True)
    assert len(drawn) == 450
    assert (drawn < 100).sum() == (drawn >= 100).sum() == 225
    assert drawn.min() >= 50
    sizes[:100] = 0
    with pytest.raises(ValueError, match="the dataset '100' has no sample to train on"):
        mixture([100, 400]).draws(sizes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1, None]}, "some datasets have a weight and some have none"),
        ({"weights": [1, 2], "epochs": [1, None]}, "datasets have weight and epochs"),
        ({"weights": [1, 2], "temperature": 2.0}, "leave it at 1"),
        ({"epochs": [1, 2], "temperature": 2.0}, "leave it at 1"),
        ({"datasets": [Table(1), Stream()]}, "some datasets are tables and some are streams"),
        ({"datasets": [Stream(), Stream()]}, "give each a weight"),
        ({"datasets": [Stream()] * 2, "epochs": [1, 1]}, "give each a weight"),
        ({"names": ["a", "a"]}, r"the datasets have the names \['a', 'a'\]: make them differ"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "datasets": [Table(1), Table(2)],
        "names": ["a", "b"],
        "weights": [None, None],
        "epochs": [None, None],
    }
    with pytest.raises(ValueError, match=message):
        Mixture(**{**given, **settings})


def test_errors_name_the_dataset() -> None:
    table = mixture([4, 3]).table
    assert [table[index] for index in (0, 2, 3, 4, 6)] == [0, 2, 3, 0, 2]
    with pytest.raises(ValueError, match=r"^sample 5: 3: sample 'a/1': it is torn"):
        table[5]


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    write_inputs(root, vocabulary, 40, [("image",), (), ("image", "image")])
    lines = (root / "train.jsonl").read_text().splitlines()
    (root / "few.jsonl").write_text("\n".join(lines[:8]))
    (root / "many.jsonl").write_text("\n".join(lines[8:]))
    return root


def write_mixture(root: Path, output: Path, streaming: bool, **others: Any) -> Path:
    config = write_config(root, output, {"shuffle": not streaming, **others})
    content = OmegaConf.load(config)
    common = {**content.dataset, "streaming": streaming}
    content.dataset = [
        {**common, "data_files": str(root / "few.jsonl"), "name": "few", "weight": 1.0},
        {**common, "data_files": str(root / "many.jsonl"), "name": "many", "weight": 1.0},
    ]
    OmegaConf.save(content, config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streaming", "processes", "workers"),
    [
        (False, 1, 2),
        (True, 2, 1),
        (True, 1, 0),
    ],
)
def test_a_run_on_two_datasets_goes_on(
    root: Path, tmp_path: Path, streaming: bool, processes: int, workers: int
) -> None:
    given = {"num_workers": workers, "max_steps": 12, "save_every_n_steps": 2}
    losses = run(write_mixture(root, tmp_path / "whole", streaming, **given), processes)
    assert len(losses) == 12
    other = tmp_path / "killed"
    config = write_mixture(root, other, streaming, **given)
    for at in (3, 8):
        kill_after(at, config, processes, "resume=True")
    rest = run(config, processes, "resume=True")
    assert max(rest) == 12
    for step, loss in rest.items():
        assert abs(loss - losses[step]) < 1e-5
    whole, again = read_samples(tmp_path / "whole"), read_samples(other)
    assert {k: sorted(v) for k, v in whole.items()} == {k: sorted(v) for k, v in again.items()}
    # Of each dataset its samples, and its share of them
    few = sum(read_metric(tmp_path / "whole", "samples/few").values())
    many = sum(read_metric(tmp_path / "whole", "samples/many").values())
    assert few + many == sum(map(len, whole.values()))
    assert 0.35 < few / (few + many) < 0.65
    sources = Counter(
        source
        for path in (tmp_path / "whole" / "samples").iterdir()
        for line in path.read_text().splitlines()
        for source in json.loads(line)["sources"]
    )
    assert sources == {"few": few, "many": many}
    # The loss is the mean of those of its datasets, by their supervised tokens
    of_few, of_many = (read_metric(tmp_path / "whole", f"loss/{n}") for n in ("few", "many"))
    for step, loss in read_losses(tmp_path / "whole").items():
        parts = [part[step] for part in (of_few, of_many) if step in part]
        assert min(parts) - 1e-4 <= loss <= max(parts) + 1e-4
