"""A stage as a job: the same work, its result and pictures here, its failures in words."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from infra import ray_jobs, ui
from infra.ledger import Ledger
from infra.ray_jobs import JobFailed, JobInfo, JobRequest
from infra.ray_session import Job, RayJob, ray_session
from infra.runner import SystemicFailure
from infra.store import Store
from pipelines import remote
from pipelines.params import EndToEndParams, TokenizeParams
from tests.infra.jobs_fake import FakeJobs
from tests.infra.test_runner import toy_job
from tests.pipelines.toy_stage import not_a_stage, toy

STAGE = toy.fn.__wrapped__


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ui, "PERIOD_SECONDS", 0.0)


def params(root: Path, crops: int = 4) -> TokenizeParams:
    return TokenizeParams(root=str(root), crops=crops, workers=0, ray=Job())


class InProcess(FakeJobs):
    """Runs a job at once, in this process."""

    def submit(self, request: JobRequest) -> None:
        super().submit(request)
        python, _, module, root, job_id = request.entrypoint.split()
        assert (python, module) == ("python", "pipelines.remote")
        failed = remote.main(root, job_id)
        self.logs[job_id] = ["INFO fourm.toy: working\n", "WARNING fourm.toy: slowly\n"]
        self.states[job_id] = JobInfo("failed" if failed else "succeeded", "", request.owner)


def test_a_job_does_the_work_and_returns_its_result(tmp_path, caplog, monkeypatch):
    shown: list[tuple[str, Any]] = []
    monkeypatch.setattr(ui, "table", lambda key, rows, title: shown.append((key, rows)))
    monkeypatch.setattr(ui.Progress, "_show", lambda self, percent, text: shown.append((text, 0)))
    monkeypatch.setattr(ui, "replay", lambda what, arguments: ui.table(**arguments))
    with caplog.at_level(logging.INFO):
        rows = remote.run(STAGE, params(tmp_path), InProcess())
    job = toy_job(2)
    assert rows == [{"stage": job.stage.id, "done": 2}]
    assert Ledger(Store(str(tmp_path))).committed(job.stage) == {0, 1}
    levels = {r.message: r.levelname for r in caplog.records if r.name == "fourm.job"}
    assert levels["fourm.toy: working"] == "INFO"
    assert levels["fourm.toy: slowly"] == "WARNING"
    assert ("toy", rows) in shown


def test_what_the_job_shows_is_shown_here(tmp_path, monkeypatch):
    shown = []
    store = Store(str(tmp_path))
    event = {"what": "table", "arguments": {"key": "k", "rows": [{"a": 1}], "title": "t"}}
    store.write_json("jobs/a/shown/table-k.json", event)
    bar = {"name": "label", "percent": 50.0, "text": "half"}
    store.write_json("jobs/a/shown/bar.json", {"what": "progress", "arguments": bar})
    monkeypatch.setattr(ui, "replay", lambda what, arguments: shown.append((what, arguments)))
    monkeypatch.setattr(
        ui.Progress, "update", lambda self, *given: shown.append((self.name, given))
    )
    mirror = remote._Shown(store, "a")
    mirror.update()
    mirror.update()
    assert shown == [("label", (50.0, 100, "half")), ("table", event["arguments"])]


def test_what_a_server_did_not_take_is_shown_later_and_what_makes_no_sense_never(
    tmp_path, monkeypatch, caplog
):
    store, given = Store(str(tmp_path)), []
    store.write_json("jobs/a/shown/k.json", {"what": "table", "arguments": {"key": "k"}})
    for number, odd in enumerate((b"", b"[]", b"{}", b'{"what": "progress", "arguments": {}}')):
        store.write(f"jobs/a/shown/{number}.json", odd)
    monkeypatch.setattr(ui, "replay", lambda *event: given.append(event) or len(given) > 2)
    mirror = remote._Shown(store, "a")
    mirror.update()
    mirror.update()
    assert len(given) == 1, "a server that is away is not asked at every poll"
    monkeypatch.setattr(remote, "SHOW_AGAIN_SECONDS", -1.0)
    mirror._again.clear()
    for _ in range(5):
        mirror.update()
    assert len(given) == 3
    assert caplog.text.count("tells nothing that can be shown") == 4


def test_showing_tells_whether_the_server_took_it(monkeypatch):
    assert ui.replay("table", {"key": "k", "rows": [], "title": "t"}), "nobody looks"
    monkeypatch.setattr(ui, "in_run", lambda: True)
    monkeypatch.setattr("prefect.artifacts.create_table_artifact", lambda *_, **__: 1 / 0)
    assert not ui.replay("table", {"key": "k", "rows": [], "title": "t"})


def test_a_cluster_out_of_reach_turns_no_cancelled_run_into_a_failed_one(monkeypatch, caplog):
    class Away(FakeJobs):
        def stop(self, job_id: str) -> None:
            raise ConnectionError("the dashboard restarts")

    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(KeyboardInterrupt), remote._stopped_on_cancel(Away(), "a"):
        raise KeyboardInterrupt
    assert "job a goes on" in caplog.text


def test_the_flows_process_relays_and_replays_the_same(monkeypatch):
    sent, made = [], []
    with ui.relayed(lambda *event: sent.append(event)):
        assert ui.in_run()
        ui.table("k", [{"a": 1}], "t")
        ui.markdown("m", "text")
        ui.progress("bar").update(1, 2, "half")
    assert not ui.in_run()
    monkeypatch.setattr(ui, "in_run", lambda: True)
    for kind in ("table", "markdown"):
        monkeypatch.setattr(
            f"prefect.artifacts.create_{kind}_artifact", lambda *a, **k: made.append((a, k))
        )
    for what, arguments in sent:
        ui.replay(what, arguments)
    assert [what for what, _ in sent] == ["table", "markdown", "progress"]
    assert made == [
        (([{"a": 1}],), {"key": "k", "description": "t"}),
        (("text",), {"key": "m"}),
    ]


def test_a_bad_value_in_the_job_is_final_and_named(tmp_path):
    with pytest.raises(SystemicFailure, match="ValueError: nine crops are too many"):
        remote.run(STAGE, params(tmp_path, crops=9), InProcess())
    with pytest.raises(SystemicFailure, match="no disk"):
        remote.run(STAGE, params(tmp_path, crops=11), InProcess())
    with pytest.raises(SystemicFailure, match="another trains it"):
        remote.run(STAGE, params(tmp_path, crops=13), InProcess())


def test_other_trouble_of_the_job_is_worth_another_attempt(tmp_path):
    jobs = InProcess()
    for number in range(2):
        with pytest.raises(JobFailed, match=f"-{number} failed(.|\n)*slowly"):
            remote.run(STAGE, params(tmp_path, crops=10), jobs)


def test_what_a_job_of_the_same_id_left_behind_counts_no_more(tmp_path):
    """Of a cluster that was made anew: it gives out the same ids again."""
    event = {"what": "table", "arguments": {"key": "k", "rows": [], "title": "t"}}

    class Dies(FakeJobs):
        def submit(self, request: JobRequest) -> None:
            super().submit(request)
            store.write_json(f"jobs/{request.job_id}/shown/late.json", event)
            self.states[request.job_id] = JobInfo("failed", "the node is gone", request.owner)

    class Refused(InProcess):
        def submit(self, request: JobRequest) -> None:
            super().submit(request)
            answer = {"error": "ValueError: old", "final": True}
            store.write_json(f"jobs/{request.job_id}/result.json", answer)
            store.write_json(f"jobs/{request.job_id}/shown/old.json", event)
            self.states[request.job_id] = JobInfo("failed", "", request.owner)

    store = Store(str(tmp_path))
    with pytest.raises(SystemicFailure, match="ValueError: old"):
        remote.run(STAGE, params(tmp_path), Refused())
    with pytest.raises(JobFailed, match="the node is gone"):
        remote.run(STAGE, params(tmp_path), Dies())
    assert [path.rpartition("/")[2] for path in store.list("jobs/")] == ["call.json", "late.json"]


def test_equal_work_has_one_name_and_other_work_another(tmp_path):
    jobs = FakeJobs(lambda request: jobs.states.update({request.job_id: JobInfo("stopped")}))
    for crops in (4, 4, 5):
        with pytest.raises(JobFailed):
            remote.run(STAGE, params(tmp_path, crops), jobs)
    first, again, other = (request.job_id for request in jobs.submitted)
    assert (first[:-1], first[-1], again[-1]) == (again[:-1], "0", "1")
    assert other[:-1] != first[:-1]
    assert max(map(len, (first, other))) <= 40


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_cancelled_run_stops_its_job_and_a_killed_one_leaves_it(tmp_path, monkeypatch, cancelled):
    jobs = FakeJobs()
    monkeypatch.setattr(remote, "_cancelled", lambda: cancelled)
    monkeypatch.setattr(remote, "follow", lambda *a, **k: _end(SystemExit(15)))
    with pytest.raises(SystemExit):
        remote.run(STAGE, params(tmp_path), jobs)
    assert bool(jobs.stopped) == cancelled


@pytest.mark.parametrize(("states", "cancelled"), [
    (["RUNNING", "CANCELLING"], True), (["CANCELLING", "RUNNING"], True),
    (["RUNNING", "RUNNING"], False),
])
def test_a_step_is_cancelled_with_the_chain_that_it_is_a_step_of(monkeypatch, states, cancelled):
    """Prefect tells a step so only once the chain's own run has ended."""
    ids = [UUID(int=1), UUID(int=2)]
    link = UUID(int=3)
    runs = {
        run: SimpleNamespace(state=SimpleNamespace(type=SimpleNamespace(value=state)),
                             parent_task_run_id=above)
        for run, state, above in zip(ids, states, (link, None), strict=True)
    }  # fmt: skip
    tasks = {link: SimpleNamespace(flow_run_id=ids[1])}
    client = SimpleNamespace(read_flow_run=runs.__getitem__, read_task_run=tasks.__getitem__)
    monkeypatch.setattr(
        "prefect.client.orchestration.get_client", lambda **_: nullcontext(client)
    )
    monkeypatch.setattr(remote, "_owner", lambda: str(ids[0]))
    assert remote._cancelled() == cancelled


