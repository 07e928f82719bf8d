"""Where a version of a dataset comes from, as a picture that Prefect's UI draws from Markdown.

    source list --> fetch --> label:depth --> tokens:depth --> main v3

Stages are followed upstream through the commits: each names the shards that it was made from.
"""

from __future__ import annotations

import re

from infra.ledger import Ledger
from infra.manifest import Manifest
from infra.stages import Commit

MAX_NODES = 80
"""Stages that are drawn at most; a picture of more cannot be read."""


def upstream(ledger: Ledger, manifest: Manifest) -> dict[str, set[str]]:
    """Stage id -> ids of the stages it was made from, for every stage behind a manifest.

    One shard speaks for all: shards of a stage share its fingerprint, and that its upstream.

    Raises:
        FileNotFoundError: a stage of the manifest has not committed the manifest's first shard.
    """
    shard = manifest.shards()[0]
    found: dict[str, set[str]] = {}
    waiting = {about["stage"] for about in manifest.modalities.values()}
    while waiting:
        stage = waiting.pop()
        commit = ledger.read_commit(stage, shard)
        found[stage] = {name.rpartition("/")[0] for name in commit.upstream}
        waiting |= found[stage] - found.keys()
    return found


def mermaid(ledger: Ledger, manifest: Manifest, source: str = "") -> str:
    """A mermaid flowchart of a manifest: its source list, stages with networks, and itself.

    Args:
        source: name of the list that the first stages read.
    """
    edges = upstream(ledger, manifest)
    stages = sorted(edges)[:MAX_NODES]
    names = {stage: f"s{number}" for number, stage in enumerate(stages)}
    shard = manifest.shards()[0]
    lines = ["flowchart LR"]
    if source:
        lines.append(f'  source[("{_text(source)}")]')
    for stage in stages:
        lines.append(f'  {names[stage]}["{_label(ledger.read_commit(stage, shard))}"]')
    title = f"{manifest.name} v{manifest.version}"
    lines.append(f'  manifest(["{_text(title)}"])')
    for stage in stages:
        for before in sorted(edges[stage] & names.keys()):
            lines.append(f"  {names[before]} --> {names[stage]}")
        if source and not edges[stage]:
            lines.append(f"  source --> {names[stage]}")
    for stage in sorted({about["stage"] for about in manifest.modalities.values()} & names.keys()):
        lines.append(f"  {names[stage]} --> manifest")
    return "\n".join(lines)


def _label(commit: Commit) -> str:
    """A stage and its network, without the folder that the network lies in."""
    model = commit.model.rstrip("/").rpartition("/")[2]
    return _text(commit.stage) + (f"<br/>{_text(model)}" if model else "")


def _text(text: str) -> str:
    """Text that cannot end a mermaid label nor be taken for markup."""
    return re.sub(r"[^\w .:@/+,-]", "_", text)[:80]
