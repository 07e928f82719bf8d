"""The parameters of every flow, as forms for the Prefect UI and options of `fourm`.

Defaults are literals: Prefect's form shows a `default_factory` as empty. What a flow is told here
about *how a dataset is made* is written into the dataset (see :mod:`tasks.chain`), so that later
flows need not be told again. Secrets have no place here: parameters are stored and shown.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from infra.ray_session import Embedded, Existing, Job, RayJob, RayTarget
from pipelines.forms import Compute, Form, Where
from pipelines.model_params import (
    GENERATE,
    EvaluateOptions,
    GenerateParams,
    PlanTrainParams,
    RecipeName,
    SpeedrunParams,
    TrainOptions,
)
from pipelines.names import Accelerator, DenseName, HostName, LabelerName

SourceFormat = Literal["auto", "tsv", "csv", "jsonl", "parquet", "folder", "webdataset"]
RetryReason = Literal["timeout", "connect", "dns", "rate_limited", "server_error", "truncated"]

ALL_RETRIES: list[RetryReason] = list(get_args(RetryReason))


TokenizerPreset = Literal["scenes", "modern", "released"]

FIRST_LABELERS: list[LabelerName] = ["depth", "normal", "semseg", "det", "caption", "clip"]
"""The labels of 4M-7; `docs/modalities.md` lists all that there are."""
ALL_DENSE: list[DenseName] = ["rgb", "depth", "normal", "semseg", "clip"]


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
    allow_hosts: list[HostName] = Field(
        [], description="Private hosts (host or host:port) that may be reached nevertheless."
    )
    timeout: float = Field(15.0, gt=0, description="Seconds for one attempt.")
    attempts: int = Field(3, ge=1, description="Attempts for failures that are worth a retry.")
    concurrency: int = Field(256, ge=1, description="Downloads under way at once, each worker.")
    per_host: int = Field(8, ge=1, description="Connections to one host at once, all workers.")
    honour_opt_out: bool = Field(
        True, description="Drop pictures whose server forbids indexing or training."
    )
    honour_robots: bool = Field(
        False, description="Ask each host's robots.txt, and fetch only what it allows."
    )


class LabelerResources(Form):
    """What one labeler's workers occupy, where it differs from the others'."""

    gpus: float | None = Field(None, ge=0, description="GPUs of a worker, may be a fraction.")
    workers: int | None = Field(None, ge=1, description="Worker processes.")
    batch_size: int | None = Field(None, ge=1, description="Pictures a forward pass.")
    accelerator: Accelerator = Field(
        "", description="Type of GPU, as Ray names it: T4, A100, H100."
    )
    compile: bool = Field(
        False, description="Run the network through torch.compile: a minute or more once for "
        "each shape of its input. For large sets on GPUs; CPUs gain little."
    )  # fmt: skip


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
    one_pass: list[LabelerName] = Field(
        [], description="Labels, such as feature maps, that are stored for the first shards alone, "
        "for tokenizers to learn from; `tokenize` makes and tokenizes the others in one pass."
    )  # fmt: skip
    one_pass_shards: int = Field(8, ge=1, description="Those first shards.")
    models: dict[LabelerName, str] = Field(
        {}, description='Other networks: {"depth": "hub/id@revision"} or a folder.'
    )
    batch_size: int | None = Field(
        None, ge=1, description="Pictures a forward pass; none: the preset's."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU or CPU that is fast at it, else fp32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where networks run.")
    resources: dict[LabelerName, LabelerResources] = Field(
        {},
        description='What single labelers get: {"sam": {"gpus": 1, "accelerator": "A100"}, '
        '"depth": {"gpus": 0.25, "batch_size": 64, "workers": 4, "compile": true}}.',
    )
    share: list[str] = Field(
        [], description="Labelers that go over the pictures together, as depth+normal; their "
        "networks must fit into a worker's memory."
    )  # fmt: skip


class TokenizerOptions(Form):
    """How tokenizers are trained."""

    modalities: list[DenseName] = Field(ALL_DENSE, description="Dense modalities to tokenize.")
    preset: TokenizerPreset = Field(
        "scenes",
        description="scenes: a minute of one core each; modern: FSQ for photographs; released: "
        "those of 4M as they were trained. `fourm plan-tokenizers` prints what they take.",
    )
    recipes: dict[DenseName, str] = Field(
        {}, description="Other recipes of the preset than those named like the modality: "
        '{"rgb": "rgb_1k"}.'
    )  # fmt: skip
    size: int | None = Field(
        None, ge=32, description="Side of the pictures that tokenizers see, pixels; none: 128 "
        "with the preset scenes, else 224."
    )  # fmt: skip
    steps: int | None = Field(
        None, ge=1, description="Optimizer steps of each tokenizer; none: its recipe's."
    )
    max_shards: int = Field(8, ge=1, description="Shards that they learn from, at most.")
    max_samples: int | None = Field(
        None, ge=1, description="Crops that they learn from, at most, held in memory; none: 4,000 "
        "with the preset scenes, else 100,000."
    )  # fmt: skip
    changes: dict[DenseName, dict[str, Any]] = Field(
        {}, description='Changes of recipes: {"rgb": {"width": 512, "steps": 20000}}; '
        "'registers' makes ordered tokens of any number, 'encoder' trains a new decoder behind "
        "the codes of a stored tokenizer, 'start' goes on with one, 'sizes' draws resolutions, "
        "'ema' averages weights."
    )  # fmt: skip
    coordinate_bins: int = Field(
        1000, ge=8, le=1000, description="Bins of box coordinates; the released models have 1000."
    )
    text_vocab: int = Field(30_000, ge=300, le=65_000, description="Largest WordPiece vocabulary.")
    like: str = Field("", description="Dataset whose tokenizers are taken instead, all else here "
                      "aside: one training can then read both.")  # fmt: skip


class TokenizeOptions(Form):
    """What the token set holds."""

    modalities: list[str] = Field(
        [], description="Modalities to tokenize, of those with a tokenizer; none: all of them."
    )
    sizes: list[Annotated[int, Field(ge=16)]] = Field(
        [], description="Sides of the crops, pixels: a token set for each, of the same regions, as "
        "224,448 for super-resolution; pictures should be stored as large. None: the tokenizers'."
    )  # fmt: skip
    crops: int = Field(4, ge=1, le=64, description="Crops of a sample; crop 0 is the centre.")
    min_scale: float = Field(0.8, gt=0, le=1, description="Least area of a random crop, a share.")
    hflip: bool = Field(False, description="Mirror random crops (captions with 'left' forbid it).")
    tokens: dict[DenseName, int] = Field(
        {}, description="Tokens to store of modalities with ordered ones: "
        '{"depth": 16}; others have all of them.'
    )  # fmt: skip


class PublishOptions(Form):
    """The version of the dataset that training reads."""

    name: str = Field("main", pattern=r"^[\w.-]+$", description="Name of the manifest.")
    val_share: float = Field(
        0.05, ge=0, lt=1, description="Share of shards kept from training; at least one shard."
    )


class PlanTokenizersParams(Form):
    """State what tokenizers would take - parameters, tokens, steps, hours - without data or GPU."""

    preset: TokenizerPreset = Field("released", description="Which recipes.")
    modalities: list[DenseName] = Field([], description="Of which modalities; none: all recipes.")
    recipes: dict[DenseName, str] = Field({}, description="As of `fourm train-tokenizers`.")
    size: int | None = Field(None, ge=32, description="Side of the pictures, pixels.")
    changes: dict[DenseName, dict[str, Any]] = Field({}, description="Changes of recipes.")
    devices: int = Field(8, ge=1, description="Devices to train on.")
    peak_tflops: float = Field(312.0, gt=0, description="bf16 peak of a device (H100: 989).")
    mfu: float = Field(0.4, gt=0, le=1, description="Share of the peak that is reached.")


class IngestParams(Compute, IngestOptions, Where):
    """Download the pictures of a list into shards, with a fate for every row."""

    append: bool = Field(
        False,
        description="Add what is new in this list, by its URLs, to a dataset that has one; "
        "where there is none yet, it is made.",
    )


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


class WithdrawParams(Where):
    """Take samples out of a dataset for good: pictures, texts, labels, tokens and planned rows."""

    names: str = Field(
        min_length=1,
        description="File of keys and URLs, one a line; what follows a tab is not read. A path, or "
        "any fsspec URL.",
    )
    apply: bool = Field(False, description="Remove; otherwise only say what would be removed.")


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
    "plan-tokenizers": (PlanTokenizersParams, "fourm plan-tokenizers --preset modern"),
    "withdraw": (WithdrawParams, "fourm withdraw --root data/mine --names opt-out.txt --apply"),
    "speedrun": (SpeedrunParams, "fourm speedrun --record --note 'larger batches'"),
}
"""Commands made from their form that are no flows: they print lines."""

__all__ = [
    "COMMANDS", "GENERATE", "TOOLS", "Embedded", "EndToEndParams", "EvaluateOptions", "Existing",
    "GenerateParams", "Job", "RayJob", "RayTarget", "RecipeName",
]  # fmt: skip
