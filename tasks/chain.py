"""Which stages make up a dataset: each recomputed from what the flows were told, never guessed.

Every flow writes its choices into `dataset.json` of the dataset. A later flow, a status or a
second machine rebuilds from it the same stages, hence the same fingerprints, and finds what is
committed under them. Changing a choice changes the fingerprints from there on and nothing else:
what was made under the old ones stays, and counts again when the choice is taken back.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from infra.ledger import Ledger, Stage
from infra.machine import commit_hash
from infra.store import Store, StoreConflict, json_bytes
from tasks.choices import fetch_config, labelers, tokenizer_recipes

if TYPE_CHECKING:
    from models.crops import CropPolicy
    from models.labelers.base import LabelerSpec
    from tasks.fetch import FetchConfig
    from tasks.tokenizer_config import TextRecipe, TokenizerRecipe
    from tasks.train_tokenizers import TokenizerInfo
    from tokenizers_vq.sequences.form import TextForm

logger = logging.getLogger("fourm.chain")

FILE = "dataset.json"
_FREE = frozenset({
    "source", "format", "url_column", "caption_column", "extra_columns", "limit", "allow_hosts",
    "timeout", "attempts", "concurrency", "per_host", "batch_size", "device", "resources", "share",
    "name", "val_share", "shards",
})  # fmt: skip
"""Choices that change nothing of what is made already."""
_NEEDED = {
    "ingest": "no pictures were ingested into {url}; run `fourm ingest` first",
    "label": "nothing says how the pictures of {url} are labelled; run `fourm label` first",
    "tokenizers": "{url} has no tokenizers; run `fourm train-tokenizers` first",
    "tokenize": "nothing says how {url} is tokenized; run `fourm tokenize` first",
}


def remember(store: Store, section: str, choices: dict[str, Any]) -> None:
    """Write the choices of one flow into the dataset, those of other flows kept."""
    _remember(store, section, lambda known: choices)


def _remember(
    store: Store, section: str, chosen: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Write what `chosen` makes of the choices that stand, anew where these change meanwhile."""
    while True:
        version = store.version(FILE)
        settings = store.read_json(FILE) if version else {}
        choices = chosen(settings.get(section, {}))
        if settings.get(section) == choices:
            return
        _tell(section, settings.get(section, {}), choices)
        try:
            store.replace(FILE, json_bytes({**settings, section: choices}), version)
        except StoreConflict:  # another flow wrote at the same time
            continue
        return


