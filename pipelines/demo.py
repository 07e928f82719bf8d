"""The demo: a world of rendered scenes goes through the ordinary chain.

Nothing but the parameters below is special to it. Its links lead to a local server of scenes, on
a port that is chosen once for a dataset: links are part of the plan, and a plan never changes.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infra.scenes import DEMO_SEED
from infra.scenes.server import SceneServer
from infra.store import Store
from pipelines import params
from pipelines.server import prefect_server

logger = logging.getLogger("fourm.demo")

Scale = Literal["tiny", "demo", "long"]
FINISHED = "reports/demo.json"
"""Written at the end of a demo: its parameters."""
FRONT = ("results.json", "report.html")
SIDE = 128
"""Side of the scenes' pictures, pixels."""
LABELERS: list[params.LabelerName] = [
    *params.FIRST_LABELERS, "color_palette", "canny_edge", "metadata", "dinov2",
]  # fmt: skip
"""All labelers of the preset for scenes: with the pictures themselves, 12 modalities."""
DENSE: list[params.DenseName] = [
    *params.ALL_DENSE, "canny_edge", "dinov2", "dinov2_global",
]  # fmt: skip
CHANGES: dict[params.DenseName, dict[str, Any]] = {
    "canny_edge": {"loss": "mse"}, "dinov2_global": {"groups": 16, "levels": (4, 4)},
}  # fmt: skip
"""Squared errors keep lines of which a small network is unsure. Sixteen codes of sixteen hold a
vector of 48 numbers nearly as well as eight of thousands (cosine 0.97, not 0.98), and 4M learns to
predict them within the demo's steps, which it does not for thousands."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What distinguishes the scales of the demo."""

    scenes: int
    shard_rows: int
    tokenizer_shards: int
    recipe: params.RecipeName
    evaluated: int
    tokenizer_steps: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    samples: int = 10
    pictures: int = 64


