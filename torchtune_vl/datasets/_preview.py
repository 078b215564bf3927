"""What a model gets of a dataset, as plain data, and the page that shows it."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from torchtune_vl.chat import ChatTransform
from torchtune_vl.data import Planner
from torchtune_vl.data._data_workers import loading
from torchtune_vl.datasets._mixture import Mixture
from torchtune_vl.datasets._preview_sample import SampleView
from torchtune_vl.datasets._preview_summary import Summary

# Of the 20 MB that a page of 200 samples is to have at most, those for pictures, in base64
_PICTURES = 14_000_000
# What could end the script that the data are in
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def preview(
    mixture: Mixture,
    transform: ChatTransform,
    planner: Planner,
    *,
    samples: int | Sequence[int],
    rows_per_step: int,
    seed: int = 0,
    shuffle: bool = True,
    num_workers: int = 0,
    tokens_per_second: float | None = None,
) -> dict[str, Any]:
    """Measure a dataset, and compute all that a page tells of it and of some of its samples.

    Args:
        mixture: of the dataset or the datasets. Of a stream only the first ``samples`` are looked
            at. Where a dataset has them, its ``origin`` and ``augmented``, of an index (and an
            epoch), tell and make more of a sample.
        transform: that of the datasets.
        planner: of rows.
        samples: how many to show, chosen at random, or their indices.
        rows_per_step: rows of a step, as for training.
        seed: of the choice of samples, and of the order of the first epoch.
        shuffle: whether that has an order of its own.
        num_workers: processes to measure and transform in, besides this one; 0: in this one.
        tokens_per_second: what training was measured to take.

    Returns:
        Values that JSON can hold, for :func:`to_html`: ``geometry`` of patches in pixels,
        ``summary`` of the dataset, ``samples``, and ``texts``, ``bytes`` and ``special``, the
        tokens that the samples have, by their ids. A sample that cannot be read has an ``error``.

    Raises:
        ValueError: if there is no sample, or none with one of the indices.
    """
    is_stream = mixture.is_stream
    if is_stream:
        if not isinstance(samples, int):
            raise ValueError("a stream has no indices: give the number of samples to show")
        mixture, shuffle = _beginning(mixture, samples), False
    dataset = mixture.table
    indices = _chosen(len(dataset), samples, seed)
    summary = Summary(mixture, planner, rows_per_step, seed, shuffle, num_workers)
    rows = summary.rows_of(indices)
    geometry = transform.geometry
    patches = summary.sizes[indices, 1].sum(dtype=int)
    bytes_per_pixel = _PICTURES * 3 / 4 / max(patches * geometry.patch_size**2, 1)
    view = SampleView(dataset, transform, planner, bytes_per_pixel)
    shown = []
    with (
        loading(indices, num_workers, batch_size=None, collate_fn=view) as views,
        tqdm(total=len(indices), desc="transforming", unit=" samples") as bar,
    ):
        for index, sample in zip(indices, views, strict=True):
            problem = summary.problems.get(index, "")
            of_dataset = {"source": mixture.name_of(index), "problem": problem}
            shown.append({**sample, **of_dataset, "row": rows.get(index)})
            bar.update()
    window = geometry.window_size and geometry.window_size * geometry.unit
    return {
        "geometry": {"patch": geometry.patch_size, "unit": geometry.unit, "window": window},
        "is_stream": is_stream,
        "summary": summary.as_data(shown, tokens_per_second),
        "samples": shown,
        **_vocabulary(transform, shown),
    }


def to_html(page: Mapping[str, Any]) -> str:
    """Write what :func:`preview` computed, with texts for its head as ``facts``, as a page."""
    data = json.dumps(page, separators=(",", ":")).translate(_ESCAPES)
    return (files(__package__) / "preview.html").read_text("utf-8").replace("{{data}}", data)


def _chosen(count: int, samples: int | Sequence[int], seed: int) -> list[int]:
    if not count:
        raise ValueError("the dataset has no samples")
    if isinstance(samples, int):
        drawn = np.random.default_rng(seed).choice(count, min(samples, count), replace=False)
        return sorted(drawn.tolist())
    for index in samples:
        if not 0 <= index < count:
            raise ValueError(f"there is no sample {index}: the dataset has {count}, from 0")
    return [*samples]


def _beginning(mixture: Mixture, samples: int) -> Mixture:
    none = [None] * len(mixture.datasets)
    return Mixture([_Beginning(d, samples) for d in mixture.datasets], mixture.names, none, none)


class _Beginning:
    """The first samples of a stream, as a dataset."""

    def __init__(self, stream: Any, count: int) -> None:
        self._stream = stream
        self._raw = [*islice(stream.raw(), count)]

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.augmented(index, 0)

    def augmented(self, index: int, epoch: int) -> dict[str, Any]:
        return self._stream.make_raw(self._raw[index], epoch)

    def measure(self, index: int) -> Sequence[int]:
        return self._stream.measure_raw(self._raw[index])


def _vocabulary(transform: ChatTransform, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tokens of samples by their ids: those that are text, and others in hexadecimal digits."""
    runs = [run for sample in samples for run in sample.get("runs", ())]
    ids = sorted({token for run in runs for token in run.get("ids", ())})
    texts, parts = {}, {}
    for token, content in zip(ids, transform.token_bytes(ids), strict=True):
        try:
            texts[str(token)] = content.decode()
        except UnicodeDecodeError:
            parts[str(token)] = content.hex(" ")
    special = sorted({*ids}.intersection(transform.special_tokens.values()))
    return {"texts": texts, "bytes": parts, "special": special}