def _tell(section: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what a flow is told otherwise than the one before: often by an option that was left
    out, and then all that depends on it is made anew."""
    told = before.keys() & now.keys() - _FREE
    changed = [name for name in before if name in told and before[name] != now[name]]
    if changed:
        said = ", ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed)
        logger.warning("%s of this dataset is chosen otherwise than before: %s. What that changes "
                       "is made anew beside what there is, which counts again once the choice is "
                       "taken back.", section, said)  # fmt: skip


def remember_tokenizers(store: Store, choices: dict[str, Any]) -> None:
    """Like :func:`remember`, with the shards to learn from: those of the first time stay, so that
    shards which are labelled later do not ask for other tokenizers.

    Raises:
        ValueError: No shard is labelled in every modality.
    """
    from tasks.tokenizer_recipes import COMMON

    usual = COMMON[choices["preset"]]
    choices = {**choices, **{name: choices[name] or usual[name] for name in usual}}
    labelled = Chain(store).learnable()

    def chosen(known: dict[str, Any]) -> dict[str, Any]:
        rest, shards = dict(known), known.get("shards", [])
        rest.pop("shards", None)
        # What an older version did not ask for was as it is by default.
        same = {**choices, **rest} == choices
        if not (shards and same and set(shards) <= set(labelled)):
            shards = labelled[: choices["max_shards"]]
        return {**choices, "shards": shards}

    _remember(store, "tokenizers", chosen)


def made_otherwise(ledger: Ledger, stage: Stage) -> str:
    """What there is of a stage under other fingerprints, as a sentence; "" where there is nothing.

    An option that was left out and another version of the software look the same to who runs it:
    as if nothing had been done.
    """
    others = {each: ledger.committed(each) for each in ledger.stage_ids()
              if each.rpartition("@")[0] == stage.name and each != stage.id}  # fmt: skip
    if not others:
        return ""
    made = ", ".join(f"{len(shards)} of {each} (made by {_maker(ledger, each, min(shards))})"
                     for each, shards in others.items())  # fmt: skip
    return (f"there are shards {made}, which other options or another version of the software made "
            f"and which do not count as {stage.id} of {commit_hash()}; take that version or those "
            "options to go on with them, or make them anew beside those")


def _maker(ledger: Ledger, stage_id: str, shard: int) -> str:
    return ledger.read_commit(stage_id, shard).code_version


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

    def check(self, name: str, choices: dict[str, Any]) -> None:
        """Raises ValueError where the choices of one flow are not these any more."""
        if self.section(name) != choices:
            raise ValueError(f"another run has chosen otherwise for {self.store.url} meanwhile "
                             f"({name!r} of {FILE}); run this one again once that one has ended")

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
        from tasks.tokenizer_config import TextRecipe

        choices = self.section("tokenizers")
        words = {word for form in self.text_forms.values() for word in form.words}
        return TextRecipe(
            bins=choices["coordinate_bins"], vocab_size=choices["text_vocab"],
            words=tuple(sorted(words)),
        )  # fmt: skip

    @property
    def text_forms(self) -> dict[str, TextForm]:
        """Modalities that are told as text, with their form: all that there are, less those whose
        codes no tokenizer is trained for."""
        from models.modalities import text_form

        # Another dataset's tokenizer knows the words of what is told there.
        told = self.section("tokenizers").get("texts", self.sources)
        forms = {name: form for name in self.sources
                 if name in told and (form := text_form(name)) is not None}  # fmt: skip
        return {name: form for name, form in forms.items()
                if form.parts is None or name in self.recipes}  # fmt: skip

    @property
    def embedded(self) -> dict[str, Stage]:
        """Labels that a model reads as they are, vectors of a text, with the stage of each."""
        from models.modalities import is_embedded

        return {name: stage for name, stage in self.sources.items() if is_embedded(name)}

    @property
    def tokenizer_shards(self) -> list[int]:
        """Shards that the tokenizers learn from."""
        return self.section("tokenizers")["shards"]

    def labelled(self, *, stored: bool = False) -> list[int]:
        """Shards that have all labels; those of one pass count as soon as there are pictures,
        unless they must be `stored`."""
        stages = {self.fetch, *self.sources.values()}
        if not stored:
            stages -= self.one_pass.keys()
        return sorted(set.intersection(*(self.ledger.committed(stage) for stage in stages)))

    def learnable(self) -> list[int]:
        """Shards that tokenizers can learn from: all of their labels are stored.

        Raises:
            ValueError: There is none.
        """
        if found := self.labelled(stored=True):
            return found
        stages = dict.fromkeys([self.fetch, *self.sources.values()])
        lacking = [stage for stage in stages if not self.ledger.committed(stage)]
        why = made_otherwise(self.ledger, lacking[0]) if lacking else ""
        raise ValueError(f"no shard of {self.store.url} has all of its labels; "
                         f"{why or 'run `fourm label` first'}")

    @cached_property
    def one_pass(self) -> dict[Stage, LabelerSpec]:
        """Label stages that store their first shards alone, and their labelers."""
        chosen = self.settings.get("label", {}).get("one_pass", [])
        return {self.labels[name]: self.labelers[name] for name in chosen}

    @cached_property
    def in_passing(self) -> dict[Stage, LabelerSpec]:
        """Label stages that tokenizing runs itself where they stored nothing: those of one pass,
        and those of finer feature maps, which are never stored."""
        return self.one_pass | dict(self._finer_features.values())

    def label_shards(self, stage: Stage, shards: Sequence[int]) -> list[int]:
        """Which of the shards with pictures a label stage works on."""
        if stage not in self.one_pass:
            return list(shards)
        return sorted(shards)[: self.section("label")["one_pass_shards"]]

    @property
    def sizes(self) -> list[int]:
        """Sides of the crops in pixels, ascending, a token set each. The first is the size of the
        dataset itself: that of texts, and of names without a size."""
        chosen = self.section("tokenize").get("sizes")
        return sorted(set(chosen or [self.section("tokenizers")["size"]]))

    @cached_property
    def crops(self) -> CropPolicy:
        """The crops of the token set."""
        from models.crops import CropPolicy

        choices = self.section("tokenize")
        return CropPolicy(
            num_crops=choices["crops"],
            min_scale=choices["min_scale"],
            hflip=choices["hflip"],
            size=self.sizes[0],
        )

    @cached_property
    def tokenizers(self) -> dict[str, TokenizerInfo]:
        """Record of each tokenizer, trained here or taken, by modality and "text".

        Raises:
            ValueError: One is not trained yet.
        """
        from tasks.tokenize import tokenizer_infos
        from tasks.train_tokenizers import TEXT, text_path, tokenizer_path

        shards, sources = self.tokenizer_shards, self.sources
        paths = self.section("tokenizers").get("taken") or {
            **{name: tokenizer_path(name, recipe, [sources[name]], shards)
               for name, recipe in self.recipes.items()},
            TEXT: text_path(sources, self.text_recipe, shards),
        }  # fmt: skip
        try:
            return tokenizer_infos(self.store, paths)
        except FileNotFoundError as error:
            raise ValueError(
                f"the tokenizers are not all trained ({error}); run `fourm train-tokenizers`"
            ) from error

    @cached_property
    def tokens(self) -> dict[str, Stage]:
        """Token stage of each modality that has a tokenizer, or of those that were chosen; of finer
        sets by names such as rgb@448."""
        from tasks.tokenize import token_stage
        from tasks.train_tokenizers import TEXT

        learned = {name: info for name, info in self.tokenizers.items() if name != TEXT}
        known = learned | dict.fromkeys(self.text_forms, self.tokenizers[TEXT])
        wanted = self.section("tokenize").get("modalities") or list(known)
        if missing := [name for name in wanted if name not in known]:
            raise ValueError(f"{missing[0]!r} has no tokenizer; there are {', '.join(known)}")
        chosen = {name: info for name, info in known.items() if name in wanted}
        stages = {
            name: token_stage(
                name, info, self.crops, self.sources[name],
                codes=learned.get(name) if name in self.text_forms else None,
                kept=self.kept.get(name, 0),
            )
            for name, info in chosen.items()
        }  # fmt: skip
        for size in self.sizes[1:]:
            for name, info in chosen.items():
                source = self._source_at(name, size)
                if source is not None:
                    stages[f"{name}@{size}"] = token_stage(
                        name, info, self.crops, source, size=size
                    )
        return stages

    def _source_at(self, name: str, size: int) -> Stage | None:
        """The stage whose values have more tokens at a larger size, if any has: maps are cut finer
        out of the same labels, features are seen in a larger picture."""
        if name not in self.recipes or self.tokenizers[name].ordered:
            return None
        finer = self._finer_features.get((name, size))
        if finer is not None:
            return finer[0]
        return self.sources[name] if self.tokenizers[name].patch else None

    @cached_property
    def _finer_features(self) -> dict[tuple[str, int], tuple[Stage, LabelerSpec]]:
        """(Modality, size) of the feature maps of finer sets to who writes them."""
        from models.labelers.features import finer
        from tasks.label import label_stage

        if "tokenize" not in self.settings:
            return {}
        found = {}
        for name, size in itertools.product(self.recipes, self.sizes[1:]):
            for spec in self.labelers.values():
                larger = finer(spec, name, size / self.sizes[0])
                if larger is not None:
                    found[name, size] = label_stage(larger, self.fetch), larger
        return found

    @property
    def kept(self) -> dict[str, int]:
        """Tokens that are stored of modalities with ordered ones, where not all are."""
        return self.section("tokenize").get("tokens", {})
