"""The parameters of every flow, as forms for the Prefect UI and options of `fourm`.

Defaults are literals: Prefect's form shows a `default_factory` as empty. What a flow is told here
about *how a dataset is made* is written into the dataset (see :mod:`tasks.chain`), so that later
flows need not be told again. Secrets have no place here: parameters are stored and shown.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from infra.ray_session import Embedded, Existing, RayTarget

LabelerName = Literal["depth", "normal", "semseg", "det", "caption", "clip"]
DenseName = Literal["rgb", "depth", "normal", "semseg", "clip"]
RecipeName = Literal[
    "demo", "demo_long", "speedrun", "fourm_b", "fourm_l", "fourm_xl", "fourm_21_b", "fourm_21_l",
    "fourm_21_xl", "t2i_b", "t2i_l", "t2i_xl", "sr_l",
]

ALL_LABELERS: list[LabelerName] = ["depth", "normal", "semseg", "det", "caption", "clip"]
ALL_DENSE: list[DenseName] = ["rgb", "depth", "normal", "semseg", "clip"]


class Form(BaseModel):
    """What all forms share: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Where(Form):
    """Which dataset."""

    root: str = Field(
        "data/dataset", min_length=1, description="Dataset: a folder, or s3://bucket/prefix."
    )


class Compute(Form):
    """Where the work of a stage runs."""

    ray: RayTarget = Field(
        Embedded(), description="'embedded' (on this machine), or a cluster's address, or 'auto'."
    )
    workers: int | None = Field(
        None, ge=0, description="Worker processes; none: one for each core or GPU. 0: without Ray."
    )
    gpus: float = Field(0, ge=0, description="GPUs that each worker occupies, may be a fraction.")

    @field_validator("ray", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        """On the command line an address, or 'embedded', stands for the whole."""
        if not isinstance(value, str):
            return value
        return Embedded() if value == "embedded" else Existing(address=value)


class IngestOptions(Form):
    """What is downloaded, and how."""

    source: str = Field(description="TSV of url<TAB>caption: a path or any fsspec URL.")
    limit: int | None = Field(None, ge=1, description="Only the first rows of the list.")
    shard_rows: int = Field(2000, ge=1, le=99_999, description="Rows of a shard.")
    resize: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = Field(
        "keep_ratio", description="keep_ratio: shorter side to the image size, never enlarged."
    )
    image_size: int = Field(256, ge=16, le=8192, description="Side of stored pictures, pixels.")
    allow_hosts: list[str] = Field(
        [], description="Private hosts (host or host:port) that may be reached nevertheless."
    )
    timeout: float = Field(15.0, gt=0, description="Seconds for one attempt.")
    attempts: int = Field(3, ge=1, description="Attempts for failures that are worth a retry.")
    concurrency: int = Field(64, ge=1, description="Downloads under way at once, each worker.")
    per_host: int = Field(8, ge=1, description="Connections to one host at once, each worker.")
    honour_opt_out: bool = Field(
        True, description="Drop pictures whose server forbids indexing or training."
    )


class LabelOptions(Form):
    """Which networks label the pictures."""

    preset: Literal["scenes", "modern"] = Field(
        "modern", description="scenes: the shipped tiny teachers; modern: networks of the hub."
    )
    labelers: list[LabelerName] = Field(ALL_LABELERS, description="Labels to make.")
    models: dict[LabelerName, str] = Field(
        {}, description="Other networks: {'depth': 'hub/id@revision'} or a folder."
    )
    batch_size: int | None = Field(
        None, ge=1, description="Pictures a forward pass; none: the preset's."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU, else fp32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where networks run.")


class TokenizerOptions(Form):
    """How tokenizers are trained."""

    modalities: list[DenseName] = Field(ALL_DENSE, description="Dense modalities to tokenize.")
    size: int = Field(128, ge=32, description="Side of the pictures that tokenizers see, pixels.")
    steps: int | None = Field(
        None, ge=1, description="Optimizer steps of each tokenizer; none: its recipe's."
    )
    max_shards: int = Field(8, ge=1, description="Shards that they learn from, at most.")
    max_samples: int = Field(4000, ge=1, description="Crops that they learn from, at most.")
    changes: dict[DenseName, dict[str, Any]] = Field(
        {}, description="Changes of recipes: {'rgb': {'width': 512, 'steps': 20000}}."
    )
    coordinate_bins: int = Field(
        1000, ge=8, le=1000, description="Bins of box coordinates; the released models have 1000."
    )
    text_vocab: int = Field(30_000, ge=300, le=65_000, description="Largest WordPiece vocabulary.")


class TokenizeOptions(Form):
    """What the token set holds."""

    crops: int = Field(4, ge=1, le=64, description="Crops of a sample; crop 0 is the centre.")
    min_scale: float = Field(0.8, gt=0, le=1, description="Least area of a random crop, a share.")
    hflip: bool = Field(False, description="Mirror random crops (captions with 'left' forbid it).")


class PublishOptions(Form):
    """The version of the dataset that training reads."""

    name: str = Field("main", pattern=r"^[\w.-]+$", description="Name of the manifest.")
    val_share: float = Field(
        0.05, ge=0, lt=1, description="Share of shards kept from training; at least one shard."
    )


class TrainOptions(Form):
    """How 4M is trained."""

    recipe: RecipeName = Field(
        "demo", description="Network, masking and optimizer in one word."
    )
    run: str = Field(
        "", pattern=r"^[\w.-]*$", description="Name of the run; empty: from manifest and recipe."
    )
    manifest: str = Field("main", pattern=r"^[\w.-]+$", description="Manifest to train on.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; none: the recipe's.")
    batch_size: int | None = Field(None, ge=1, description="Samples a step; none: the recipe's.")
    seed: int = Field(0, ge=0, description="Seed of weights and of every batch.")
    data: dict[str, str] = Field(
        {}, description="Sets of a recipe that mixes several: {'coyo': 's3://bucket/coyo#main'}, "
        "a manifest alone is of this dataset, a+b are read side by side; empty: the manifest."
    )
    start: str = Field(
        "", description="Model to begin with: a run of this dataset, or a folder; 'none': fresh."
    )
    freeze: list[str] = Field(
        [], description="Patterns of published tensor names that stay as they are: 'encoder.*'."
    )
    lora: int = Field(
        0, ge=0, description="Rank of low-rank updates in place of the matrices; 0: none."
    )
    train_workers: int = Field(
        0, ge=0, description="Ray Train workers, a GPU each; 0: in this process."
    )


class PlanTrainParams(Form):
    """State what a training would take - shapes, memory, tokens, hours - without data or GPU."""

    recipe: RecipeName = Field("demo", description="The recipe to check.")
    root: str = Field(
        "", description="Dataset whose manifests are checked; empty: modalities as released."
    )
    manifest: str = Field("main", pattern=r"^[\w.-]+$", description="Its manifest.")
    data: dict[str, str] = Field({}, description="Sets of a recipe that mixes, as in `train`.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; none: the recipe's.")
    batch_size: int | None = Field(None, ge=1, description="Samples a step; none: the recipe's.")
    freeze: list[str] = Field([], description="Parameters that stay as they are: 'encoder.*'.")
    lora: int = Field(0, ge=0, description="Rank of low-rank updates; 0: none.")
    devices: int = Field(1, ge=1, description="Devices to train on.")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp: each device holds everything; fsdp: it is split among them."
    )
    accumulate: int = Field(
        1, ge=1, description="Parts of its share of a batch that a device takes in turn."
    )
    recompute: bool = Field(False, description="Compute activations of blocks twice, keep none.")
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


class IngestParams(Compute, IngestOptions, Where):
    """Download the pictures of a list into shards, with a fate for every row."""


class LabelParams(Compute, LabelOptions, Where):
    """Label every picture: depth, normals, classes, boxes, captions, features."""


class TrainTokenizersParams(Compute, TokenizerOptions, Where):
    """Train the tokenizers that turn each modality into discrete codes and back."""


class TokenizeParams(Compute, TokenizeOptions, Where):
    """Turn every modality of every sample into tokens."""


class PublishParams(PublishOptions, Where):
    """Prove that all modalities align, and publish a version of the token set."""


class TrainParams(Compute, TrainOptions, Where):
    """Train 4M on a published token set."""


class EvaluateParams(Compute, EvaluateOptions, Where):
    """Measure a model against the truth; writes results.json, report.html and pictures."""


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
    out_dir: str = Field("generated", description="Folder for the pictures and texts.")


class EndToEndParams(Compute, Where):
    """The whole chain, from a list of links to a trained and measured model."""

    ingest: IngestOptions
    label: LabelOptions = LabelOptions()
    tokenizers: TokenizerOptions = TokenizerOptions()
    tokenize: TokenizeOptions = TokenizeOptions()
    publish: PublishOptions = PublishOptions()
    train: TrainOptions = TrainOptions()
    evaluate: EvaluateOptions = EvaluateOptions()

    def part(self, form: type[Form], options: Form) -> Any:
        """The parameters of one flow: its options here, on the same dataset and machines."""
        own = {name: getattr(self, name) for name in form.model_fields if name in SHARED}
        return form(**own, **{name: getattr(options, name) for name in type(options).model_fields})


SHARED = frozenset({*Where.model_fields, *Compute.model_fields})

COMMANDS: dict[str, tuple[type[Where], str]] = {
    "ingest": (IngestParams, "fourm ingest --root data/mine --source cc12m.tsv --limit 10000"),
    "label": (LabelParams, "fourm label --root data/mine --labelers depth,caption"),
    "train-tokenizers": (TrainTokenizersParams, "fourm train-tokenizers --root data/mine"),
    "tokenize": (TokenizeParams, "fourm tokenize --root data/mine --crops 8"),
    "publish": (PublishParams, "fourm publish --root data/mine --val-share 0.02"),
    "train": (TrainParams, "fourm train --root data/mine --run first --steps 20000"),
    "evaluate": (EvaluateParams, "fourm evaluate --root data/demo --scenes 512"),
}
"""Flows whose command is made from their form, with an example of each."""

TOOLS: dict[str, tuple[type[Form], str]] = {
    "plan-train": (PlanTrainParams, "fourm plan-train --recipe fourm_21_xl --devices 128"),
    "speedrun": (SpeedrunParams, "fourm speedrun --record --note 'larger batches'"),
}
"""Commands made from their form that are no flows: they print lines."""

__all__ = ["COMMANDS", "TOOLS", "Embedded", "EndToEndParams", "Existing", "RayTarget"]
