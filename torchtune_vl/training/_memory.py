"""Memory of training on one of several devices, computed from a config.

A step is taken on the meta device, whose tensors have shapes and no numbers, and the bytes of those
that are alive are counted: so what layers keep and take is what they do keep and take. Of states
each device has its share, by arithmetic; how FSDP2 gathers weights and reduces gradients is
imitated here.
"""

import weakref
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from torchtune_vl._torchtune import instantiate
from torchtune_vl.data import RowSharing, packed_collate_vision
from torchtune_vl.media import CHANNELS
from torchtune_vl.modules import Segments
from torchtune_vl.modules.adapters import num_bytes
from torchtune_vl.modules.context import RowShare
from torchtune_vl.modules.layout import vision_index
from torchtune_vl.training import _sharding as sharding
from torchtune_vl.training._mesh import Mesh

PURPOSES = ("weights", "gradients", "optimizer", "gathered layers", "activations", "layers at work")
WEIGHTS, GRADIENTS, OPTIMIZER, GATHERED, ACTIVATIONS, WORK = PURPOSES

_SIDE = 32  # patches of a side of the images of a row
# torchtune.training.OffloadActivations keeps so many of the last tensors until they are copied
_STASHED = 5
# Flash attention's backward adds so many rows for each segment, and rounds heads up
_FLASH_ROWS, _FLASH_WIDTH = 128, 32


def estimate_memory(
    config: DictConfig,
    num_devices: int = 1,
    devices: DeviceMesh | None = None,
    expert_devices: DeviceMesh | None = None,
) -> dict[str, int]:
    """Compute the bytes that the recipe ``finetune`` takes on each device, at its peak, by purpose.

    The row is the largest that the config allows, each of its tokens a target. It is what torch's
    allocator gives to tensors: not in it are fragments, the CUDA context, what NCCL takes, and what
    compilation saves. Of experts that devices share each has as many rows as the others. A run that
    has its ``devices``, and ``expert_devices`` perhaps, passes them. Raises ``ValueError`` if the
    model cannot be built, or the devices cannot share it.
    """
    mesh = Mesh.of(config.parallel, num_devices)
    if mesh.tensor == mesh.experts == 1:
        return _Run(config, mesh).peak()
    if devices is not None:
        return _Run(config, mesh, devices, expert_devices).peak()
    # Layers are divided as in a run, by a process group that sends nothing
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_devices)
    try:
        return _Run(config, mesh, mesh.devices("cpu"), mesh.expert_devices("cpu")).peak()
    finally:
        dist.destroy_process_group()


