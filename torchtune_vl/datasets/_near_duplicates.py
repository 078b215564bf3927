"""Samples that are almost the same, found without comparing all with all.

Two samples are near duplicates if their texts share at least 90 % of their pieces, as MinHash
estimates it, and they have as many media, each of which differs in at most 4 of the 64 bits of its
hash. Candidates are those that agree in a band of both hashes. Shapes: N samples.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# Numbers of a MinHash, in bands of which those with the same text agree in all, those that share
# 90 % in one at least but for 1 in 10^7
TEXT_NUMBERS, _TEXT_BANDS = 64, 16
SIMILARITY = 0.9
# Hashes of media that differ in 4 bits agree in one of 5 bands
_DISTANCE = 4
_MEDIUM_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))
# Of many candidates in a band each is compared with so many of those before it
_COMPARED = 8
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits without a pattern


def near_duplicates(texts: np.ndarray, media: Sequence[np.ndarray]) -> dict[int, tuple[int, float]]:
    """Find for samples an earlier one that is almost the same, and how much of the text they share.

    Args:
        texts: MinHashes of the texts, uint32 [N, 64].
        media: hashes of each sample's media, each uint64 [number of media].
    """
    first = np.array([hashes[0] if len(hashes) else 0 for hashes in media], np.uint64)
    counts = np.array([len(hashes) for hashes in media], np.uint64)
    found: dict[int, tuple[int, float]] = {}
    seen: set[int] = set()
    for earlier, later in _candidates(texts, first, counts):
        pairs = earlier * len(texts) + later
        new = np.array([pair not in seen for pair in pairs.tolist()], bool)
        seen.update(pairs[new].tolist())
        earlier, later = earlier[new], later[new]
        shared = (texts[earlier] == texts[later]).mean(axis=1)
        close = np.bitwise_count(first[earlier] ^ first[later]) <= _DISTANCE
        close &= (shared >= SIMILARITY) & (counts[earlier] == counts[later])
        for row in np.flatnonzero(close).tolist():
            one, other = int(earlier[row]), int(later[row])
            distances = np.bitwise_count(media[one] ^ media[other])
            if (distances <= _DISTANCE).all() and one < found.get(other, (other,))[0]:
                found[other] = one, float(shared[row])
    return found


def _candidates(
    texts: np.ndarray, first: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of samples that agree in a band of their texts and in one of their first medium."""
    for band in np.split(texts.astype(np.uint64), _TEXT_BANDS, axis=1):
        of_text = counts.copy()
        for column in band.T:
            of_text = (of_text ^ column) * _FACTOR
            of_text ^= of_text >> np.uint64(32)
        for start, width in _MEDIUM_BANDS:
            bits = first >> np.uint64(start) & np.uint64(2**width - 1)
            keys = (of_text ^ bits) * _FACTOR
            order = np.argsort(keys, kind="stable")
            for shift in range(1, _COMPARED + 1):
                same = keys[order[shift:]] == keys[order[:-shift]]
                if not same.any():
                    break
                yield order[:-shift][same], order[shift:][same]
