"""Fine-tune a vision-language model: in full or by adapters, on one device or many.

    tune-vl run finetune --config qwen2_5_vl/lora
    tune-vl run --nproc_per_node 8 finetune --config qwen2_5_vl/lora

A step takes ``rows_per_step`` rows, whatever the number of devices: each accumulates gradients
over its share of them. Rows are packed with several samples, or padded, as ``rows`` says. The loss
is the mean over all supervised tokens of the step. `docs/training.md` walks through this file.
"""

import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from torchtune_vl._torchtune import (
    ADAPTER_CONFIG,
    ADAPTER_KEY,
    MODEL_KEY,
    LoRALinear,
    OffloadActivations,
    TransformerSelfAttentionLayer,
    get_logger,
    instantiate,
)
from torchtune_vl.checkpoint._adapters import Adapter, check_continues, merge_adapter
from torchtune_vl.data import Row, TrainingRows
from torchtune_vl.data._loading import loading
from torchtune_vl.datasets import SamplesError, measure_all
from torchtune_vl.files._directory import epochs
from torchtune_vl.models._builders import part_of
from torchtune_vl.models._families import family_of
from torchtune_vl.models._weights import initial_adapters, load_weights_into
from torchtune_vl.modules import Segments
from torchtune_vl.modules.adapters import DoRA, is_adapter
from torchtune_vl.recipes._main import run_recipe
from torchtune_vl.training._distributed import (
    average_copies,
    clip_grad_norm,
    default_dtype,
    divide_layers,
    dtype_on,
    dtypes_of,
    gather,
    non_finite,
    shard,
)
from torchtune_vl.training._fingerprint import (
    data_fingerprint,
    model_fingerprint,
    refuse_changes,
    settings,
)
from torchtune_vl.training._flops import FlopCounter, peak_flops
from torchtune_vl.training._loss_curve import plot_losses
from torchtune_vl.training._optimizer_state import (
    fit,
    initialize,
    optimizer_state,
    set_plain_values,
)
from torchtune_vl.training._saved_steps import SavedStep, Steps, drop_steps_after, lock

log = get_logger("INFO")

T = TypeVar("T")

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Logged:
    """What happened since the last line of the log, on this rank, and was not waited for yet.

    Args:
        losses: of each step, over all ranks.
        counts: how many targets, tokens, tokens that would have had room, images and videos, and
            floating-point operations.
        waited: seconds in which there was no row.
        start: when it began.
    """

    losses: list[float] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(5))
    waited: float = 0.0
    start: float = field(default_factory=time.perf_counter)


