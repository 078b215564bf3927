"""Fine-tune a vision-language model, in full or by adapters; docs/training.md walks through this.

A step takes ``rows_per_step`` rows over all devices; its loss is the mean over supervised tokens.
"""

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig
from torch import nn
from torch._dynamo import config as dynamo
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from torchtune_vl import _torchtune as tune
from torchtune_vl._torchtune import instantiate
from torchtune_vl.checkpoint._adapters import Adapter, check_continues, merge_lazily
from torchtune_vl.data import Plan, Planner, Row, RowSharing, StreamedRows, TrainingRows
from torchtune_vl.data._data_workers import loading
from torchtune_vl.data._plan import unusable
from torchtune_vl.datasets import Measurements, Mixture, SamplesError, measure
from torchtune_vl.evaluation import Sources, evaluate, metrics_of
from torchtune_vl.files._directory import numbered, open_locked, remove, write_json
from torchtune_vl.files._together import Together
from torchtune_vl.generation import Rules, answer_questions
from torchtune_vl.models._builders import part_of
from torchtune_vl.models._registry import family_of
from torchtune_vl.models._weights import initial_adapters, load_weights_into
from torchtune_vl.modules import Segments
from torchtune_vl.modules.adapters import adapted_layers, is_adapter
from torchtune_vl.modules.attention import use_flash_attention
from torchtune_vl.modules.context import RowShare
from torchtune_vl.recipes._datasets import datasets_of
from torchtune_vl.recipes._launch import run_recipe
from torchtune_vl.training import _fingerprint as fingerprint
from torchtune_vl.training import _optimizer_state as states
from torchtune_vl.training import _sharding as sharding
from torchtune_vl.training._bad_samples import BadSample, BadSamples
from torchtune_vl.training._flops import FlopCounter
from torchtune_vl.training._memory import estimate_memory
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._metrics import Metrics
from torchtune_vl.training._overview import Overview
from torchtune_vl.training._saved_steps import SavedStep, Steps, drop_steps_after

log = tune.get_logger("INFO")

# A line of the log comes with each of these
_TURNS = ("log_every_n_steps", "save_every_n_steps", "eval_every_n_steps")
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds: schedulers send a signal to all processes, and torchrun sends it on to the same ones
_SIGNALS_ARE_ONE = 1.0
# All wait while the first process completes an export, on whatever disk
_SAVED_WITHIN = timedelta(hours=12)


