"""The one trainer: tokenizers, 4M and fine-tunes differ in their `Task`, never in the loop.

Everything random is a function of (seed, step), so nothing but weights, optimiser state and the
step number has to be saved and a resumed run equals an uninterrupted one bit for bit on the same
hardware. `Trainer.fit` runs in this process; `tasks.distributed.fit_distributed` runs the same
loop on Ray Train workers with DDP.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tasks.optim import Schedule, build_optimizers, learning_rate_scale
from tasks.run_store import Checkpoints, Curve

if TYPE_CHECKING:
    import torch
    from torch import nn

    from infra.store import Store

logger = logging.getLogger("fourm.train")

ProgressCallback = Callable[[int, int, dict[str, float]], None]
# Settings that may change between two parts of one run: they do not alter what is computed.
_FREE = frozenset({"checkpoint_seconds", "threads", "log_every"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast one training runs. Raises ValueError on values that cannot work."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Samples a step, over all workers together."""
    lr: float
    """Peak learning rate."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    schedule: Schedule = "cosine"
    """Shape after the warm-up; "wsd" stays constant, then falls linearly."""
    weight_decay: float = 0.05
    """Decoupled decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moments."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs matrix products in autocast; auto does so where the hardware is fast at it."""
    seed: int = 0
    """Seed of initial weights and of every step."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    log_every: int = 10
    """Steps between two points of the loss curve."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "log_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16, got {self.precision!r}")
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"schedule must be cosine or wsd, got {self.schedule!r}")


class Task:
    """What a training is about. Subclasses are picklable where `fit_distributed` is used."""

    def build_model(self) -> nn.Module:
        """Returns the network with its initial weights (the trainer has set the seed)."""
        raise NotImplementedError

    def batch(self, step: int, rank: int, world: int) -> Any:
        """Returns rows rank::world of the batch of `step`: a pure function, on the CPU. Tensors,
        or tuples, lists, dicts and dataclasses of them, or objects with `.to(device)`."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the scalar to minimise and scalars to log (on the device, without syncing).
        Calls `model(...)`, which may be a DDP wrapper, and not its methods."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns validation metrics of the model in evaluation mode, without gradients."""
        return {}

    def is_hidden(self, name: str) -> bool:
        """Whether the 2-D parameter `name` is a hidden matrix, which Muon updates."""
        return False


@dataclass(frozen=True)
class TrainResult:
    """What came of a run: where it lies, steps, wall seconds of this call, samples/s of this
    call, the last metrics, steps skipped for non-finite gradients, and the model (None after
    `fit_distributed`, whose newest checkpoint holds it)."""

    path: str
    steps: int
    seconds: float
    samples_per_second: float
    metrics: dict[str, float]
    skipped: int
    model: Any = None


