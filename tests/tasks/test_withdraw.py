"""Contracts of what must go: nothing of it is left, all else stays, and nothing is made again."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from infra import manifest as manifest_module
from infra.ledger import Ledger, commit_path
from infra.manifest import load_manifest, versions
from infra.shards import read_tar, sample_key, write_tar
from infra.sources import Source
from infra.store import Store
from infra.tables import read_table
from infra.verify import verify
from pipelines.cli import app
from pipelines.params import LabelOptions, WithdrawParams
from pipelines.withdraw import run
from tasks import publish
from tasks.chain import Chain, remember
from tasks.fetch import FetchWork, fetch_stage
from tasks.growth import append_list
from tasks.plans import Plan, make_plan, plan_retry
from tasks.publish import is_current, publish_tokens
from tasks.withdraw import come_back, withdraw
from tests.tasks.test_fetch_sources import CONFIG, Web, run_all
from tests.tasks.test_token_choices import ROWS, SHARDS, SMALL, _ingested, _picture, _tokenize

URL = "http://third.org/3"


def _everything(store: Store) -> bytes:
    """All that a dataset holds, tables as text."""
    return b"\n".join(
        str(read_table(data).to_pylist()).encode() if path.endswith(".parquet") else data
        for path in store.list("")
        for data in [store.read(path)]
    )


@pytest.fixture
def fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Store:
    """Six rows in three shards; URL stands at two places, a copy of its picture under another."""
    on_s3 = getattr(request, "param", "file") == "s3"
    bucket = request.getfixturevalue("s3_url") if on_s3 else ""
    web = Web(monkeypatch)
    web.fates = {"http://host.org/4": "timeout"}
    store = Store(f"{bucket}/{tmp_path.name}" if bucket else str(tmp_path / "data"))
    source = tmp_path / "list.tsv"
    urls = ["http://host.org/1", "http://host.org/2", URL, "http://host.org/4", URL]
    rows = [f"{url}\tword{url[-1]}" for url in urls] + ["http://copy.org/3\tother"]
    source.write_text("".join(f"{row}\n" for row in rows))
    make_plan(store, str(source), shard_rows=2)
    run_all(store)
    plan_retry(store, fetch_stage(Plan(store).about, CONFIG))
    web.fates = {}
    run_all(store)
    return store


@pytest.mark.parametrize("fetched", ["file", "s3"], indirect=True)
def test_nothing_is_left_of_a_picture_its_text_and_its_url(fetched, tmp_path):
    before = _everything(fetched)
    assert URL in Plan(fetched).about["passes"][0]["witnesses"]
    assert b"word3" in before
    stage = fetch_stage(Plan(fetched).about, CONFIG)
    picture = dict(read_tar(*_tar(fetched, stage, 1)))["00000100000.jpg"]
    assert picture in before
    done = withdraw(fetched, ["00000100000", "http://nowhere.org"], apply=True)
    assert done.keys == [sample_key(1, 0), sample_key(2, 0)]
    assert done.unknown == ["http://nowhere.org"]
    after = _everything(fetched)
    assert URL.encode() not in after
    assert b"word3" not in after
    assert _everything(fetched).count(picture) == 1  # the copy
    assert b"word1" in after
    assert b"word4" in after
    assert verify(fetched, deep=True).problems == []
    assert verify(fetched).orphans == []
    assert run_all(fetched).commits(stage)[1].drops == {"timeout": 1, "withdrawn": 1}
    # Neither another size of picture nor a longer list brings it back.
    assert [row["problem"] for row in Plan(fetched).rows(1)] == ["withdrawn", None]
    longer = tmp_path / "longer.tsv"
    longer.write_text(f"{URL}\tword3\nhttp://host.org/9\tword9\n")
    assert append_list(fetched, Source(path=str(longer))) == 1


def _tar(store: Store, stage, shard: int) -> tuple[bytes]:
    return (store.read(Ledger(store).read_commit(stage, shard).outputs["rgb"]["path"]),)


def test_labels_tokens_and_manifests_lose_it_and_nothing_is_made_again(tmp_path):
    store = _ingested(tmp_path)
    remember(store, "label", LabelOptions(preset="scenes", labelers=[]).model_dump())
    _tokenize(store, {"modalities": ["rgb"], "changes": {"rgb": SMALL}})
    first = publish_tokens(store, "main", val_share=0.3)
    gone = sample_key(1, 2)
    assert withdraw(store, [gone], apply=False).keys == [gone]
    assert versions(store, "main") == [1]
    assert _picture(12) in _everything(store)
    done = withdraw(store, [gone], apply=True)
    assert done.manifests == ["main v1"]
    manifest = load_manifest(store, "main")
    assert manifest.splits == first.splits
    assert manifest.modalities == first.modalities
    assert [manifest.samples(shard) for shard in range(SHARDS)] == [ROWS, ROWS - 1, ROWS]
    content = _everything(store)
    assert _picture(12) not in content
    assert f"a square number {gone}".encode() not in content
    assert _picture(11) in content
    assert verify(store, deep=True).problems == []
    chain = Chain(store)
    for stage in chain.tokens.values():
        assert chain.ledger.todo(stage, range(SHARDS)) == []
    assert is_current(store, "main")
    assert publish_tokens(store, "main", val_share=0.3).version == 1
    assert withdraw(store, [gone], apply=True).commits == 0
    assert versions(store, "main") == [1]


@pytest.fixture
def tokenized(tmp_path: Path) -> Store:
    """Three shards with tokens of the pictures."""
    store = _ingested(tmp_path)
    remember(store, "label", LabelOptions(preset="scenes", labelers=[]).model_dump())
    _tokenize(store, {"modalities": ["rgb"], "changes": {"rgb": SMALL}})
    return store


def test_what_a_run_at_work_writes_all_the_same_is_found_refused_and_taken_out(tokenized):
    gone, chain = sample_key(1, 2), Chain(tokenized)
    stage = chain.tokens["rgb"]
    record = tokenized.read(path := commit_path(stage.id, 1))
    commit = chain.ledger.read_commit(stage, 1)
    late = {made["path"]: tokenized.read(made["path"])
            for made in (*commit.outputs.values(), commit.status)}  # fmt: skip
    tokenized.delete(path)  # its worker is still at it
    withdraw(tokenized, [gone], apply=True)
    assert come_back(tokenized) == []
    for name, data in {**late, path: record}.items():
        tokenized.write(name, data)
    assert come_back(tokenized) == [gone]
    with pytest.raises(ValueError, match=f"such as {gone}.* `fourm withdraw --apply` once more"):
        publish_tokens(tokenized, "main", val_share=0.3)
    shown = CliRunner().invoke(app, ["verify", "--root", tokenized.url])
    assert (shown.exit_code, gone in shown.output) == (1, True)
    withdraw(tokenized, [gone], apply=True)
    assert publish_tokens(tokenized, "main", val_share=0.3).version == 1
    assert verify(tokenized, deep=True).problems == verify(tokenized).orphans == []


def test_samples_that_are_withdrawn_while_a_version_is_published_are_not_left_in_it(
    tokenized, monkeypatch
):
    gone, make = sample_key(1, 2), publish.publish

    def meanwhile(*given: Any, **named: Any) -> Any:
        write = manifest_module._write_version

        def late(*content: Any) -> Any:
            withdraw(tokenized, [gone], apply=True)
            return write(*content)

        with monkeypatch.context() as during:
            during.setattr(manifest_module, "_write_version", late)
            return make(*given, **named)

    with monkeypatch.context() as during:
        during.setattr(publish, "publish", meanwhile)
        with pytest.raises(ValueError, match="`fourm withdraw --apply` once more, then publish"):
            publish_tokens(tokenized, "other", val_share=0.3)
    withdraw(tokenized, [gone], apply=True)
    publish_tokens(tokenized, "other", val_share=0.3)
    assert verify(tokenized, deep=True).problems == verify(tokenized).orphans == []
    assert _picture(12) not in _everything(tokenized)


def test_a_picture_that_tars_still_hold_does_not_come_back_at_another_size(tmp_path):
    members = [(f"{n}.{ext}", data) for n in range(3)
               for ext, data in (("jpg", _picture(n)), ("txt", b"word%d" % n))]  # fmt: skip
    (tmp_path / "wds.tar").write_bytes(write_tar(members))
    store = Store(str(tmp_path / "data"))
    make_plan(store, str(tmp_path / "wds.tar"), shard_rows=3)
    run_all(store)
    assert withdraw(store, [sample_key(0, 1)], apply=True).keys == [sample_key(0, 1)]
    smaller = FetchWork(store, replace(CONFIG.pictures, size=16), CONFIG.downloads)
    with closing(smaller):
        data = smaller.run(0)
    assert data.keys == [sample_key(0, 0), sample_key(0, 2)]
    assert [reason for _, reason, _ in data.statuses] == ["ok", "withdrawn", "ok"]
    assert data.columns["url"][1].as_py() is None
    assert b"word1" not in data.outputs["caption"]


def test_a_withdrawal_that_was_cut_off_ends_when_it_is_run_again(fetched, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("_forget_rows", "_rewrite", "_delete"):
        with monkeypatch.context() as early:
            early.setattr(f"tasks.withdraw.{step}", killed)
            with pytest.raises(KeyboardInterrupt):
                withdraw(fetched, [URL], apply=True)
    withdraw(fetched, [URL], apply=True)
    content = _everything(fetched)
    assert URL.encode() not in content
    assert b"word3" not in content
    assert verify(fetched, deep=True).orphans == []


def test_the_command_says_what_it_would_do_and_where_it_does_not_reach(fetched, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text(f"{URL}\tcaption\nhttp://nowhere.org\n")
    values = WithdrawParams(root=fetched.url, names=str(names))
    before = _everything(fetched)
    told = "\n".join(run(values))
    assert "2 samples (00000100000, 00000200000)" in told
    assert "--apply does it" in told
    assert "1 names of no sample (http://nowhere.org)" in told
    assert _everything(fetched) == before
    assert "not reached: exports" in "\n".join(run(values.model_copy(update={"apply": True})))