class FinetuneRecipe:
    """The run that a config describes: see the configs for what each key means.

    Raises ``ValueError`` if settings do not fit, or ``output_dir`` has a run not to be resumed.
    """

    def __init__(self, cfg: DictConfig) -> None:
        _check_settings(cfg)
        self.cfg = cfg
        self.device = torch.device(cfg.device)
        self._init_process_group()
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        self.dtype = sharding.dtype_on(self.device, cfg.dtype)
        self.compute_dtype = sharding.dtype_on(self.device, cfg.compute_dtype or cfg.dtype)
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.mesh = Mesh.of(cfg.parallel, self.processes)
        self.devices = self.mesh.devices(self.device.type)
        self.expert_devices = self.mesh.expert_devices(self.device.type)
        self.row_group = self.mesh.row_group(self.device.type)
        self.data_ranks, self.data_rank = self.mesh.data, self.rank // self.mesh.copies
        self.is_main = self.rank == 0
        self.output_dir = Path(cfg.output_dir)
        self.saved = Steps(self.output_dir / "steps", cfg.keep_last)
        self.stop_signal = 0
        self.last_asked = 0  # the step after which it was last seen to
        self.overview = Overview()
        self.bad_samples = BadSamples(
            self.output_dir / "bad_samples.jsonl", cfg.max_bad_share, writes=self.is_main
        )
        self.pending_save: Future[None] | None = None
        self.saving = ThreadPoolExecutor(1)
        # Steps wait while a GPU's tensors are copied: to pinned memory, kept from save to save
        kept = StagingOptions(use_shared_memory=False, use_async_staging=False)
        self.stager = DefaultStager(kept) if self.device.type == "cuda" else None
        self.fingerprint: dict[str, Any] = {}
        self.begun = self.together.by_first(self._find_begun)
        self.together.check_shared(self.output_dir)
        self.together.by_first(lambda: self._keep("settings", fingerprint.settings(cfg)))

    def _init_process_group(self) -> None:
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:  # started without torchrun: one process is a group too
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # Saving goes on beside the steps, and so must not take part in their collectives
        self.save_group = dist.new_group(backend="gloo", timeout=_SAVED_WITHIN)
        self.together = Together(self.save_group)

    def _find_begun(self) -> SavedStep | None:
        """The step to go on from, if there is one, and no other run beside this."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.lock = open_locked(self.output_dir / ".lock")
        self.saved.tidy()
        newest, exported = self.saved.newest(), numbered(self.output_dir, "epoch")
        if (newest and not self.cfg.resume) or (exported and not newest):
            remedy = "if that has steps, go on with resume=True, or name another output_dir"
            raise ValueError(f"{newest or exported[0]} is of an earlier run: {remedy}")
        return self.saved.newest_whole()

    def _keep(self, kind: str, values: dict[str, Any]) -> None:
        """Note what a run begins with, and refuse to go on with anything else."""
        self.fingerprint[kind] = values
        if self.begun:
            fingerprint.refuse_changes(kind, self.begun.progress["fingerprint"][kind], values)

    def setup(self) -> None:
        """Make model, data, optimizer and schedule, and take up where an earlier run stopped."""
        cfg = self.cfg
        # The same on devices that share layers, or their copies of the others would drift apart;
        # and for datasets, which may use any, on those that share rows
        torch.manual_seed(cfg.seed + self.rank // cfg.parallel.tensor)
        for seed in (np.random.seed, random.seed):
            seed(cfg.seed + self.data_rank)
        tokenizer = instantiate(cfg.tokenizer)
        self.processor_files = tokenizer.processor_files()
        self.checkpointer = instantiate(cfg.checkpointer)
        self.model = self._make_model()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("nothing is trained: set one of the keys model.*_trainable")
        self.optimizer = instantiate(cfg.optimizer, self._parameter_groups())
        self._check_rounding()
        # Not by torchtune's function, which refuses models with a decoder and an encoder
        self.offloading = tune.OffloadActivations() if cfg.activation_offloading else nullcontext()

        self.step = self.begun.progress["step"] if self.begun else 0
        self.had_media = bool(self.begun and self.begun.progress["position"]["had_media"])
        self.lanes: dict[int, dict[str, Any]] = {}  # of streams, their newest states
        self.newly_bad: list[BadSample] = []  # since they were listed
        found_before: list[BadSample] = []
        if self.begun:
            found_before = self.together.by_first(lambda: self.bad_samples.read_until(self.step))
        self.rows = self._make_rows(tokenizer)
        self.validation_rows: TrainingRows | None = None
        self.questions: Sources | None = None
        if cfg.dataset_val:
            mixture = datasets_of(cfg, "dataset_val", tokenizer)
            if cfg.metrics:
                self.questions = self._make_questions(mixture)
                for metric in metrics_of(cfg.metrics):
                    metric.check_installed()
                    metric.check_fits(tokenizer)
                self.transform = tokenizer
            order = {"rows_per_step": self.data_ranks, "shuffle": False, "epochs": 1}
            self.validation_rows = self._make_table_rows("dataset_val", mixture, **order)
        self.bad_samples.begin(found_before)
        plan = self.rows.plan if isinstance(self.rows, TrainingRows) else None
        self.max_steps = cfg.max_steps or (plan.last_step if plan else 0)
        if self.begun:
            self._check_end(self.begun.progress)
        # What has no gradient in a step without media, and none at all if no step has any
        self.seeing = {n: p for n, p in self.trained.items() if part_of(n) != "decoder"}
        self.seeing_parts = " and ".join(sorted({*map(part_of, self.seeing)}))
        if self.seeing and plan and not plan.has_media(self.max_steps):
            raise ValueError(
                f"{self.seeing_parts} cannot be trained: none of the {self.max_steps} steps has an "
                "image or a video. Freeze them by model.encoder_trainable and "
                "model.fusion_trainable, or correct the dataset"
            )
        scheduler = instantiate(cfg.lr_scheduler, self.optimizer, num_training_steps=self.max_steps)
        self.scheduler = scheduler or LambdaLR(self.optimizer, lambda step: 1.0)
        logger = instantiate(cfg.metric_logger) if self.is_main else None
        if logger:
            logger.log_config(cfg)
        room = getattr(self.rows.planner, "max_tokens", None)
        shown = (self.sources, cfg.best_by)
        self.metrics = Metrics(logger, self.flops, room, self.device, self.mesh, *shown)
        if self.begun:
            self._resume(self.begun)
        self.sample_log = self._open_sample_log()
        if self.is_main:
            # Of the device alone: it takes seconds
            memory = {}
            if self.device.type == "cuda":
                memory = estimate_memory(cfg, self.processes, self.devices, self.expert_devices)
            self.overview.show(self.max_steps - self.step, sum(memory.values()))
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
                "What is trained is rounded to bf16: updates below half a unit in the last place, "
                "1/512 of a weight, are lost. Set dtype=fp32 compute_dtype=bf16 or, with adapters, "
                "model.trained_in_float32=True, or round at random (docs/training.md, Precision)"
            )

    def _check_end(self, progress: dict[str, Any]) -> None:
        step, before, last = progress["step"], progress["max_steps"], self.max_steps
        if step > last:
            told = f"the run in {self.output_dir} is at step {step} already"
            raise ValueError(f"{told}, and is to end after step {last}: raise max_steps or epochs")
        if step == last:
            log.info("The run ended with step %d: raise max_steps or epochs to train on", step)
        elif before != last:
            told = f"The run was to end after step {before}, and is to end after step {last} now"
            log.info(f"{told}; from here on learning rates are those of such a run")

    def _make_model(self) -> nn.Module:
        """Build on the meta device, divide over devices, and only then load each one's part."""
        cfg = self.cfg
        if cfg.flash_attention:
            use_flash_attention(cfg.flash_attention, self.device)
        with sharding.default_dtype(self.dtype), torch.device("meta"):
            model = instantiate(cfg.model)
        self.flops, self.placeholder_ids = FlopCounter(model), model.placeholder_ids
        # In the order of the model, which is the same in all processes
        self.base_names = [name for name, _ in model.named_parameters() if not is_adapter(name)]
        if cfg.float8:
            sharding.multiply_in_float8(model, self.device)
        if cfg.parallel.tensor > 1:
            plan = instantiate(cfg.parallel.plan, model)
            sharding.divide_layers(model, self.devices["tensor"], plan)
        if self.expert_devices is not None:
            sharding.divide_experts(model, self.expert_devices["experts"])
        if cfg.compile:
            # Layers of decoder and encoder are one function, which is compiled for both, with
            # gradients and without, for inputs that need them or not, and for fixed and any sizes
            dynamo.recompile_limit = max(dynamo.recompile_limit, 32)
            for layer in sharding.layers_of(model):
                layer.forward = torch.compile(layer.forward)
        sharding.recompute_layers(model, cfg.activation_checkpointing)
        offload = cfg.parallel.cpu_offload
        if sharding.is_sharded(model, self.mesh, self.compute_dtype, offload):
            how = self.compute_dtype, offload, self.expert_devices
            sharding.shard(model, self.devices, *how)
        state = self.checkpointer.load_checkpoint()
        weights = state[tune.MODEL_KEY]
        if tune.ADAPTER_CONFIG in state:
            going_on = state[tune.ADAPTER_CONFIG]
            names = [*state[tune.ADAPTER_KEY], *going_on["modules_to_save"]]
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            check_continues(model, trained, going_on, names)
        folder = Path(cfg.checkpoint_dir)
        self.together.by_first(
            lambda: self._keep("model", fingerprint.model_fingerprint(weights, folder))
        )
        weights = {**weights, **initial_adapters(model, weights, cfg.seed)}
        load_weights_into(model, weights, torch.device("cpu") if offload else self.device)
        return model.train()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters by part, each with its learning rate."""
        groups: dict[tuple[str, DeviceMesh | None], list[nn.Parameter]] = {}
        for name, p in self.trained.items():
            # Fused steps do not mix parameters that are divided over other devices
            mesh = p.device_mesh if isinstance(p, DTensor) else None
            groups.setdefault((part_of(name), mesh), []).append(p)
        rates, lr = self.cfg.learning_rates, self.cfg.optimizer.lr
        return [
            {"params": params, "lr": lr if rates[part] is None else rates[part], "part": part}
            for (part, _), params in groups.items()
        ]

    def _make_rows(self, tokenizer: Any) -> TrainingRows | StreamedRows:
        cfg, mixture = self.cfg, datasets_of(self.cfg, "dataset", tokenizer)
        self.sources = mixture.names
        order: dict[str, Any] = {"rows_per_step": cfg.rows_per_step, "seed": cfg.seed}
        order["position"] = self.begun and self.begun.progress["position"]
        if not mixture.is_stream:
            order |= {"epochs": None if cfg.max_steps else cfg.epochs, "max_steps": cfg.max_steps}
            rows = self._make_table_rows("dataset", mixture, shuffle=cfg.shuffle, **order)
            rows.augments = mixture.augments
            return rows
        if cfg.shuffle or not cfg.max_steps:
            raise ValueError(
                "a stream has an order of its own and no known end: set shuffle=False and max_steps"
            )
        order |= {"weights": mixture.weights if len(self.sources) > 1 else [1.0]}
        order |= {"num_workers": cfg.num_workers, **self._sharing()}
        return StreamedRows(mixture.datasets, instantiate(cfg.rows), **order)

    def _make_table_rows(self, key: str, mixture: Mixture, **order: Any) -> TrainingRows:
        """The rows of tables, planned by the first process from sizes that all have measured."""
        if mixture.is_stream:
            raise ValueError(f"{key} has no known end: read it as a table, without streaming")
        planner = instantiate(self.cfg.rows)
        measured = self._measure(mixture)
        listed = self.together.by_first(
            lambda: self._plan(key, mixture, measured, planner, **order)
        )
        self.bad_samples.add(listed)
        plan = Plan(self._plan_of(key))
        plan.wait()
        return TrainingRows(mixture.table, planner, plan, **self._sharing())

    def _make_questions(self, mixture: Mixture) -> Sources:
        """The conversations of the validation set, whose last answers are truths."""
        for dataset in mixture.datasets:
            if not hasattr(dataset, "read"):
                name = type(dataset).__name__
                raise ValueError(
                    f"metrics need the conversations of dataset_val, which {name} does not have: "
                    "take vision_chat_dataset, or set metrics=null"
                )
        return Sources(mixture.datasets, mixture.names)

    def _sharing(self) -> dict[str, Any]:
        skips_bad = self.cfg.on_bad_sample == "skip"
        sharing = None
        if self.row_group:
            place = dist.get_rank(self.row_group), self.mesh.context
            sharing = RowSharing(*place, self.placeholder_ids)
        order = {"rank": self.data_rank, "world_size": self.data_ranks}
        return {**order, "skips_bad": skips_bad, "sharing": sharing}

    def _measure(self, mixture: Mixture) -> Measurements:
        """What is found of all samples, in the first process; each measures its share of them."""
        found = []
        for name, dataset in zip(mixture.names, mixture.datasets, strict=True):
            share = range(self.rank, len(dataset), self.processes)
            of = f" {name}" if len(mixture.names) > 1 else ""
            shown = f"measuring{of}" if self.is_main else None
            own = measure(dataset, share, self.cfg.num_workers, shown)
            shares: list[Any] = [Measurements()] * self.processes
            dist.gather_object(own, shares if self.is_main else None, group=self.save_group)
            found.append(Measurements.interleaved(shares))
        return mixture.measured(found)

    def _plan(
        self, key: str, mixture: Mixture, measured: Measurements, planner: Planner, **order: Any
    ) -> list[BadSample]:
        """Plan all rows, and give the samples that are left out."""
        sizes = measured.sizes
        refused = [(i, mixture.with_place(i, reason)) for i, reason in unusable(planner, sizes)]
        bad = sorted([*measured.bad, *refused])
        if bad and self.cfg.on_bad_sample == "raise":
            raise SamplesError(bad, len(bad), len(sizes))
        listed = [BadSample(0, key, index, reason) for index, reason in bad]
        self.bad_samples.add(listed)
        self.bad_samples.refuse_many(key, len(sizes))
        sizes[[index for index, _ in bad]] = 0
        self._keep(key, fingerprint.data_fingerprint(self.cfg[key], sizes))
        measured.tell_truncated()
        plan = Plan.make(self._plan_of(key), planner, sizes, draws=mixture.draws(sizes), **order)
        self.overview.add_dataset(key, measured, len(bad), plan)
        return listed

    def _plan_of(self, key: str) -> Path:
        return self.output_dir / "plan" / key

    def _open_sample_log(self) -> TextIO:
        """Which samples each step took, for whoever wants to check, a file for each process."""
        directory = self.output_dir / "samples"
        if self.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            for path in directory.glob("process_*.jsonl"):  # steps after the saved come again
                drop_steps_after(self.step, path)
        dist.barrier(group=self.save_group)
        own = directory / f"process_{self.rank}.jsonl"
        return own.open("a", buffering=1, encoding="utf-8")  # whole lines, if we are killed

    def _load(self, rows: TrainingRows | StreamedRows) -> AbstractContextManager[Iterator[Row]]:
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
            # All processes end with the status of the signal that some got
            signals = torch.tensor(self.stop_signal)
            dist.all_reduce(signals, dist.ReduceOp.MAX, group=self.save_group)
            self.stop_signal = int(signals)
            if self.is_main:
                log.warning("Stopped after step %d; resume=True goes on", self.step)
            return
        if self.is_main and self.seeing and not self.had_media:
            log.warning("%s did not change: no step had an image or a video", self.seeing_parts)
        epoch = self._export()
        if self.is_main:
            self.metrics.show(self.step, self.output_dir)
            print(f"Weights:    {self.output_dir / f'epoch_{epoch}'}")

    def _take_steps(self) -> None:
        last, is_hidden = self.max_steps, not self.is_main
        self.bar = tqdm(total=last, initial=self.step, unit="step", disable=is_hidden)
        if self.validation_rows and not self.step and self.cfg.eval_every_n_steps:
            self._evaluate(self.validation_rows)
        self.metrics.begin()
        with self._load(self.rows) as loader, self.bar:
            while self.step < self.max_steps:
                self._train_step(loader)
                self.bar.update()
                if self.pending_save and self.pending_save.done():
                    self._wait_for_save()
                if self._is_turn(self.step):
                    saves = self._is_turn(self.step, "save_every_n_steps")
                    asked_to_stop = self._log()
                    if self.validation_rows and self._is_turn(self.step, "eval_every_n_steps"):
                        saves |= self._evaluate(self.validation_rows)
                    if saves or asked_to_stop:
                        self._save()
                    if asked_to_stop:
                        return
                    self.metrics.begin()

    def _is_turn(self, step: int, *keys: str) -> bool:
        """Whether a step is the last, or one of those that keys, by default all, name."""
        every = (self.cfg[key] for key in keys or _TURNS)
        return step == self.max_steps or any(n is not None and step % n == 0 for n in every)

    def _train_step(self, loader: Iterator[Row]) -> None:
        start = time.perf_counter()
        rows = [next(loader) for _ in range(self.cfg.rows_per_step // self.data_ranks)]
        self.metrics.waited += time.perf_counter() - start
        self._refuse_different_rows(rows, "dataset")

        # Made and summed on the device: the host does not wait for it
        count = sum(len(row.batch["targets"]) for row in rows)
        targets = torch.full((), float(count), device=self.device)
        dist.all_reduce(targets)
        targets /= self.mesh.tensor  # which have the same ones
        mean_loss = torch.zeros_like(targets)
        self.step += 1
        with self.offloading:
            for row in rows:
                losses = self.model(**self._to_device(row.batch))
                loss = losses.sum() / targets
                # FSDP averages gradients over devices that share weights
                (loss * (self.processes // self.mesh.tensor)).backward()
                mean_loss += loss.detach()
                self.metrics.add_row(row, losses)
                self._log_samples(row)
        has_media = self._has_media(rows)
        self.had_media |= has_media
        if not has_media:  # gradients of zero: momentum and decay would act on them
            for p in self.seeing.values():
                p.grad = None
        if self.mesh.tensor > 1:
            sharding.average_copies(self.trained.values(), self.devices["tensor"])
        if self.expert_devices is not None:
            sharding.average_experts(self.trained.values(), self.expert_devices)
        dist.all_reduce(mean_loss)
        mean_loss /= self.mesh.tensor
        norm = sharding.clip_grad_norm(self.trained.values(), self.cfg.clip_grad_norm or math.inf)
        # The one wait for the device in a step: no optimizer can take a step back
        loss, self.grad_norm = torch.stack([mean_loss, norm.to(mean_loss)]).tolist()
        self._refuse_non_finite(loss, rows)
        states.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.metrics.add_loss(loss)

    def _refuse_different_rows(self, rows: list[Row], key: str) -> None:
        """End the run if devices that share rows have made them of other samples."""
        if self.mesh.copies == 1 or self.cfg.on_bad_sample == "raise":
            return
        own = self.data_rank, [row.samples for row in rows]
        everyone: list[Any] = [None] * self.processes
        dist.all_gather_object(everyone, own)
        made = [samples for data_rank, samples in everyone if data_rank == self.data_rank]
        if any(samples != made[0] for samples in made):
            read = {*chain.from_iterable(chain.from_iterable(samples) for samples in made)}
            everywhere = set.intersection(*({*chain.from_iterable(s)} for s in made))
            self._end(
                f"{key}: samples {sorted(read - everywhere)} could be read by some of the devices "
                "that share a row, and not by others: see that all machines can read them"
            )

    def _has_media(self, rows: list[Row]) -> bool:
        """Whether any row of the step, on any process, has images or videos."""
        planned = rows[0].step_has_media
        if planned is False or (planned and self.cfg.on_bad_sample == "raise"):
            return planned
        # Streams are not planned by all, and samples may have been skipped
        found = torch.tensor(any("encoder_input" in row.batch for row in rows))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def _log_samples(self, row: Row) -> None:
        """Note which samples a row had, and which of them were bad."""
        line: dict[str, Any] = {"step": self.step, "samples": row.samples}
        if len(self.sources) > 1:
            line["sources"] = [self.sources[source] for source in row.sources]
        self.sample_log.write(json.dumps(line) + "\n")
        self.newly_bad += [BadSample(self.step, "dataset", *bad) for bad in row.bad]
        if isinstance(self.rows, StreamedRows):
            self.lanes[row.position["lane"]] = row.position["state"]

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        types = (torch.Tensor, Segments, RowShare)
        on_device = tree_map_only(
            types, lambda x: x.to(self.device, non_blocking=True), dict(batch)
        )
        if self.row_group:
            on_device["mask"] = replace(on_device["mask"], group=self.row_group)
        return on_device

    def _log(self) -> bool:
        """Write a line of the log, and tell whether any process was asked to stop."""
        self.last_asked = self.step
        groups, is_asked = self.optimizer.param_groups, bool(self.stop_signal)
        metrics, asked_to_stop = self.metrics.write(self.step, self.grad_norm, groups, is_asked)
        if "bad_samples" in metrics:
            self._list_bad("dataset")
        self.bar.set_postfix(loss=f"{metrics['loss']:.4g}", fill=f"{metrics['row_fill']:.0%}")
        return asked_to_stop

    def _list_bad(self, key: str) -> None:
        """List the bad samples that any process found, and end the run if they are too many."""
        everyone: list[Any] = [None] * self.processes
        dist.all_gather_object(everyone, self.newly_bad)
        self.newly_bad = []
        self.bad_samples.add(bad for part in everyone for bad in part)
        rows = self.rows if key == "dataset" else self.validation_rows
        if isinstance(rows, TrainingRows):
            self.bad_samples.refuse_many(key, len(rows.dataset))
        else:
            self.bad_samples.refuse_many(key, max(self.metrics.history["samples"], 1000))

    def _refuse_non_finite(self, loss: float, rows: list[Row]) -> None:
        """End the run, on all processes, before a step would spoil the weights."""
        for what, value in (("loss", loss), ("norm of the gradients", self.grad_norm)):
            if not math.isfinite(value):
                self._refuse_non_finite_weights(self.step - 1)
                samples = self._samples_of_all([row.samples for row in rows])
                self._end(
                    f"the {what} of step {self.step} is {value}; its samples have the indices "
                    f"{samples}. The step was not taken: lower the learning rate, or look at them"
                )

    def _refuse_non_finite_weights(self, step: int) -> None:
        if names := sharding.non_finite(self.trained, self.device):
            self._end(
                f"{f'after step {step}' if step else 'before the first step'}, {names[0]} is not "
                f"finite, as {len(names)} of {len(self.trained)} trained weights: lower the "
                "learning rate, or start from another checkpoint"
            )

    def _samples_of_all(self, rows: list[list[int]]) -> list[int]:
        everyone: list[Any] = [None] * self.processes
        dist.all_gather_object(everyone, [sample for row in rows for sample in row])
        return sorted({sample for part in everyone for sample in part})

    def _end(self, reason: str) -> NoReturn:
        self._wait_for_save()
        last = self.saved.newest() or "no directory yet"
        raise ValueError(f"{reason}; the last save is in {last}")

    @torch.no_grad()
    def _evaluate(self, rows: TrainingRows) -> bool:
        """Compute loss and scores of the validation set, and tell whether it is the best so far."""
        self.model.eval()
        sums: list[tuple[torch.Tensor, list[int]]] = []  # of the losses of each row's samples
        count = 0
        with self._load(rows) as loader:
            for row in loader:
                self._refuse_different_rows([row], "dataset_val")
                losses = self.model(**self._to_device(row.batch))
                sums.append((losses.double().sum(), row.samples))
                count += len(losses)
                self.newly_bad += [BadSample(self.step, "dataset_val", *bad) for bad in row.bad]
        if self.cfg.on_bad_sample == "skip":
            self._list_bad("dataset_val")
        total = torch.stack([x for x, _ in sums]).sum()
        total = torch.stack([total, torch.full_like(total, count)])
        dist.all_reduce(total)  # of all processes, which have to come to the same conclusion
        loss = (total[0] / total[1]).item()
        when = f"after step {self.step}" if self.step else "before the first step"
        if not math.isfinite(loss):
            bad = [samples for x, samples in sums if not x.isfinite()]
            self._end(
                f"the validation loss {when} is {loss}; the samples of dataset_val "
                f"whose rows did it have the indices {self._samples_of_all(bad)}: look at them"
            )
        scores = self._score_answers(self.questions) if self.questions else {}
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # a backward would have
        self.model.train()
        if self.is_main:
            told = "".join(f", {name} {score:.4g}" for name, score in scores.items())
            with tqdm.external_write_mode():  # not behind the bar
                log.info("Validation loss %.4g%s %s", loss, told, when)
        return self.metrics.write_validation(self.step, loss, scores)

    def _score_answers(self, questions: Sources) -> dict[str, float]:
        """Let the model answer the questions of the validation set, and score its answers."""
        self._wait_for_save()  # which takes part in other collectives
        # Whole prompts, on devices that share rows of training too
        answering = self.processes // self.mesh.tensor
        own = range(self.rank // self.mesh.tensor, len(questions), answering)
        rules, is_hidden = Rules(self.cfg.max_new_tokens), not self.is_main
        asked = tqdm(own, "answering", unit="question", leave=False, disable=is_hidden)
        # Compiled layers would be compiled anew for each number of answers and tokens
        with torch.compiler.set_stance("force_eager"):
            model: Any = self.model
            answered = answer_questions(
                model, self.transform, questions, asked, rules, any_of=self._any_of
            )
            records = {record["sample"]: record for record in answered}
        everyone: list[Any] = [None] * self.processes
        dist.all_gather_object(everyone, records)
        joined = {sample: record for part in everyone for sample, record in part.items()}
        return self.together.by_first(
            lambda: self._scored([joined[n] for n in sorted(joined)], questions)
        )

    def _any_of(self, is_mine: bool) -> bool:
        found = torch.tensor(int(is_mine))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def _scored(self, records: list[dict[str, Any]], questions: Sources) -> dict[str, float]:
        errors = [record["error"] for record in records if "error" in record]
        if errors and self.cfg.on_bad_sample == "raise":
            raise ValueError(f"dataset_val: {len(errors)} cannot be answered: {errors[0]}")
        report = evaluate(records, questions, self.transform, metrics_of(self.cfg.metrics))
        directory = self.output_dir / "evaluations"
        directory.mkdir(exist_ok=True)
        write_json(directory / f"step_{self.step}.json", report)
        return {name: found["total"] for name, found in report["metrics"].items()}

    def _state(self) -> dict[str, Any]:
        """What is saved and loaded by all processes together, random states of each by its rank."""
        random_states = {f"cpu_{self.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_states[f"cuda_{self.rank}"] = torch.cuda.get_rng_state(self.device)
        weights = {name: parameter.detach() for name, parameter in self.trained.items()}
        optimizer = states.optimizer_state(self.optimizer, self.trained)
        return {"model": weights, "optimizer": optimizer, "random": random_states}

    def _position(self) -> dict[str, Any]:
        """Where the data go on; of streams each process knows a part."""
        if isinstance(self.rows, TrainingRows):
            return self.rows.plan.position(self.step)
        states: list[Any] = [None] * self.processes
        dist.all_gather_object(states, self.lanes)
        return self.rows.position_after(self.step, self.had_media, states)

    def _save(self) -> None:
        """Begin to save all that it takes to go on; the next steps run meanwhile."""
        self._wait_for_save()
        self._refuse_non_finite_weights(self.step)
        state = self._state()
        if self.device.type == "cpu":  # would change under the hands of the thread that writes
            state = tree_map_only(torch.Tensor, torch.clone, state)
        progress = {"step": self.step, "max_steps": self.max_steps, "position": self._position()}
        progress |= {"processes": self.processes, "mesh": [*self.mesh]}
        progress |= {"fingerprint": self.fingerprint}
        progress |= self.metrics.history
        partial = self.together.by_first(lambda: self.saved.begin(self.step, progress))
        written = dcp.async_save(
            state, checkpoint_id=partial, process_group=self.save_group, async_stager=self.stager
        )
        self.pending_save = self.saving.submit(self._finish_save, partial, written)

    def _finish_save(self, partial: Path, written: Any) -> None:
        try:
            written.result()
            if self.is_main:
                self.saved.finish(partial)
        except (dcp.CheckpointException, OSError) as error:
            failures = getattr(error, "failures", {0: (error, None)})
            reason = next(iter(failures.values()))[0]
            if self.is_main:
                remove(partial)
            step = partial.with_suffix("")
            remedy = "make room and go on with resume=True; earlier steps are as they were"
            raise OSError(f"{step} cannot be written ({reason}): {remedy}") from error

    def _wait_for_save(self) -> None:
        if self.pending_save is not None:
            pending, self.pending_save = self.pending_save, None
            pending.result()

    def _resume(self, begun: SavedStep) -> None:
        directory, progress = begun
        states.initialize(self.optimizer)
        saved = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
        sizes = {
            name.removeprefix("optimizer."): getattr(found, "size", None)
            for name, found in saved.items()
            if name.startswith("optimizer.")
        }
        states.fit(self.optimizer, self.trained, sizes)
        state = self._state()
        # Devices that share layers have the same random numbers; who shares experts does not matter
        is_same_mesh = [*progress.get("mesh", self.mesh)][:4] == [*self.mesh][:4]
        is_same_mesh &= progress["processes"] == self.processes
        if not is_same_mesh:
            del state["random"]
        dcp.load(state, checkpoint_id=directory)
        states.set_plain_values(self.optimizer, self.trained, state["optimizer"])
        self.metrics.history = {key: progress[key] for key in self.metrics.history}
        for _ in range(self.step):  # towards the end that the run has now
            self.scheduler.step()
        if is_same_mesh:
            torch.set_rng_state(state["random"][f"cpu_{self.rank}"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["random"][f"cuda_{self.rank}"], self.device)
        log.info("Going on after step %d of %s", self.step, directory)

    def _export(self) -> int:
        """Write what was trained in the published layout, adapters apart and merged.

        Returns the epoch of its last step, which names the directory.
        """
        position = self._position()
        best = self.metrics.history["best"]["step"]
        if self.cfg.export == "best" and best != self.step:
            saved = self.together.by_first(lambda: self.saved.read(self.saved.path(best)))
            dcp.load({"model": self._state()["model"]}, checkpoint_id=saved.directory)
            position = saved.progress["position"]
            if self.is_main:
                told = "Exporting step %d, which has the best validation %s"
                log.info(told, best, self.cfg.best_by)
        # The position is that of the next step
        epoch = position["epoch"] - (not position["has_begun"])
        adapters = {name: p.detach() for name, p in self.trained.items() if is_adapter(name)}
        in_full = {n: p.detach() for n, p in self.trained.items() if n not in adapters}
        stored = self.together.by_each(self.checkpointer.load_checkpoint)[tune.MODEL_KEY]
        weights = {name: in_full.get(name, stored[name]) for name in self.base_names}
        state: dict[str, Any] = {tune.MODEL_KEY: weights}
        if adapters:
            layer = adapted_layers(self.model)[0]
            base = self.cfg.checkpoint_dir
            whole = sharding.gather(adapters)  # in all, of which each merges what it writes
            adapter = Adapter(whole, layer.rank, layer.alpha, str(base), family_of(base).names)
            state = {
                tune.MODEL_KEY: merge_lazily(weights, adapter),
                tune.ADAPTER_KEY: {**whole, **sharding.gather(in_full, rank=0)},
                tune.ADAPTER_CONFIG: {
                    "r": layer.rank,
                    "lora_alpha": layer.alpha,
                    "modules_to_save": sorted(in_full),
                },
            }
        files, group = self.processor_files, self.save_group
        self.checkpointer.save_checkpoint(state, epoch, processor_files=files, group=group)
        return epoch

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        self.stop_signal = number
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        time.sleep(_SIGNALS_ARE_ONE)
        for each in _STOP_SIGNALS:  # a second one stops at once
            signal.signal(each, signal.SIG_DFL)
        if self.is_main:
            step = max(self.step, self.last_asked + 1)
            while step < self.max_steps and not self._is_turn(step):
                step += 1
            what = f"step {step} is saved" if step < self.max_steps else "the export is written"
            name = signal.Signals(number).name
            text = f"\n{name}: stops when {what}, at once on a second signal\n"
            os.write(2, text.encode())  # can come in the middle of a print, which cannot be nested

    def cleanup(self) -> None:
        """Close what is open."""
        self.saving.shutdown()
        if self.stager:
            self.stager.close()
        self.sample_log.close()
        self.metrics.close()
        dist.destroy_process_group()


def _tell_unless_dropped_signal(unraisable: Any) -> None:
    """Say what cannot be raised, but for a signal that came together with the first one."""
    # Python finds its handler taken away by then, drops it, and would show a traceback of that
    if "ignored due to race condition" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _check_settings(cfg: DictConfig) -> None:
    """Refuse what does not fit, and devices that are not there, before anything waits."""
    processes, here = (int(os.environ.get(x, 1)) for x in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    gpus = torch.cuda.device_count() if cfg.device == "cuda" else here
    mesh, rows = Mesh.of(cfg.parallel, processes), cfg.rows_per_step
    offloads = cfg.activation_offloading
    offloads_on_cpu = offloads and cfg.device == "cpu"
    keeps = cfg.activation_checkpointing != "full"
    has_no_best = cfg.export == "best" and cfg.dataset_val is None
    metrics_of(cfg.metrics or [])
    is_best_known = cfg.best_by in ("loss", *(cfg.metrics or []))
    has_no_plan = mesh.tensor > 1 and cfg.parallel.plan is None
    cannot_float8 = (cfg.compute_dtype or cfg.dtype) != "bf16" or mesh.tensor > 1
    shares_padded = mesh.context > 1 and "batch_size" in cfg.rows
    compiles_divided = cfg.compile and mesh.tensor > 1
    draws_apart = mesh.context > 1 and not cfg.num_workers
    refusals = {
        "export: best is that of the best validation: set dataset_val": has_no_best,
        "metrics are of answers to the questions of dataset_val: set it": (
            cfg.metrics and cfg.dataset_val is None
        ),
        f"best_by is {cfg.best_by}: make it loss, or one of metrics": not is_best_known,
        # Views of gathered weights would be offloaded too, which FSDP frees after the forward
        "activation_offloading needs activation_checkpointing: full": offloads and keeps,
        "activation_offloading is for a GPU's memory: leave it at False on a cpu": offloads_on_cpu,
        "parallel.cpu_offload is for a GPU's memory: leave it at False on a cpu": (
            cfg.parallel.cpu_offload and cfg.device == "cpu"
        ),
        "device is cuda, and torch sees no GPU: see what torch.cuda.is_available() says, or set "
        "device=cpu": gpus == 0,
        f"{here} processes cannot share {gpus} GPUs: lower nproc_per_node": here > gpus,
        "flash_attention is for GPUs: set flash_attention=null": (
            cfg.flash_attention and cfg.device == "cpu"
        ),
        "float8 needs compute_dtype: bf16 and parallel.tensor: 1": cfg.float8 and cannot_float8,
        f"parallel.tensor is {mesh.tensor}, which needs a parallel.plan": has_no_plan,
        # Sizes that vary are symbols, which DTensor cannot hash
        "layers that parallel.tensor divides cannot be compiled: set compile=False": (
            compiles_divided
        ),
        # In the trainer, whose random numbers differ, datasets may draw others for the same sample
        "parallel.context needs data workers: set num_workers to 1 or more": draws_apart,
        "parallel.context shares packed rows only: set rows._component_ to "
        "torchtune_vl.data.PackedRows": shares_padded,
        f"{mesh.data} devices cannot share the {rows} rows of a step equally: set rows_per_step to "
        f"a multiple of {mesh.data}": rows % mesh.data,
    }
    for sentence, is_wrong in refusals.items():
        if is_wrong:
            raise ValueError(sentence)


def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe; the exit status is 0 at its end, 128 and the signal's number if stopped."""
    recipe = FinetuneRecipe(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    return 128 + recipe.stop_signal if recipe.step < recipe.max_steps else 0


if __name__ == "__main__":
    sys.exit(run_recipe(recipe_main))
