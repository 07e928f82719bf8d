"""The one trainer: tokenizers, 4M and fine-tunes differ in their `Task`, never in the loop.

Everything random is a function of (seed, step), so nothing but weights, optimiser state and the
numbers of steps and tokens has to be saved, and a resumed run equals an uninterrupted one bit for
bit on the same hardware. `Trainer.fit` runs in this process; `tasks.distributed.fit_distributed`
runs the same loop on Ray Train workers with DDP or FSDP2.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.machine import check_compiler, chosen_device, fp32_products, keep_freed_memory
from infra.overlap import prefetch
from tasks.batches import to_device
from tasks.buffers import Buffers
from tasks.flops import Load, peak_flops
from tasks.frozen import held_rows
from tasks.gradients import Gradients
from tasks.meter import Meter
from tasks.optim import build_optimizers, learning_rate_scale
from tasks.preemption import Stopped, StopSignal
from tasks.run_store import Background, Checkpoints, Curve
from tasks.task import Task
from tasks.train_config import TrainConfig
from tasks.train_state import (
    check_same_run,
    restore_rest,
    restore_weights,
    snapshot,
    unique_tensors,
)
from tasks.wandb_log import open_run, require_wandb

if TYPE_CHECKING:
    import torch

    from infra.store import Store
    from tasks.run_store import Owner, Tensors

logger = logging.getLogger("fourm.train")

ProgressCallback = Callable[[int, int, dict[str, float]], None]
Asked = Callable[[], tuple[bool, bool]]
"""Whether to keep a checkpoint now, and whether to end after it; all workers ask it alike, at the
points of the loss curve."""


@dataclass(frozen=True)
class TrainResult:
    """What came of a run: where it lies, steps, wall seconds and samples/s of this call, the last
    metrics, steps skipped as not finite, and the model (None after `fit_distributed`)."""

    path: str
    steps: int
    seconds: float
    samples_per_second: float
    metrics: dict[str, float]
    skipped: int
    model: Any = None


class Trainer:
    """Trains `task` under `config`, keeping the run at `path` of `store`.

    `fit` picks up the newest checkpoint at `path`, and ends others that train it. Raises ValueError
    when the run was started with another configuration, or this machine lacks what that needs.
    """

    def __init__(
        self, store: Store, path: str, task: Task, config: TrainConfig, *, rank: int = 0,
        world: int = 1, asked: Asked = lambda: (False, False), owner: Owner | None = None,
    ) -> None:
        config.check_workers(world)
        require_wandb(config.wandb)
        self.store, self.path, self.task, self.config = store, path, task, config
        self.rank, self.world, self.asked, self.warned = rank, world, asked, 0
        self.checkpoints = Checkpoints(store, path, owner)
        self.metrics: dict[str, float] = {}

    def fit(self, on_progress: ProgressCallback | None = None) -> TrainResult:
        """Trains to the end and returns the result; `on_progress(step, steps, metrics)` is called
        at every point of the loss curve.

        Raises:
            Stopped: SIGTERM came, or `asked` said so; the checkpoint of the last step is written.
            TakenOver: somebody else has begun to train the same run.
        """
        import torch

        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        self._build()
        start, began = self.step, time.monotonic()
        curve = self._open_curve() if self.rank == 0 else None
        rounded = self.products == "tf32"
        with closing(Background()) as self.writer, fp32_products(self.device.type, rounded=rounded):
            with StopSignal() as signal:
                metrics = self._loop(signal, curve, on_progress)
            seconds = time.monotonic() - began
            if metrics is not None:
                metrics = self._finish(curve, metrics, trained=self.step > start)
        if metrics is None or signal.requested:
            signal.hand_on()
            raise Stopped(f"{self.path}: stopped at step {self.step} of {config.steps} as asked; "
                          "the same call goes on from there")
        speed = (self.step - start) * config.batch_size / max(seconds, 1e-9)
        return TrainResult(
            self.path, self.step, seconds, speed, metrics, int(self.skipped), self.model
        )

    def _loop(
        self, signal: StopSignal, curve: Curve | None, on_progress: ProgressCallback | None
    ) -> dict[str, float] | None:
        """Steps to the end; returns the last metrics, or None if it was asked to stop before."""
        from tasks.parallel import everyone

        config, saved = self.config, time.monotonic()
        meter = Meter(lambda: peak_flops(self.device, self.products),
                      lambda own: everyone(own, self.world, self.device))
        steps = range(self.step, config.steps)
        with closing(prefetch(map(self._parts, steps), wait=True)) as batches:
            while not self._ended():
                parts = next(batches)
                rate = self._rate(parts)
                meter.add(self._step(parts, rate), config.batch_size, [load for _, load in parts])
                point = self.step % config.log_every == 0 or self._ended()
                if point:
                    self.metrics = {**meter.take(), "lr": rate}
                    self._report(curve, on_progress)
                if self._ended():
                    break
                if config.eval_every and self.step % config.eval_every == 0:
                    self._evaluate(curve)
                late = time.monotonic() - saved > config.checkpoint_seconds
                save, stop = self._wishes(late, signal.requested, point)
                if save or stop:
                    self._save()
                    saved = time.monotonic()
                    if curve:
                        curve.flush()
                if stop:
                    self.writer.wait()
                    if curve:
                        curve.close()
                    return None
        return self.metrics

    def _wishes(self, late: bool, stop: bool, point: bool) -> tuple[bool, bool]:
        """Whether to save and whether to stop: what any of the workers wants, asked at points."""
        if point:
            save, halt = self.asked()
            late, stop = late or save, stop or halt
        if self.world == 1:
            return late, stop
        if not point:
            return False, False
        from tasks.parallel import agree

        late, stop = agree((late and self.rank == 0, stop), self.device)
        return late, stop

    def _finish(
        self, curve: Curve | None, metrics: dict[str, float], *, trained: bool
    ) -> dict[str, float]:
        if self.mean and self.config.finish_with_ema:
            self.mean.apply()
        metrics = {**metrics, **self._evaluate(curve if trained else None)}
        if trained:
            if curve:  # first: what went beyond the checkpoint that is there is left out again
                curve.flush()
            self._save()
            self.writer.wait()
        if curve:
            curve.close()
        from tasks.parallel import restore_forwards

        restore_forwards(self.model)
        self.gradients.close()
        return metrics

    def _open_curve(self) -> Curve:
        config, mirror = self.config, None
        if config.wandb:
            mirror = open_run(config.wandb, self.store.url, self.path, dataclasses.asdict(config))
        return Curve(self.store, self.path, self.step, mirror)

    def _report(self, curve: Curve | None, on_progress: ProgressCallback | None) -> None:
        if int(self.skipped) > self.warned:
            self.warned = int(self.skipped)
            logger.warning("step %d: gradients were not finite, %d steps skipped so far",
                           self.step, self.warned)
        if curve:
            curve.add(self.step, self.metrics)
            if on_progress:
                on_progress(self.step, self.config.steps, self.metrics)

    def _build(self) -> None:
        """Builds model and optimisers and restores the newest checkpoint."""
        import torch

        from tasks.ema import WeightMean
        from tasks.parallel import is_sharded, products_of, spread

        config = self.config
        torch.manual_seed(config.seed)
        self.device = torch.device(chosen_device())
        if self.device.type == "cpu":
            keep_freed_memory()
        if config.compile:
            check_compiler(self.device.type)
        self.model = self.task.build_model().to(self.device)
        found = self._found()
        state = found[1] if found else {}
        self.products = products_of(config, state.get("products"), self.world, self.device)
        if found:
            check_same_run(self.path, config, self.task, self.model, *found)
            restore_weights(self.model, found[0]["model"])
        self.wrapped = spread(self.model, config, self.world, bf16=self.products == "bf16")
        self.optimizers = build_optimizers(
            self.model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay,
            is_hidden=self.task.is_hidden,
        )
        self.held, self.buffers = held_rows(self.model), Buffers(self.model)
        by_rows = self.world == 1 and self.device.type == "cpu"
        self.gradients = Gradients(self.model, by_rows=by_rows)
        self.sharded = any(is_sharded(value) for value in self.model.parameters())
        self.mean = WeightMean(unique_tensors(self.model), config.ema_decay) \
            if config.ema_decay else None
        self.step, self.tokens = state.get("step", 0), state.get("tokens", 0)
        self.skipped: int | torch.Tensor = state.get("skipped", 0)
        self.warned = int(self.skipped)
        self.metrics = state.get("metrics", {})
        if found:
            restore_rest(found[0], self.model, self.optimizers, self.mean)
            logger.info("%s: resuming at step %d", self.path, self.step)
        self._begin()

    def _found(self) -> tuple[Tensors, dict[str, Any]] | None:
        """The newest checkpoint. The first worker decides which: another may look before the last
        one is complete."""
        found = self.checkpoints.newest() if self.rank == 0 else None
        if self.world == 1:
            return found
        from tasks.parallel import first_says

        step = first_says(found[1]["step"] if found else 0, self.device)
        return self.checkpoints.newest(step) if self.rank and step else found

    def _begin(self) -> None:
        """Clears away half-written checkpoints, once all workers have read what they need."""
        import torch

        if self.world > 1:
            torch.distributed.barrier()
        if self.rank == 0:
            self.checkpoints.begin(self.step)
        if self.world > 1:
            torch.distributed.barrier()

    def _parts(self, step: int) -> list[tuple[Any, Load]]:
        """This worker's parts of the batch of `step`, on the CPU."""
        world = self.world * self.config.accumulate
        ranks = range(self.rank, world, self.world)
        batches = [self.task.batch(step, rank, world) for rank in ranks]
        return [(batch, self.task.load(batch)) for batch in batches]

    def _step(self, parts: list[tuple[Any, Load]], rate: float) -> dict[str, torch.Tensor]:
        import torch

        from tasks.parallel import last_of

        self.wrapped.train()
        self.buffers.keep()
        gathered: dict[str, list[torch.Tensor]] = {}
        for index, (batch, _) in enumerate(parts):
            part = index * self.world + self.rank
            torch.manual_seed(_mix(self.config.seed, self.step, part))
            with last_of(self.wrapped, index == len(parts) - 1):
                with self._autocast():
                    loss, metrics = self.task.loss(self.wrapped, to_device(batch, self.device))
                (loss / len(parts)).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                gathered.setdefault(name, []).append(value)
        norm = self._apply(rate)
        self.step += 1
        self.tokens += self._slots(parts)
        means = {name: torch.stack(values).mean() for name, values in gathered.items()}
        return {**means, "grad_norm": norm}

    def _apply(self, rate: float) -> torch.Tensor:
        """Clips and applies the gradients, unless one is not finite; returns their norm."""
        import torch

        self.gradients.fill()
        for rows in self.held:
            rows.clear_gradient()
        norm = self.gradients.norm()
        # DDP has already averaged: a bad gradient on one worker is seen, and skipped, by all.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = ~torch.isfinite(norm)
        excess = ((norm + 1e-6) / (self.config.clip_norm or float("inf"))).clamp(min=1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        if not self.sharded and all(isinstance(o, torch.optim.AdamW) for o in self.optimizers):
            # Its fused kernel clips, and looks at this flag on the device: the host need not wait.
            for optimizer in self.optimizers:
                optimizer.grad_scale = excess  # type: ignore[attr-defined]
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
                optimizer.step()
        elif not bad:
            self.gradients.divide(excess)
            for optimizer in self.optimizers:
                optimizer.step()
        self.skipped = self.skipped + bad.int()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.gradients.clear()
        for rows in self.held:
            rows.put_back()
        self.buffers.put_back(bad)
        if self.mean:
            self.mean.update(self.step)
        return norm

    def _slots(self, parts: list[tuple[Any, Load]]) -> int:
        """Tokens of this step over all workers, whose parts are as large as this one's."""
        return self.world * sum(load.slots for _, load in parts)

    def _ended(self) -> bool:
        config = self.config
        return self.step >= config.steps or bool(config.tokens and self.tokens >= config.tokens)

    def _rate(self, parts: list[tuple[Any, Load]]) -> float:
        """Learning rate of the coming step."""
        config = self.config
        at, length, warmup = float(self.step), float(config.steps), float(config.warmup_steps)
        if config.tokens:
            unit = self._slots(parts)
            if not unit:
                raise ValueError(f"tokens={config.tokens}, but the batches of "
                                 f"{type(self.task).__name__} hold no tokens; give steps alone")
            at, length = self.tokens / unit, config.tokens / unit
            warmup = config.warmup_tokens / unit
        return config.lr * learning_rate_scale(
            at, length, warmup=warmup, min_ratio=config.min_lr_ratio, schedule=config.schedule
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        if self.products != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _evaluate(self, curve: Curve | None) -> dict[str, float]:
        """Validation metrics, on the first worker; shards need all workers to compute anything."""
        import torch

        from tasks.parallel import reshard

        if self.rank and not self.sharded:
            return {}
        self.model.eval()
        # Its batches have shapes of their own, not worth compiling for.
        stance: AbstractContextManager[Any] = nullcontext()
        if self.config.compile:
            stance = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), self._autocast(), stance:
            metrics = self.task.evaluate(self.model)
        reshard(self.model)
        if curve and metrics:
            curve.add(self.step, metrics)
        return metrics

    def _save(self) -> None:
        """Copies the state; a thread writes it while training goes on."""
        if self.rank and not self.sharded:
            return
        self.writer.wait()
        tensors = snapshot(self.model, self.optimizers, self.mean, rank=self.rank)
        state = {"config": dataclasses.asdict(self.config), "streams": self.task.streams,
                 "task": self.task.identity(), "skipped": int(self.skipped), "tokens": self.tokens,
                 "products": self.products, "metrics": self.metrics}
        step, world = self.step, self.world if self.sharded else 1
        self.writer.submit(
            lambda: self.checkpoints.save(step, tensors, state, rank=self.rank, world=world)
        )


def _mix(seed: int, step: int, part: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + part
