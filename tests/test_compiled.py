"""Functions that numba compiles are found again by the next process, where they can be kept."""

from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.caching import CompileResultCacheImpl

from torchtune_vl._numba import compiled
from torchtune_vl.media import _patches
from torchtune_vl.models.qwen2_5_vl import GEOMETRY


def test_loops_over_pixels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    frames = np.zeros((1, 56, 56, 3), np.uint8)
    found = []
    try:
        for _ in range(2):
            _patches._loops.cache_clear()  # as in another process
            _patches.patchify(frames, GEOMETRY)
            stats = _patches._loops(GEOMETRY.patch_size, GEOMETRY.merge_size).stats
            found.append((sum(stats.cache_hits.values()), sum(stats.cache_misses.values())))
    finally:
        _patches._loops.cache_clear()
    assert found == [(0, 1), (1, 0)]


def test_processes_that_save_at_the_same_time_keep_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    @compiled
    def double(x):  # type: ignore[no-untyped-def]
        return 2 * x

    double._cache._cache_file._load_index = dict  # as if nobody had saved before
    assert (double(3), double(1.5)) == (6, 3.0)
    assert len([*tmp_path.rglob("*.nbc")]) == 2


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    @compiled
    def double(x):  # type: ignore[no-untyped-def]
        return 2 * x

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    double._cache._cache_file._save_data = refuse
    assert double(3) == 6
    assert not [*tmp_path.rglob("*.nb?")]


def test_without_a_directory_to_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])

    @compiled
    def double(x):  # type: ignore[no-untyped-def]
        return 2 * x

    assert double(3) == 6
    assert not double.stats.cache_path
