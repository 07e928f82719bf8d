"""A run that shows all that our runs show, and a deployment: python shown_flow.py <store url>."""

from __future__ import annotations

import sys

from prefect import flow

from infra import ui
from infra.ledger import Ledger
from infra.lineage import mermaid
from infra.manifest import publish
from infra.scenes import render, sample_scene
from infra.store import Store
from models import modalities
from pipelines.label import label_flow
from pipelines.params import LabelParams
from pipelines.stages import run_jobs
from tests.infra.test_runner import toy_job


@flow(name="shown")
def shown(url: str) -> None:
    """A stage with one shard that fails, a gallery, and a lineage."""
    store, job = Store(url), toy_job(3, fail=[1])
    Ledger(store).write_plan({"num_shards": 3})
    run_jobs(store, [job], LabelParams(root=url, workers=0), "label")
    pictures = [
        (name, modalities.get(name).render(getattr(truth, name)))
        for truth in (render(sample_scene(seed), 128) for seed in range(3))
        for name in ("rgb", "depth", "normal")
    ]
    ui.gallery("gallery", pictures, "Labels beside pictures", columns=3)
    manifest = publish(Ledger(store), "main", {"toy": job.stage}, [0, 2])
    ui.markdown("lineage", f"```mermaid\n{mermaid(Ledger(store), manifest, 'list.tsv')}\n```\n")


if __name__ == "__main__":
    shown(sys.argv[1])
    label_flow.to_deployment("all", parameters={"params": {"root": sys.argv[1]}}).apply()