SIZES: dict[Scale, Size] = {
    "tiny": Size(
        scenes=60, shard_rows=20, tokenizer_steps=8, tokenizer_shards=2, recipe="demo_12", steps=8,
        batch_size=8, evaluated=4, samples=2, pictures=4,
    ),
    "demo": Size(
        scenes=4500, shard_rows=500, tokenizer_shards=8, tokenizer_steps=350, recipe="demo_12",
        evaluated=128,
    ),
    "long": Size(
        scenes=12_000, shard_rows=1000, tokenizer_shards=10, tokenizer_steps=800,
        recipe="demo_12", steps=5200, evaluated=256,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """The list of links of a demo, and the server that they lead to."""

    scenes: int
    port: int
    source: Path

    @classmethod
    def at(cls, root: Path, scenes: int) -> World:
        """The world of a dataset, made on first use.

        Raises:
            ValueError: The dataset has another number of scenes, or is no demo.
        """
        source, record = root / "source" / "scenes.tsv", root / "source" / "world.json"
        if not record.exists():
            if (root / "plan").exists():
                raise ValueError(f"{root} holds a dataset that is no demo; choose another --root")
            source.parent.mkdir(parents=True, exist_ok=True)
            world = cls(scenes, _free_port(), source)
            world.server().write_tsv(source)
            # Last: a list that a killed run left half-written is written anew.
            record.write_text(json.dumps({"scenes": scenes, "port": world.port}))
            return world
        known = json.loads(record.read_text())
        if known["scenes"] != scenes:
            raise ValueError(
                f"{root} holds a demo of {known['scenes']} scenes, not {scenes}; "
                "choose another --root, or delete it"
            )
        return cls(scenes, known["port"], source)

    def server(self) -> SceneServer:
        """The server of the list, not started."""
        return SceneServer(DEMO_SEED, self.scenes, SIDE, port=self.port)


@dataclass(frozen=True)
class Demo:
    """A demo that can be run."""

    world: World
    params: params.EndToEndParams


def demo_params(size: Size, root: str, world: World) -> params.EndToEndParams:
    """The parameters of a demo: what one would write for one's own pictures, at this scale."""
    return params.EndToEndParams(
        root=root,
        ingest=params.IngestOptions(
            source=str(world.source),
            shard_rows=size.shard_rows,
            image_size=SIDE,
            allow_hosts=[f"127.0.0.1:{world.port}"],
            per_host=16,
        ),
        label=params.LabelOptions(preset="scenes", labelers=LABELERS),
        tokenizers=params.TokenizerOptions(
            modalities=DENSE,
            changes=CHANGES,
            size=SIDE,
            steps=size.tokenizer_steps,
            max_shards=size.tokenizer_shards,
            coordinate_bins=64,
            text_vocab=1000,
        ),
        publish=params.PublishOptions(val_share=0.1),
        train=params.TrainOptions(
            recipe=size.recipe, steps=size.steps, batch_size=size.batch_size
        ),
        evaluate=params.EvaluateOptions(
            scenes=size.evaluated, samples=size.samples, pictures=size.pictures
        ),
    )


def prepare(scale: Scale, root: str) -> Demo:
    """The world of a demo, made on first use, and its parameters.

    Args:
        scale: a key of `SIZES`.
        root: local folder of the dataset.

    Raises:
        ValueError: The root is not local, or holds another demo.
    """
    if "://" in root:
        raise ValueError(f"the demo needs a local folder, not {root!r}")
    size = SIZES[scale]
    world = World.at(Path(root).absolute(), size.scenes)
    return Demo(world, demo_params(size, root, world))


def run_demo(demo: Demo, *, keep_ui: bool = False) -> Iterator[str]:
    """Run the chain; what an earlier run has done is not done again.

    Args:
        demo: what `prepare` returned.
        keep_ui: wait at the end, the UI up, until interrupted.

    Yields:
        Lines for the terminal.
    """
    root = demo.params.root
    if not keep_ui and is_finished(demo.params):
        yield "Everything is done: 0 shards, 0 steps, 0 evaluations to do."
        yield from _where(root)
        return
    with prefect_server(Path(root).absolute().parent / "prefect") as url:
        yield f"Watch it at {url}"
        logging.getLogger("fourm").setLevel(logging.INFO)
        # After the server: Prefect reads its settings when it is imported.
        from pipelines.end_to_end import end_to_end_flow

        with _scenes(demo):
            results = end_to_end_flow(demo.params)
        _put_in_front(Store(root), results["run"])
        Store(root).write_json(FINISHED, finished_as(demo.params))
        yield from _where(root)
        if keep_ui:
            yield f"The UI stays at {url} until Ctrl-C."
            threading.Event().wait()


def is_finished(chosen: params.EndToEndParams) -> bool:
    """Whether a run with these parameters came to its end, and what it made is still what the
    code and the shipped networks of today would make."""
    from tasks.publish import is_current

    store = Store(chosen.root)
    if not store.exists(FINISHED):
        return False
    record, now = store.read_json(FINISHED), finished_as(chosen)
    # Read through the form: options that it did not have yet are at their defaults.
    try:
        before = params.EndToEndParams(**record["params"]).model_dump(mode="json")
    except ValueError:
        return False
    if {**record, "params": before} != now:
        return False
    return is_current(store, chosen.publish.name)


def finished_as(chosen: params.EndToEndParams) -> dict[str, Any]:
    """What a finished run writes about itself: its parameters, and what its recipe was."""
    from tasks.recipes import described, recipe

    train = chosen.train
    used = recipe(train.recipe, steps=train.steps, batch_size=train.batch_size, seed=train.seed)
    return {"params": chosen.model_dump(mode="json"), "recipe": described(used)}


def _put_in_front(store: Store, run: str) -> None:
    """Copy what people look for first to the top of the dataset."""
    for name in FRONT:
        store.write(name, store.read(f"reports/{run}/{name}"))


def _where(root: str) -> Iterator[str]:
    yield f"Results:   {root}/{FRONT[0]}"
    yield f"Pictures:  {root}/{FRONT[1]}"
    yield f"Try it:    fourm generate --root {root} --from rgb=photo.jpg --to depth,caption"


def _scenes(demo: Demo) -> AbstractContextManager[Any]:
    """The server of scenes, while there is anything to fetch from it."""
    from tasks.chain import Chain, remember

    store = Store(demo.params.root)
    if store.exists("plan/plan.json"):
        remember(store, "ingest", demo.params.ingest.model_dump())
        chain = Chain(store)
        if not chain.ledger.todo(chain.fetch, chain.shards):
            return nullcontext()
    return demo.world.server()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
