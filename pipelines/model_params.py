"""The parameters of what has to do with the model itself: training it and generating with it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.forms import Form, Where

RecipeName = Literal[
    "demo", "demo_long", "speedrun", "fourm_b", "fourm_l", "fourm_xl", "fourm_21_b", "fourm_21_l",
    "fourm_21_xl", "t2i_b", "t2i_l", "t2i_xl", "sr_l",
]


class Training(Form):
    """What is trained, and how it is spread over devices."""

    recipe: RecipeName = Field(
        "demo", description="Network, masking and optimizer in one word."
    )
    manifest: str = Field("main", pattern=r"^[\w.-]+$", description="Manifest to train on.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; none: the recipe's.")
    batch_size: int | None = Field(None, ge=1, description="Samples a step; none: the recipe's.")
    data: dict[str, str] = Field(
        {}, description="Sets of a recipe that mixes several: {'coyo': 's3://bucket/coyo#main'}, "
        "a manifest alone is of this dataset, a+b are read side by side; empty: the manifest."
    )
    freeze: list[str] = Field(
        [], description="Patterns of published tensor names that stay as they are: 'encoder.*'."
    )
    lora: int = Field(
        0, ge=0, description="Rank of low-rank updates in place of the matrices; 0: none."
    )
    ema: float = Field(
        0, ge=0, lt=1, description="Decay of a running mean of the weights, which the finished "
        "model then is, such as 0.9999; 0: none."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp: each device holds everything; fsdp: it is split among them."
    )
    accumulate: int = Field(
        1, ge=1, description="Parts of its share of a batch that a device takes in turn."
    )
    recompute: bool = Field(False, description="Compute activations of blocks twice, keep none.")


class TrainOptions(Training):
    """How 4M is trained."""

    run: str = Field(
        "", pattern=r"^[\w.-]*$", description="Name of the run; empty: from manifest and recipe."
    )
    seed: int = Field(0, ge=0, description="Seed of weights and of every batch.")
    start: str = Field(
        "", description="Model to begin with: a run of this dataset, or a folder; 'none': fresh."
    )
    train_workers: int = Field(
        0, ge=0, description="Ray Train workers, a GPU each; 0: in this process."
    )
    compile: bool = Field(False, description="Compile the blocks; needs a C++ compiler on CPUs.")
    wandb: str = Field("", description="Project of Weights & Biases that gets the curve too.")


class PlanTrainParams(Training):
    """State what a training would take - shapes, memory, tokens, hours - without data or GPU."""

    root: str = Field(
        "", description="Dataset whose manifests are checked; empty: modalities as released."
    )
    devices: int = Field(1, ge=1, description="Devices to train on.")
    peak_tflops: float = Field(312.0, gt=0, description="bf16 peak of a device (H100: 989).")
    mfu: float = Field(0.4, gt=0, le=1, description="Share of the peak that is reached.")
    memory_gib: float = Field(80.0, gt=0, description="Memory of a device, GiB.")


class SpeedrunParams(Form):
    """Train on fixed scenes to a fixed loss; print time, tokens and FLOPs to it."""

    root: str = Field("data/speedrun", min_length=1, description="Where set and runs are kept.")
    seed: int = Field(0, ge=0, description="Seed of weights and of every batch.")
    record: bool = Field(False, description="Add it to the leaderboard if it is the fastest.")
    note: str = Field("", description="What became faster, for the leaderboard.")
    board: str = Field("docs/speedrun.jsonl", min_length=1, description="The leaderboard.")


class GenerateParams(Where):
    """Predict modalities from others."""

    run: str = Field("", description="Training run; empty: the only one there is.")
    inputs: dict[str, str] = Field(
        description="Modality to a file, or to text: {'rgb': 'photo.jpg'}."
    )
    targets: list[str] = Field(min_length=1, description="Modalities to predict, in this order.")
    samples: int = Field(1, ge=1, le=64, description="Different results of each.")
    guidance: float | None = Field(
        None, ge=0, description="Guidance scale; none: each target's usual one, 1: no guidance."
    )
    seed: int = Field(0, ge=0, description="Seed of the sampling.")
    redraw: str = Field(
        "", description="Part of rgb to draw anew: xmin,ymin,xmax,ymax in 0..1, a mask picture "
        "(white), or the boxes (JSON) before an edit of det."
    )  # fmt: skip
    out_dir: str = Field("generated", description="Folder for the pictures and texts.")
