"""All that is wrong with a dataset, or may be, found before anything is trained on it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from torchtune_vl.chat import ChatTransform
from torchtune_vl.data import Planner
from torchtune_vl.data._data_workers import loading
from torchtune_vl.data._plan import unusable
from torchtune_vl.datasets._box_units import UnitEvidence
from torchtune_vl.datasets._check_sample import LIBRARIES, Found, SampleCheck, load_libraries
from torchtune_vl.datasets._mixture import Mixture
from torchtune_vl.datasets._near_duplicates import near_duplicates
from torchtune_vl.datasets._record_cache import Kept, RecordCache

# So many are kept at a time, and at most so many checked in vain if the process is killed
_BATCH_SIZE = 128
BAD = "bad"
# Kinds of findings, with what each says of a sample; all but the first are warnings
KINDS = {
    BAD: "cannot be trained on",
    "truncated": "is longer than max_seq_len and is cut",
    "duplicate": "says and shows the same as another",
    "near duplicate": "says and shows almost the same as another",
    "special token": "spells out special tokens or tags of media",
    "empty answer": "has an answer without a text",
    "box unit": "has boxes that look like those of another unit",
}


def check(
    mixture: Mixture,
    transform: ChatTransform,
    planner: Planner,
    *,
    decode: bool = False,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Look at all samples of a dataset, and tell what is wrong with them or may be.

    What is found is kept in the cache directory after each batch. So a check that was killed goes
    on, and a second one looks only at records that are new or changed, or whose media are, and at
    bad ones.

    Args:
        mixture: of the dataset or the datasets, all of
            :func:`~torchtune_vl.datasets.vision_chat_dataset`.
        transform: that of the datasets.
        planner: of rows, in which each sample has to fit.
        decode: whether to decode all media: then damage that headers do not show is found, and
            images are compared by what they show instead of by their names.
        num_workers: processes to check in, besides this one; 0: in this one.

    Returns:
        Values that JSON can hold, the same for any number of processes: ``samples``, their number;
        ``decoded``; ``counts`` of samples for each of :data:`KINDS`; ``findings``, by kind and
        sample, of which each has its ``kind``, ``sample``, ``dataset`` ("" if there is one only),
        ``other``, the sample that it duplicates or None, and ``reason``, a sentence; ``answers``,
        how many carry loss, ``any``, are ``empty`` or ``one word``; and ``languages``, the number
        of samples by ISO 639-1, "" for those with too few letters to tell.

    Raises:
        ValueError: if the dataset is a stream or another kind of dataset, a library is missing, or
            the cache cannot be written.
    """
    if mixture.is_stream:
        raise ValueError("a stream cannot be checked, only a table: leave streaming out")
    for dataset in mixture.datasets:
        if not hasattr(dataset, "read"):
            problem = f"a {type(dataset).__name__} does not give its samples as they are read"
            raise ValueError(f"{problem}: use torchtune_vl.datasets.vision_chat_dataset")
    load_libraries()
    each = [_all_found(d, transform, decode, num_workers) for d in mixture.datasets]
    joined = [found for of_dataset in each for found in of_dataset]
    bad = [*_bad(mixture, planner, joined)]
    are_bad = {finding["sample"] for finding in bad}
    usable = {sample: found for sample, found in enumerate(joined) if sample not in are_bad}
    findings = sorted(
        [*bad, *_warnings(mixture, usable), *_box_units(mixture, each)],
        key=lambda finding: ([*KINDS].index(finding["kind"]), finding["sample"]),
    )
    counts = Counter(finding["kind"] for finding in findings)
    answers = Counter({"any": 0, "empty": 0, "one word": 0})
    for found in usable.values():
        answers.update(found.answers)
    languages = Counter(found.language for found in usable.values())
    return {
        "samples": len(joined),
        "decoded": decode,
        "counts": {kind: counts[kind] for kind in KINDS},
        "findings": findings,
        "answers": dict(answers),
        "languages": dict(sorted(languages.items(), key=lambda item: (-item[1], item[0]))),
    }


def _all_found(
    dataset: Any, transform: ChatTransform, decode: bool, num_workers: int
) -> list[Found]:
    batches = _BatchCheck(dataset, SampleCheck(dataset, transform, decode))
    indices = range(len(dataset))
    all_found: list[Found] = []
    with (
        loading(indices, num_workers, batch_size=_BATCH_SIZE, collate_fn=batches) as loaded,
        tqdm(total=len(indices), desc="checking", unit=" samples") as bar,
    ):
        for found, new in loaded:
            all_found += found
            batches.keep(new)
            bar.update(len(found))
    return all_found


