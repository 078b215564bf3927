"""Patches of several media in one tensor."""

from collections.abc import Sequence

import torch


def concatenate_patches(patches: Sequence[torch.Tensor], shared: bool = False) -> torch.Tensor:
    """Join patches of images and videos.

    uint8 patches of an image hold one frame, those of a video two. Where both meet, the frame of
    an image is repeated.

    Args:
        patches: [n, 3 * frames * pixels] each, of one dtype.
        shared: whether the result is to be in memory that other processes can map.

    Returns:
        [sum of n, widest]; a single medium's patches as they are.
    """
    if len(patches) == 1:
        return patches[0]  # what torch.cat would copy
    widest = max(p.shape[1] for p in patches)
    repeated = [_repeat_frame(p, widest // p.shape[1]) for p in patches]
    return torch.cat(repeated, out=_shared_memory_for(repeated) if shared else None)


def _shared_memory_for(patches: Sequence[torch.Tensor]) -> torch.Tensor:
    shape = torch.Size([sum(map(len, patches)), patches[0].shape[1]])
    storage = torch.UntypedStorage._new_shared(shape.numel() * patches[0].itemsize)
    return torch.empty(0, dtype=patches[0].dtype).set_(storage).view(shape)


def _repeat_frame(patches: torch.Tensor, times: int) -> torch.Tensor:
    if times == 1:
        return patches
    return patches.unflatten(1, (3, 1, -1)).expand(-1, -1, times, -1).flatten(1)
