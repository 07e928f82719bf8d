"""Flow: measure a trained model, and show it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefect import flow

from infra import ui
from infra.manifest import load_manifest
from infra.store import Store
from pipelines.params import EvaluateParams
from pipelines.stages import seconds_spent, stage_task
from tasks import chain
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.generate import MODEL, only_run
from tasks.report import write_report


@stage_task("evaluate")
def measure(params: EvaluateParams) -> dict[str, Any]:
    """Every task against the truth; a model that was measured like this before, against the same
    labels, is not again."""
    store = Store(params.root)
    config = _config(store, params)
    run = params.run or only_run(store)
    record = f"reports/{run}/measured.json"
    weights = store.version(f"runs/{run}/{MODEL}/model.safetensors")
    manifest = load_manifest(store, config.manifest)
    labels = {name: stage.id for name, stage in chain.Chain(store).labels.items()}
    measured = {"config": asdict(config), "weights": weights, "manifest": manifest.version,
                "labels": labels}  # fmt: skip
    results = f"reports/{run}/results.json"
    if store.exists(record) and store.read_json(record) == measured and store.exists(results):
        return store.read_json(results)
    found = evaluate(store, run, config, ui.progress("evaluate").update)
    before = {name: value for name, value in seconds_spent(store).items() if name != "evaluate"}
    report = write_report(
        store,
        run,
        found,
        samples=sum(manifest.samples(shard) for shard in manifest.shards("train")),
        seconds=before,
    )
    store.write_json(record, measured)
    return report


def _config(store: Store, params: EvaluateParams) -> EvaluateConfig:
    truth = params.truth
    if truth == "auto":
        preset = chain.Chain(store).section("label")["preset"]
        truth = "scenes" if preset == "scenes" else "labels"
    return EvaluateConfig(
        scenes=params.scenes,
        samples=params.samples,
        pictures=params.pictures,
        truth=truth,
        manifest=params.manifest,
    )


@flow(
    name="evaluate",
    flow_run_name="{params.dataset}",
    description=EvaluateParams.__doc__,
)
def evaluate_flow(params: EvaluateParams) -> dict[str, Any]:
    """Measure a model against the truth; writes results.json, report.html and pictures."""
    return measure(params)