class _BatchCheck:
    """Checks samples, of which those are known that an earlier check kept.

    All are checked anew if nobody would notice that their media have changed.
    """

    def __init__(self, dataset: Any, check_sample: SampleCheck) -> None:
        self._dataset = dataset
        self._check_sample = check_sample
        self._fingerprint = None
        if (of_dataset := getattr(dataset, "fingerprint", None)) is not None:
            versions = [version(name) for name in LIBRARIES.values()]
            own = f"{of_dataset} {check_sample.decodes} {versions}"
            self._fingerprint = xxhash.xxh3_128_hexdigest(own.encode())

    def __call__(self, indices: Sequence[int]) -> tuple[list[Found], list[Kept]]:
        """Check samples; gives those, too, that are to be kept."""
        digests = self._digests(indices)
        known = self._known(digests)
        found, new = [], []
        for place, index in enumerate(indices):
            if digests and digests[place] in known:
                found.append(Found.from_bytes(known[digests[place]]))
                continue
            of_sample, files, state = self._check_sample(index)
            found.append(of_sample)
            if digests and of_sample.reason is None and state is not None:
                new.append(Kept(digests[place], of_sample.to_bytes(), files, state))
        return found, new

    def keep(self, new: Sequence[Kept]) -> None:
        """Keep what was found of samples."""
        if new and self._fingerprint is not None:
            with RecordCache("checks", self._fingerprint) as cache:
                cache.add(new)

    def _digests(self, indices: Sequence[int]) -> list[bytes]:
        try:
            return self._dataset.digests(indices) if self._fingerprint else []
        except (ValueError, OSError):  # is told by each of the samples
            return []

    def _known(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        if not digests or self._fingerprint is None:
            return {}
        with RecordCache("checks", self._fingerprint) as cache:
            return cache.find(digests)


def _finding(
    mixture: Mixture, kind: str, sample: int, reason: str, other: int | None = None
) -> dict[str, Any]:
    dataset = mixture.name_of(sample)
    finding = {"kind": kind, "sample": sample, "dataset": dataset, "other": other}
    return {**finding, "reason": reason}


def _bad(mixture: Mixture, planner: Planner, joined: Sequence[Found]) -> Iterator[dict[str, Any]]:
    """What cannot be read, and what can but exceeds a row."""
    for sample, found in enumerate(joined):
        if found.reason is not None:
            reason = found.reason
            if name := mixture.name_of(sample):
                reason = f"sample {sample}: {name}: {reason}"
            yield _finding(mixture, BAD, sample, reason)
    sizes = np.array([found.counts[:3] for found in joined], np.int32)
    for sample, reason in unusable(planner, sizes):
        yield _finding(mixture, BAD, sample, mixture.with_place(sample, reason))


def _warnings(mixture: Mixture, usable: Mapping[int, Found]) -> Iterator[dict[str, Any]]:
    def warn(kind: str, sample: int, told: str, other: int | None = None) -> dict[str, Any]:
        reason = mixture.with_place(sample, f"sample {sample}: {told}")
        return _finding(mixture, kind, sample, reason, other)

    for sample, found in usable.items():
        *_, tokens, images, videos = found.counts
        if tokens:
            lost = f"loses {tokens} tokens, {images} images and {videos} videos"
            yield warn("truncated", sample, f"it is longer than max_seq_len and {lost}")
        if found.special:
            told = f"its texts have {', '.join(found.special)}, letters like any others"
            yield warn("special token", sample, told)
        if empty := found.answers["empty"]:
            told = f"{empty} of its {found.answers['any']} answers have no text"
            yield warn("empty answer", sample, told)
    first: dict[bytes, int] = {}
    for sample, found in usable.items():
        other = first.setdefault(found.content, sample)
        if other != sample:
            yield warn("duplicate", sample, f"it is the same as sample {other}", other)
    for sample, other, share in _near(usable, sorted(first.values())):
        told = f"it shares {share:.0%} of its text with sample {other}, and its media are alike"
        yield warn("near duplicate", sample, told, other)


def _near(
    usable: Mapping[int, Found], different: Sequence[int]
) -> Iterator[tuple[int, int, float]]:
    if not different:
        return
    texts = np.frombuffer(b"".join(usable[s].text for s in different), np.uint32)
    media = [np.frombuffer(usable[s].media, np.uint64) for s in different]
    for later, (earlier, share) in near_duplicates(
        texts.reshape(len(different), -1), media
    ).items():
        yield different[later], different[earlier], share


def _box_units(mixture: Mixture, each: Iterable[Sequence[Found]]) -> Iterator[dict[str, Any]]:
    """A finding for each dataset and unit of its boxes that looks like another, at its first."""
    start = 0
    for of_dataset in each:
        parts: defaultdict[str, list[UnitEvidence]] = defaultdict(list)
        first: dict[str, int] = {}
        for number, found in enumerate(of_dataset, start):
            for unit, evidence in found.boxes.items():
                parts[unit].append(evidence)
                first.setdefault(unit, number)
        for unit, sample in first.items():
            evidence = UnitEvidence.joined(parts[unit])
            if other := evidence.other_than(unit):
                told = (
                    f"the unit of its boxes, and of those of {len(parts[unit]) - 1} other samples, "
                    f"is {unit!r}, but all {evidence.boxes} look like {other}"
                )
                reason = f"sample {sample}: {told}: set box_unit, or convert them"
                yield _finding(mixture, "box unit", sample, mixture.with_place(sample, reason))
        start += len(of_dataset)
