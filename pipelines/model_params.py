"""The parameters of what has to do with the model itself: training it and generating with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pipelines.forms import Form, Where
from pipelines.options import Spelled, fields, pair, weighted

if TYPE_CHECKING:
    from tasks.generate import How

RecipeName = Literal[
    "demo", "demo_12", "any", "speedrun", "fourm_b", "fourm_l", "fourm_xl", "fourm_21_b",
    "fourm_21_l", "fourm_21_xl", "t2i_b", "t2i_l", "t2i_xl", "sr_l",
]


class Training(Form):
    """What is trained, and how it is spread over devices."""

    recipe: RecipeName = Field(
        "demo", description="Network, masking and optimizer in one word. demo wants the labels of "
        "4M-7, any takes whatever the set holds."
    )
    manifest: str = Field(
        "main", pattern=r"^[\w.-]+(@\d+)?$", description="Manifest to train on; main@2: version 2 "
        "of it, to go on with a run that began before the next one was published."
    )  # fmt: skip
    steps: int | None = Field(None, ge=1, description="Optimizer steps; none: the recipe's.")
    batch_size: int | None = Field(None, ge=1, description="Samples a step; none: the recipe's.")
    data: dict[str, str] = Field(
        {}, description='Sets of a recipe that mixes several: {"coyo": "s3://bucket/coyo#main"}, '
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
    compile: bool = Field(False, description="Compile the blocks, on GPUs: CPUs get slower by it.")
    wandb: str = Field("", description="Project of Weights & Biases that gets the curve too.")


class EvaluateOptions(Form):
    """What is measured."""

    run: str = Field(
        "", pattern=r"^[\w.-]*$", description="Training run; empty: the only one there is."
    )
    manifest: str = Field("main", pattern=r"^[\w.-]+$", description="Manifest it was trained on.")
    truth: Literal["auto", "scenes", "labels"] = Field(
        "auto", description="scenes: exact truth of new scenes; labels: those of the held-out part."
    )
    scenes: int = Field(256, ge=1, description="Pictures, never trained on, that are evaluated.")
    samples: int = Field(10, ge=1, le=100, description="Samples that are averaged for 'fourm_10'.")
    pictures: int = Field(96, ge=1, description="Pictures generated for each task to RGB.")


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


class GuideOptions(Form):
    """Conditions that pull a result towards them, or push it away, with a weight of their own."""

    conditions: dict[str, str] = Field(
        min_length=1, description='Modality to a file, or to text: {"caption": "at night"}.'
    )
    weight: float = Field(description="Above 0 leads towards them, below 0 away.")


class DecodingOptions(Form):
    """How a target is decoded, where that differs from the preset."""

    order: Literal["maskgit", "roar", "halton"] | None = Field(
        None, description="Which tokens of a grid come first: the surest, random, evenly spread."
    )
    steps: int | None = Field(None, ge=1, description="Forward passes for a grid.")
    schedule: Literal["cosine", "linear"] | None = Field(
        None, description="Tokens a step: few at first and last, or equally many."
    )
    temperature: float | None = Field(None, ge=0, description="0 takes the most likely token.")
    temperature_schedule: str | None = Field(
        None, pattern=r"^(constant|linear|onex:[\d.]+:[\d.]+)$",
        description="Temperature over the steps of a grid: constant, linear, onex:MIN:POWER.",
    )  # fmt: skip
    top_k: float | None = Field(
        None, ge=0, description="Tokens to choose from, a count or a share below 1; 0: all."
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="Probability of the tokens to choose from; 0: all."
    )
    guidance: float | None = Field(None, ge=0, description="Guidance scale; 1: none.")
    remask: float | None = Field(
        None, ge=0, lt=1, description="Share of a grid's tokens that each step draws again."
    )
    well_formed: bool | None = Field(
        None, description="Boxes, palettes, metadata, poses: only as their grammar allows."
    )


class GenerateParams(Where):
    """Predict any modalities from any others with a trained model; writes pictures and text."""

    root: str = Field(
        "data/demo", min_length=1, description="Dataset: a folder, or s3://bucket/prefix."
    )
    inputs: Annotated[dict[str, str], Spelled("--from", pair)] = Field(
        {}, description="modality=file or modality=text, with ___ for words that are not known."
    )
    targets: Annotated[list[str], Spelled("--to")] = Field(
        min_length=1, description="Modalities to predict, in this order: depth,caption."
    )
    run: str = Field("", description="Training run; empty: the only one there is.")
    out_dir: Annotated[str, Spelled("--out")] = Field(
        "generated", description="Folder for the pictures and texts."
    )
    samples: int = Field(1, ge=1, le=64, description="Different results of each.")
    combine: bool = Field(
        False, description="Write what the samples agree on instead of each: means, votes, text."
    )
    seed: int = Field(0, ge=0, description="Seed of the sampling.")
    preset: Literal["plain", "released", "halton", "greedy"] = Field(
        "plain", description="released: the published sampler; plain: that without guidance; "
        "halton: in evenly spread steps; greedy: the most likely tokens."
    )  # fmt: skip
    guidance: float | None = Field(
        None, ge=0, description="Guidance scale; none: the preset's, 1: no guidance."
    )
    guides: Annotated[list[GuideOptions], Spelled("--guide", weighted)] = Field(
        [], description="weight*modality=file-or-text: a further condition to follow, or to avoid "
        "where the weight is negative, in place of a scale."
    )  # fmt: skip
    decoding: Annotated[dict[str, DecodingOptions], Spelled("--decode", fields)] = Field(
        {}, description="target:setting=value,..., where it differs from the preset: order, steps, "
        "schedule, temperature, temperature-schedule, top-k, top-p, guidance, remask, well-formed; "
        "'*' is every target."
    )  # fmt: skip
    known: Annotated[dict[str, str], Spelled("--known", pair)] = Field(
        {}, description="input=area: only this part of it is given, xmin,ymin,xmax,ymax in 0..1 or "
        "a mask picture (white); of a target the rest is generated."
    )  # fmt: skip
    redraw: str = Field(
        "", description="Part of rgb to draw anew: xmin,ymin,xmax,ymax in 0..1, a mask picture "
        "(white), or the boxes (JSON) before an edit of det."
    )  # fmt: skip
    upscale: str = Field(
        "", description="Run of a super-resolution model that makes the results finer; empty: none."
    )

    def how(self) -> How:
        """How results are sampled. Raises ValueError for what excludes each other."""
        from tasks.generate import How

        plain = self.model_dump(include={
            "samples", "combine", "seed", "preset", "guidance", "known", "redraw", "upscale",
        })  # fmt: skip
        return How(
            guides=[(guide.conditions, guide.weight) for guide in self.guides],
            decoding={name: one.model_dump(exclude_none=True)
                      for name, one in self.decoding.items()},
            **plain,
        )  # fmt: skip


GENERATE = """\
fourm generate --from rgb=photo.jpg --to depth,caption --out out
fourm generate --from rgb=photo.jpg --to depth --samples 10 --combine
fourm generate --from "caption=a red ___ on the floor" --to caption,rgb --preset halton
fourm generate --guide "3*caption=a red cube" --guide "-2*caption=a sphere" --to rgb
fourm generate --from rgb=photo.jpg --known rgb=0,0,1,0.5 --to rgb
fourm generate --from rgb=photo.jpg --from det=after.json --redraw before.json --to rgb
fourm generate --from det=boxes.json --to rgb --decode rgb:order=maskgit,steps=12,top-k=50
fourm generate --from depth=near.png --to rgb --run first --upscale finer"""
"""Examples of its command."""
