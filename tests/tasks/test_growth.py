"""Contracts of a list that grows: what is new becomes further shards, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from infra.ledger import Ledger
from infra.shards import sample_key
from infra.sources import Source
from infra.store import Store
from pipelines.params import IngestParams, LabelOptions
from tasks import plans
from tasks.chain import remember
from tasks.checks import check
from tasks.fetch import fetch_stage
from tasks.growth import append_list
from tasks.plans import Plan, make_plan, plan_retry
from tasks.publish import publish_tokens
from tests.tasks.test_fetch_sources import CONFIG, Web, run_all
from tests.tasks.test_token_choices import SMALL, _ingested, _tokenize


def _list(path: Path, numbers: list[int], *more: str) -> Source:
    rows = [f"http://host{n}.org/{n}\tpicture {n}" for n in numbers]
    path.write_text("".join(f"{row}\n" for row in [*rows, *more]))
    return Source(path=str(path))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Five rows in three shards of two, one of them bad."""
    store = Store(str(tmp_path / "data"))
    make_plan(store, _list(tmp_path / "june.tsv", [0, 1, 2, 3], "\tno url"), shard_rows=2)
    return store


def _urls(store: Store, shards: list[int]) -> list[str]:
    plan = Plan(store)
    return [row["url"].rpartition("/")[2] for shard in shards for row in plan.rows(shard)]