class FinetuneRecipe:
    """The run that a config describes: see the configs for what each key means.

    Args:
        cfg: the config.

    Raises:
        ValueError: if settings do not fit each other, or ``output_dir`` has an earlier run that is
            not to be resumed.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        _check_devices(cfg)
        self.device = torch.device(cfg.device)
        self.peak_flops: float | None = None
        self._init_process_group()
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device))
        self.dtype = dtype_on(self.device, cfg.dtype)
        self.compute_dtype = dtype_on(self.device, cfg.compute_dtype or cfg.dtype)
        self.mesh = init_device_mesh(
            self.device.type,
            (dist.get_world_size() // cfg.parallel.tensor, cfg.parallel.tensor),
            mesh_dim_names=("data", "tensor"),
        )
        self.data_ranks = self.mesh["data"].size()
        self.data_rank = self.mesh["data"].get_local_rank()
        self.is_main = dist.get_rank() == 0
        self.output_dir = Path(cfg.output_dir)
        self.saved = Steps(self.output_dir / "steps", cfg.keep_last)
        if cfg.export == "best" and cfg.dataset_val is None:
            raise ValueError("export: best is that of the lowest validation loss: set dataset_val")
        self.stop_signal = 0
        self.last_asked = 0  # the step after which it was last seen to
        self.pending_save: Future[None] | None = None
        self.saving = ThreadPoolExecutor(1)
        self.fingerprint: dict[str, Any] = {}
        self.begun = self._on_main(self._find_begun)
        self._on_main(lambda: self._keep("settings", settings(cfg)))

    def _init_process_group(self) -> None:
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:  # started without torchrun: one process is a group too
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # Saving goes on beside the steps, and so must not take part in their collectives
        self.save_group = dist.new_group(backend="gloo")

    def _on_main(self, decide: Callable[[], T]) -> T:
        """Let the first process decide, so that all go on, or end, together."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [decide()]
            except (ValueError, OSError) as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, group=self.save_group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return cast("T", outcome[0])

    def _find_begun(self) -> SavedStep | None:
        """The step to go on from, if there is one, and no other run beside this."""
        self.lock = lock(self.output_dir)
        self.saved.tidy()
        newest, exported = self.saved.newest(), epochs(self.output_dir)
        if newest and not self.cfg.resume:
            raise ValueError(
                f"{self.output_dir} has steps of an earlier run: go on with resume=True, or name "
                "another output_dir"
            )
        if exported and not newest:
            raise ValueError(
                f"{exported[0]} is of an earlier run, which has no steps to go on from: name "
                "another output_dir"
            )
        return self.saved.newest_whole()

    def _keep(self, kind: str, values: dict[str, Any]) -> None:
        """Note what a run begins with, and refuse to go on with anything else."""
        self.fingerprint[kind] = values
        if self.begun:
            refuse_changes(kind, self.begun.progress["fingerprint"][kind], values)

    def setup(self) -> None:
        """Make model, data, optimizer and schedule, and take up where an earlier run stopped."""
        cfg = self.cfg
        # The same on devices that share layers, or their copies of the others would drift apart
        for seed in (torch.manual_seed, np.random.seed, random.seed):  # datasets may use any
            seed(cfg.seed + self.data_rank)
        tokenizer = instantiate(cfg.tokenizer)
        self.processor_files = tokenizer.processor_files()
        self.checkpointer = instantiate(cfg.checkpointer)
        self.model = self._make_model()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(
                "nothing is trained: set one of model.decoder_trainable, model.encoder_trainable "
                "and model.fusion_trainable"
            )
        self.optimizer = instantiate(cfg.optimizer, self._parameter_groups())
        self.seeing = [p for n, p in self.trained.items() if part_of(n) != "decoder"]
        self._check_rounding()
        # Not by torchtune's function, which refuses models with a decoder and an encoder
        self.offloading = OffloadActivations() if cfg.activation_offloading else nullcontext()

        self.position: dict[str, Any] = self.begun.progress["position"] if self.begun else {}
        self.rows = self._make_rows(tokenizer)
        self.validation_rows = self._make_validation_rows(tokenizer)
        self.max_steps = cfg.max_steps or self.rows.last_step()
        if self.begun:
            self._check_end(self.begun.progress)
        self._refuse_untrainable_parts()
        self.scheduler = self._make_scheduler()
        self.step = 0
        self.losses: list[float] = []
        self.validation_losses: list[tuple[int, float]] = []
        self.best: dict[str, Any] = {"loss": math.inf, "step": None}
        if self.begun:
            self._resume(self.begun)

        self.sample_log = self._open_sample_log()
        if self.is_main:
            self.logger = instantiate(cfg.metric_logger)
            self.logger.log_config(cfg)
        for number in _STOP_SIGNALS:
            signal.signal(number, self._ask_to_stop)
        sys.unraisablehook = _tell_unless_dropped_signal

    def _check_rounding(self) -> None:
        halves = [p for p in self.trained.values() if p.dtype == torch.bfloat16]
        rounds_at_random = getattr(self.optimizer, "bf16_stochastic_round", False)
        if rounds_at_random and any(isinstance(p, DTensor) for p in halves):
            raise ValueError(
                "optimizer.bf16_stochastic_round cannot be used where bf16 weights are divided "
                "over devices, or computed with in another dtype: set dtype=fp32 compute_dtype=bf16"
            )
        if self.is_main and halves and not rounds_at_random:
            log.warning(
                "What is trained is in bf16, and the optimizer rounds: a weight stays as it is "
                "where its update is below half a unit in the last place, 1/512 of the weight. Set "
                "dtype=fp32 compute_dtype=bf16, or with adapters model.trained_in_float32=True, or "
                "on one device an optimizer that rounds at random, such as "
                "torchao.optim.AdamW8bit with bf16_stochastic_round=True"
            )

    def _check_end(self, progress: dict[str, Any]) -> None:
        step, before = progress["step"], progress["max_steps"]
        if step > self.max_steps:
            raise ValueError(
                f"the run in {self.output_dir} is at step {step} already, and is to end after step "
                f"{self.max_steps}: raise max_steps or epochs"
            )
        if step == self.max_steps:
            log.info("The run ended with step %d: raise max_steps or epochs to train on", step)
        elif before != self.max_steps:
            log.info(
                "The run was to end after step %d, and is to end after step %d now; learning rates "
                "are from here on those of a run of that length",
                before,
                self.max_steps,
            )

    def _make_model(self) -> nn.Module:
        """Build on the meta device, divide over devices, and only then load each one's part."""
        cfg = self.cfg
        with default_dtype(self.dtype), torch.device("meta"):
            model = instantiate(cfg.model)
        self.flops = FlopCounter(model)
        if cfg.parallel.tensor > 1:
            plan = instantiate(cfg.parallel.plan, model)
            divide_layers(model, self.mesh["tensor"], plan)
        layers = [m for m in model.modules() if isinstance(m, TransformerSelfAttentionLayer)]
        # No backward comes through a frozen encoder: what it kept for one would never be let go
        encoder_layers = [layer for e in model.encoders.values() for layer in e.layers]
        is_trained = any(p.requires_grad for layer in encoder_layers for p in layer.parameters())
        frozen = set() if is_trained else {*encoder_layers}
        for number, layer in enumerate(layers):
            if cfg.compile:
                layer.forward = torch.compile(layer.forward)
            if self._recomputes(number) and layer not in frozen:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        offload = cfg.parallel.cpu_offload
        if self.data_ranks > 1 or dtypes_of(model) != {self.compute_dtype} or offload:
            shard(model, layers, self.mesh["data"], self.compute_dtype, offload)
        state = self.checkpointer.load_checkpoint()
        weights = state[MODEL_KEY]
        if ADAPTER_CONFIG in state:
            going_on = state[ADAPTER_CONFIG]
            names = [*state[ADAPTER_KEY], *going_on["modules_to_save"]]
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            check_continues(model, trained, going_on, names)
        self._on_main(
            lambda: self._keep("model", model_fingerprint(weights, Path(cfg.checkpoint_dir)))
        )
        weights = {**weights, **initial_adapters(model, weights, cfg.seed)}
        load_weights_into(model, weights, torch.device("cpu") if offload else self.device)
        return model.train()

    def _recomputes(self, layer: int) -> bool:
        every = {"none": None, "selective": 2, "full": 1}[self.cfg.activation_checkpointing]
        return every is not None and layer % every == 0

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters by part, each with its learning rate."""
        groups: dict[tuple[str, DeviceMesh | None], list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            # Fused steps do not mix parameters that are divided over other devices
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((part_of(name), mesh), []).append(parameter)
        rates = self.cfg.learning_rates
        return [
            {
                "params": parameters,
                "lr": self.cfg.optimizer.lr if rates[part] is None else rates[part],
                "part": part,
            }
            for (part, _), parameters in groups.items()
        ]

    def _make_scheduler(self) -> LRScheduler:
        if self.cfg.lr_scheduler is None:
            return LambdaLR(self.optimizer, lambda step: 1.0)
        scheduler: LRScheduler = instantiate(
            self.cfg.lr_scheduler, self.optimizer, num_training_steps=self.max_steps
        )
        return scheduler

    def _refuse_untrainable_parts(self) -> None:
        """Refuse to train what will have no gradient in any step."""
        if self.seeing and not self.rows.is_stream and not self.rows.has_media(self.max_steps):
            raise ValueError(
                f"{self._seeing_parts()} cannot be trained: none of the {self.max_steps} steps has "
                "an image or a video. Freeze them by model.encoder_trainable and "
                "model.fusion_trainable, or correct the dataset"
            )

    def _seeing_parts(self) -> str:
        parts = (group["part"] for group in self.optimizer.param_groups)
        return " and ".join(sorted({part for part in parts if part != "decoder"}))

    def _make_rows(self, tokenizer: Any) -> TrainingRows:
        """The data; the sizes of all samples are measured first, which finds broken ones."""
        cfg = self.cfg
        dataset = instantiate(cfg.dataset, tokenizer)
        is_stream = not hasattr(dataset, "__getitem__")
        if is_stream and not cfg.max_steps:
            raise ValueError("a streaming dataset has no known end: set max_steps")
        sizes = None if is_stream else self._measure(dataset, "dataset")
        return TrainingRows(
            dataset,
            instantiate(cfg.rows),
            rows_per_step=cfg.rows_per_step,
            rank=self.data_rank,
            world_size=self.data_ranks,
            seed=cfg.seed,
            shuffle=cfg.shuffle,
            epochs=None if cfg.max_steps else cfg.epochs,
            position=self.position or None,
            sizes=sizes,
        )

    def _make_validation_rows(self, tokenizer: Any) -> TrainingRows | None:
        if self.cfg.dataset_val is None:
            return None
        dataset = instantiate(self.cfg.dataset_val, tokenizer)
        return TrainingRows(
            dataset,
            instantiate(self.cfg.rows),
            rows_per_step=self.data_ranks,
            rank=self.data_rank,
            world_size=self.data_ranks,
            shuffle=False,
            epochs=1,
            sizes=self._measure(dataset, "dataset_val"),
        )

    def _measure(self, dataset: Any, key: str) -> np.ndarray:
        """The size of each sample; each process measures its share."""
        processes = dist.get_world_size()
        share = range(dist.get_rank(), len(dataset), processes)
        own: np.ndarray | SamplesError
        try:
            own = measure_all(dataset, share, self.cfg.num_workers, show_progress=self.is_main)
        except SamplesError as error:
            own = error
        shares: list[Any] = [None] * processes
        dist.all_gather_object(shares, own, group=self.save_group)
        errors = [share for share in shares if isinstance(share, SamplesError)]
        if errors:
            first = [sample for error in errors for sample in error.first]
            raise SamplesError(first, sum(error.bad for error in errors), len(dataset))
        sizes = np.empty((len(dataset), shares[0].shape[1]), shares[0].dtype)
        for rank, sizes_of_rank in enumerate(shares):
            sizes[rank::processes] = sizes_of_rank
        self._on_main(lambda: self._keep(key, data_fingerprint(self.cfg[key], sizes)))
        return sizes

    def _open_sample_log(self) -> TextIO:
        """Which samples each step took, for whoever wants to check, a file for each process."""
        directory = self.output_dir / "samples"
        if self.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            for path in directory.glob("process_*.jsonl"):  # steps after the saved come again
                drop_steps_after(self.step, path)
        dist.barrier(group=self.save_group)
        own = directory / f"process_{dist.get_rank()}.jsonl"
        return own.open("a", buffering=1, encoding="utf-8")  # whole lines, if we are killed

    def _load(self, rows: TrainingRows) -> AbstractContextManager[Iterator[Row]]:
        pins = self.device.type == "cuda"
        return loading(rows, self.cfg.num_workers, batch_size=None, pin_memory=pins)

    def train(self) -> None:
        """Train until the last step, or until a signal asks to stop, and save."""
        try:
            self._take_steps()
        except BaseException:
            if self.pending_save and (error := self.pending_save.exception()):
                log.error("%s", error)
            raise
        self._wait_for_save()
        if self.step < self.max_steps:
            self._agree_on_signal()
            return
        if self.is_main and self.seeing and not self.position["had_media"]:
            log.warning("%s did not change: no step had an image or a video", self._seeing_parts())
        self._export()
        if self.is_main:
            self._show()

    def _take_steps(self) -> None:
        cfg = self.cfg
        since = Logged()
        self.bar = tqdm(
            total=self.max_steps, initial=self.step, unit="step", disable=not self.is_main
        )
        with self._load(self.rows) as loader, self.bar:
            while self.step < self.max_steps:
                self._train_step(loader, since)
                self.bar.update()
                if self.pending_save and self.pending_save.done():
                    self._wait_for_save()
                is_last = self.step == self.max_steps
                saves = is_last or self._is_turn(cfg.save_every_n_steps, self.step)
                evaluates = self._is_turn(cfg.eval_every_n_steps, self.step)
                if self._logs(self.step):
                    asked_to_stop = self._log(since)
                    if self.validation_rows and (evaluates or is_last):
                        saves |= self._evaluate(self.validation_rows)
                    if saves or asked_to_stop:
                        self._save()
                    if asked_to_stop:
                        return
                    since = Logged()

    def _is_turn(self, every: int | None, step: int) -> bool:
        return every is not None and step % every == 0

    def _logs(self, step: int) -> bool:
        """Whether a step ends with a line of the log, which what else follows needs."""
        every = (
            self.cfg.log_every_n_steps,
            self.cfg.save_every_n_steps,
            self.cfg.eval_every_n_steps,
        )
        return step == self.max_steps or any(self._is_turn(n, step) for n in every)

    def _train_step(self, loader: Iterator[Row], since: Logged) -> None:
        start = time.perf_counter()
        rows = [next(loader) for _ in range(self.cfg.rows_per_step // self.data_ranks)]
        since.waited += time.perf_counter() - start

        # Made and summed on the device: the host does not wait for it
        targets = torch.full(
            (), float(sum(len(row.batch["targets"]) for row in rows)), device=self.device
        )
        dist.all_reduce(targets, group=self.mesh["data"].get_group())
        mean_loss = torch.zeros_like(targets)
        self.step += 1
        with self.offloading:
            for row in rows:
                loss = self.model(**self._to_device(row.batch)).sum() / targets
                (loss * self.data_ranks).backward()  # FSDP averages gradients over ranks
                mean_loss += loss.detach()
                self._note(row, since)
        if not rows[0].step_has_media:  # gradients of zero: momentum and decay would act on them
            for p in self.seeing:
                p.grad = None
        if self.cfg.parallel.tensor > 1:
            average_copies(self.trained.values(), self.mesh["tensor"])
        dist.all_reduce(mean_loss)
        mean_loss /= self.mesh["tensor"].size()  # which have the same rows
        norm = clip_grad_norm(self.trained.values(), self.cfg.clip_grad_norm or math.inf)
        # The one wait for the device in a step: no optimizer can take a step back
        loss, self.grad_norm = torch.stack([mean_loss, norm.to(mean_loss)]).tolist()
        self._refuse_non_finite(loss, rows)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        since.losses.append(loss)
        self.position = rows[-1].position

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        def move(value: torch.Tensor | Segments) -> torch.Tensor | Segments:
            return value.to(self.device, non_blocking=True)

        return tree_map_only((torch.Tensor, Segments), move, dict(batch))

    def _note(self, row: Row, since: Logged) -> None:
        """Count what a row was, and write down whose it was."""
        media = row.batch.get("encoder_input", {}).get("vision")
        tokens = [size.tokens for size in row.sizes]
        targets = len(row.batch["targets"])
        since.counts += (
            targets,
            sum(tokens),
            getattr(self.rows.planner, "max_tokens", row.batch["tokens"].numel()),
            len(media["grid_thw"]) if media else 0,
            self.flops.step(tokens, media, targets),
        )
        self.sample_log.write(json.dumps({"step": self.step, "samples": row.samples}) + "\n")

    def _log(self, since: Logged) -> bool:
        """Log the steps since the last line.

        Returns:
            Whether any process was asked to stop.
        """
        steps = len(since.losses)
        self.last_asked = self.step
        totals = torch.tensor([*since.counts, float(self.stop_signal)]).double().to(self.device)
        dist.all_reduce(totals)
        totals /= self.mesh["tensor"].size()  # which have the same rows
        targets, tokens, room, media, flops, stops = totals.tolist()
        seconds = time.perf_counter() - since.start
        self.losses += since.losses
        metrics = {
            "loss": sum(since.losses) / steps,
            "grad_norm": self.grad_norm,
            **{f"lr_{group['part']}": group["lr"] for group in self.optimizer.param_groups},
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": targets / seconds,
            "media_per_second": media / seconds,
            "row_fill": tokens / room,
            "waiting_for_data": since.waited / seconds,
            "memory_gb": self._peak_memory() / 1e9,
        }
        if self.peak_flops:
            metrics["mfu"] = flops / seconds / (self.peak_flops * dist.get_world_size())
        if self.is_main:
            self.logger.log_dict(metrics, step=self.step)
            self.bar.set_postfix(loss=f"{metrics['loss']:.4g}", fill=f"{metrics['row_fill']:.0%}")
        return stops > 0

    def _refuse_non_finite(self, loss: float, rows: list[Row]) -> None:
        """Raise an error, on all processes, before a step would spoil the weights."""
        if math.isfinite(loss) and math.isfinite(self.grad_norm):
            return
        self._refuse_non_finite_weights(self.step - 1)
        samples = self._samples_of_all([row.samples for row in rows])
        name, value = "loss", loss
        if math.isfinite(loss):
            name, value = "norm of the gradients", self.grad_norm
        raise ValueError(
            f"the {name} of step {self.step} is {value}; its samples have the indices "
            f"{samples}. The step was not taken: lower the learning rate, or look at these "
            f"samples; the last save is in {self._last_save()}"
        )

    def _refuse_non_finite_weights(self, step: int) -> None:
        names = non_finite(self.trained, self.device)
        if names:
            what = f"after step {step}" if step else "before the first step"
            raise ValueError(
                f"{what}, {names[0]} is not finite, as {len(names)} of {len(self.trained)} trained "
                "weights: lower the learning rate, or start from another checkpoint; the last "
                f"save is in {self._last_save()}"
            )

    def _samples_of_all(self, rows: list[list[int]]) -> list[int]:
        own = [sample for row in rows for sample in row]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        return sorted({sample for part in everyone for sample in part})

    def _last_save(self) -> Path | str:
        self._wait_for_save()
        return self.saved.newest() or "no directory yet"

    def _peak_memory(self) -> int:
        """The most bytes used so far: of the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @torch.no_grad()
    def _evaluate(self, rows: TrainingRows) -> bool:
        """Compute the loss of the validation set, and tell whether it is the lowest so far."""
        self.model.eval()
        sums: list[torch.Tensor] = []
        samples: list[list[int]] = []
        count = 0
        with self._load(rows) as loader:
            for row in loader:
                losses = self.model(**self._to_device(row.batch))
                sums.append(losses.double().sum())
                samples.append(row.samples)
                count += len(losses)
        total = torch.stack([torch.stack(sums).sum(), torch.full_like(sums[0], count)])
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # a backward would have
        self.model.train()
        dist.all_reduce(total)  # of all processes, which have to come to the same conclusion
        loss = (total[0] / total[1]).item()
        if not math.isfinite(loss):
            bad = [own for own, x in zip(samples, sums, strict=True) if not x.isfinite()]
            raise ValueError(
                f"the validation loss after step {self.step} is {loss}; the samples of dataset_val "
                f"whose rows did it have the indices {self._samples_of_all(bad)}: look at them; "
                f"the last save is in {self._last_save()}"
            )
        if self.is_main:
            self.logger.log_dict({"validation_loss": loss}, step=self.step)
            log.info("Validation loss %.4g after step %d", loss, self.step)
        self.validation_losses.append((self.step, loss))
        is_best = loss < self.best["loss"]
        if is_best:
            self.best = {"loss": loss, "step": self.step}
        return is_best

    def _state(self) -> dict[str, Any]:
        """What is saved and loaded by all processes together, by name and not by rank."""
        return {
            "model": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizer": optimizer_state(self.optimizer, self.trained),
        }

    def _random_state(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {f"{name}_{dist.get_rank()}": state for name, state in states.items()}

    def _save(self) -> None:
        """Begin to save all that it takes to go on; the next steps run meanwhile."""
        self._wait_for_save()
        self._refuse_non_finite_weights(self.step)
        state = {**self._state(), "random": self._random_state()}
        if self.device.type == "cpu":  # would change under the hands of the thread that writes
            state = tree_map_only(torch.Tensor, torch.clone, state)
        progress = {
            "step": self.step,
            "position": self.position,
            "max_steps": self.max_steps,
            "losses": self.losses,
            "validation_losses": self.validation_losses,
            "best": self.best,
            "processes": dist.get_world_size(),
            "fingerprint": self.fingerprint,
        }
        self._on_main(lambda: self.saved.begin(self.step, progress))
        written = dcp.async_save(
            state, checkpoint_id=self.saved.partial(self.step), process_group=self.save_group
        )
        self.pending_save = self.saving.submit(self._finish_save, self.step, written)

    def _finish_save(self, step: int, written: Any) -> None:
        try:
            written.result()
            if self.is_main:
                self.saved.finish(step)
        except (dcp.CheckpointException, OSError) as error:
            failures = getattr(error, "failures", {0: (error, None)})
            reason = next(iter(failures.values()))[0]
            if self.is_main:
                self.saved.discard(step)
            raise OSError(
                f"{self.saved.path(step)} cannot be written ({reason}): make room and go on with "
                "resume=True; earlier steps are as they were"
            ) from error

    def _wait_for_save(self) -> None:
        if self.pending_save is not None:
            pending, self.pending_save = self.pending_save, None
            pending.result()

    def _resume(self, begun: SavedStep) -> None:
        directory, progress = begun
        initialize(self.optimizer)
        saved = FileSystemReader(directory).read_metadata().state_dict_metadata
        prefix = "optimizer."
        names = {name.removeprefix(prefix) for name in saved if name.startswith(prefix)}
        fit(self.optimizer, self.trained, names)
        state = self._state()
        same_processes = progress["processes"] == dist.get_world_size()
        if same_processes:
            state["random"] = self._random_state()
        dcp.load(state, checkpoint_id=directory)
        set_plain_values(self.optimizer, self.trained, state["optimizer"])
        self.step, self.losses = progress["step"], progress["losses"]
        self.validation_losses, self.best = progress["validation_losses"], progress["best"]
        for _ in range(self.step):  # towards the end that the run has now
            self.scheduler.step()
        if same_processes:
            rank = dist.get_rank()
            torch.set_rng_state(state["random"][f"cpu_{rank}"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["random"][f"cuda_{rank}"], self.device)
        log.info("Going on after step %d of %s", self.step, directory)

    def _export(self) -> None:
        """Write what was trained in the published layout, adapters apart and merged."""
        if self.cfg.export == "best":
            self._load_best()
        trained = gather(self.trained)
        if not self.is_main:
            return
        weights = self.checkpointer.load_checkpoint()[MODEL_KEY] | trained
        weights = {name: tensor for name, tensor in weights.items() if not is_adapter(name)}
        state = {MODEL_KEY: weights}
        adapters = {name: tensor for name, tensor in trained.items() if is_adapter(name)}
        if adapters:
            layer = next(m for m in self.model.modules() if isinstance(m, LoRALinear | DoRA))
            in_full = sorted(trained.keys() - adapters.keys())
            base = self.cfg.checkpoint_dir
            names = family_of(base).names
            adapter = Adapter(adapters, layer.rank, layer.alpha, str(base), names)
            state = {
                MODEL_KEY: merge_adapter(weights, adapter),
                ADAPTER_KEY: adapters,
                ADAPTER_CONFIG: {
                    "r": layer.rank,
                    "lora_alpha": layer.alpha,
                    "modules_to_save": in_full,
                },
            }
        self.checkpointer.save_checkpoint(
            state, epoch=self._epoch(), processor_files=self.processor_files
        )

    def _load_best(self) -> None:
        number = self.best["step"]
        if number == self.step:
            return
        best = self._on_main(lambda: self.saved.read(number))
        dcp.load({"model": self._state()["model"]}, checkpoint_id=best.directory)
        self.position = best.progress["position"]
        log.info("Exporting step %d, which has the lowest validation loss", number)

    def _epoch(self) -> int:
        """The epoch of the last step; the position is that of the next."""
        return self.position["epoch"] - (not self.position["has_begun"])

    def _show(self) -> None:
        """Draw the losses, and sum the run up."""
        picture = self.output_dir / "loss.png"
        plot_losses(self.losses, self.validation_losses, picture)
        table = Table("steps", "first loss", "last loss", "best validation loss")
        best = f"{self.best['loss']:.4g} (step {self.best['step']})" if self.best["step"] else "-"
        table.add_row(str(self.step), f"{self.losses[0]:.4g}", f"{self.losses[-1]:.4g}", best)
        Console().print(table)
        print(f"Loss curve: {picture}\nWeights:    {self.output_dir / f'epoch_{self._epoch()}'}")

    def _agree_on_signal(self) -> None:
        """Let all processes end with the status of the signal that some got."""
        signals = torch.tensor(self.stop_signal)
        dist.all_reduce(signals, dist.ReduceOp.MAX, group=self.save_group)
        self.stop_signal = int(signals)
        if self.is_main:
            log.warning("Stopped after step %d; resume=True goes on", self.step)

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        self.stop_signal = number
        for each in _STOP_SIGNALS:  # a second one stops at once
            signal.signal(each, signal.SIG_DFL)
        if self.is_main:
            step = max(self.step, self.last_asked + 1)
            while step < self.max_steps and not self._logs(step):
                step += 1
            what = f"step {step} is saved" if step < self.max_steps else "the export is written"
            name = signal.Signals(number).name
            text = f"\n{name}: stops when {what}, at once on a second signal\n"
            os.write(2, text.encode())  # can come in the middle of a print, which cannot be nested

    def cleanup(self) -> None:
        """Close what is open."""
        self.saving.shutdown()
        self.sample_log.close()
        if self.is_main:
            self.logger.close()
        dist.destroy_process_group()


def _tell_unless_dropped_signal(unraisable: Any) -> None:
    """Say what cannot be raised, but for a signal that came together with the first one.

    Python finds its handler taken away by then, drops it, and shows a traceback of that.
    """
    if "ignored due to race condition" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _check_devices(cfg: DictConfig) -> None:
    """Refuse devices that are not there, and numbers that do not divide, before anything waits."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.activation_offloading and cfg.activation_checkpointing != "full":
        # Views of gathered weights would be offloaded too, which FSDP frees after the forward
        raise ValueError("activation_offloading needs activation_checkpointing: full")
    if cfg.device == "cpu" and cfg.activation_offloading:
        raise ValueError("activation_offloading is for a GPU's memory: leave it at False on a cpu")
    if cfg.device == "cuda":
        devices, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if devices == 0:
            raise ValueError(
                "device is cuda, and torch sees no GPU: see what torch.cuda.is_available() says, "
                "or set device=cpu"
            )
        if here > devices:
            raise ValueError(f"{here} processes cannot share {devices} GPUs: lower nproc_per_node")
    tensor = cfg.parallel.tensor
    if processes % tensor:
        raise ValueError(
            f"parallel.tensor is {tensor}, and does not divide the {processes} processes"
        )
    if tensor > 1 and cfg.parallel.plan is None:
        raise ValueError(f"parallel.tensor is {tensor}, which needs a parallel.plan")
    if cfg.rows_per_step % (processes // tensor):
        raise ValueError(
            f"{processes // tensor} devices cannot share the {cfg.rows_per_step} rows of a step "
            f"equally: set rows_per_step to a multiple of {processes // tensor}"
        )


def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe.

    Args:
        cfg: the config.

    Returns:
        The exit status: 0 if the run is finished, 128 and the signal's number if it was stopped.
    """
    recipe = FinetuneRecipe(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    return 128 + recipe.stop_signal if recipe.step < recipe.max_steps else 0


if __name__ == "__main__":
    sys.exit(run_recipe(recipe_main))
