"""Which stages make up a dataset: each recomputed from what the flows were told, never guessed.

Every flow writes its choices into `dataset.json` of the dataset. A later flow, a status or a
second machine rebuilds from it the same stages, hence the same fingerprints, and finds what is
committed under them. Changing a choice changes the fingerprints from there on and nothing else:
what was made under the old ones stays, and counts again when the choice is taken back.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from infra.ledger import Ledger, Stage
from infra.store import Store, StoreConflict, json_bytes

if TYPE_CHECKING:
    from models.crops import CropPolicy
    from models.labelers.base import LabelerSpec
    from tasks.fetch import FetchConfig

FILE = "dataset.json"
_NEEDED = {
    "ingest": "no pictures were ingested into {url}; run `fourm ingest` first",
    "label": "nothing says how the pictures of {url} are labelled; run `fourm label` first",
    "tokenizers": "{url} has no tokenizers; run `fourm train-tokenizers` first",
    "tokenize": "nothing says how {url} is tokenized; run `fourm tokenize` first",
}
_UPSTREAM = {
    "label": ("ingest",),
    "train_tokenizers": ("ingest", "label"),
    "tokenize": ("ingest", "label", "tokenizers"),
    "publish": ("ingest", "label", "tokenizers", "tokenize"),
}


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
    def fetch(self) -> Stage:
        """The stage that writes rgb and the captions of the list."""
        from tasks.fetch import fetch_stage

        return fetch_stage(self.plan, self.fetch_config)

    @cached_property
    def labelers(self) -> dict[str, LabelerSpec]:
        """Specification of each chosen labeler, by name."""
        return labelers(self.section("label"))

    @cached_property
    def labels(self) -> dict[str, Stage]:
        """Label stage of each chosen labeler, by name."""
        from tasks.label import label_stage

        return {name: label_stage(spec, self.fetch) for name, spec in self.labelers.items()}

    @cached_property
    def sources(self) -> dict[str, Stage]:
        """Modality to the stage that writes it; a labeler's caption goes before the list's."""
        made = dict.fromkeys(self.fetch.outputs, self.fetch)
        for stage in self.labels.values():
            made |= dict.fromkeys(stage.outputs, stage)
        return made

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


def fetch_config(choices: dict[str, Any]) -> FetchConfig:
    """Download settings out of the choices of the ingest flow."""
    from infra.addresses import AddressPolicy
    from infra.download import DownloadPolicy
    from tasks.fetch import FetchConfig
    from tasks.pictures import PicturePolicy

    names = ("timeout", "attempts", "concurrency", "per_host", "honour_opt_out")
    return FetchConfig(
        pictures=PicturePolicy(resize=choices["resize"], size=choices["image_size"]),
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
    return {name: dataclasses.replace(specs[name], **changes) for name in choices["labelers"]}


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
    if flow == "label":
        labelers(choices)
    if flow == "train":
        _one_of("manifest", choices["manifest"], _folders(store, "manifests"), "publish")
    if flow in ("evaluate", "generate") and choices["run"]:
        _one_of("run", choices["run"], _folders(store, "runs"), "train")


def _folders(store: Store, prefix: str) -> list[str]:
    return sorted({path.split("/")[1] for path in store.list(f"{prefix}/")})


def _one_of(what: str, name: str, choices: list[str], flow: str) -> None:
    if name not in choices:
        have = f"there are {', '.join(choices)}" if choices else f"`fourm {flow}` makes one"
        raise ValueError(f"no {what} {name!r}; {have}")
