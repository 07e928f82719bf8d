"""Which stages make up a dataset: each recomputed from what the flows were told, never guessed.

Every flow writes its choices into `dataset.json` of the dataset. A later flow, a status or a
second machine rebuilds from it the same stages, hence the same fingerprints, and finds what is
committed under them. Changing a choice changes the fingerprints from there on and nothing else:
what was made under the old ones stays, and counts again when the choice is taken back.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.ledger import Ledger, Stage
from infra.store import Store, StoreConflict, json_bytes

if TYPE_CHECKING:
    from models.crops import CropPolicy
    from models.labelers.base import LabelerSpec
    from tasks.fetch import FetchConfig
    from tasks.tokenizer_recipes import TextRecipe, TokenizerRecipe
    from tasks.train_tokenizers import TokenizerInfo

FILE = "dataset.json"
_NEEDED = {
    "ingest": "no pictures were ingested into {url}; run `fourm ingest` first",
    "label": "nothing says how the pictures of {url} are labelled; run `fourm label` first",
    "tokenizers": "{url} has no tokenizers; run `fourm train-tokenizers` first",
    "tokenize": "nothing says how {url} is tokenized; run `fourm tokenize` first",
}
_UPSTREAM = {
    "retry": ("ingest",),
    "label": ("ingest",),
    "train_tokenizers": ("ingest", "label"),
    "tokenize": ("ingest", "label", "tokenizers"),
    "publish": ("ingest", "label", "tokenizers", "tokenize"),
}


_FILTERS = ("min_side", "max_pixels", "max_aspect")  # choices that older datasets lack


def remember(store: Store, section: str, choices: dict[str, Any]) -> None:
    """Write the choices of one flow into the dataset, those of other flows kept."""
    while True:
        version = store.version(FILE)
        settings = store.read_json(FILE) if version else {}
        if settings.get(section) == choices:
            return
        try:
            store.replace(FILE, json_bytes({**settings, section: choices}), version)
        except StoreConflict:  # another flow wrote its section at the same time
            continue
        return


def remember_tokenizers(store: Store, choices: dict[str, Any]) -> None:
    """Like :func:`remember`, with the shards to learn from: those of the first time stay, so that
    shards which are labelled later do not ask for other tokenizers.

    Raises:
        ValueError: No shard is labelled in every modality.
    """
    chain = Chain(store)
    known = dict(chain.settings.get("tokenizers", {}))
    labelled = chain.labelled()
    shards = known.pop("shards", [])
    if known != choices or not set(shards) <= set(labelled):
        shards = labelled[: choices["max_shards"]]
    if not shards:
        raise ValueError(f"no shard of {store.url} has all of its labels; run `fourm label` first")
    remember(store, "tokenizers", {**choices, "shards": shards})


class Chain:
    """The stages of a dataset, upstream first. Each attribute raises ValueError where the flow
    that decides on it has not run yet."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ledger = Ledger(store)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The choices of all flows so far, a section each."""
        return self.store.read_json(FILE) if self.store.exists(FILE) else {}

    def section(self, name: str) -> dict[str, Any]:
        """The choices of one flow."""
        if name not in self.settings:
            raise ValueError(_NEEDED[name].format(url=self.store.url))
        return self.settings[name]

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What is fetched."""
        self.section("ingest")
        return self.ledger.read_plan()

    @property
    def shards(self) -> tuple[int, ...]:
        """Numbers of all planned shards."""
        return tuple(range(self.plan["num_shards"]))

    @cached_property
    def fetch_config(self) -> FetchConfig:
        """How rows are downloaded and cleaned."""
        return fetch_config(self.section("ingest"))

    @cached_property
    def download(self) -> Stage:
        """The stage that gets the pictures and the captions of the list."""
        from tasks.fetch import fetch_stage

        return fetch_stage(self.plan, self.fetch_config)

    @property
    def duplicates(self) -> Literal["mark", "drop_exact", "drop_near"]:
        """What becomes of pictures that repeat others."""
        choice: Literal["mark", "drop_exact", "drop_near"]
        choice = self.section("ingest").get("duplicates", "mark")
        return choice

    @cached_property
    def fetch(self) -> Stage:
        """The stage that writes the rgb and captions which all others read."""
        from tasks.duplicates import distinct_stage

        drop = self.duplicates
        return self.download if drop == "mark" else distinct_stage(self.download, drop)

    @cached_property
    def labelers(self) -> dict[str, LabelerSpec]:
        """Specification of each chosen labeler, by name."""
        return labelers(self.section("label"))

    @cached_property
    def labels(self) -> dict[str, Stage]:
        """Label stage of each chosen labeler, by name."""
        from tasks.label import label_stages

        return label_stages(self.labelers.values(), self.fetch)

    @cached_property
    def sources(self) -> dict[str, Stage]:
        """Modality to the stage that writes it; a labeler's caption goes before the list's."""
        made = dict.fromkeys(self.fetch.outputs, self.fetch)
        for stage in self.labels.values():
            made |= dict.fromkeys(stage.outputs, stage)
        return made

    @cached_property
    def recipes(self) -> dict[str, TokenizerRecipe]:
        """Recipe of each learned tokenizer, by modality."""
        return tokenizer_recipes(self.section("tokenizers"))

    @cached_property
    def text_recipe(self) -> TextRecipe:
        """Recipe of the text tokenizer."""
        from tasks.tokenizer_recipes import TextRecipe

        choices = self.section("tokenizers")
        return TextRecipe(bins=choices["coordinate_bins"], vocab_size=choices["text_vocab"])

    @property
    def tokenizer_shards(self) -> list[int]:
        """Shards that the tokenizers learn from."""
        return self.section("tokenizers")["shards"]

    def labelled(self) -> list[int]:
        """Shards that are committed in every modality."""
        done = [self.ledger.committed(stage) for stage in set(self.sources.values())]
        return sorted(set.intersection(*done))

    @cached_property
    def crops(self) -> CropPolicy:
        """The crops of the token set."""
        from models.crops import CropPolicy

        choices = self.section("tokenize")
        return CropPolicy(
            num_crops=choices["crops"],
            min_scale=choices["min_scale"],
            hflip=choices["hflip"],
            size=self.section("tokenizers")["size"],
        )

    @cached_property
    def tokenizers(self) -> dict[str, TokenizerInfo]:
        """Record of each trained tokenizer, by modality and "text".

        Raises:
            ValueError: One is not trained yet.
        """
        from tasks.tokenize import SEQUENCES, tokenizer_infos
        from tasks.train_tokenizers import TEXT, tokenizer_path

        shards, sources = self.tokenizer_shards, self.sources
        paths = {
            name: tokenizer_path(name, recipe, [sources[name]], shards)
            for name, recipe in self.recipes.items()
        }
        written = [sources[name] for name in SEQUENCES if name in sources]
        paths[TEXT] = tokenizer_path(TEXT, self.text_recipe, written, shards)
        try:
            return tokenizer_infos(self.store, paths)
        except FileNotFoundError as error:
            raise ValueError(
                f"the tokenizers are not all trained ({error}); run `fourm train-tokenizers`"
            ) from error

    @cached_property
    def tokens(self) -> dict[str, Stage]:
        """Token stage of each modality that has a tokenizer."""
        from tasks.tokenize import SEQUENCES, token_stage
        from tasks.train_tokenizers import TEXT

        text = self.tokenizers[TEXT]
        chosen = {name: info for name, info in self.tokenizers.items() if name != TEXT}
        chosen |= {name: text for name in SEQUENCES if name in self.sources}
        return {
            name: token_stage(name, info, self.crops, self.sources[name])
            for name, info in chosen.items()
        }


def fetch_config(choices: dict[str, Any]) -> FetchConfig:
    """Download settings out of the choices of the ingest flow."""
    from infra.addresses import AddressPolicy
    from infra.download import DownloadPolicy
    from tasks.fetch import FetchConfig
    from tasks.pictures import PicturePolicy

    names = ("timeout", "attempts", "concurrency", "per_host", "honour_opt_out")
    return FetchConfig(
        pictures=PicturePolicy(
            resize=choices["resize"],
            size=choices["image_size"],
            **{name: choices[name] for name in _FILTERS if name in choices},
        ),
        downloads=DownloadPolicy(
            **{name: choices[name] for name in names},
            addresses=AddressPolicy(frozenset(choices["allow_hosts"])),
        ),
    )


def labelers(choices: dict[str, Any]) -> dict[str, LabelerSpec]:
    """Specifications out of the choices of the label flow."""
    import dataclasses

    from models.labelers import preset

    specs = preset(choices["preset"])
    missing = [name for name in choices["labelers"] if name not in specs]
    if missing:
        raise ValueError(
            f"preset {choices['preset']!r} has no labeler {missing[0]!r}; it has {', '.join(specs)}"
        )
    names = ("batch_size", "precision", "device")
    changes = {name: choices[name] for name in names if choices.get(name) is not None}
    chosen = {name: dataclasses.replace(specs[name], **changes) for name in choices["labelers"]}
    for name, model in choices.get("models", {}).items():
        if name not in chosen:
            raise ValueError(f"models names {name!r}; the labelers are {', '.join(chosen)}")
        model_id, _, revision = (model, "", "") if Path(model).is_dir() else model.partition("@")
        chosen[name] = dataclasses.replace(chosen[name], model_id=model_id, revision=revision)
    for name, own in choices.get("resources", {}).items():
        if name not in chosen:
            raise ValueError(f"resources names {name!r}; the labelers are {', '.join(chosen)}")
        if own["batch_size"]:
            chosen[name] = dataclasses.replace(chosen[name], batch_size=own["batch_size"])
    return chosen


def tokenizer_recipes(choices: dict[str, Any]) -> dict[str, TokenizerRecipe]:
    """Recipes out of the choices of the tokenizer flow."""
    from tasks.tokenizer_recipes import tokenizer_recipe

    common = {"size": choices["size"], "max_samples": choices["max_samples"]}
    if choices["steps"]:
        common["steps"] = choices["steps"]
    unknown = choices["changes"].keys() - set(choices["modalities"])
    if unknown:
        raise ValueError(f"changes names {min(unknown)!r}, which is not among the modalities")
    return {
        name: tokenizer_recipe(name, **{**common, **choices["changes"].get(name, {})})
        for name in choices["modalities"]
    }


def check(flow: str, choices: dict[str, Any]) -> None:
    """Refuse what cannot work, before any work starts.

    Args:
        flow: name of the flow, such as "train_tokenizers".
        choices: its parameters.

    Raises:
        ValueError: An earlier flow is missing, or a name does not exist; says which there are.
    """
    store = Store(choices["root"])
    chain = Chain(store)
    for section in _UPSTREAM.get(flow, ()):
        chain.section(section)
    if flow == "ingest":
        _check_source(choices)
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
    if flow == "train":
        _check_training(store, choices)
    if flow in ("evaluate", "generate"):
        from tasks.generate import only_run, runs

        run = choices["run"] or only_run(store)
        _one_of("trained run", run, runs(store), "train")


def _check_source(choices: dict[str, Any]) -> None:
    """Read the first row of the list: its columns are there, or the error names them."""
    from infra.sources import Source, detect, read_rows

    source = Source(
        path=choices["source"],
        format=choices["format"],
        url=choices["url_column"],
        caption=choices["caption_column"],
        extra=tuple(choices["extra_columns"]),
    )
    try:
        next(read_rows(detect(source), 1), None)
    except FileNotFoundError:
        raise ValueError(f"there is nothing at {source.path}") from None


def _check_labels(chain: Chain, choices: dict[str, Any]) -> None:
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
        if own["accelerator"] and not (choices["gpus"] if own["gpus"] is None else own["gpus"]):
            raise ValueError(f"resources of {name!r}: an accelerator, but no gpus")


def _check_tokenizers(chain: Chain, choices: dict[str, Any]) -> None:
    tokenizer_recipes(choices)
    for name in choices["modalities"]:
        _one_of("labels for", name, list(chain.sources), "label")


def _check_training(store: Store, choices: dict[str, Any]) -> None:
    from infra.manifest import manifest_names
    from tasks.mixture import open_sets
    from tasks.recipes import recipe
    from tasks.train import FourMTask, begins

    if not choices["data"]:
        _one_of("manifest", choices["manifest"], manifest_names(store), "publish")
    names = ("steps", "batch_size", "seed", "start", "freeze", "lora")
    chosen = recipe(choices["recipe"], **{name: choices[name] for name in names})
    sets = open_sets(store, chosen, choices["data"] or choices["manifest"])
    begins(chosen)
    FourMTask(store, sets, chosen)


def _one_of(what: str, name: str, choices: list[str], flow: str) -> None:
    if name not in choices:
        have = f"there are {', '.join(choices)}" if choices else f"`fourm {flow}` makes one"
        raise ValueError(f"no {what} {name!r}; {have}")
