"""M-RoPE positions beside their definition, and those of answers in training and generation."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.positions import IMAGE, VIDEO, defined_positions
from torchtune_vl.modules.layout import mrope_positions

TEXT, START, END = 100, 151652, 151653
sides = st.integers(1, 9).map(lambda units: 2 * units)
seconds = st.floats(0.02, 40) | st.sampled_from([0.5, 1.0, 2 / 3, 2 / 23.976, 2 * 1001 / 30000])
image = st.tuples(st.just(IMAGE), st.just(1), sides, sides, st.none())
video = st.tuples(st.just(VIDEO), st.integers(1, 40), sides, sides, seconds)
text = st.integers(0, 12)


def conversation(
    media: list[tuple[int, int, int, int, float | None]], texts: list[int]
) -> tuple[list[int], list[tuple[int, int, int]], list[float]]:
    """Tokens, grids and seconds of media with texts of some lengths around them."""
    tokens = [TEXT] * texts[0]
    for (token, t, h, w, _), length in zip(media, texts[1:], strict=False):
        tokens += [START, *[token] * (t * h * w // 4), END, *[TEXT] * length]
    grids = [(t, h, w) for _, t, h, w, _ in media]
    return tokens, grids, [interval for *_, interval in media if interval is not None]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(image | video, max_size=5),
    st.lists(text, min_size=6, max_size=6),
    st.sampled_from([2, 4, 25]),
)
def test_positions_are_those_of_the_definition(media, texts, tokens_per_second) -> None:
    tokens, grids, intervals = conversation(media, texts)
    ours = mrope_positions(
        tokens,
        torch.tensor(grids).reshape(-1, 3),
        [1.0 if s is None else tokens_per_second * s for *_, s in media],
        placeholder_ids=(IMAGE, VIDEO),
        merge_size=2,
    )
    expected = defined_positions(tokens, grids, intervals, tokens_per_second=tokens_per_second)
    assert ours.tolist() == expected.tolist()


def test_text_behind_a_long_video() -> None:
    """A minute of 640 x 360, two frames a second: its last step is at 16 + 59 * 2."""
    tokens, grids, _ = conversation([(VIDEO, 60, 26, 46, 1.0)], [15, 3])
    positions = mrope_positions(
        tokens, torch.tensor(grids), [2.0], placeholder_ids=(IMAGE, VIDEO), merge_size=2
    )
    last = tokens.index(END) - 1
    assert positions[last].tolist() == [134, 28, 38]
    assert positions[last + 1 :, 0].tolist() == [135, 136, 137, 138]