class Trainer:
    """Trains `task` under `config`, keeping the run at `path` of `store`.

    `fit` picks up the newest checkpoint at `path`. Raises ValueError when the run there was
    started with another configuration.
    """

    def __init__(
        self, store: Store, path: str, task: Task, config: TrainConfig, *, rank: int = 0,
        world: int = 1,
    ) -> None:
        if config.batch_size % world:
            raise ValueError(f"batch_size {config.batch_size} is no multiple of {world} workers")
        self.store, self.path, self.task, self.config = store, path, task, config
        self.rank, self.world = rank, world
        self.checkpoints = Checkpoints(store, path)

    def fit(self, on_progress: ProgressCallback | None = None) -> TrainResult:
        """Trains to the last step and returns the result; `on_progress(step, steps, metrics)`
        is called at every point of the loss curve."""
        import torch

        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        start = self._build()
        curve = Curve(self.store, self.path, start) if self.rank == 0 else None
        meter, metrics, began = _Meter(), dict[str, float](), time.monotonic()
        saved = began
        batches = _prefetch(
            lambda step: self.task.batch(step, self.rank, self.world), start, config.steps
        )
        for step in range(start, config.steps):
            meter.add(self._step(step, next(batches)), config.batch_size)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                metrics = {**meter.take(), "lr": self._scale(step) * config.lr}
                if curve:
                    curve.add(done, metrics)
                    if on_progress:
                        on_progress(done, config.steps, metrics)
            if curve and config.eval_every and done % config.eval_every == 0 < config.steps - done:
                curve.add(done, self._evaluate())
            if curve and time.monotonic() - saved > config.checkpoint_seconds:
                self._save(done)
                curve.flush()
                saved = time.monotonic()
        seconds = time.monotonic() - began
        return self._finish(curve, metrics, start, seconds)

    def _finish(
        self, curve: Curve | None, metrics: dict[str, float], start: int, seconds: float
    ) -> TrainResult:
        config = self.config
        if curve:
            metrics = {**metrics, **self._evaluate()}
            if start < config.steps:
                self._save(config.steps)
                curve.add(config.steps, metrics)
            curve.close()
        speed = (config.steps - start) * config.batch_size / max(seconds, 1e-9)
        return TrainResult(
            self.path, config.steps, seconds, speed, metrics, self.skipped, self.model
        )

    def _build(self) -> int:
        """Builds model and optimisers, restores the newest checkpoint, returns the next step."""
        import torch

        config, self.skipped = self.config, 0
        torch.manual_seed(config.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self.task.build_model().to(self.device)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and _fast_bf16())
        self.optimizers = build_optimizers(
            self.model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay,
            is_hidden=self.task.is_hidden,
        )
        found = self.checkpoints.newest()
        start = self._restore(*found) if found else 0
        self.wrapped: nn.Module = self.model
        if self.world > 1:
            from torch.nn.parallel import DistributedDataParallel

            self.wrapped = DistributedDataParallel(self.model)
        return start

    def _step(self, step: int, batch: Any) -> dict[str, torch.Tensor]:
        import torch

        config = self.config
        torch.manual_seed(_mix(config.seed, step, self.rank))
        self.wrapped.train()
        with self._autocast():
            loss, metrics = self.task.loss(self.wrapped, to_device(batch, self.device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), config.clip_norm or float("inf")
        )
        # DDP has already averaged: a bad gradient on one worker is seen, and skipped, by all.
        if torch.isfinite(norm):
            scale = self._scale(step)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * scale
                optimizer.step()
        else:
            self.skipped += 1
            logger.warning("step %d: gradient is not finite, skipped", step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "grad_norm": norm.detach(), **metrics}

    def _scale(self, step: int) -> float:
        config = self.config
        return learning_rate_scale(
            step, config.steps, warmup=config.warmup_steps, min_ratio=config.min_lr_ratio,
            schedule=config.schedule,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _evaluate(self) -> dict[str, float]:
        import torch

        self.model.eval()
        with torch.no_grad(), self._autocast():
            return self.task.evaluate(self.model)

    def _save(self, step: int) -> None:
        tensors = {"model": _unique_tensors(self.model), "optimizer": {}}
        for i, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors["optimizer"][f"{i}.{index}.{key}"] = value
        state = {"config": dataclasses.asdict(self.config), "skipped": self.skipped}
        self.checkpoints.save(step, tensors, state)

    def _restore(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> int:
        import torch

        self._check_config(state["config"])
        own = _unique_tensors(self.model)
        if own.keys() != tensors["model"].keys():
            odd = sorted(own.keys() ^ tensors["model"].keys())[:3]
            raise ValueError(f"the run at {self.path} trains another model (it differs in {odd}); "
                             "choose another run name")
        with torch.no_grad():
            for name, value in tensors["model"].items():
                own[name].copy_(value)
        for i, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors["optimizer"].items():
                which, index, key = name.split(".", 2)
                if int(which) == i:
                    states.setdefault(int(index), {})[key] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.skipped = state["skipped"]
        logger.info("%s: resuming at step %d", self.path, state["step"])
        return int(state["step"])

    def _check_config(self, saved: dict[str, Any]) -> None:
        own = dataclasses.asdict(self.config)
        for name in own.keys() - _FREE:
            before = saved.get(name)
            if before != own[name] and before != list(_as_sequence(own[name])):
                raise ValueError(
                    f"the run at {self.path} was started with {name}={before}, now it is "
                    f"{own[name]}; choose another run name or the old value"
                )


class _Meter:
    """Means of metrics since the last reading, kept on the device: adding does not sync."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._samples, self._began = 0, time.monotonic()

    def add(self, metrics: dict[str, torch.Tensor], samples: int) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._samples += samples

    def take(self) -> dict[str, float]:
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        means["samples_per_second"] = self._samples / (time.monotonic() - self._began)
        self._reset()
        return means


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves tensors and (nested) containers of them; other values pass through."""
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {f.name: to_device(getattr(batch, f.name), device)
                 for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **moved)
    return batch


def _prefetch(make: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
    """Yields make(start), ..., make(stop - 1), computed two ahead by a background thread."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=2)
    closed = threading.Event()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def produce() -> None:
        for step in range(start, stop):
            if closed.is_set():
                return
            item: tuple[Any, Exception | None]
            try:
                item = (make(step), None)
            except Exception as error:  # noqa: BLE001 - raised again where the batch is needed
                item = (None, error)
            put(item)

    threading.Thread(target=produce, daemon=True, name="batches").start()
    try:
        for _ in range(start, stop):
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch
    finally:
        closed.set()


def _unique_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each shared tensor once."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    kept = model.state_dict().keys()
    tensors.update({name: value for name, value in model.named_buffers() if name in kept})
    return tensors


def _mix(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank


def _as_sequence(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def _fast_bf16() -> bool:
    from infra.machine import fast_bf16

    return fast_bf16()