def test_ctrl_c_stops_the_job(tmp_path, monkeypatch):
    jobs = FakeJobs()
    monkeypatch.setattr(remote, "_cancelled", lambda: False)
    monkeypatch.setattr(remote, "follow", lambda *a, **k: _end(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        remote.run(STAGE, params(tmp_path), jobs)
    assert jobs.stopped


def test_a_dataset_cannot_make_a_job_call_any_function(tmp_path):
    store = Store(str(tmp_path))
    call = {
        "function": f"{not_a_stage.__module__}:not_a_stage",
        "form": "TokenizeParams",
        "params": {"root": store.url},
    }
    store.write_json("jobs/a/call.json", call)
    assert remote.main(store.url, "a") == 1
    assert "is no stage" in store.read_json("jobs/a/result.json")["error"]


def test_a_root_that_a_shell_would_change_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be part of a job's command"):
        remote.run(STAGE, params(tmp_path / "a b; rm"), FakeJobs())


def test_words_of_the_command_line_name_jobs():
    assert TokenizeParams(ray="http://head:8265").ray == Job(address="http://head:8265")
    assert TokenizeParams(ray="rayjob").ray == RayJob()
    assert TokenizeParams(ray={"kind": "rayjob", "namespace": "ml"}).ray.namespace == "ml"
    assert remote.is_remote(EndToEndParams(ingest={"source": "x"}, ray="rayjob"))
    assert not remote.is_remote(TokenizeParams())


def test_a_session_cannot_be_opened_on_a_job():
    with pytest.raises(ValueError, match="'job' runs whole stages elsewhere"), ray_session(Job()):
        pass


def test_the_form_of_a_flow_offers_every_target():
    schema = TokenizeParams.model_json_schema()
    choices = schema["properties"]["ray"]
    assert set(choices["discriminator"]["mapping"]) == {"embedded", "existing", "job", "rayjob"}


def _end(error: BaseException) -> None:
    raise error
