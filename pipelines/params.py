"""The parameters of every flow, as forms for the Prefect UI and options of `fourm`.

Defaults are literals: Prefect's form shows a `default_factory` as empty. What a flow is told here
about *how a dataset is made* is written into the dataset (see :mod:`tasks.chain`), so that later
flows need not be told again. Secrets have no place here: parameters are stored and shown.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from infra.ray_session import Embedded, Existing, Job, RayJob, RayTarget

SourceFormat = Literal["auto", "tsv", "csv", "jsonl", "parquet", "folder", "webdataset"]
RetryReason = Literal["timeout", "connect", "dns", "rate_limited", "server_error", "truncated"]

ALL_RETRIES: list[RetryReason] = [
    "timeout", "connect", "dns", "rate_limited", "server_error", "truncated",
]  # fmt: skip


def _known_labeler(name: str) -> str:
    from models.labelers import kinds

    if name not in kinds():
        raise ValueError(f"no such labeler; there are {', '.join(map(repr, kinds()))}")
    return name


def _known_dense(name: str) -> str:
    from tasks.tokenizer_recipes import recipe_names

    if name not in recipe_names():
        raise ValueError(f"no such modality; there are {', '.join(map(repr, recipe_names()))}")
    return name


LabelerName = Annotated[str, AfterValidator(_known_labeler)]
"""A kind of labeler, of this project or of an installed package."""
DenseName = Annotated[str, AfterValidator(_known_dense)]
"""A modality with a recipe for its tokenizer, of this project or of an installed package."""
RecipeName = Literal[
    "demo", "demo_long", "speedrun", "fourm_b", "fourm_l", "fourm_xl", "fourm_21_b", "fourm_21_l",
    "fourm_21_xl", "t2i_b", "t2i_l", "t2i_xl", "sr_l",
]

FIRST_LABELERS: list[LabelerName] = ["depth", "normal", "semseg", "det", "caption", "clip"]
"""The labels of 4M-7; `docs/modalities.md` lists all that there are."""
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
        Embedded(),
        description="'embedded' (on this machine), a cluster's address, 'auto', the http:// "
        "address of a dashboard to run as a job there, or 'rayjob' for a cluster on Kubernetes.",
    )
    workers: int | None = Field(
        None, ge=0, description="Worker processes; none: one for each core or GPU. 0: without Ray."
    )
    gpus: float = Field(0, ge=0, description="GPUs that each worker occupies, may be a fraction.")

    @field_validator("ray", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        """On the command line an address, or a word, stands for the whole."""
        if not isinstance(value, str):
            return value
        if value.startswith(("http://", "https://")):
            return Job(address=value)
        words = {"embedded": Embedded(), "rayjob": RayJob()}
        return words.get(value) or Existing(address=value)


class IngestOptions(Form):
    """What is downloaded, and how."""

    source: str = Field(
        description="List of url<TAB>caption, or CSV, JSONL, Parquet (.gz, .zst), a folder of "
        "pictures, or WebDataset tars: a path, a pattern, or any fsspec URL."
    )
    format: SourceFormat = Field("auto", description="auto: from the name.")
    url_column: str = Field("", description="Name or number of the URLs' column; empty: url.")
    caption_column: str = Field(
        "", description="Name or number of the captions' column; empty: caption, '-': none."
    )
    extra_columns: list[str] = Field([], description="Columns that are kept beside the caption.")
    limit: int | None = Field(
        None, ge=1, description="Only the first rows of the list; of tars, the first tars."
    )
    shard_rows: int = Field(
        2000, ge=1, le=99_999, description="Rows of a shard; a tar of others is one shard."
    )
    resize: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = Field(
        "keep_ratio", description="keep_ratio: shorter side to the image size, never enlarged."
    )
    image_size: int = Field(256, ge=16, le=8192, description="Side of stored pictures, pixels.")
    min_side: int = Field(32, ge=1, description="Shortest side that is kept, pixels.")
    max_pixels: int = Field(
        64_000_000, ge=1, le=178_000_000, description="Largest area that is decoded, pixels."
    )
    max_aspect: float = Field(6.0, ge=1, description="Largest ratio of the sides that is kept.")
    duplicates: Literal["mark", "drop_exact", "drop_near"] = Field(
        "mark", description="What becomes of pictures that repeat an earlier one of the set."
    )
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


def _known_accelerator(name: str) -> str:
    if name:
        from ray.util import accelerators

        choices = sorted(value for key, value in vars(accelerators).items() if key.isupper())
        if name not in choices:
            raise ValueError(f"Ray knows no such accelerator; there are {', '.join(choices)}")
    return name


class LabelerResources(Form):
    """What one labeler's workers occupy, where it differs from the others'."""

    gpus: float | None = Field(None, ge=0, description="GPUs of a worker, may be a fraction.")
    workers: int | None = Field(None, ge=1, description="Worker processes.")
    batch_size: int | None = Field(None, ge=1, description="Pictures a forward pass.")
    accelerator: Annotated[str, AfterValidator(_known_accelerator)] = Field(
        "", description="Type of GPU, as Ray names it: T4, A100, H100."
    )


class LabelOptions(Form):
    """Which networks label the pictures."""

    preset: Literal["scenes", "modern", "released"] = Field(
        "modern",
        description="scenes: the shipped tiny teachers; modern: permissive networks of the hub; "
        "released: those of 4M as far as they load.",
    )
    labelers: list[LabelerName] = Field(
        FIRST_LABELERS, description="Labels to make; docs/modalities.md names them all."
    )
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
    resources: dict[LabelerName, LabelerResources] = Field(
        {},
        description="What single labelers get: {'sam': {'gpus': 1, 'accelerator': 'A100'}, "
        "'depth': {'gpus': 0.25, 'batch_size': 64, 'workers': 4}}.",
    )
    share: list[str] = Field(
        [], description="Labelers that go over the pictures together, as depth+normal; their "
        "networks must fit into a worker's memory."
    )  # fmt: skip


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


class RetryParams(Compute, Where):
    """Download once more the rows that failed for passing reasons, as further shards."""

    reasons: list[RetryReason] = Field(ALL_RETRIES, description="Reason classes to try again.")


class ImportParams(Compute, Where):
    """Take over a set in the layout ml-4m, webdataset or parquet, to the same bytes."""

    source: str = Field(min_length=1, description="Folder or s3://bucket/prefix of the set.")


class ExportParams(Where):
    """Write a published set and its labels in a layout that others read."""

    out: str = Field(min_length=1, description="Folder or s3://bucket/prefix to write to.")
    layout: Literal["ml-4m", "webdataset", "parquet"] = Field(
        "ml-4m", description="ml-4m: as the released code reads it."
    )
    manifest: str = Field("main", pattern=r"^[\w.-]+$", description="Which published set.")
    parts: list[str] = Field(
        [], description="What to write, such as rgb, depth, tok_depth; empty: everything."
    )


class PlanParams(Compute, Where):
    """Print what a dataset will take, before anything is spent: bytes, hours, GPU-hours."""

    source: str = Field("", description="List of a dataset that is not planned yet.")
    format: SourceFormat = Field("auto", description="auto: from the name.")
    url_column: str = Field("", description="Name or number of the URLs' column.")
    caption_column: str = Field("", description="Name or number of the captions' column.")
    limit: int | None = Field(None, ge=1, description="Only the first rows of the list.")
    shard_rows: int = Field(2000, ge=1, le=99_999, description="Rows of a shard.")
    labelers: list[LabelerName] = Field(FIRST_LABELERS, description="Labels to make.")
    modalities: list[DenseName] = Field(ALL_DENSE, description="Modalities to tokenize.")


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
    redraw: str = Field(
        "", description="Part of rgb to draw anew: xmin,ymin,xmax,ymax in 0..1, a mask picture "
        "(white), or the boxes (JSON) before an edit of det."
    )  # fmt: skip
    out_dir: str = Field("generated", description="Folder for the pictures and texts.")


class JanitorParams(Where):
    """Remove what no commit and no manifest names: orphans, old attempts and checkpoints."""

    older_than_days: float = Field(
        7.0, ge=1 / 24, description="Only what was not written for so long, days."
    )
    apply: bool = Field(False, description="Remove; otherwise only list what would be removed.")
    dashboard: str = Field(
        "",
        description="Ray dashboard, http://..., whose jobs end when their flow run has ended.",
    )


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
    "retry": (RetryParams, "fourm retry --root data/mine --reasons timeout,server_error"),
    "import": (ImportParams, "fourm import --root data/theirs --source exports/set"),
    "label": (LabelParams, "fourm label --root data/mine --labelers depth,caption"),
    "train-tokenizers": (TrainTokenizersParams, "fourm train-tokenizers --root data/mine"),
    "tokenize": (TokenizeParams, "fourm tokenize --root data/mine --crops 8"),
    "publish": (PublishParams, "fourm publish --root data/mine --val-share 0.02"),
    "train": (TrainParams, "fourm train --root data/mine --run first --steps 20000"),
    "evaluate": (EvaluateParams, "fourm evaluate --root data/demo --scenes 512"),
    "janitor": (JanitorParams, "fourm janitor --root data/mine --older-than-days 30 --apply"),
}
"""Flows whose command is made from their form, with an example of each."""

TOOLS: dict[str, tuple[type[Form], str]] = {
    "plan-train": (PlanTrainParams, "fourm plan-train --recipe fourm_21_xl --devices 128"),
    "speedrun": (SpeedrunParams, "fourm speedrun --record --note 'larger batches'"),
}
"""Commands made from their form that are no flows: they print lines."""

__all__ = [
    "COMMANDS", "TOOLS", "Embedded", "EndToEndParams", "Existing", "Job", "RayJob", "RayTarget",
]  # fmt: skip