class _Run:
    """A run of the recipe on the meta device, as one of its processes."""

    def __init__(
        self,
        config: DictConfig,
        mesh: Mesh,
        devices: DeviceMesh | None = None,
        expert_devices: DeviceMesh | None = None,
    ) -> None:
        self.config, self.mesh = config, mesh
        dtype = sharding.DTYPES[config.compute_dtype or config.dtype]
        offload = config.parallel.cpu_offload
        with sharding.default_dtype(sharding.DTYPES[config.dtype]), torch.device("meta"):
            self.model: Any = instantiate(config.model)
        if devices is not None and mesh.tensor > 1:
            plan = instantiate(config.parallel.plan, self.model)
            sharding.divide_layers(self.model, devices["tensor"], plan)
        if expert_devices is not None:
            sharding.divide_experts(self.model, expert_devices["experts"])
        norms: list[Any] = [m for m in self.model.modules() if isinstance(m, nn.RMSNorm)]
        for norm in norms:
            norm.forward = partial(_fused_norm, norm)
        sharding.recompute_layers(self.model, config.activation_checkpointing)
        is_sharded = sharding.is_sharded(self.model, mesh, dtype, offload)
        if is_sharded:
            sharding.pack_quantized(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if not self.trained:
            raise ValueError("nothing is trained: set one of the keys model.*_trainable")
        states, self.temporary = self._states()
        self.alive = _Alive(states)
        self.sharding: _Sharding | None = None
        if is_sharded:
            (stored,) = {p.dtype for p in self.trained}
            _compute_in(self.model, dtype)
            self.sharding = _Sharding(self.model, self.alive, mesh, stored, offload)
        else:
            for p in self.trained:
                p.register_post_accumulate_grad_hook(lambda p: self.alive.move(p.grad, GRADIENTS))
        self.alive.leave_out(self.model.parameters())

    def _states(self) -> tuple[dict[str, int], int]:
        """Bytes of weights and the optimizer's states, and of what its step takes meanwhile."""
        if self.config.parallel.cpu_offload:
            return {}, 0
        shards = partial(_shards, self.mesh)
        weights = sum(
            num_bytes(sharding.local_part(p.data)) / shards(p) for p in self.model.parameters()
        )
        sizes = [sharding.local_part(p).numel() / shards(p) for p in self.trained]
        (dtype,) = {p.dtype for p in self.trained}
        optimizer = _OptimizerBytes.of(self.config.optimizer, dtype)
        at_once = sum(sizes) if optimizer.takes_all_at_once else max(sizes)
        states = {WEIGHTS: round(weights), OPTIMIZER: round(optimizer.kept * sum(sizes))}
        return states, round(optimizer.temporary * at_once)

    def peak(self) -> dict[str, int]:
        """Take the last row of a step, behind others if there are, and the optimizer's step."""
        batch = self._row()
        with self.alive:
            if self.config.rows_per_step > self.mesh.data:
                self._leave_gradients()
            batch = _mapped(lambda x: x.clone(), batch)
            with _Kept(self.alive, self.config.activation_offloading):
                losses = self.model(**batch)
                losses.sum().backward()
            del batch, losses
            self.alive.take(self.temporary, OPTIMIZER)
        return {purpose: self.alive.peak.get(purpose, 0) for purpose in PURPOSES}

    def _leave_gradients(self) -> None:
        """Have gradients of earlier rows."""
        if self.sharding:
            self.sharding.leave_gradients()
        else:
            for p in self.trained:
                p.grad = torch.empty_like(p)
                self.alive.move(p.grad, GRADIENTS)

    def _row(self) -> dict[str, Any]:
        """The largest row, of images of one size, or this device's share of it."""
        rows, encoder = self.config.rows, self.model.encoders["vision"]
        size, placeholder = encoder.merger.unit_size, self.model.placeholder_ids[0]
        if "batch_size" in rows:
            tokens = rows.batch_size * self.config.tokenizer.max_seq_len
        else:
            tokens = rows.max_tokens
        self.model.decoder.max_seq_len = tokens  # of one sample that takes as much as the row
        units = min(tokens, (rows.get("max_patches") or size * tokens) // size)
        images, rest = divmod(size * units, _SIDE**2)
        grids = [(1, _SIDE, _SIDE)] * images + [(1, 2, rest // 2)] * (rest > 0)
        grid_thw = torch.tensor(grids)
        patch = CHANNELS * encoder.geometry.patch_size**2
        vision = {
            "patches": torch.zeros(1, patch, dtype=torch.uint8).expand(size * units, -1),
            "grid_thw": grid_thw,
            **vision_index(grid_thw, encoder.geometry),
        }
        ids = [placeholder] * units + [placeholder + 1] * (tokens - units)
        sample = {
            "tokens": ids,
            "labels": ids,
            "input_pos": torch.zeros(tokens, 3, dtype=torch.int64),
            "encoder_input": {"vision": vision},
        }
        row = packed_collate_vision([sample])
        if self.mesh.context > 1:
            row = RowSharing(0, self.mesh.context, self.model.placeholder_ids)(row)
        return _mapped(lambda x: x.to("meta"), row)


def _shards(mesh: Mesh, p: nn.Parameter) -> int:
    """Over how many devices what one has of a parameter, by plan, is divided."""
    return mesh.shards // mesh.experts if sharding.is_of_shared_experts(p) else mesh.shards


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a model have the weights that FSDP2 gathers: in the dtype of the computation."""
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            if p.is_floating_point():
                gathered = nn.Parameter(p.data.to(dtype), requires_grad=p.requires_grad)
                module.register_parameter(name, gathered)


def _mapped(change: Callable[[Any], Any], batch: Any) -> Any:
    def changed(x: Any) -> Any:
        if isinstance(x, Segments):
            return Segments(x.lengths, change(x.boundaries))
        return x.with_each(changed) if isinstance(x, RowShare) else change(x)

    return tree_map_only((torch.Tensor, Segments, RowShare), changed, dict(batch))


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """List the plain tensors that one of NF4, or of an optimizer's few bits, is made of."""
    own: Any = sharding.local_part(tensor.data)
    names, _ = own.__tensor_flatten__() if hasattr(own, "__tensor_flatten__") else ([], None)
    return [getattr(own, name) for name in names] or [own]


class _OptimizerBytes(NamedTuple):
    """What an optimizer keeps of each parameter, and takes in a step, in bytes."""

    kept: float
    temporary: float
    takes_all_at_once: bool

    @classmethod
    def of(cls, component: DictConfig, dtype: torch.dtype) -> "_OptimizerBytes":
        """Measure it: a step of one parameter, on the CPU as it would be on a GPU."""
        parameter = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
        parameter.grad = torch.zeros_like(parameter)
        optimizer = instantiate(component, [parameter])
        (group,) = optimizer.param_groups
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
        with torch.compiler.set_stance("force_eager"):  # torchao compiles the step
            optimizer.step()
            states = [x for x in optimizer.state[parameter].values() if torch.is_tensor(x)]
            alive = _Alive({})
            alive.leave_out([parameter, parameter.grad, *states])
            with alive:
                optimizer.step()
        kept = sum(num_bytes(x) for x in states if x.ndim)
        # Compiled, the step of those with states of few bits takes nothing
        is_plain = all(type(x) is torch.Tensor for x in states)
        taken = sum(alive.peak.values()) if is_plain else 0
        count = parameter.numel()
        return cls(kept / count, taken / count, bool(group.get("foreach")))


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, by purpose, from ``fixed`` ones on."""

    def __init__(self, fixed: dict[str, int]) -> None:
        super().__init__()
        self.now, self.peak = Counter(fixed), dict(fixed)
        self.purpose = WORK  # of what is made
        self._storages: dict[int, tuple[str, int]] = {}  # purpose and bytes, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_fake = any(issubclass(kind, FakeTensor) for kind in types)  # shapes of DTensors
        if not is_fake and any(kind not in (torch.Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # what it is made of comes here
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) is torch.Tensor:
                self._add(tensor.untyped_storage())
        if func is torch.ops.torch_attn._varlen_attn_backward.default:
            self.take(_bytes_within_flash_attention(*args), WORK)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._storages:
            return
        self._storages[address] = self.purpose, storage.nbytes()
        self.now[self.purpose] += storage.nbytes()
        weakref.finalize(storage, self._remove, address)
        if self.now.total() > sum(self.peak.values()):
            self.peak = dict(self.now)

    def _remove(self, address: int) -> None:
        purpose, size = self._storages.pop(address)
        self.now[purpose] -= size

    def take(self, size: int, purpose: str) -> torch.Tensor:
        """Make a tensor of so many bytes."""
        self.purpose = purpose
        tensor = torch.empty(size, dtype=torch.uint8, device="meta")
        self._add(tensor.untyped_storage())
        self.purpose = WORK
        return tensor

    def move(self, tensor: torch.Tensor, purpose: str) -> None:
        """Say what a tensor is for, unless it is counted elsewhere."""
        address = sharding.local_part(tensor).untyped_storage()._cdata
        before, size = self._storages.get(address, (purpose, 0))
        if size:
            self._storages[address] = purpose, size
            self.now[before] -= size
            self.now[purpose] += size

    def leave_out(self, tensors: Any) -> None:
        """Do not count tensors, which are counted elsewhere."""
        for tensor in tensors:
            for part in _parts(tensor):
                self._storages[part.untyped_storage()._cdata] = "", 0

    def is_left_out(self, tensor: torch.Tensor) -> bool:
        """Whether it is one of these, or made of one."""
        return not self._storages.get(
            sharding.local_part(tensor).untyped_storage()._cdata, ("", 0)
        )[1]


def _bytes_within_flash_attention(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *others: torch.Tensor
) -> int:
    """Bytes that the kernel takes in backward beside what it returns.

    They are sums of queries' gradients, float32, and gradients of keys and values for each head of
    queries, before those of heads that share keys are added.
    """
    rows, heads, width = q.shape
    segments = len(others[3]) - 1
    rounded = -(-width // _FLASH_WIDTH) * _FLASH_WIDTH
    sums = 4 * (rows + _FLASH_ROWS * segments) * heads * (rounded + 1)
    is_shared = k.shape[1] != heads
    return sums + is_shared * 2 * len(k) * heads * width * k.itemsize


def _fused_norm(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Apply a norm as it is on CUDA alone: by one kernel."""
    return _FusedNorm.apply(x, norm.weight)


class _FusedNorm(torch.autograd.Function):
    """Has the shapes of torch's fused norm, which keeps its input and a factor of each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Tells what is kept for gradients or, if that is offloaded, lets it go."""

    def __init__(self, alive: _Alive, offloads: bool) -> None:
        stash: deque[torch.Tensor] = deque(maxlen=_STASHED)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            alive.move(tensor, ACTIVATIONS)
            return tensor

        def send(tensor: torch.Tensor) -> Any:
            if alive.is_left_out(tensor):
                return tensor
            stash.append(tensor)
            return tensor.shape, tensor.dtype

        def fetch(sent: Any) -> torch.Tensor:
            stash.clear()
            is_here = isinstance(sent, torch.Tensor)
            return sent if is_here else torch.empty(sent[0], dtype=sent[1], device="meta")

        super().__init__(*((send, fetch) if offloads else (keep, lambda x: x)))


class _Sharding:
    """Imitates how FSDP2 gathers weights and reduces gradients, event by event.

    In forward, weights are gathered in a buffer, which the next gathering replaces, and copied out
    of it. In backward, the buffer of the layer before is gathered meanwhile, and gradients are
    copied to a buffer of float32, which is there until those of the layer before follow.
    """

    def __init__(
        self, model: Any, alive: _Alive, mesh: Mesh, stored: torch.dtype, offload: bool
    ) -> None:
        self.alive, self.stored, self.offload = alive, stored, offload
        self.gathered: torch.Tensor | None = None  # the last buffer of forward
        self.reduced: torch.Tensor | None = None  # the last buffer of backward
        self.order: list[_Group] = []  # as they ended forward
        rest = {*model.parameters()}
        sent_to = sharding.experts_of(model) if mesh.experts > 1 else []
        groups = []
        for experts in sent_to:
            parameters = [*experts.parameters()]
            of_experts = mesh.shards // mesh.experts
            groups.append(_Group(self, parameters, of_experts, is_cut_by_rows=True))
            groups[-1].watch(experts, experts)
            rest -= {*parameters}
        for modules in sharding.gathered_together(model):
            parameters = [p for module in modules for p in module.parameters() if p in rest]
            groups.append(_Group(self, parameters, mesh.shards))
            groups[-1].watch(modules[0], modules[-1])
            rest -= {*parameters}
        self.root = _Group(self, [*rest], mesh.shards, is_root=True)
        self.groups = [self.root, *groups]
        self.root.watch(model, model)
        if model.decoder.output is not None:
            groups[len(sent_to)].is_gathered_in_backward = False  # the embedding
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: alive.move(p.grad, GATHERED))

    def leave_gradients(self) -> None:
        """Have gradients of an earlier backward."""
        for group in self.groups:
            count = sum(sharding.local_part(p).numel() for p in group.parameters if p.requires_grad)
            if count and not self.offload:
                size = self.stored.itemsize * count // group.shards
                group.kept = self.alive.take(size, GRADIENTS)

    def end_backward(self) -> None:
        """Reduce gradients of modules whose inputs have none, and let go of all."""
        for group in self.groups:
            if not group.has_ended:
                group.post_backward()
            group.has_ended, group.buffer = False, None
        self.order.clear()
        self.reduced = None


class _Group:
    """Parameters that are gathered together."""

    def __init__(
        self,
        shared: _Sharding,
        parameters: list[nn.Parameter],
        shards: int,
        is_root: bool = False,
        is_cut_by_rows: bool = False,
    ) -> None:
        self.shared, self.parameters, self.shards = shared, parameters, shards
        self.is_root, self.is_cut_by_rows = is_root, is_cut_by_rows
        self.is_gathered_in_backward = True
        self.has_ended = False
        self.buffer: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None  # gradients of this device

    def watch(self, first: nn.Module, last: nn.Module) -> None:
        """Follow forward and backward of modules that come one after another."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self.pre_forward()
            is_carried = args and isinstance(args[0], torch.Tensor) and args[0].requires_grad
            return (_BackwardEnds.apply(args[0], self), *args[1:]) if is_carried else args

        def behind(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.post_forward()
            if output.requires_grad:
                output.register_hook(lambda grad: self.pre_backward())

        first.register_forward_pre_hook(before, prepend=True)
        last.register_forward_hook(behind)

    def _take(self, size: float) -> torch.Tensor:
        return self.shared.alive.take(round(size), GATHERED)

    def _bytes(self) -> int:
        return sum(sharding.local_part(p.data).nbytes for p in self.parameters)

    def gather(self) -> None:
        """Begin to gather: in one buffer, of which there is no need if this device has all."""
        if self.weights is None and self.buffer is None:
            self.buffer = self._take(self._bytes() if self.shards > 1 else 0)

    def _copy_out(self) -> None:
        self.weights = self._take(self._bytes())
        if self.is_cut_by_rows and self.shards > 1:
            self._take(self._bytes())  # the parts, before they are put together

    def pre_forward(self) -> None:
        """Gather, and let go of the buffer of the group before."""
        self.gather()
        self.shared.gathered = None
        self._copy_out()
        self.shared.gathered, self.buffer = self.buffer, None

    def post_forward(self) -> None:
        """Let go of the weights, but not of the buffer."""
        if self.is_root:
            self.shared.gathered = None
        else:
            self.weights = None
        self.shared.order.append(self)

    def pre_backward(self) -> None:
        """Gather, and begin to gather the group that comes next."""
        if self.is_root:
            torch.autograd.Variable._execution_engine.queue_callback(self.shared.end_backward)
        if self.is_gathered_in_backward:
            self.gather()
            if self.buffer is not None:
                self._copy_out()
                self.buffer = None
        place = self.shared.order.index(self)
        if place and self.shared.order[place - 1].is_gathered_in_backward:
            self.shared.order[place - 1].gather()

    def post_backward(self) -> None:
        """Let go of the weights, and reduce gradients to what this device keeps."""
        self.has_ended = True
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        count = sum(sharding.local_part(gradient).numel() for gradient in gradients)
        for p in self.parameters:
            p.grad = None
        self.weights = self.shared.reduced = None
        if not gradients:
            return
        self.shared.reduced = self._take(4 * count)
        gradients.clear()
        own = self._take(4 * count / self.shards)
        if self.shared.stored != torch.float32:
            own = self._take(self.shared.stored.itemsize * count / self.shards)
        if self.kept is None and not self.shared.offload:
            self.shared.alive.move(own, GRADIENTS)
            self.kept = own


class _BackwardEnds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: _Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.group.post_backward()
        return grad, None
