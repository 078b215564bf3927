"""Transforms the samples of a dataset before training, in processes here or on a cluster."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import Dataset
from tqdm import tqdm

from torchtune_vl.chat import ChatTransform
from torchtune_vl.chat._transform import Examined
from torchtune_vl.data._data_workers import loading
from torchtune_vl.data._training_rows import size_of
from torchtune_vl.datasets._conversations import VisionChatDataset
from torchtune_vl.datasets._prepared import (
    FORMAT,
    MANIFEST,
    SAMPLES,
    check_format,
    differences,
    transform_settings,
)
from torchtune_vl.datasets._sample_sizes import SamplesError, counts_of
from torchtune_vl.datasets._shards import write_shard
from torchtune_vl.files._directory import checksum, new_file, open_locked, write_json
from torchtune_vl.files._json import read_json_object
from torchtune_vl.media._errors import naming_sample

BAD_SAMPLES = "bad_samples.jsonl"
# Number of a bad sample's record, and why it is bad
Bad = tuple[int, str]


@dataclass(eq=False)
class Shards(Dataset):
    """The shards of a dataset, each of which is written when it is asked for.

    A shard is ``shard_00000.arrow`` and, written after it, ``shard_00000.json`` with its size and
    checksum, a digest of its records, and what its samples count.

    Args:
        dataset: whose samples it writes.
        directory: of the files.
        shard_size: how many records a shard is made of, but for the last.
        skips_bad: whether a shard with samples that cannot be made is good without them.
    """

    dataset: VisionChatDataset
    directory: Path
    shard_size: int
    skips_bad: bool

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.shard_size)

    def __getitem__(self, number: int) -> list[Bad]:
        """Write a shard, unless it is there and whole; tells its bad samples."""
        first = number * self.shard_size
        records = range(first, min(first + self.shard_size, len(self.dataset)))
        digest = self._digest(records)
        entry = self.entry(number)
        if entry is None or entry["records"] != digest or not self._is_whole(number, entry):
            entry = self._write(number, records, digest)
        return [(record, reason) for record, reason in entry["bad"]]

    def path(self, number: int) -> Path:
        """The file of a shard's samples."""
        return self.directory / f"shard_{number:05}.arrow"

    def entry(self, number: int) -> dict[str, Any] | None:
        """What was written down of a shard, if anything was."""
        path = self.path(number).with_suffix(".json")
        return read_json_object(path).content if path.is_file() else None

    def _digest(self, records: range) -> str:
        try:
            return xxhash.xxh3_128_hexdigest(b"".join(self.dataset.digests(records)))
        except (ValueError, OSError):  # is told by each of the samples
            return ""

    def _is_whole(self, number: int, entry: Mapping[str, Any]) -> bool:
        if not entry["records"] or (entry["bad"] and not self.skips_bad):
            return False
        path = self.path(number)
        return path.is_file() and checksum(path) == entry["xxh3_128"]

    def _write(self, number: int, records: range, digest: str) -> dict[str, Any]:
        samples: list[list[int]] = []
        bad: list[Bad] = []

        def made() -> Iterator[tuple[dict[str, Any], tuple[Any, str]]]:
            for record in records:
                try:
                    with naming_sample(record):
                        sample, origin = self.dataset[record], self.dataset.origin(record)
                except ValueError as error:  # one bad sample must not hide the others
                    bad.append((record, str(error)))
                else:
                    samples.append([record, *counts_of(_examined(sample))])
                    yield sample, origin

        path = self.path(number)
        write_shard(path, made())
        file = {"file": path.name, "size": path.stat().st_size, "xxh3_128": checksum(path)}
        entry = {**file, "records": digest, "samples": samples, "bad": bad}
        write_json(path.with_suffix(".json"), entry)
        return entry


def _examined(sample: Mapping[str, Any]) -> Examined:
    vision = sample["encoder_input"]["vision"] if "encoder_input" in sample else {}
    return Examined(size_of(sample), sample.get("truncated"), len(vision.get("grid_thw", ())))


def check_can_be_prepared(dataset: Any, transform: ChatTransform) -> None:
    """Raise ``ValueError`` if samples are not the same in each epoch, or cannot be stored."""
    if not isinstance(dataset, VisionChatDataset):
        problem = f"a {type(dataset).__name__} cannot be prepared"
        raise ValueError(f"{problem}: use vision_chat_dataset as a table, without streaming")
    if dataset.augments:
        problem = "samples that are augmented differ from epoch to epoch, and cannot be prepared"
        raise ValueError(f"{problem}: leave augmentation out")
    dtypes = {transform.image_transform.patch_dtype, transform.video_transform.patch_dtype}
    if dtypes != {"uint8"}:
        problem = "float32 patches take eight times the room for the same embeddings"
        raise ValueError(f"{problem}: set tokenizer.patch_dtype=uint8")


