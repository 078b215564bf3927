"""M-RoPE positions by their definition, one token after another, to compare with.

"Qwen2-VL" (arXiv 2409.12191), section 2.1: text has one position on all three axes; of an image the
temporal position is constant while height and width follow row and column; of a video the temporal
one grows with each frame; and the numbering of each modality begins at the largest position of what
comes before, plus one. "Qwen2.5-VL Technical Report" (arXiv 2502.13923), section 2.1.3: temporal
positions of a video follow its seconds. transformers 4.49 to 4.51 compute the same (compared with
4.51 on 343 conversations); from 4.52 to 5.22 it cuts the seconds between steps to whole ones, and
from 5.3 on it continues behind a medium at half the larger side of its grid.
"""

from collections.abc import Sequence

import numpy as np
import torch

IMAGE, VIDEO = 151655, 151656


def defined_positions(
    tokens: Sequence[int],
    grids: Sequence[Sequence[int]],
    seconds_per_step: Sequence[float] = (),
    *,
    image_token_id: int = IMAGE,
    video_token_id: int = VIDEO,
    tokens_per_second: int = 2,
) -> torch.Tensor:
    """Positions of a conversation, int64 [s, 3]; grids of its media in their order."""
    positions: list[tuple[int, int, int]] = []
    left: list[tuple[int, int, int]] = []  # places of the current medium that no token has taken
    media, seconds = iter(grids), iter(seconds_per_step)
    largest = reached = -1
    for token in tokens:
        if token not in (image_token_id, video_token_id):
            positions.append((largest + 1,) * 3)
        else:
            if not left:
                steps, rows, columns = next(media)
                rate = tokens_per_second * next(seconds) if token == video_token_id else 0
                # In float32, as all implementations have it
                times = [int(np.float32(step) * np.float32(rate)) for step in range(steps)]
                left = [
                    (largest + 1 + time, largest + 1 + row, largest + 1 + column)
                    for time in times
                    for row in range(rows // 2)
                    for column in range(columns // 2)
                ]
            positions.append(left.pop(0))
        reached = max(reached, *positions[-1])
        if not left:
            largest = reached
    return torch.tensor(positions)
