"""What a flow is told, checked before any work starts: by the command line before there is a flow,
and by flows that write down what they were told, whoever started them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.ray_session import Embedded
from infra.sources import Source
from infra.store import Store
from tasks.chain import Chain, made_otherwise
from tasks.choices import fetch_config, labelers, tokenizer_recipes

FIRST_ROWS = 100
"""Rows of a list of which one at least must be good, before work starts."""
_UPSTREAM = {
    "retry": ("ingest",),
    "label": ("ingest",),
    "train_tokenizers": ("ingest", "label"),
    "tokenize": ("ingest", "label", "tokenizers"),
    "publish": ("ingest", "label", "tokenizers", "tokenize"),
}
_READERS = frozenset({"generate", "janitor"})
"""Flows that may be of use where nothing can be written."""


def check(flow: str, choices: dict[str, Any]) -> None:
    """Refuse what cannot work, before any work starts.

    Args:
        flow: name of the flow, such as "train_tokenizers".
        choices: its parameters.

    Raises:
        ValueError: An earlier flow is missing, a name does not exist (says which there are), or
            the dataset cannot be written.
        OSError: The dataset's place cannot be reached.
    """
    store = Store(choices["root"])
    chain = Chain(store)
    for section in _UPSTREAM.get(flow, ()):
        chain.section(section)
    if flow == "ingest":
        source = _check_source(choices)
        if choices.get("append") and store.exists("plan/plan.json"):
            _check_same_pictures(chain, source, choices)
    if flow == "janitor" and not store.exists("plan/plan.json"):
        raise ValueError(f"there is no dataset at {choices['root']}")
    if flow == "retry":
        from tasks.plans import check_retry

        check_retry(store)
    if flow == "import":
        from tasks.interchange import read_about

        read_about(Store(choices["source"]))
    if flow == "label":
        _check_labels(chain, choices)
    if flow == "train_tokenizers":
        _check_tokenizers(chain, choices)
    if flow == "tokenize":
        _check_tokens(chain, choices)
    if flow == "publish":
        from tasks.publish import published_stages, tokenized_shards

        tokenized_shards(chain, published_stages(chain))
    if flow == "train":
        _check_training(store, choices)
    if flow in ("evaluate", "generate"):
        from tasks.generate import only_run, runs

        run = choices["run"] or only_run(store)
        _one_of("trained run", run, runs(store), "train")
    if flow == "evaluate":
        from infra.manifest import manifest_names

        _one_of("manifest", choices["manifest"], manifest_names(store), "publish")
    if flow not in _READERS:
        store.check_writable()


def _check_labels(chain: Chain, choices: dict[str, Any]) -> None:
    from models.modalities import is_embedded
    from tasks.label import label_stages

    specs = labelers(choices)
    for name, model in choices["models"].items():
        here = choices["ray"]["kind"] == "embedded" and model.startswith((".", "/", "~"))
        if here and not Path(model).is_dir():
            raise ValueError(f"models: there is no folder {model!r} for {name!r}")
    stages = label_stages(specs.values(), chain.fetch)
    passing = choices.get("one_pass", [])
    if unknown := sorted(set(passing) - specs.keys()):
        raise ValueError(f"one_pass names {unknown[0]!r}, which is not among the labelers")
    for output in (each for name in passing for each in specs[name].outputs):
        if is_embedded(output):
            raise ValueError(f"{output} has no tokens, so it must be stored: take its labeler out "
                             "of one_pass")
    for name, stage in stages.items():
        for other in passing:
            if stages[other] in stage.upstream:
                raise ValueError(f"{name!r} looks at labels of {other!r}, so these must be "
                                 "stored: take it out of one_pass")
    _check_resources(chain, choices)
    if not chain.ledger.committed(chain.fetch):
        why = made_otherwise(chain.ledger, chain.fetch) or "run `fourm ingest` first"
        raise ValueError(f"no shard of {chain.store.url} has its pictures; {why}")


def _check_resources(chain: Chain, choices: dict[str, Any]) -> None:
    from tasks.label import label_jobs

    groups = [group.split("+") for group in choices["share"]]
    label_jobs(labelers(choices).values(), chain.fetch, (), groups)
    alone = {"gpus": None, "workers": None, "accelerator": ""}
    needs = {
        name: {each: own[each] for each in alone} for name, own in choices["resources"].items()
    }
    for names in groups:
        first = needs.get(names[0], alone)
        if other := [name for name in names if needs.get(name, alone) != first]:
            raise ValueError(
                f"share={'+'.join(names)!r}: {other[0]!r} has other resources than {names[0]!r}; "
                "what shares a pass runs in the same workers"
            )
    for name, own in needs.items():
        gpus = choices["gpus"] if own["gpus"] is None else own["gpus"]
        if gpus is None and choices["ray"]["kind"] == "embedded":
            gpus = Embedded(**choices["ray"]).gpus
        if own["accelerator"] and not gpus:
            raise ValueError(f"resources of {name!r}: an accelerator, but no gpus")
        if choices["resources"][name].get("compile"):
            on_gpu = gpus and choices["device"] != "cpu"
            _check_compiles(name, "cuda" if on_gpu else "cpu", choices["ray"]["kind"])


def _check_compiles(name: str, device: str, ray: str) -> None:
    from infra.machine import check_compiler
    from models.labelers import labeler_class

    if not labeler_class(name).compiles:
        raise ValueError(f"resources of {name!r}: it has no network that can be compiled")
    if ray == "embedded":  # elsewhere each worker looks for one itself
        check_compiler(device)


def _check_source(choices: dict[str, Any]) -> Source:
    """Read the first rows of the list: its columns are there and hold what they should, or the
    error says what they do. Returns where it is."""
    from botocore.exceptions import BotoCoreError, NoCredentialsError

    from infra.sources import detect, read_rows

    source = Source(
        path=choices["source"],
        format=choices["format"],
        url=choices["url_column"],
        caption=choices["caption_column"],
        extra=tuple(choices["extra_columns"]),
    )
    try:
        source = detect(source)
        rows = list(read_rows(source, FIRST_ROWS))
    except FileNotFoundError as error:
        # A web server's refusal comes as this, too.
        why = f": {error.__cause__}" if "://" in source.path and error.__cause__ else ""
        of = f" of format {choices['format']}" if choices["format"] != "auto" else ""
        raise ValueError(f"there is nothing{of} at {source.path}{why}") from None
    except (OSError, BotoCoreError) as error:
        public = "; what is public is read without any where FSSPEC_S3_ANON=true"
        why = public if isinstance(error, NoCredentialsError) else ""
        raise ValueError(f"{source.path} cannot be read: {error}{why}") from None
    if not rows:
        raise ValueError(f"{source.path} holds no rows")
    files = source.format in ("folder", "webdataset")
    odd = [
        row.problem or f"{row.url[:200]!r} is no URL"
        for row in rows
        if row.problem or not (files or row.url.lower().startswith(("http://", "https://")))
    ]
    if odd and len(odd) == len(rows):
        raise ValueError(
            f"{source.path}: none of the first {len(odd)} rows can be used: {odd[0]}; "
            "url_column says where the URLs are"
        )
    return source


def _check_same_pictures(chain: Chain, source: Source, choices: dict[str, Any]) -> None:
    """What is appended becomes part of the stages that there are; under other options all that
    they hold would be fetched, and labelled, once more."""
    from tasks.fetch import fetch_stage
    from tasks.growth import check_place

    check_place(chain.store, chain.ledger.read_plan(), source)
    if "ingest" not in chain.settings:
        return
    known = chain.section("ingest")
    stage = fetch_stage(chain.plan, fetch_config(choices))
    if stage.id == chain.download.id and choices["duplicates"] == chain.duplicates:
        return
    shaping = ("resize", "image_size", "min_side", "max_pixels", "max_aspect", "duplicates",
               "honour_opt_out", "honour_robots")  # fmt: skip
    before = [f"--{name.replace('_', '-')} {known[name]}" for name in shaping
              if name in known and known[name] != choices[name]]  # fmt: skip
    raise ValueError(f"the pictures of {chain.store.url} were made with {' '.join(before)}: append "
                     "with the same, or all of them would be fetched and labelled anew")


def _check_tokenizers(chain: Chain, choices: dict[str, Any]) -> None:
    from models.modalities import text_form

    if choices.get("like"):
        from tasks.shared_tokenizers import shared

        shared(chain, Chain(Store(choices["like"])))
        return
    recipes = tokenizer_recipes(choices)
    for name in choices["modalities"]:
        _one_of("labels for", name, list(chain.sources), "label")
    bins = choices["coordinate_bins"]
    for name in chain.sources:
        form = text_form(name)
        if form is None or (form.parts is not None and name not in recipes):
            continue
        form.check_bins(name, bins)
        if form.parts is not None:
            recipes[name].check_codes(name, form.parts.count, form.parts.most(bins))
    chain.learnable()


def _check_tokens(chain: Chain, choices: dict[str, Any]) -> None:
    for name in choices["modalities"]:
        _one_of("tokenizer of", name, [*chain.recipes, *chain.text_forms], "train-tokenizers")
    for name, recipe in chain.recipes.items():
        cut = name in (choices["modalities"] or chain.recipes) and recipe.scales
        if odd := [size for size in choices["sizes"] if cut and size % recipe.patch]:
            raise ValueError(f"sizes: {odd[0]} is no multiple of the {recipe.patch} px of a token "
                             f"of {name}")
    chain.settings["tokenize"] = choices  # as the flow will have written it
    _ = chain.tokens  # refuses what is not trained yet, or does not fit


def _check_training(store: Store, choices: dict[str, Any]) -> None:
    from infra.manifest import manifest_names
    from tasks.mixture import open_sets
    from tasks.recipes import recipe
    from tasks.train import FourMTask, begins

    if not choices["data"]:
        name = choices["manifest"].partition("@")[0]
        _one_of("manifest", name, manifest_names(store), "publish")
    names = ("steps", "batch_size", "seed", "start", "freeze", "lora")
    chosen = recipe(choices["recipe"], **{name: choices[name] for name in names})
    sets = open_sets(store, chosen, choices["data"] or choices["manifest"])
    begins(chosen)
    FourMTask(store, sets, chosen)


def _one_of(what: str, name: str, choices: list[str], flow: str) -> None:
    if name not in choices:
        have = f"there are {', '.join(choices)}" if choices else f"`fourm {flow}` makes one"
        raise ValueError(f"no {what} {name!r}; {have}")