def prepare(
    dataset: VisionChatDataset,
    transform: ChatTransform,
    directory: Path,
    settings: Mapping[str, Any],
    *,
    shard_size: int = 500,
    num_workers: int = 0,
    ray_address: str | None = None,
    skips_bad: bool = False,
    largest_bad_share: float = 1.0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write the samples of a dataset to a directory, of which ``prepared_dataset`` reads them.

    What an earlier call left unfinished is finished: shards that are whole, and whose records are
    the same, stay.

    Args:
        dataset: of :func:`~torchtune_vl.datasets.vision_chat_dataset`.
        transform: that the dataset was made with.
        directory: made if it is not there.
        settings: of the dataset, as JSON has them; a directory is finished with the same ones only.
        shard_size: how many records a shard is made of.
        num_workers: processes that work besides this one; 0: none, or with Ray as many as it can.
        ray_address: of the Ray cluster that works instead, "local" for one on this machine.
        skips_bad: whether samples that cannot be made are left out, and listed.
        largest_bad_share: with ``skips_bad``, a larger share of bad samples is an error.
        show_progress: whether to show a progress bar.

    Returns:
        What the manifest says.

    Raises:
        SamplesError: if samples cannot be made and are not skipped; all others are done by then.
        ValueError: if the dataset cannot be prepared, or the directory is of something else.
    """
    check_can_be_prepared(dataset, transform)
    manifest = {
        "format": FORMAT,
        "is_complete": False,
        "dataset": {**settings, "shard_size": shard_size},
        "transform": transform_settings(transform),
    }
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with open_locked(directory / ".lock"):
        _begin(directory, manifest)
        shards = Shards(dataset, directory, shard_size, skips_bad)
        work = partial(_on_ray, ray_address) if ray_address else _in_processes
        bad: list[Bad] = []
        bar = tqdm(total=len(shards), desc="preparing", unit=" shards", disable=not show_progress)
        with bar:
            for of_shard in work(shards, num_workers):
                bad += of_shard
                bar.update()
        bad.sort()
        _list_bad(directory, bad)
        if bad and not skips_bad:
            raise SamplesError(bad, len(bad), len(dataset))
        if len(bad) > largest_bad_share * len(dataset):
            told = f"{len(bad)} of {len(dataset)} samples are bad, more than max_bad_share"
            raise ValueError(f"{told}: look at {directory / BAD_SAMPLES}, or raise it")
        manifest |= {"is_complete": True, "bad": len(bad), **_finish(shards)}
        write_json(directory / MANIFEST, manifest)
    return manifest


def _begin(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write down what is being prepared, or check that it is what was begun."""
    path = directory / MANIFEST
    if not path.is_file():
        if others := sorted(x.name for x in directory.iterdir() if x.name != ".lock"):
            raise ValueError(f"{directory} has {others[0]}: name an empty or a new directory")
    else:
        begun = read_json_object(path)
        check_format(begun)
        for kind in ("dataset", "transform"):
            if changes := differences(begun.part(kind).content, manifest[kind]):
                problem = f"{directory} was begun with other settings: {changes}"
                raise ValueError(f"{problem}; restore them, or name another directory")
    write_json(path, manifest)


def _in_processes(shards: Shards, num_workers: int) -> Iterator[list[Bad]]:
    with loading(shards, num_workers, batch_size=None) as written:
        yield from written


def _on_ray(address: str, shards: Shards, num_workers: int) -> Iterator[list[Bad]]:
    try:
        import ray
    except ImportError as error:
        raise ValueError("Ray is not installed: pip install 'torchtune-vl[ray]'") from error
    ray.init(address, ignore_reinit_error=True)

    def write(row: dict[str, Any]) -> dict[str, str]:
        return {"bad": json.dumps(shards[int(row["id"])])}

    # A block for each shard, or else one task would write several
    numbers = ray.data.range(len(shards), override_num_blocks=len(shards))
    for row in numbers.map(write, concurrency=num_workers or None).iter_rows():
        yield [(record, reason) for record, reason in json.loads(row["bad"])]


def _list_bad(directory: Path, bad: list[Bad]) -> None:
    path = directory / BAD_SAMPLES
    path.unlink(missing_ok=True)
    if bad:
        lines = [json.dumps({"sample": record, "reason": reason}) for record, reason in bad]
        with new_file(path) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _finish(shards: Shards) -> dict[str, Any]:
    """Join what was written down of all shards, and remove what is left of others."""
    listed, samples, kept = [], [np.empty((0, 8), np.int32)], set()
    for number in range(len(shards)):
        entry, path = shards.entry(number), shards.path(number)
        if entry is None:
            problem = f"{path} is not there, although it was written"
            raise ValueError(f"{problem}: name a directory that is the same on all machines")
        kept |= {path, path.with_suffix(".json")}
        samples.append(np.array(entry["samples"], np.int32).reshape(-1, 8))
        facts = {name: entry[name] for name in ("file", "size", "xxh3_128", "records")}
        listed.append({**facts, "samples": len(entry["samples"])})
    for path in {*shards.directory.glob("shard_*")} - kept:
        path.unlink()
    path = shards.directory / SAMPLES
    with new_file(path) as partial, partial.open("wb") as file:
        np.save(file, np.concatenate(samples), allow_pickle=False)
    of_samples = {"file": SAMPLES, "size": path.stat().st_size, "xxh3_128": checksum(path)}
    return {"samples": of_samples, "shards": listed}
