"""What each of the devices that share a packed row gets of it (context parallelism)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from torchtune_vl.data._collate import Batch
from torchtune_vl.modules import Segments
from torchtune_vl.modules.context import RowShare


@dataclass(frozen=True)
class RowSharing:
    """How one of several devices takes its share of each packed row.

    A row is cut in twice as many chunks as there are devices, and a device takes one from each end:
    one with few keys and one with many, so that causal attention is equal work for all. Frames are
    shared out in their order, equally many patches to each.

    Args:
        device: number of this device among the ``devices``.
        devices: how many share a row.
        placeholder_ids: tokens that stand for units of images and videos.
    """

    device: int
    devices: int
    placeholder_ids: tuple[int, ...]

    def __call__(self, row: Batch) -> Batch:
        """Cut a device's share out of a row of ``packed_collate_vision``.

        The row is padded, by a document without targets, to a length that the chunks divide. The
        ``mask`` of the share is a :class:`~torchtune_vl.modules.context.RowShare`; where the row
        has media it has the frames of this device or, if there are none for it, a blank one. Raises
        ``ValueError`` if media have no index of the encoder, which their transform makes.
        """
        tokens, positions, documents = row["tokens"], row["input_pos"], row["mask"].lengths
        lacking = -tokens.shape[1] % (2 * self.devices)
        if lacking:
            tokens, documents = F.pad(tokens, (0, lacking)), (*documents, lacking)
            positions = F.pad(positions, (0, 0, 0, lacking))
        length = tokens.shape[1]
        rows = self._rows(length, self.device)
        place = np.full(length, -1)
        place[rows] = np.arange(len(rows))
        own = place[row["output_positions"].numpy()]
        targets = torch.from_numpy((own >= 0).nonzero()[0])
        media = row.get("encoder_input", {}).get("vision")
        shared = _no_media(self.devices)
        share = Batch()
        if media:
            shared, vision = self._share_media(tokens[0].numpy(), media)
            share["encoder_input"] = {"vision": vision}
        queries, keys, key_rows = self._pieces(documents, length)
        return Batch(
            share,
            tokens=tokens[:, rows],
            input_pos=positions[:, rows],
            mask=RowShare(queries, keys, key_rows, targets=targets, **shared),
            output_positions=torch.from_numpy(own[own >= 0]),
            targets=row["targets"][targets],
        )

    def _chunks(self, length: int, device: int) -> list[tuple[int, int]]:
        """Where the chunks of a device start and end."""
        size = length // (2 * self.devices)
        return [(n * size, (n + 1) * size) for n in (device, 2 * self.devices - 1 - device)]

    def _rows(self, length: int, device: int) -> np.ndarray:
        return np.concatenate([np.arange(*chunk) for chunk in self._chunks(length, device)])

    def _pieces(
        self, documents: tuple[int, ...], length: int
    ) -> tuple[Segments, Segments, torch.Tensor]:
        """Queries and keys of the pieces of documents in this device's chunks, and where keys are.

        Keys lie as they are gathered: device after device, each with its two chunks.
        """
        gathered = np.empty(length, np.int64)
        rows = [self._rows(length, device) for device in range(self.devices)]
        gathered[np.concatenate(rows)] = np.arange(length)
        ends = np.cumsum(documents)
        pieces, key_rows = [], []
        for first, last in self._chunks(length, self.device):
            reached = range(ends.searchsorted(first, "right"), ends.searchsorted(last) + 1)
            for start, end in ((ends[n] - documents[n], ends[n]) for n in reached):
                end = min(end, last)
                pieces.append((end - max(start, first), end - start))
                key_rows.append(gathered[start:end])
        queries, keys = (Segments.of([*map(int, each)]) for each in zip(*pieces, strict=True))
        return queries, keys, torch.from_numpy(np.concatenate(key_rows))

    def _share_media(
        self, tokens: np.ndarray, media: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What devices exchange, and what this one encodes."""
        if "unit_order" not in media:
            raise ValueError(
                "the transform makes no index of the encoder, without which devices cannot share a "
                "row: set parallel.context to 1"
            )
        (frames,), (windows,) = media["frames"], media["windows"]
        patches_of_unit = sum(frames) // len(media["unit_order"])
        bounds = self._frame_bounds(np.array(frames))
        # Each device encodes a range of the row's units, and wants those of its placeholders
        encoded = np.cumsum([0, *frames])[bounds] // patches_of_unit
        is_placeholder = np.isin(tokens, self.placeholder_ids)
        number = is_placeholder.cumsum() - 1
        wanted = [
            number[rows][is_placeholder[rows]]
            for rows in (self._rows(len(tokens), device) for device in range(self.devices))
        ]
        first, last = encoded[self.device : self.device + 2]
        sent = [units[(units >= first) & (units < last)] - first for units in wanted]
        received = np.diff(wanted[self.device].searchsorted(encoded))
        whole = {
            "frames": {frames: None},
            "windows": {windows: None},
            "grid_thw": media["grid_thw"],
        }
        exchanged = {
            "sent_rows": torch.from_numpy(np.concatenate(sent)),
            "sent": tuple(map(len, sent)),
            "received": tuple(received.tolist()),
            "media": whole,
        }
        if first == last:
            return exchanged, _nothing_to_see(media, patches_of_unit)
        ends = np.cumsum([0, *windows])
        of_windows = slice(*ends.searchsorted([first * patches_of_unit, last * patches_of_unit]))
        of_frames = slice(*bounds[self.device : self.device + 2])
        steps = media["grid_thw"].repeat_interleave(media["grid_thw"][:, 0], dim=0)
        own = {
            # A copy, or else all patches would travel to the trainer
            "patches": media["patches"][first * patches_of_unit : last * patches_of_unit].clone(),
            "grid_thw": F.pad(steps[of_frames, 1:], (1, 0), value=1),
            "unit_order": media["unit_order"][first:last] - int(first),
            "unit_positions": media["unit_positions"][first:last].clone(),
            **_segments(windows[of_windows], frames[of_frames]),
        }
        return exchanged, own

    def _frame_bounds(self, frames: np.ndarray) -> np.ndarray:
        """Where each device's frames start, and the last one's end: of equally many patches."""
        ends = frames.cumsum()
        owners = (ends - frames / 2) * self.devices // ends[-1]
        return owners.searchsorted(np.arange(self.devices + 1))


def _no_media(devices: int) -> dict[str, Any]:
    nothing = (0,) * devices
    rows = torch.zeros(0, dtype=torch.int64)
    return {"sent_rows": rows, "sent": nothing, "received": nothing, "media": None}


def _nothing_to_see(media: dict[str, Any], patches_of_unit: int) -> dict[str, Any]:
    """The smallest image, all zeros: the encoder works where that of another device does."""
    side = math.isqrt(patches_of_unit)
    return {
        "patches": media["patches"].new_zeros(patches_of_unit, media["patches"].shape[1]),
        "grid_thw": torch.tensor([[1, side, side]]),
        "unit_order": media["unit_order"].new_zeros(1),
        "unit_positions": media["unit_positions"].new_zeros(1, 2),
        **_segments((patches_of_unit,), (patches_of_unit,)),
    }


def _segments(windows: tuple[int, ...], frames: tuple[int, ...]) -> dict[str, Any]:
    kinds = {"windows": Segments.of(windows), "frames": Segments.of(frames)}
    return {kind: {some.lengths: some.boundaries} for kind, some in kinds.items()}
