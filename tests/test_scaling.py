"""The computed time of a step beside numbers by hand, and the page that shows it."""

import math
from pathlib import Path

import pytest

from benchmarks import scaling, step_time
from benchmarks.step_time import Group, Mesh, Stage, stages_seconds, step_times
from torchtune_vl.training._memory import estimate_memory

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
COMMUNICATION = ("waiting", "shard", "replicate", "context", "tensor")


@pytest.fixture(scope="module")
def case() -> scaling.Case:
    return scaling.case_of_images("7b")


@pytest.mark.parametrize(
    ("size", "stride", "group"),
    [(8, 1, (8, 1)), (64, 1, (8, 8)), (4, 2, (4, 1)), (8, 4, (2, 4)), (16, 8, (1, 16))],
)
def test_devices_of_a_group_lie_on_nodes(size: int, stride: int, group: tuple[int, int]) -> None:
    assert Group.of(size, stride) == Group(*group)


@pytest.mark.parametrize(
    ("group", "gigabytes", "seconds"),
    [
        (Group(1, 1), 1.0, 0.0),
        (Group(8, 1), 8 * 0.362, 7e-3 + 8.4e-6 + 7 * 3.4e-6),
        (Group(8, 16), 128 * 0.320, 127e-3 + 8.4e-6 + 112 * 3.4e-6 + 15 * 14e-6),
        (Group(1, 4), 4 * 0.045, 3e-3 + 8.4e-6 + 3 * 14e-6),  # by one of eight network cards
        (Group(8, 1), 0.0, 0.0),
    ],
)
def test_a_gather_takes_what_its_ring_does(group: Group, gigabytes: float, seconds: float) -> None:
    assert step_time.gather_seconds(group, 1e9 * gigabytes) == pytest.approx(seconds)


def test_an_all_reduce_is_a_ring_if_large_and_a_tree_if_wide() -> None:
    ring = step_time.all_reduce_seconds(Group(8, 1), 8 * 362e6)
    assert ring == pytest.approx(14e-3 + 8.4e-6 + 14 * 3.4e-6)
    tree = step_time.all_reduce_seconds(Group(1, 128), 0.92 * 32.5e6)
    assert tree == pytest.approx(2e-3 + 2 * 7 * 28e-6)
    small = step_time.small_all_reduce_seconds(Group(8, 128))
    assert small == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 7 * 5e-6))


def test_an_exchange_leaves_a_node_by_one_card() -> None:
    inside = step_time.exchange_seconds(Group(8, 1), 8 * 362e6)
    assert inside == pytest.approx(7e-3 + 8.4e-6 + 7 * 3.4e-6)
    outside = step_time.exchange_seconds(Group(8, 4), 4 * 45e6)
    assert outside == pytest.approx(3e-3 + 8.4e-6 + 31 * 14e-6)


@pytest.mark.parametrize(
    ("shares_links", "last"),
    # What is moved beside the first layer's backward, of the second, and after it
    [(False, 50 + 5), (True, 40 + 50 + 4 + 5)],
)
def test_layers_overlap_with_what_is_moved(shares_links: bool, last: float) -> None:
    stages = [Stage(1, 2, 3, 4, 5), Stage(10, 20, 30, 40, 50)]
    # The first gather, the second one beside the first layer, and the second layer; then a gather
    # anew, and the second layer's backward
    assert stages_seconds(stages, shares_links) == 3 + 30 + 10 + 30 + 20 + last


def test_an_embedding_is_gathered_once() -> None:
    embedding = Stage(0, 0, 3, 4, is_gathered_again=False)
    seconds = stages_seconds([embedding, Stage(10, 20, 30, 40)], shares_links=True)
    assert seconds == 3 + 30 + 10 + 30 + 20 + 40 + 4


def test_one_device_computes_alone(case: scaling.Case) -> None:
    row = case.row
    times = step_times(case.model, row, Mesh(), rows=3)
    flops = case.model.flops.step(row.documents, row.media, row.targets)
    assert times.compute == pytest.approx(3 * flops / (0.5 * 989.4e12))
    assert times.recompute == pytest.approx(times.compute / 3)
    assert [getattr(times, term) for term in COMMUNICATION] == pytest.approx([0.0] * 5)
    assert times.total == pytest.approx(times.compute + times.recompute + times.optimizer)


