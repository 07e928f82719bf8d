"""The settings of one training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tasks.optim import Schedule

Parallel = Literal["ddp", "fsdp"]
Precision = Literal["auto", "fp32", "tf32", "bf16"]

FREE = frozenset({
    "checkpoint_seconds", "threads", "log_every", "accumulate", "parallel", "recompute", "compile",
    "wandb",
})  # fmt: skip
"""Settings that may change between two parts of one run: they decide how it is computed, shown and
kept, like the number of workers, and not on what it trains."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast one training runs. Raises ValueError on values that cannot work."""

    steps: int
    """Optimizer steps; where `tokens` are given, at most that many."""
    batch_size: int
    """Samples a step, over all workers and accumulated parts together."""
    lr: float
    """Peak learning rate."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    tokens: int = 0
    """Length and learning-rate schedule in tokens instead of steps: slots of inputs and targets of
    all workers, empty ones included. 0 counts in steps."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up where `tokens` are given; `warmup_steps` has no meaning then."""
    schedule: Schedule = "cosine"
    """Shape after the warm-up; "wsd" stays constant, then falls linearly."""
    weight_decay: float = 0.05
    """Decoupled decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moments."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    ema_decay: float = 0.0
    """Decay of a running mean of the weights, kept in checkpoints; 0 keeps none."""
    finish_with_ema: bool = False
    """Whether the last evaluation and the finished model take that mean."""
    precision: Precision = "auto"
    """bf16 runs matrix products in autocast; auto does so where the hardware is fast at it when a
    run begins, else fp32. tf32 keeps everything in fp32 but what products multiply, which GPUs
    round to TF32 and CPUs with AMX to bf16; elsewhere it is fp32."""
    seed: int = 0
    """Seed of initial weights and of every step."""
    accumulate: int = 1
    """Parts of a worker's batch that are computed one after another, to fit it into memory. The
    loss of a step is the mean of the losses of all parts of all workers, whatever number of tokens
    each is over, so N workers with one part each train what one worker with N does. Fewer and
    larger parts weigh tokens more evenly."""
    parallel: Parallel = "ddp"
    """With several workers: "ddp" keeps the whole network on each, "fsdp" shards weights, gradients
    and optimizer state block by block."""
    recompute: bool = False
    """Whether blocks keep their inputs only and are computed anew in the backward pass."""
    compile: bool = False
    """Whether blocks are compiled; what varies from step to step (embedding, loss) is not. Meant
    for GPUs: on two CPU cores in bf16, 4M-Tiny takes the same losses more slowly (15.0 samples/s
    against 18.4)."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints; with several workers they wait for the next point of the loss
    curve."""
    log_every: int = 10
    """Steps between two points of the loss curve."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    wandb: str = ""
    """Project of Weights & Biases that also gets the loss curve; needs the package `wandb`."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "log_every", "accumulate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        choices = {"precision": Precision, "schedule": Schedule, "parallel": Parallel}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got "
                                 f"{getattr(self, name)!r}")
        for name in ("warmup_steps", "weight_decay", "clip_norm", "checkpoint_seconds",
                     "eval_every", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be in 0..1, got {self.min_lr_ratio}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in 0..1 and below 1, got {self.ema_decay}")
        if self.finish_with_ema and not self.ema_decay:
            raise ValueError("finish_with_ema needs an ema_decay above 0, such as 0.999")
        if self.tokens < 0 or not 0 <= self.warmup_tokens <= self.tokens:
            raise ValueError(f"tokens and warmup_tokens must be 0 <= warmup <= tokens, got "
                             f"{self.tokens} and {self.warmup_tokens}")

    def check_workers(self, world: int) -> None:
        """Raises ValueError where a batch does not divide into parts of `world` workers."""
        if world < 1 or self.batch_size % (world * self.accumulate):
            raise ValueError(f"batch_size {self.batch_size} is no multiple of {world} workers x "
                             f"{self.accumulate} accumulated parts")
