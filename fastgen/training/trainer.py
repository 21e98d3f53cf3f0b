"""The training loop. It knows players, optimizers and cadence, and nothing about any method."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgen.config.run import StageConfig
from fastgen.config.sections import TrainConfig
from fastgen.core import interrupt
from fastgen.core.ema import EMA
from fastgen.core.errors import NotFinite
from fastgen.core.files import append_line, to_json
from fastgen.core.progress import Progress
from fastgen.core.rng import Rng
from fastgen.core.threads import CpuShare
from fastgen.data.loader import Data
from fastgen.data.text import example_of
from fastgen.networks.context_parallel import SplitSequences, ring_size, sum_over_groups
from fastgen.networks.mesh import Layout, make_mesh, of_parts
from fastgen.networks.sharding import (
    clip_gradients,
    everywhere,
    gathered,
    like,
    mean_of_all,
    own_parts,
    shard,
    wholes,
)
from fastgen.roles.roles import Player
from fastgen.training import checkpoint
from fastgen.training.cast import Cast
from fastgen.training.optimizers import average_gradients, lr_factor, make_optimizer, set_rate
from fastgen.training.saving import Saver

__all__ = ["NotFinite", "Trainer"]


class Trainer:
    """Runs the stages of a cast over its data; calls `validate(trainer)` at its cadence."""

    def __init__(
        self,
        train: TrainConfig,
        cast: Cast,
        data: Data,
        folder: Path,
        accelerator: Accelerator,
        fingerprint: dict[str, str],
        validate: Callable[["Trainer"], None] | None = None,
    ):
        """`fingerprint`: what the run is made of (`fingerprint.of_run`), kept in its checkpoints."""
        self.train_cfg, self.cast, self.data, self.folder, self.acc = train, cast, data, folder, accelerator
        self.fingerprint, self.validate = fingerprint, validate
        group = train.context_parallel or 1  # processes with the same samples
        rank, world = accelerator.process_index // group, accelerator.num_processes // group
        self.rng = Rng(train.seed, rank, world, accelerator.device)
        self.step = 0  # windows over all stages
        self.seconds = 0.0
        self.cpu = CpuShare()
        self.total = sum(s.max_train_steps for s in cast.stages)
        cast.divide(data)
        self.sharded = train.sharding == "fsdp"
        self.sequences: SplitSequences | None = None
        if self.sharded or train.context_parallel:
            layout = Layout(self.sharded, train.shard_group, group)
            ring = ring_size(cast.backbones(), group) if train.context_parallel else 1
            mesh = make_mesh(layout, accelerator.device, ring)
        if self.sharded:
            shard(cast.backbones(), accelerator.device, of_parts(mesh))
        if train.context_parallel:
            self.sequences = SplitSequences(cast.backbones(), accelerator.device, mesh)
            with accelerator.autocast():
                self.sequences.try_one(cast.teacher, accelerator.device)
        self.saver = Saver(folder, accelerator, train.sharded_checkpoints, train.async_checkpoints)
        self.student = cast.student
        self.averaged = self.student.trainable()  # also what a stage leaves as it is
        self.ema = EMA(self.averaged, train.ema_decay)
        self.logs: dict[str, list[float | Tensor]] = defaultdict(list)
        self.best: dict = {}
        self.validated = True  # False where a signal cut this step's validation short
        self.unproven = False  # whether a checkpoint was saved that no step has started from yet
        self.unchanged = False  # True within a step until it changes the first weight
        self.exported: Path | None = None
        self.example = example_of(data.texts)  # a prompt that the export may suggest
        self.enlarges = data.degradation.factor if data.degradation else 0

    # -- the loop --------------------------------------------------------------------------------------------
    def fit(self, resume: Path | None = None) -> None:
        """Train every stage, from a checkpoint if given. A signal raises interrupt.Stopped after the
        checkpoint of the step it came in.
        """
        try:
            self._fit(resume)
        except BaseException:
            self.saver.leave()
            raise

    def _fit(self, resume: Path | None) -> None:
        tensors, meta = checkpoint.load(resume) if resume else ({}, {"stage": 0, "k": 0})
        start = time.monotonic()
        stages = self.cast.stages
        for index, stage in enumerate(stages):
            self._begin(stage)
            resumed = resume is not None and index == min(meta["stage"], len(stages) - 1)
            if resumed:
                self._restore(tensors, meta)
            if index < meta["stage"] and not resumed:
                continue
            with interrupt.at_once():
                self.objective.prepare()
            if resumed:
                self._restore_objective(tensors, meta)
            if index >= meta["stage"]:
                k0 = meta["k"] if index == meta["stage"] else 0
                what = stage.name if len(stages) == 1 else f"{stage.name} {index + 1}/{len(stages)}"
                bar = Progress(what, stage.max_train_steps, k0, always=True)
                with interrupt.deferred(), bar:
                    self._stage(index, stage, k0, bar, start - meta.get("seconds", 0.0))

    def _begin(self, stage: StageConfig) -> None:
        """Objective, optimizers and parameter lists of a stage."""
        self.objective = self.cast.stage(stage, self.rng)
        self.params = {n: p.trainable() for n, p in self.objective.players.items()}
        self.optim_cfg = {n: getattr(stage.optim, n.rstrip("0123456789")) for n in self.params}
        self.optimizers = {
            n: self.acc.prepare(make_optimizer(list(p.values()), self.optim_cfg[n]))
            for n, p in self.params.items()
        }
        for player in self.objective.players.values():
            player.requires_grad_(False)
            for parameter in player.trainable().values():
                parameter.grad = None  # nothing left over from whoever made or trained it before

    def _stage(self, index: int, stage: StageConfig, k0: int, bar: Progress, started: float) -> None:
        train = self.train_cfg
        if self.validate and train.validation_steps and (not self.step or not self.validated):
            self.validate(self)
            self._stop()
        data = self.data.first(stage.limit)
        self.objective.num_examples = len(data)
        windows = data.batches(
            train.train_batch_size, self.step, train.gradient_accumulation_steps, self.rng, self.acc.device
        )
        for k, window in zip(range(k0, stage.max_train_steps), windows):
            self.unchanged = True
            with self.sequences.split() if self.sequences else nullcontext():
                for micro, batch in enumerate(window):
                    self._micro_step(batch, k, micro, stage.max_train_steps)
            self.unchanged = False
            if self.ema.averages:
                self.ema.update(self.averaged, self.step)
            self._rotate()  # the checkpoint this step started from is proven good
            if self.saver.behind and self.step % self.train_cfg.log_steps == 0:
                self._saved(wait=False)
            self.step += 1
            self.seconds = time.monotonic() - started
            self._log(stage, k, bar)
            last = k + 1 == stage.max_train_steps
            if self.validate and train.validation_steps and (self.step % train.validation_steps == 0 or last):
                self.validate(self)
            stopping = self._stopping()
            if last or stopping or (train.checkpointing_steps and self.step % train.checkpointing_steps == 0):
                following = (index + 1, 0) if last and self.validated else (index, k + 1)
                self.save(*following)
            if last or stopping:
                self._saved(wait=True)
            if self.step == self.total:
                self._rotate()
            self._stop(stopping)

    def _stopping(self) -> str:
        """The name of the signal that stops this process or another one of the run; empty without one."""
        name = interrupt.requested()
        if torch.distributed.is_initialized():
            some = torch.tensor([int(bool(name))], device=self.acc.device)
            torch.distributed.all_reduce(some, torch.distributed.ReduceOp.MAX)
            name = name or ("a signal to another process" if int(some) else "")
        return name

    def _stop(self, stopping: str | None = None) -> None:
        if stopping := self._stopping() if stopping is None else stopping:
            raise interrupt.Stopped(stopping)

    def _micro_step(self, batch, k: int, micro: int, total: int) -> None:
        """One micro-batch: every turn the objective takes, each with its own backward and optimizer step."""
        self.rng.reset(self.step, micro)
        with self.acc.accumulate():
            self.objective.sync = self.acc.sync_gradients
            turns = self.objective.step(batch, k)
            while True:
                with self.acc.autocast():
                    item = next(turns, None)
                if item is None:
                    break
                loss, logs = item
                player = self.objective.active
                assert player is not None, "a loss outside a turn"
                self._check_finite(loss, logs, player)
                self.acc.backward(loss)
                if self.acc.sync_gradients:
                    self._update(player, k, total)
                self._note(player, {"loss": loss, **logs})

    def _update(self, player: str, k: int, total: int) -> None:
        cfg, optimizer = self.optim_cfg[player], self.optimizers[player]
        parameters = list(self.params[player].values())
        average_gradients(parameters)
        if self.sequences:
            sum_over_groups((p.grad for p in parameters), self.sequences.degree)
        clip = clip_gradients if self.sharded else self.acc.clip_grad_norm_
        norm = clip(parameters, cfg.clip or math.inf)
        if not torch.isfinite(norm) and self.acc.scaler is None:
            raise NotFinite(f"step {self.step}: gradient of {player} is {float(norm)}")
        lr = cfg.lr * lr_factor(cfg, k, total)
        set_rate(optimizer, lr)
        self.unchanged = False
        optimizer.step()
        optimizer.zero_grad()
        self._note(player, {"grad_norm": norm, "lr": lr})

    def _check_finite(self, loss: Tensor, logs: dict, player: str) -> None:
        if torch.isfinite(loss):
            return
        terms = [n for n, v in logs.items() if not math.isfinite(float(v))] or ["loss"]
        raise NotFinite(f"step {self.step}: {player}'s {', '.join(terms)} is {float(loss)}")

    # -- logging ---------------------------------------------------------------------------------------------
    def _note(self, player: str, values: dict) -> None:
        for name, value in values.items():
            self.logs[f"{player}/{name}"].append(value.detach() if isinstance(value, Tensor) else value)

    def _log(self, stage: StageConfig, k: int, bar: Progress) -> None:
        bar.note = self.objective.busy()
        if not (self.step % self.train_cfg.log_steps == 0 or self.step == 1 or self.step == self.total):
            bar.update()
            return
        means = mean_of_all({n: sum(map(float, v)) / len(v) for n, v in self.logs.items()})
        self.logs.clear()
        record = {"step": self.step, "stage": stage.name, "seconds": round(self.seconds, 2), **means}
        record["steps_per_second"] = self.step / max(self.seconds, 1e-9)
        if self.acc.device.type == "cpu":
            record["cpu_share"] = self.cpu.since()
        record["rss_mb"] = psutil.Process().memory_info().rss / 2**20
        self.write_metrics(record)
        bar.update(1, {n.split("/")[0]: v for n, v in means.items() if n.endswith("/loss")})

    def write_metrics(self, record: dict) -> None:
        """Append one line to metrics.jsonl and hand it to the trackers; numbers that are not finite (a
        spread over a batch of one) are left out.
        """
        if not self.acc.is_main_process:
            return
        append_line(self.folder / "metrics.jsonl", to_json(record))
        numbers = {n: v for n, v in record.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        self.acc.log(numbers, step=self.step)

    @contextmanager
    def whole_networks(self) -> Iterator[None]:
        """Networks and averages whole on the main process, which goes on alone."""
        if not self.sharded:
            yield
            return
        averages = self.ema.averages
        self.ema.averages = {decay: wholes(one) for decay, one in averages.items()}
        try:
            with gathered(self.cast.backbones(), self.acc.is_main_process):
                yield
        finally:
            self.ema.averages = averages

    # -- checkpoints -----------------------------------------------------------------------------------------
    def _weights(self) -> dict[str, Tensor]:
        """What is trained, its averages, and what the student's network keeps beside them, by name."""
        parts = Player("all", {n: p for n, p in self.cast.parts.items() if n != "teacher"})
        found: dict[str, Tensor] = {f"part/{n}": p for n, p in parts.trainable().items()}
        found |= {f"net/{n}": p for n, p in self.cast.student.backbone.state().items()}
        return found | {f"ema/{n}": p for n, p in self.ema.state_dict().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs, by name (optimizers apart)."""
        return self._weights() | {f"objective/{n}": p for n, p in self.objective.state().items()}

    def save(self, stage: int, k: int) -> None:
        """Checkpoint the state from which step k of a stage starts; NotFinite instead where a weight, or a
        sample made with the weights, is not finite.
        """
        main = self.acc.is_main_process
        if not (main or self.sharded):
            return
        self._saved(wait=True)
        tensors = self._tensors()
        rest: dict[str, Any] = {}
        for name, optimizer in self.optimizers.items():
            more, other = checkpoint.optimizer_tensors(optimizer, list(self.params[name]), f"optim/{name}")
            tensors, rest = tensors | more, rest | other
        self._check_good(tensors)
        begins: dict[str, list[int]] = {}
        if self.saver.in_parts:
            tensors, begins = own_parts(tensors)
        elif self.sharded:
            tensors = wholes(tensors, main, on_cpu=True)
        if not (main or self.saver.in_parts):
            return
        meta = {
            "stage": stage,
            "k": k,
            "step": self.step,
            "seconds": self.seconds,
            "rest": rest,
            "best": self.best,
            "example": self.example,
            "validated": self.validated,
            "fingerprint": self.fingerprint,
            "logs": {n: [float(v) for v in values] for n, values in self.logs.items()},
            "scaler": self.acc.scaler.state_dict() if self.acc.scaler else None,
        }
        self.saver.save(self.step, tensors, begins, meta)
        if self.saver.step is None:
            self.unproven = True

    def _saved(self, wait: bool) -> None:
        """Complete a checkpoint that is being written beside the training."""
        if self.saver.finish(wait):
            self.unproven = True

    @torch.no_grad()
    def _check_good(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise NotFinite unless these weights are finite and give finite samples: a checkpoint that could
        not go on is never written.
        """
        from fastgen.sampling.solvers import sample_student

        kinds = ("part/", "ema/", "optim/")
        floats = {n: t for n, t in tensors.items() if n.startswith(kinds) and t.is_floating_point()}
        own = [t.to_local() if isinstance(t, DTensor) else t for t in floats.values()]
        fine = [t.isfinite().all().to(self.acc.device) for t in own]
        good = torch.stack(fine) if fine else torch.ones(1, device=self.acc.device)
        good = everywhere(good).cpu() if self.sharded else good.cpu()
        if not good.all():
            name = next(n for n, fine in zip(floats, good.tolist()) if not fine)
            raise NotFinite(f"step {self.step}: the last update left {name} not finite")
        index = torch.arange(min(2, len(self.data)))
        cond = {k: v.to(self.acc.device) for k, v in self.data.cond(index).items()}
        codec: Any = self.cast.teacher.codec
        with self.acc.autocast():
            x = sample_student(self.cast.student, index.tolist(), codec.shape, cond, self.acc.device)
        if not x.isfinite().all():
            raise NotFinite(f"step {self.step}: samples of the student are not finite after the last update")

    def _rotate(self) -> None:
        """Delete old checkpoints, once the newest one has proven good."""
        if self.unproven:
            checkpoint.rotate(self.folder, self.train_cfg.checkpoints_total_limit)
            self.unproven = False

    @torch.no_grad()
    def _restore(self, tensors: Mapping[str, Tensor], meta: dict) -> None:
        """Put a checkpoint into the current stage; parts of a finished stage are taken over, its
        optimizers are not.
        """
        for name, value in self._weights().items():
            if name in tensors:  # a part that this stage brings in is not
                value.copy_(like(tensors[name], value))
        if meta["k"]:
            for name, optimizer in self.optimizers.items():
                own, prefix = self.params[name], f"optim/{name}"
                checkpoint.restore_optimizer(optimizer, own, prefix, tensors, meta["rest"])
        self.step, self.seconds, self.best = meta["step"], meta["seconds"], meta["best"]
        self.validated = meta["validated"]
        for key, values in meta["logs"].items():
            self.logs[key] = [math.nan if v is None else v for v in values]
        if self.acc.scaler and meta["scaler"]:
            self.acc.scaler.load_state_dict(meta["scaler"])
        if self.acc.is_main_process:
            checkpoint.rewind_metrics(self.folder, self.step)

    @torch.no_grad()
    def _restore_objective(self, tensors: Mapping[str, Tensor], meta: dict) -> None:
        """What an objective keeps beside its players, made by its prepare(); of the stage that saved it."""
        if meta["k"] or meta["stage"] == len(self.cast.stages):
            for name, value in self.objective.state().items():
                value.copy_(tensors[f"objective/{name}"])
