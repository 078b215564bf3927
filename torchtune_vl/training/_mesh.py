"""How the devices of a run share weights, rows and layers."""

import math
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import DeviceMesh, ProcessGroup


class Mesh(NamedTuple):
    """How many devices share what; a device has a place along each dimension.

    Devices that are neighbours share most: those of ``tensor`` come first, then ``context``.

    Args:
        replicate: copies of the weights.
        shard: devices with rows of their own, over which a copy is divided, together with those of
            ``context``.
        context: devices that share each row.
        tensor: devices that share each layer, and its rows.
        experts: neighbours, of those that a copy is divided over, that share its experts: these
            are not gathered, tokens are sent to them.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    experts: int = 1

    def __str__(self) -> str:
        # How many devices there are, of which some may share experts
        return " x ".join(map(str, self[:4]))

    @classmethod
    def of(cls, parallel: Any, processes: int) -> "Mesh":
        """Return that of a config's ``parallel``, or raise ``ValueError`` if it does not fit."""
        sizes = {name: parallel[name] for name in ("replicate", "shard", "context", "tensor")}
        experts = parallel.get("experts", 1)  # configs of families without have no such key
        named = {name: size for name, size in sizes.items() if (size or 1) > 1}
        asked = math.prod(named.values())
        told = " x ".join(f"parallel.{name}" for name in named)
        told += f" is {' x '.join(map(str, named.values()))}"
        if processes % asked:
            remedy = "lower it, or start a multiple of it by --nproc_per_node and --nnodes"
            raise ValueError(f"{told}, and does not divide the {processes} processes: {remedy}")
        if sizes["shard"] is None:
            sizes["shard"] = processes // asked
        elif asked != processes:
            told = told if named else "parallel.shard is 1"
            remedy = "leave shard at null to take all"
            raise ValueError(f"{told}, and there are {processes} processes: {remedy}")
        mesh = cls(**sizes, experts=experts)
        if experts > 1 and mesh.tensor > 1:
            raise ValueError(
                "parallel.experts and parallel.tensor do not go together: set one to 1"
            )
        if mesh.shards % experts:
            told = f"parallel.experts is {experts}, and does not divide the {mesh.shards} devices"
            remedy = "lower it, or start more of them"
            raise ValueError(f"{told} that share weights, parallel.shard x context: {remedy}")
        return mesh

    @property
    def data(self) -> int:
        """How many devices have rows of their own."""
        return self.replicate * self.shard

    @property
    def shards(self) -> int:
        """Over how many devices each copy of the weights is divided."""
        return self.shard * self.context

    @property
    def copies(self) -> int:
        """How many devices have, together or each, the same rows."""
        return self.context * self.tensor

    def devices(self, device_type: str) -> DeviceMesh:
        """Return the process groups of ``replicate``, ``shard``, with ``context``, and ``tensor``.

        All processes have to call it.
        """
        dims = (self.replicate, self.shards, self.tensor)
        names = ("replicate", "shard", "tensor")
        return dist.init_device_mesh(device_type, dims, mesh_dim_names=names)

    def expert_devices(self, device_type: str) -> DeviceMesh | None:
        """Return the process groups of ``replicate``, ``shard`` and ``experts``, if these share.

        Those of ``shard`` have parts of the same experts. All processes have to call it.
        """
        if self.experts == 1:
            return None
        dims = (self.replicate, self.shards // self.experts, self.experts)
        names = ("replicate", "shard", "experts")
        return dist.init_device_mesh(device_type, dims, mesh_dim_names=names)

    def row_group(self, device_type: str) -> ProcessGroup | None:
        """Return the group of those that share this one's rows; all processes have to call it."""
        if self.context == 1:
            return None
        dims, names = (self.data, self.context, self.tensor), ("data", "context", "tensor")
        devices = dist.init_device_mesh(device_type, dims, mesh_dim_names=names)
        return devices.get_group("context")
