"""Datasets of samples that were transformed before training."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from torchtune_vl.chat import ChatTransform
from torchtune_vl.chat._transform import Examined
from torchtune_vl.datasets._sample_sizes import Measurements
from torchtune_vl.datasets._shards import LOST, Shard, read_origin, read_sample
from torchtune_vl.files._directory import checksum, is_inside
from torchtune_vl.files._json import JsonObject, read_json_object
from torchtune_vl.media import Geometry
from torchtune_vl.media._errors import naming_sample, shortened

FORMAT = 1
MANIFEST = "manifest.json"
# Of each sample: the number of its record, and what `counts_of` counts
SAMPLES = "samples.npy"


def prepared_dataset(tokenizer: ChatTransform, *, directory: str) -> "PreparedDataset":
    """Read what ``tune-vl prepare`` wrote; see docs/prepare.md.

    Args:
        tokenizer: the model's transform, as recipes pass it, with the settings of the preparation.
        directory: which was written.

    Raises:
        ValueError: if the directory is not complete, or was prepared with other settings.
    """
    path = Path(directory)
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} has no {MANIFEST}: name a directory of `tune-vl prepare`")
    manifest = read_json_object(path / MANIFEST)
    check_format(manifest)
    if not manifest.flag("is_complete"):
        raise ValueError(f"{path} is not complete: run the same `tune-vl prepare` again")
    changes = differences(manifest.part("transform").content, transform_settings(tokenizer))
    if changes:
        problem = f"{path} was prepared with other settings of the tokenizer: {changes}"
        raise ValueError(f"{problem}; restore them, or prepare the data anew")
    return PreparedDataset(path, manifest, tokenizer.geometry)


def check_format(manifest: JsonObject) -> None:
    """Raise ``ValueError`` if a manifest is of another release's format."""
    if manifest.whole("format") != FORMAT:
        raise manifest.error("format", f"{FORMAT}: prepare the data anew")


def transform_settings(transform: ChatTransform) -> dict[str, str]:
    """Tell a transform from those that make other samples, by settings that a user knows."""
    settings = {
        f"{kind}.{name}": repr(value)
        for kind in ("image", "video")
        for name, value in vars(getattr(transform, f"{kind}_transform")).items()
        if name != "geometry"
    }
    for name in ("max_seq_len", "truncation", "train_on", "parse_special", "tokens_per_second"):
        settings[name] = repr(getattr(transform, name))
    settings["add_vision_id"] = repr(transform.prompts.add_vision_id)
    return {**settings, "family, vocabulary, template or release": transform.fingerprint}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings are others, of fingerprints only if nothing else is."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    told = [name for name in names if " " not in name] or names
    return shortened(", ".join(f"{x} was {before.get(x)} and is {now.get(x)}" for x in told))


class PreparedDataset(Dataset):
    """Samples that were transformed before, of a table of conversations; bad ones are left out.

    Memory is mapped, so that data workers share it. ``ValueError`` if a shard is missing or has not
    the size that the manifest says; what is damaged within is found by reading.
    """

    def __init__(self, directory: Path, manifest: JsonObject, geometry: Geometry) -> None:
        self._geometry = geometry
        shards = manifest.each("shards")
        listed = [shards.part(number) for number in shards.content]
        self._shards = [Shard(_file(directory, x), x.text("xxh3_128")) for x in listed]
        lengths = [x.whole("samples", least=0) for x in listed]
        self._ends = [*accumulate(lengths)]
        path = _file(directory, manifest.part("samples"))
        if checksum(path) != manifest.part("samples").text("xxh3_128"):
            raise ValueError(f"{path} is damaged: copy it again, or run prepare again")
        self._samples = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(self._samples) != sum(lengths):
            raise ValueError(f"{manifest.file}: its shards have not the samples of {SAMPLES}")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a sample, the same as before it was stored; a ValueError names it and its file."""
        shard, number = self._find(index)
        with naming_sample(index):
            return read_sample(shard, number, self._geometry)

    def measure(self, index: int) -> tuple[int, int, int]:
        """Count tokens, patches and supervised tokens of a sample."""
        return self.examine(index).size

    def examine(self, index: int) -> Examined:
        """Measure a sample, and tell what of it is cut."""
        _, tokens, patches, targets, media, *lost = self._samples[index].tolist()
        truncated = dict(zip(LOST, lost, strict=True)) if lost[0] else None
        return Examined((tokens, patches, targets), truncated, media)

    def measurements(self, indices: Sequence[int]) -> Measurements:
        """Measure samples, as :func:`~torchtune_vl.datasets.measure` does."""
        places = np.asarray(indices, np.int64)
        counts = self._samples[places]
        media, lost = counts[:, 4], counts[:, 5:]
        loses_media = lost[:, 1:].any(axis=1)
        found = Measurements(np.ascontiguousarray(counts[:, 1:4]))
        in_all = dict(zip(LOST, lost.sum(axis=0).tolist(), strict=True))
        cut = {"truncated": np.count_nonzero(lost[:, 0]), "lost media": int(loses_media.sum())}
        found.counts = +Counter({"media": int(media.sum()), **cut, **in_all})
        if cut["truncated"]:
            first = int(np.argmax(loses_media if loses_media.any() else lost[:, 0] > 0))
            example = dict(zip(LOST, lost[first].tolist(), strict=True))
            found.example = (int(places[first]), example)
        return found

    def origin(self, index: int) -> tuple[Any, str]:
        """Return a sample's id, by default the number of its record, and its file and line."""
        with naming_sample(index):
            return read_origin(*self._find(index))

    def _find(self, index: int) -> tuple[Shard, int]:
        """The shard of a sample, and its number there."""
        index = range(len(self))[index]
        shard = bisect_right(self._ends, index)
        return self._shards[shard], index - (self._ends[shard - 1] if shard else 0)


def _file(directory: Path, listed: JsonObject) -> Path:
    """A listed file, which has the size that it had."""
    name, size = listed.text("file"), listed.whole("size")
    path = directory / name
    if not is_inside(name):
        raise listed.error("file", f"a file inside of {directory}")
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found:,} bytes and not {size:,}"
        raise ValueError(f"{path} {state}: copy it again, or run the same `tune-vl prepare` again")
    return path
