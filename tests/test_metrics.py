"""The metrics of a line of the log, from rows of known content."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from torchtune_vl.data import Row, RowSharing, Size, packed_collate_vision
from torchtune_vl.training import _metrics
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._metrics import Metrics

ONE = Mesh(1, 1, 1, 1)


class Flops:
    """Counts a thousand operations for each token, and a million for each image."""

    def step(self, documents: list[int], media: Any, num_targets: int) -> int:
        return 1000 * sum(documents) + (10**6 * len(media["grid_thw"]) if media else 0)


class Logger:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.is_open = True

    def log_dict(self, metrics: dict[str, float], step: int) -> None:
        self.lines.append((step, metrics))

    def close(self) -> None:
        self.is_open = False


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(_metrics.time, "perf_counter", lambda: now[0])
    return now


def row(tokens: list[int], targets: int, images: int) -> Row:
    batch: dict[str, Any] = {"tokens": torch.zeros(2, 50), "targets": torch.zeros(targets)}
    if images:
        batch["encoder_input"] = {"vision": {"grid_thw": torch.zeros(images, 3)}}
    sizes = [Size(n, 0, 0 if i else targets) for i, n in enumerate(tokens)]
    sources = [number % 2 for number in range(len(tokens))]
    return Row(batch, [*range(len(tokens))], sizes, {}, images > 0, [], sources)


def add(metrics: Metrics, *of_row: Any) -> None:
    made = row(*of_row)
    metrics.add_row(made, torch.arange(float(len(made.batch["targets"]))))


@pytest.mark.parametrize(("room", "expected"), [(80, 60 / 160), (None, 60 / 200)])
def test_a_line(clock: list[float], room: int | None, expected: float) -> None:
    logger = Logger()
    metrics = Metrics(logger, Flops(), room, torch.device("cpu"), ONE, sources=["0"])  # type: ignore[arg-type]
    metrics.peak_flops = 1e6
    add(metrics, [1000], 999, 9)
    metrics.add_loss(9.0)
    metrics.begin()
    metrics.waited += 0.5
    add(metrics, [10, 20], 7, 0)
    metrics.add_loss(3.0)
    add(metrics, [30], 3, 2)
    metrics.add_loss(2.0)
    clock[0] += 4.0
    groups = [{"part": "decoder", "lr": 0.1}, {"part": "merger", "lr": 0.2}]
    line, asked_to_stop = metrics.write(7, 1.5, groups, False)
    assert not asked_to_stop
    assert logger.lines == [(7, line)]
    assert line.pop("memory_gb") > 0.01
    assert line == pytest.approx(
        {
            "loss": 2.5,
            "grad_norm": 1.5,
            "lr_decoder": 0.1,
            "lr_merger": 0.2,
            "tokens_per_second": 15.0,
            "supervised_tokens_per_second": 2.5,
            "media_per_second": 0.5,
            "row_fill": expected,
            "waiting_for_data": 0.125,
            "mfu": (60e3 + 2e6) / 4.0 / 1e6,
        }
    )
    assert metrics.write(7, 1.5, groups, True)[1]
    assert metrics.history["losses"] == [9.0, 3.0, 2.0]
    metrics.close()
    assert not logger.is_open


def test_rows_that_several_processes_have_count_once(clock: list[float]) -> None:
    lines = []
    for copies in (1, 2):
        metrics = Metrics(None, Flops(), 80, torch.device("cpu"), Mesh(1, 1, 1, copies), ["0"])  # type: ignore[arg-type]
        add(metrics, [10, 20], 7, 0)
        metrics.add_loss(3.0)
        clock[0] += 1.0
        lines.append(metrics.write(1, 1.0, [], False)[0])
    assert lines[0]["tokens_per_second"] == 2 * lines[1]["tokens_per_second"] == 30
    assert "mfu" not in lines[0]


@pytest.mark.parametrize("copies", [1, 2])
def test_each_dataset_of_a_mixture_has_its_loss(copies: int) -> None:
    metrics = Metrics(
        None, Flops(), 80, torch.device("cpu"), Mesh(1, 1, 1, copies), ["a", "b", "none"]
    )  # type: ignore[arg-type]
    batch: dict[str, Any] = {"tokens": torch.zeros(1, 50), "targets": torch.zeros(6)}
    sizes = [Size(10, 0, 1), Size(20, 0, 3), Size(12, 0, 2)]
    made = Row(batch, [4, 7, 5], sizes, {}, False, [(9, "sample 9: it is torn")], [0, 1, 0])
    for _ in range(copies):
        metrics.add_row(made, torch.tensor([1.0, 10.0, 20.0, 30.0, 3.0, 5.0]))
    metrics.add_loss(3.0)
    line, _ = metrics.write(1, 1.0, [], False)
    assert line["loss/a"] == pytest.approx((1 + 3 + 5) / 3)
    assert line["loss/b"] == pytest.approx(20)
    assert "loss/none" not in line
    names = ("samples/a", "samples/b", "samples/none", "tokens/a", "tokens/b", "tokens/none")
    assert [line[name] for name in names] == [2, 1, 0, 22, 20, 0]
    assert line["bad_samples"] == 1
    assert metrics.history["samples"] == 4


def test_losses_of_devices_that_share_a_row_are_added() -> None:
    metrics = Metrics(None, Flops(), 80, torch.device("cpu"), Mesh(1, 1, 2, 1), ["a", "b"])  # type: ignore[arg-type]
    sizes = [Size(10, 0, 1), Size(20, 0, 3), Size(12, 0, 2)]
    losses = torch.tensor([1.0, 10.0, 20.0, 30.0, 3.0, 5.0])
    documents = packed_collate_vision(
        [{"tokens": [1] * 4, "labels": [1] * 4, "input_pos": torch.zeros(4, 3)}]
    )
    for device, own in enumerate(([0, 2, 5], [1, 3, 4])):
        share = RowSharing(device, 2, ())(documents)["mask"]
        batch: dict[str, Any] = {"mask": replace(share, targets=torch.tensor(own))}
        metrics.add_row(Row(batch, [4, 7, 5], sizes, {}, False, [], [0, 1, 0]), losses[own])
    metrics.add_loss(3.0)
    line, _ = metrics.write(1, 1.0, [], False)
    assert line["loss/a"] == pytest.approx((1 + 3 + 5) / 3)
    assert line["loss/b"] == pytest.approx(20)
    assert [line[f"tokens/{name}"] for name in "ab"] == [22, 20]


def test_the_best_validation() -> None:
    for best_by, is_best in (
        ("loss", [False, True, True, False, False]),
        ("anls", [False, True, False, True, False]),
    ):
        logger = Logger()
        sources = (["0"], best_by)
        metrics = Metrics(logger, Flops(), None, torch.device("cpu"), ONE, *sources)  # type: ignore[arg-type]
        assert metrics.history["best"] == {"value": None, "step": None}
        losses = {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.0, 8: 2.5}
        scores = {0: 9.0, 2: 0.2, 4: 0.1, 6: 0.3, 8: 0.3}
        assert [
            metrics.write_validation(step, loss, {"anls": scores[step]})
            for step, loss in losses.items()
        ] == is_best
        best = {"loss": {"value": 2.0, "step": 4}, "anls": {"value": 0.3, "step": 6}}[best_by]
        assert metrics.history["best"] == best
        assert metrics.history["validation_losses"] == [*losses.items()]
        assert logger.lines[0] == (0, {"validation_loss": 1.0, "validation_anls": 9.0})


def test_a_gpu_is_asked_for_its_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", {device: "NVIDIA H100 80GB HBM3"}.get)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {device: 5}.get)
    metrics = Metrics(None, Flops(), None, device, ONE, ["0"])  # type: ignore[arg-type]
    assert metrics.peak_flops == 989.4e12
    assert metrics._peak_memory() == 5
