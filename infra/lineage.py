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


def behind(ledger: Ledger, manifest: Manifest) -> dict[str, Commit | None]:
    """Stage id -> a commit of it, for every stage behind a manifest; None where it is gone.

    One shard speaks for all: shards of a stage share its fingerprint, and that its upstream.
    """
    shard = manifest.shards()[0]
    found: dict[str, Commit | None] = {}
    waiting = {about["stage"] for about in manifest.modalities.values()}
    while waiting:
        stage = waiting.pop()
        try:
            found[stage] = ledger.read_commit(stage, shard)
        except FileNotFoundError:
            found[stage] = None
        waiting |= _upstream(found[stage]) - found.keys()
    return found


def mermaid(ledger: Ledger, manifest: Manifest, source: str = "") -> str:
    """A mermaid flowchart of a manifest: its source list, stages with networks, and itself.

    Args:
        source: name of the list that the first stages read.
    """
    commits = behind(ledger, manifest)
    stages = sorted(commits)[:MAX_NODES]
    names = {stage: f"s{number}" for number, stage in enumerate(stages)}
    lines = ["flowchart LR"]
    if source:
        lines.append(f'  source[("{_text(source)}")]')
    lines += [f'  {names[stage]}["{_label(stage, commits[stage])}"]' for stage in stages]
    title = f"{manifest.name} v{manifest.version}"
    lines.append(f'  manifest(["{_text(title)}"])')
    for stage in stages:
        before = _upstream(commits[stage])
        lines += [f"  {names[other]} --> {names[stage]}" for other in sorted(before & names.keys())]
        if source and not before:
            lines.append(f"  source --> {names[stage]}")
    published = {about["stage"] for about in manifest.modalities.values()}
    lines += [f"  {names[stage]} --> manifest" for stage in sorted(published & names.keys())]
    return "\n".join(lines)


def _upstream(commit: Commit | None) -> set[str]:
    return {name.rpartition("/")[0] for name in commit.upstream} if commit else set()


def _label(stage: str, commit: Commit | None) -> str:
    """A stage and its network, without the folder that the network lies in."""
    model = commit.model.rstrip("/").rpartition("/")[2] if commit else ""
    return _text(stage) + (f"<br/>{_text(model)}" if model else "")


def _text(text: str) -> str:
    """Text that cannot end a mermaid label nor be taken for markup."""
    return re.sub(r"[^\w .:@/+,-]", "_", text)[:80]