def test_what_is_new_in_a_longer_list_becomes_further_shards(store, tmp_path, monkeypatch):
    Web(monkeypatch)
    stage = fetch_stage(Plan(store).about, CONFIG)
    before = run_all(store).commits(stage)
    longer = _list(tmp_path / "july.tsv", [9, 0, 1, 2, 3, 8, 7, 9], "\tno url")
    assert append_list(store, longer) == 3
    ledger = run_all(store)
    assert fetch_stage(ledger.read_plan(), CONFIG).id == stage.id
    commits = ledger.commits(stage)
    assert {shard: commits[shard] for shard in before} == before
    assert sorted(set(commits) - set(before)) == [3, 4]
    assert _urls(store, [3, 4]) == ["9", "8", "7"]
    table = ledger.statuses(stage).to_pylist()[5:]
    assert [row["key"] for row in table] == [sample_key(3 + n // 2, n % 2) for n in range(3)]
    assert [row["reason"] for row in table] == ["ok", "ok", "ok"]


def test_a_list_that_is_appended_again_or_planned_again_adds_nothing(store, tmp_path):
    august = _list(tmp_path / "august.tsv", [4, 5, 6])
    with pytest.raises(ValueError, match="--append adds what is new in"):
        make_plan(store, august, shard_rows=2)
    assert append_list(store, august) == 3
    assert append_list(store, august) == 0
    assert append_list(store, _list(tmp_path / "part.tsv", [6, 2])) == 0
    plan = Ledger(store).read_plan()
    assert make_plan(store, august, shard_rows=2) == plan
    assert (plan["num_shards"], plan["list_shards"], len(plan["passes"])) == (5, 3, 1)


def test_a_plan_is_whole_or_not_there_when_the_list_changes_while_it_is_appended(
    store, tmp_path, monkeypatch
):
    source = _list(tmp_path / "august.tsv", [4, 5, 6])
    write = Store.write

    def changed(self: Store, path: str, data: bytes) -> None:
        write(self, path, data)
        _list(tmp_path / "august.tsv", [4, 5])

    monkeypatch.setattr(Store, "write", changed)
    with pytest.raises(ValueError, match="changed while it was read"):
        append_list(store, source)
    assert Ledger(store).read_plan()["num_shards"] == 3


def test_a_retry_looks_at_the_first_list_also_after_another_was_appended(
    store, tmp_path, monkeypatch
):
    web = Web(monkeypatch)
    web.fates = {"http://host1.org/1": "timeout", "http://host5.org/5": "timeout"}
    stage = fetch_stage(Plan(store).about, CONFIG)
    run_all(store)
    append_list(store, _list(tmp_path / "august.tsv", [4, 5, 6]))
    run_all(store)
    assert plan_retry(store, stage)["rows"] == 2
    run_all(store)
    append_list(store, _list(tmp_path / "september.tsv", [10]))
    web.fates = {}
    run_all(store)
    # Those of the pass before, each once, and none of the list that it went over.
    assert plan_retry(store, stage)["rows"] == 2
    run_all(store)
    assert plan_retry(store, stage)["rows"] == 0


def test_pictures_of_another_kind_of_place_are_not_appended(store, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="choose another root"):
        append_list(store, Source(path=str(tmp_path / "folder"), format="folder"))
    Image.new("RGB", (40, 40)).save(tmp_path / "folder" / "a.jpg")
    form = IngestParams(root=store.url, source=str(tmp_path / "folder"), append=True)
    with pytest.raises(ValueError, match="choose another root"):
        check("ingest", form.model_dump())


def test_other_options_would_make_all_anew_and_are_refused(store, tmp_path):
    source = _list(tmp_path / "august.tsv", [4])
    first = IngestParams(root=store.url, source=source.path, image_size=128)
    remember(store, "ingest", first.model_dump(exclude={"append", "root", "ray", "workers"}))
    again = IngestParams(root=store.url, source=source.path, append=True, timeout=3.0)
    with pytest.raises(ValueError, match="--image-size 128: append with the same"):
        check("ingest", again.model_dump())
    check("ingest", again.model_copy(update={"image_size": 128}).model_dump())


def test_what_was_held_out_stays_so_when_the_set_grows(tmp_path, monkeypatch):
    store = _ingested(tmp_path)
    remember(store, "label", LabelOptions(preset="scenes", labelers=[]).model_dump())
    _tokenize(store, {"modalities": ["rgb"], "changes": {"rgb": SMALL}})
    with monkeypatch.context() as early:
        early.setattr("tasks.publish.tokenized_shards", lambda *_: [0, 1])
        assert publish_tokens(store, "main", val_share=0.3).splits == {"train": [0], "val": [1]}
    assert publish_tokens(store, "main", val_share=0.3).splits == {"train": [0, 2], "val": [1]}
    # Asked for more, it takes what was not published before, or else of what was trained on.
    assert publish_tokens(store, "main", val_share=0.7).splits == {"train": [0], "val": [1, 2]}
    assert publish_tokens(store, "new", val_share=0.3).splits == {"train": [0, 1], "val": [2]}


def _planned(store: Store, source: Source, rows: list[int]) -> None:
    """The plan is this list's, with its rows and no others."""
    plan = Plan(store)
    assert plan.about["source"] == source.path
    assert _urls(store, list(range(plan.about["num_shards"]))) == [str(n) for n in rows]
    kept = {plan.path(shard) for shard in range(plan.about["num_shards"])}
    assert set(store.list("plan/rows")) == kept


@pytest.mark.parametrize("first", ["june", "july"])
def test_of_two_lists_that_are_planned_at_once_one_is_planned_whole_and_one_refused(
    first, tmp_path, monkeypatch
):
    store = Store(str(tmp_path / "data"))
    lists = {"june": _list(tmp_path / "june.tsv", [0, 1, 2]),
             "july": _list(tmp_path / "july.tsv", [5, 6, 7, 8, 9])}  # fmt: skip
    rows = {"june": [0, 1, 2], "july": [5, 6, 7, 8, 9]}
    other = "july" if first == "june" else "june"
    encode, shards = plans._parquet, iter(range(9))

    def meanwhile(batch: list) -> bytes:
        if next(shards) == 1:
            make_plan(store, lists[first], shard_rows=2)
        return encode(batch)

    monkeypatch.setattr(plans, "_parquet", meanwhile)
    with pytest.raises(ValueError, match="was planned otherwise"):
        make_plan(store, lists[other], shard_rows=2)
    _planned(store, lists[first], rows[first])
    assert append_list(store, lists[first]) == 0
    assert append_list(store, lists[other]) == len(rows[other])


def test_what_a_killed_planning_of_another_list_left_is_neither_read_nor_kept(
    tmp_path, monkeypatch
):
    store = Store(str(tmp_path / "data"))
    with monkeypatch.context() as early:
        early.setattr(Ledger, "write_plan", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_plan(store, _list(tmp_path / "june.tsv", [0, 1, 2, 3, 4]), shard_rows=2)
    july = _list(tmp_path / "july.tsv", [5, 6, 7])
    make_plan(store, july, shard_rows=2)
    _planned(store, july, [5, 6, 7])
