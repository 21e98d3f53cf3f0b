"""The training loop. It knows players, optimizers and cadence, and nothing about any method."""

import json
import math
import time
from collections import defaultdict
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from fastgen.config.run import RunConfig, StageConfig
from fastgen.config.sections import PlayerOptim
from fastgen.core.ema import EMA
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.loader import Data
from fastgen.roles.roles import Player
from fastgen.training import checkpoint
from fastgen.training.cast import Cast


class NotFinite(RuntimeError):
    """A loss or gradient became NaN or infinite; names player, term and step."""


def make_optimizer(parameters: list[Tensor], cfg: PlayerOptim) -> torch.optim.Optimizer:
    """The optimizer of one player."""
    if cfg.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise UserError(
                "optim.name", "adamw8bit needs bitsandbytes", 'pip install "fastgen-distill[gpu]"'
            ) from None
        return AdamW8bit(parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay)
    cls = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[cfg.name]
    return cls(parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay)


def lr_factor(cfg: PlayerOptim, k: int, total: int) -> float:
    """Learning-rate multiplier at step k of a stage: linear warm-up, then constant, cosine or linear to
    zero.
    """
    if k < cfg.warmup_steps:
        return (k + 1) / cfg.warmup_steps
    done = (k - cfg.warmup_steps) / max(total - cfg.warmup_steps, 1)
    return {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[cfg.schedule]


def average_gradients(parameters: list[Tensor]) -> None:
    """Mean of the gradients over processes, in flat buckets of about 100 MB. A parameter that some process
    had no use for this time (an expert none of its samples needed) counts as zero there.
    """
    if not torch.distributed.is_initialized():
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    used = used.to(parameters[0].device)
    torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
    for parameter, somewhere in zip(parameters, used.tolist()):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bucket: list[Tensor] = []
    size = 0
    grads = [p.grad for p in parameters if p.grad is not None]
    for i, grad in enumerate(grads):
        bucket.append(grad)
        size += grad.numel()
        if size > 25_000_000 or i == len(grads) - 1:
            flat = torch.cat([g.flatten() for g in bucket])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
            bucket, size = [], 0


class Trainer:
    """Runs the stages of a config over a cast and its data; calls `validate(trainer)` at its cadence."""

    def __init__(
        self, cfg: RunConfig, cast: Cast, data: Data, folder: Path, accelerator: Accelerator, validate=None
    ):
        self.cfg, self.cast, self.data, self.folder, self.acc = cfg, cast, data, folder, accelerator
        self.validate = validate
        self.rng = Rng(
            cfg.train.seed, accelerator.process_index, accelerator.num_processes, accelerator.device
        )
        self.step = 0  # windows over all stages
        self.seconds = 0.0
        self.total = sum(s.max_train_steps for s in cfg.all_stages())
        cast.divide(data)
        self.student = cast.parts["student"]
        self.ema = EMA(self.student.trainable(), cfg.train.ema_decay)
        self.logs: dict[str, list[float]] = defaultdict(list)
        self.best: dict = {}

    # -- the loop --------------------------------------------------------------------------------------------
    def fit(self, resume: Path | None = None) -> None:
        """Train every stage, from a checkpoint if given."""
        tensors, meta = checkpoint.load(resume) if resume else ({}, {"stage": 0, "k": 0})
        start = time.monotonic()
        bar = tqdm(total=self.total, disable=not self.acc.is_main_process, desc="train", mininterval=1.0)
        try:
            stages = self.cfg.all_stages()
            for index, stage in enumerate(stages):
                self._begin(stage)
                if resume and index == min(meta["stage"], len(stages) - 1):
                    self._restore(tensors, meta)
                    bar.update(self.step)
                if index >= meta["stage"]:
                    k0 = meta["k"] if index == meta["stage"] else 0
                    self._stage(index, stage, k0, bar, start - meta.get("seconds", 0.0))
        finally:
            bar.close()

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

    def _stage(self, index: int, stage: StageConfig, k0: int, bar: tqdm, started: float) -> None:
        train = self.cfg.train
        self.objective.prepare()
        if self.validate and train.validation_steps and not self.step:
            self.validate(self)
        windows = self.data.first(stage.limit).batches(
            train.train_batch_size, self.step, train.gradient_accumulation_steps, self.rng, self.acc.device
        )
        for k, window in zip(range(k0, stage.max_train_steps), windows):
            for micro, batch in enumerate(window):
                self._micro_step(batch, k, micro, stage.max_train_steps)
            if self.ema.averages:
                self.ema.update(self.objective.learned("student"), self.step)
            self.step += 1
            self.seconds = time.monotonic() - started
            self._log(stage, k, bar)
            last = k + 1 == stage.max_train_steps
            if (
                self.validate
                and train.validation_steps
                and (self.step % train.validation_steps == 0 or self.step == self.total)
            ):
                self.validate(self)
            if last or (train.checkpointing_steps and self.step % train.checkpointing_steps == 0):
                following = (index + 1, 0) if last else (index, k + 1)
                self.save(*following)

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
                self._check_finite(loss, logs, player)
                self.acc.backward(loss)
                if self.acc.sync_gradients:
                    self._update(player, k, total)
                self._note(player, {"loss": loss, **logs})

    def _update(self, player: str, k: int, total: int) -> None:
        cfg, optimizer = self.optim_cfg[player], self.optimizers[player]
        parameters = list(self.params[player].values())
        average_gradients(parameters)
        norm = self.acc.clip_grad_norm_(parameters, cfg.clip or math.inf)
        if not torch.isfinite(norm) and self.acc.scaler is None:
            raise NotFinite(f"step {self.step}: gradient of {player} is {float(norm)}")
        lr = cfg.lr * lr_factor(cfg, k, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
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

    def _log(self, stage: StageConfig, k: int, bar: tqdm) -> None:
        bar.update(1)
        if not (self.step % self.cfg.train.log_steps == 0 or self.step == 1 or self.step == self.total):
            return
        means = {n: sum(map(float, v)) / len(v) for n, v in self.logs.items()}
        self.logs.clear()
        record = {"step": self.step, "stage": stage.name, "seconds": round(self.seconds, 2), **means}
        record["steps_per_second"] = self.step / max(self.seconds, 1e-9)
        record["rss_mb"] = psutil.Process().memory_info().rss / 2**20
        self.write_metrics(record)
        bar.set_postfix({n.split("/")[0]: f"{v:.4g}" for n, v in means.items() if n.endswith("/loss")})

    def write_metrics(self, record: dict) -> None:
        """Append one line to metrics.jsonl and hand it to the trackers."""
        if not self.acc.is_main_process:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        numbers = {n: v for n, v in record.items() if isinstance(v, (int, float))}
        self.acc.log(numbers, step=self.step)

    # -- checkpoints -----------------------------------------------------------------------------------------
    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs, by name (optimizers apart)."""
        parts = Player("all", {n: p for n, p in self.cast.parts.items() if n != "teacher"})
        found = {f"part/{n}": p for n, p in parts.trainable().items()}
        found |= {f"ema/{n}": p for n, p in self.ema.state_dict().items()}
        return found | {f"objective/{n}": p for n, p in self.objective.state().items()}

    def save(self, stage: int, k: int) -> None:
        """Checkpoint the state from which step k of a stage starts."""
        if not self.acc.is_main_process:
            return
        tensors, rest = self._tensors(), {}
        for name, optimizer in self.optimizers.items():
            more, other = checkpoint.optimizer_tensors(optimizer, list(self.params[name]), f"optim/{name}")
            tensors, rest = tensors | more, rest | other
        meta = {
            "stage": stage,
            "k": k,
            "step": self.step,
            "seconds": self.seconds,
            "rest": rest,
            "best": self.best,
            "fingerprint": checkpoint.fingerprint(self.cfg),
            "logs": {n: [float(v) for v in values] for n, values in self.logs.items()},
            "scaler": self.acc.scaler.state_dict() if self.acc.scaler else None,
        }
        checkpoint.save(self.folder, self.step, tensors, meta, self.cfg.train.checkpoints_total_limit)

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Put a checkpoint into the current stage; parts of a finished stage are taken over, its
        optimizers are not.
        """
        for name, parameter in self._tensors().items():
            if name in tensors:
                parameter.copy_(tensors[name])
        if meta["k"]:
            for name, optimizer in self.optimizers.items():
                checkpoint.restore_optimizer(
                    optimizer, list(self.params[name]), f"optim/{name}", tensors, meta["rest"]
                )
        self.step, self.seconds, self.best = meta["step"], meta["seconds"], meta["best"]
        self.logs.update(meta["logs"])
        if self.acc.scaler and meta["scaler"]:
            self.acc.scaler.load_state_dict(meta["scaler"])
        if self.acc.is_main_process:
            checkpoint.rewind_metrics(self.folder, self.step)
