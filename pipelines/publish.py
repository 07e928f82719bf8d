"""Flow: a version of the dataset comes to be."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra import ui
from infra.ledger import Ledger
from infra.lineage import mermaid
from infra.manifest import Manifest
from infra.store import Store
from pipelines.params import PublishOptions, PublishParams
from pipelines.stages import hand_on, stage_task
from tasks import chain
from tasks.checks import check
from tasks.publish import publish_tokens


@stage_task("publish")
def publish_manifest(params: PublishParams) -> dict[str, Any]:
    """Prove that all modalities of all shards align, then write the manifest."""
    store = Store(params.root)
    manifest = publish_tokens(store, params.name, val_share=params.val_share)
    source = str(Ledger(store).read_plan().get("source", "list of links"))
    picture = mermaid(Ledger(store), manifest, source.rpartition("/")[2])
    ui.markdown(f"manifest-{params.name}", f"{_lineage(manifest)}\n\n```mermaid\n{picture}\n```\n")
    return {
        "manifest": f"{manifest.name} v{manifest.version}",
        "modalities": sorted(manifest.modalities),
        "samples": {
            split: sum(manifest.samples(shard) for shard in manifest.shards(split))
            for split in manifest.splits
        },
    }


def _lineage(manifest: Manifest) -> str:
    """Splits, and the stage behind every modality, as a page."""
    lines = [f"## {manifest.name} v{manifest.version}", "", "| split | shards | samples |"]
    lines.append("|---|---|---|")
    for split in manifest.splits:
        shards = manifest.shards(split)
        samples = sum(manifest.samples(shard) for shard in shards)
        lines.append(f"| {split} | {len(shards)} | {samples:,} |")
    lines += ["", "| modality | stage | model | revision |", "|---|---|---|---|"]
    for name, entry in manifest.modalities.items():
        lines.append(
            f"| {ui.plain(name)} | `{entry['stage']}` "
            f"| {ui.plain(entry['model']) or '-'} "
            f"| {ui.plain(entry['revision'][:12]) or '-'} |"
        )
    return "\n".join(lines)


@flow(
    name="publish",
    flow_run_name="{params.dataset}",
    description=PublishParams.__doc__,
)
def publish_flow(params: PublishParams) -> dict[str, Any]:
    """Prove that all modalities align, and publish a version of the token set."""
    check("publish", params.model_dump())
    choices = params.model_dump(include=set(PublishOptions.model_fields))
    chain.remember(Store(params.root), "publish", choices)
    published = publish_manifest(params)
    hand_on(Store(params.root), "publish", published["manifest"].replace(" ", "-"))
    return published
