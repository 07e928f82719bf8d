"""The picture of a manifest holds every stage behind it, and nothing that a name smuggles in."""

from infra.ledger import Ledger, Stage
from infra.lineage import behind, mermaid
from infra.manifest import publish
from infra.runner import StageJob
from infra.store import Store
from tests.infra.test_runner import run, toy_job


def published(store: Store, model: str = "org/depth"):
    fetch = toy_job(2, "fetch")
    label = Stage("label:toy", 1, {}, ("toy",), upstream=(fetch.stage,), model=model)
    tokens = Stage("tokens:toy", 1, {}, ("toy",), upstream=(label,))
    jobs = [StageJob(stage, fetch.factory, {}, fetch.shards) for stage in (label, tokens)]
    run(store, fetch, *jobs)
    return fetch.stage, label, tokens


def manifest_of(store: Store, stage: Stage):
    return publish(Ledger(store), "main", {"toy": stage}, [0, 1])


def test_every_stage_behind_a_manifest_is_followed_upstream(tmp_path):
    store = Store(str(tmp_path))
    fetch, label, tokens = published(store)
    manifest = manifest_of(store, tokens)
    assert behind(Ledger(store), manifest).keys() == {tokens.id, label.id, fetch.id}
    store.delete(f"commits/{label.id}/shard-000000.json")
    found = behind(Ledger(store), manifest)
    assert found.keys() == {tokens.id, label.id}, "what is gone is drawn, and nothing behind it"
    assert label.id in mermaid(Ledger(store), manifest)


def test_the_picture_leads_from_the_list_to_the_version(tmp_path):
    store = Store(str(tmp_path))
    fetch, label, tokens = published(store)
    lines = mermaid(Ledger(store), manifest_of(store, tokens), "cc12m.tsv").splitlines()
    assert lines[0] == "flowchart LR"
    names = {stage: f"s{at}" for at, stage in enumerate(sorted([fetch.id, label.id, tokens.id]))}
    assert f'  {names[label.id]}["{label.id}<br/>depth"]' in lines
    assert '  manifest(["main v1"])' in lines
    assert lines[-4:] == [
        f"  source --> {names[fetch.id]}",
        f"  {names[fetch.id]} --> {names[label.id]}",
        f"  {names[label.id]} --> {names[tokens.id]}",
        f"  {names[tokens.id]} --> manifest",
    ]


def test_a_name_cannot_end_its_label(tmp_path):
    store = Store(str(tmp_path))
    *_, tokens = published(store, model='x"]; click s0 "javascript:alert(1)<b>')
    text = mermaid(Ledger(store), manifest_of(store, tokens), 'a"]\n  evil')
    assert "evil" not in [line.strip() for line in text.splitlines()]
    for line in text.splitlines():
        assert line.count('"') in (0, 2)
        assert "<b>" not in line