def test_devices_share_rows_and_layers(case: scaling.Case) -> None:
    encoder, decoder, output = step_time.compute_seconds(case.model, case.row, Mesh())
    halves = step_time.compute_seconds(case.model, case.row, Mesh(context=2))
    assert halves == pytest.approx((encoder / 2, decoder / 2, output / 2))
    layers = step_time.compute_seconds(case.model, case.row, Mesh(tensor=4))
    assert layers == pytest.approx((encoder, decoder / 4, output / 4))
    # 16,384 tokens of bfloat16, gathered and scattered at attention and feed-forward
    exchange, _ = step_time.tensor_seconds(case.model, case.row, Mesh(tensor=4))
    hidden = 2 * 3584 * 16_384
    assert exchange == pytest.approx(4 * step_time.gather_seconds(Group(4, 1), hidden))
    keys, _ = step_time.context_seconds(case.model, case.row, Mesh(context=8))
    assert keys == pytest.approx(step_time.gather_seconds(Group(8, 1), 2 * 2 * 4 * 128 * 16_384))


def test_terms_add_up(case: scaling.Case) -> None:
    mesh = Mesh(replicate=2, shard=4, context=2, tensor=4)
    times = step_times(case.model, case.row, mesh, rows=16, imbalance=1.25)
    assert times.waiting == pytest.approx((times.compute + times.recompute) / 4)
    terms = (*COMMUNICATION, "compute", "recompute", "optimizer")
    assert all(getattr(times, term) > 0 for term in terms)
    assert times.total == pytest.approx(sum(getattr(times, term) for term in terms))
    twice = step_times(case.model, case.row, mesh, rows=32, imbalance=1.25)
    assert twice.total - times.total == pytest.approx(times.total - times.optimizer)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_memory_is_that_of_the_estimate(case: scaling.Case, turns: int) -> None:
    config = case.model.config.copy()
    config.rows.update({"max_tokens": case.row.tokens, "max_patches": case.row.patches})
    config.rows_per_step, config.parallel.context = 16 * turns, 2
    estimated = sum(estimate_memory(config, 32).values())
    assert case.memory_bytes(Mesh(shard=16, context=2), 16 * turns) == estimated
    assert case.memory_bytes(Mesh(2, 16, 2), 2 * 16 * turns) == estimated


def test_the_slowest_of_more_devices_is_slower(case: scaling.Case) -> None:
    assert case.imbalance is not None
    ratio = case.imbalance.ratio
    assert ratio(64, 1) == pytest.approx(1)
    assert 1 < ratio(8, 8) < ratio(64, 64)
    assert ratio(64, 8) < ratio(8, 8)  # heavy rows beside each other


def test_meshes_fit_and_divide(case: scaling.Case) -> None:
    meshes = [*case.meshes(16, rows=8)]
    assert Mesh(shard=8, tensor=2) in meshes
    assert {math.prod(mesh) for mesh in meshes} == {16}
    assert max(mesh.tensor for mesh in meshes) == 4  # of 28 and 4 heads
    assert max(mesh.data for mesh in meshes) == 8
    assert not case.fits(Mesh(), rows=1)  # 16 bytes of each of 8.3e9 parameters
    # With gradients of earlier rows beside what layers take
    assert [case.fits(Mesh(4, 2), rows) for rows in (8, 16)] == [True, False]


def test_the_page_has_what_is_computed(case: scaling.Case) -> None:
    page = PAGE.read_text(encoding="utf-8")
    lines = [scaling.line_of(case, Mesh(shard=devices), devices) for devices in (8, 1024)]
    assert {*scaling.table(lines).splitlines()} <= {*page.splitlines()}
    assert scaling.table(scaling.several("7b")) in page
    assert scaling.shorter_rows("7b") in page
    assert scaling.published() in page


@pytest.mark.slow
@pytest.mark.parametrize("size", scaling.SIZES)
def test_the_page_has_all_tables(size: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for title, make in scaling.TABLES.items():
        assert f"{title[0].upper()}{title[1:]}:\n\n{scaling.table(make(size))}\n" in page
    assert scaling.shorter_rows(size) in page
    assert scaling.also_growing() in page
