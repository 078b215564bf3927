"""Patches of several media in one tensor."""

from collections.abc import Sequence

import torch


def concatenate_patches(patches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join patches of images and videos.

    uint8 patches of an image hold one frame, those of a video two. Where both meet, the frame of
    an image is repeated.

    Args:
        patches: [n, 3 * frames * pixels] each, of one dtype.

    Returns:
        [sum of n, widest]; a single medium's patches as they are.
    """
    if len(patches) == 1:
        return patches[0]  # what torch.cat would copy
    widest = max(p.shape[1] for p in patches)
    return torch.cat([_repeat_frame(p, widest // p.shape[1]) for p in patches])


def _repeat_frame(patches: torch.Tensor, times: int) -> torch.Tensor:
    if times == 1:
        return patches
    return patches.unflatten(1, (3, 1, -1)).expand(-1, -1, times, -1).flatten(1)
