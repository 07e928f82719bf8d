"""The table of `fourm plan`: what a dataset will take, before anything is spent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table

from infra.ledger import Ledger, Stage
from infra.status import size
from infra.store import Store
from models import modalities
from models.labelers import outputs
from pipelines.params import PlanParams
from pipelines.workers import gpus_each, resources
from tasks.chain import Chain
from tasks.estimate import Line, estimate, rates, total


def lines(params: PlanParams) -> list[Line]:
    """A line for each stage of a planned dataset, or of one that would be made of a list.

    Raises:
        ValueError: there is neither a planned dataset nor a list.
    """
    store = Store(params.root)
    planned = store.exists("plan/plan.json")
    if planned:
        plan = Ledger(store).read_plan()
        shards = int(plan["num_shards"])
        rows = int(plan.get("rows", 0)) + sum(again["rows"] for again in plan["passes"])
        if plan.get("format") == "webdataset":
            rows = shards * params.shard_rows  # a row of such a plan is a tar
    else:
        rows = _count(params)
        shards = -(-rows // params.shard_rows)
    chain = Chain(store)
    labelers = chain.settings.get("label", {}).get("labelers", params.labelers)
    dense = chain.settings.get("tokenizers", {}).get("modalities", params.modalities)
    drops = planned and "ingest" in chain.settings and chain.duplicates != "mark"
    tokens = tokenized(labelers, dense, chain.settings.get("tokenize", {}).get("modalities", []))
    finer = sorted(chain.settings.get("tokenize", {}).get("sizes", []))[1:]
    stages = [
        "fetch",
        *(["distinct"] if drops else []),
        *(f"label:{name}" for name in labelers),
        *(f"tokens:{name}" for name in tokens),
        *(f"tokens:{name}:{size}" for size in finer for name in tokens if _grows(name)),
    ]
    compute = resources(params)
    return estimate(
        stages,
        rows=rows,
        shards=shards,
        done=_done(chain) if planned else {},
        measured=rates(store) if planned else {},
        workers=compute.workers or 1,  # of a cluster that says how many only once it is asked, 1
        gpus=gpus_each(params),
    )


def tokenized(
    labelers: Iterable[str], learned: Sequence[str], chosen: Sequence[str] = ()
) -> list[str]:
    """Modalities that get tokens, of those that are fetched or labelled: the ones with a learned
    tokenizer, then those that are told as text.

    Args:
        labelers: Names of labelers.
        learned: Modalities that tokenizers are trained for.
        chosen: Those of them all that are tokenized; none: all.
    """
    made = {"rgb", "caption", *(name for kind in labelers for name in outputs(kind))}
    forms = {name: form for name in modalities.names() if (form := modalities.text_form(name))}
    written = [name for name, form in forms.items() if form.parts is None or name in learned]
    found = dict.fromkeys([*learned, *written])
    return [name for name in found if name in made and (not chosen or name in chosen)]


def _grows(name: str) -> bool:
    """Whether a larger crop of a modality has more tokens."""
    return modalities.get(name).kind in ("image", "map", "feature")


def _count(params: PlanParams) -> int:
    from infra.sources import Source, detect, read_rows

    if not params.source:
        raise ValueError(f"{params.root} is not planned yet; name its list with --source")
    source = detect(
        Source(
            path=params.source,
            format=params.format,
            url=params.url_column,
            caption=params.caption_column,
        )
    )
    rows = sum(1 for _ in read_rows(source, params.limit))
    return rows * params.shard_rows if source.format == "webdataset" else rows


def _done(chain: Chain) -> dict[str, int]:
    """Committed shards of the stages as they are chosen now."""
    return {stage.name: len(chain.ledger.committed(stage)) for stage in _decided(chain)}


def _decided(chain: Chain) -> Iterator[Stage]:
    """Stages that are known by now: labels must be chosen, tokenizers trained."""
    try:
        yield from {chain.download, chain.fetch}
        yield from chain.labels.values()
        yield from chain.tokens.values()
    except (ValueError, FileNotFoundError):
        return


def table(found: list[Line], workers: int) -> Table:
    """The lines and their sum."""
    hands = "1 worker" if workers == 1 else f"{workers} workers"
    shown = Table(title=f"To do, with {hands}", title_justify="left")
    shown.add_column("stage", no_wrap=True)
    for name in ("shards", "samples", "bytes", "hours", "GPU-hours", "rate"):
        shown.add_column(name, justify="right")
    for line in found:
        shown.add_row(
            line.stage, f"{line.shards:,}", f"{line.samples:,}", size(line.bytes),
            _hours(line.hours), _hours(line.gpu_hours), line.basis,
        )  # fmt: skip
    whole = total(found)
    shown.add_section()
    shown.add_row(
        "together", "", "", size(whole["bytes"]), _hours(whole["hours"]),
        _hours(whole["gpu_hours"]), "",
    )  # fmt: skip
    return shown


def _hours(hours: float) -> str:
    return "" if not hours else f"{hours:,.1f}" if hours >= 0.1 else f"{hours:.3f}"
