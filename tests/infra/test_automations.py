"""Automations are set up once, and hand a dataset over exactly once for each version."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from infra.automations import FLOWS, NEXT, announce, event_name, set_up, version_of
from infra.ledger import Ledger
from infra.store import Store
from tests.infra.serving import get, post, server, until
from tests.infra.test_runner import run, toy_job

ROOT = Path(__file__).resolve().parents[2]


class FakeClient:
    """A server's automations, deployments and events in memory."""

    def __init__(self, deployments: dict[str, dict[str, Any]]) -> None:
        self.automations: dict[uuid.UUID, Any] = {}
        self.deployments = {
            name: SimpleNamespace(id=uuid.uuid5(uuid.NAMESPACE_URL, name), parameters=parameters)
            for name, parameters in deployments.items()
        }
        self.events: list[dict[str, Any]] = []
        self.away = False

    def read_automations_by_name(self, name: str) -> list[Any]:
        return [a for a in self.automations.values() if a.name == name]

    def create_automation(self, automation: Any) -> None:
        from prefect.events.schemas.automations import Automation

        made = Automation(id=uuid.uuid4(), **automation.model_dump())
        self.automations[made.id] = made

    def update_automation(self, id: uuid.UUID, automation: Any) -> None:
        from prefect.events.schemas.automations import Automation

        self.automations[id] = Automation(id=id, **automation.model_dump())

    def read_deployment_by_name(self, name: str) -> Any:
        from prefect.exceptions import ObjectNotFound

        if name not in self.deployments:
            raise ObjectNotFound(http_exc=None)
        return self.deployments[name]

    def read_block_document_by_name(self, name: str, kind: str) -> Any:
        from prefect.exceptions import ObjectNotFound

        if (kind, name) != ("slack-webhook", "ops"):
            raise ObjectNotFound(http_exc=None)
        return SimpleNamespace(id=uuid.UUID(int=7))

    def request(self, method: str, path: str, json: list[dict[str, Any]]) -> httpx.Response:
        assert (method, path) == ("POST", "/events")
        if self.away:
            raise httpx.ConnectError("away")
        self.events += json
        return httpx.Response(204, request=httpx.Request(method, "http://x/events"))


def client() -> FakeClient:
    usual = {"params": {"root": "data/cc12m", "workers": 8}}
    return FakeClient(dict.fromkeys(NEXT.values(), usual))


def actions(changes: list[Any]) -> set[str]:
    return {change.action for change in changes}


def test_setting_up_twice_changes_nothing_the_second_time():
    fake = client()
    assert actions(set_up(fake, apply=False)) == {"created"}
    assert fake.automations == {}, "without apply nothing is made"
    assert actions(set_up(fake, apply=True)) == {"created"}
    made = dict(fake.automations)
    assert actions(set_up(fake, apply=True)) == {"unchanged"}
    assert fake.automations == made
    assert len(made) == 1 + len(NEXT)


def test_what_differs_is_changed_and_stays_switched_off():
    fake = client()
    set_up(fake, apply=True)
    (silent,) = fake.read_automations_by_name("fourm: silent runs have crashed")
    fake.automations[silent.id] = silent.model_copy(update={"enabled": False})
    changes = set_up(fake, apply=True, silence=120)
    assert [c.name for c in changes if c.action == "changed"] == [silent.name]
    now = fake.automations[silent.id]
    assert (now.enabled, now.trigger.within.total_seconds()) == (False, 120)


def test_the_next_step_keeps_its_parameters_on_the_announced_dataset():
    fake = client()
    set_up(fake, apply=True)
    (step,) = fake.read_automations_by_name("fourm: label is followed by train-tokenizers")
    assert step.trigger.expect == {event_name("label")}
    assert step.actions[0].parameters == {
        "params": {"root": "{{ event.payload.root }}", "workers": 8}
    }


def test_a_deployment_that_is_missing_is_named():
    fake = FakeClient({})
    notes = [change.note for change in set_up(fake, apply=True) if change.action == "missing"]
    assert len(notes) == len(NEXT)
    assert "there is no deployment tokenize/kubernetes" in str(
        set_up(fake, apply=True, deployment="kubernetes")
    )


def test_every_flow_is_watched():
    flows = (path.read_text() for path in (ROOT / "pipelines").glob("*.py"))
    pattern = r'^@flow\(\s*name="([^"]+)"'
    names = {name for text in flows for name in re.findall(pattern, text, re.M)}
    assert names == set(FLOWS)


def test_failures_are_told_to_the_block_that_is_named():
    fake = client()
    set_up(fake, apply=True, notify="slack-webhook/ops")
    (tell,) = fake.read_automations_by_name("fourm: tell of failures")
    assert tell.actions[0].block_document_id == uuid.UUID(int=7)
    for notify, sentence in [("ops", "not of the form"), ("slack-webhook/x", "there is no block")]:
        with pytest.raises(ValueError, match=sentence):
            set_up(fake, apply=True, notify=notify)


def test_a_silence_shorter_than_three_heartbeats_is_refused():
    with pytest.raises(ValueError, match="at least 90 s"):
        set_up(client(), apply=True, silence=30)


def test_a_version_is_announced_once_and_each_version_anew(tmp_path):
    fake, store = client(), Store(str(tmp_path))
    assert announce(fake, store, "label", "v1")
    assert not announce(fake, store, "label", "v1")
    assert announce(fake, store, "label", "v2")
    assert [event["payload"]["version"] for event in fake.events] == ["v1", "v2"]


def test_an_announcement_that_failed_is_made_again_with_the_same_id(tmp_path, monkeypatch):
    fake, store = client(), Store(str(tmp_path))
    fake.away = True
    with pytest.raises(httpx.ConnectError):
        announce(fake, store, "label", "v1")
    fake.away = False

    def die(*args: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create_json", die)
        with pytest.raises(KeyboardInterrupt):
            announce(fake, store, "label", "v1")
    assert announce(fake, store, "label", "v1")
    assert len({event["id"] for event in fake.events}) == 1, "the server drops the second"


def test_a_version_exists_once_every_shard_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.units.RETRY_SECONDS", 0.0)
    store = Store(str(tmp_path))
    ledger, job = Ledger(store), toy_job(3, fail=[1])
    assert version_of(ledger, [job.stage], job.shards) is None
    run(store, toy_job(2))
    assert version_of(ledger, [job.stage], job.shards) is None
    partial = version_of(ledger, [job.stage], range(2))
    run(store, job)
    whole = version_of(ledger, [job.stage], job.shards)
    assert whole == version_of(ledger, [job.stage], reversed(job.shards))
    assert None not in (partial, whole)
    assert partial != whole
    assert version_of(ledger, [], job.shards) is None


# --- on a server ------------------------------------------------------------------------------


@contextmanager
def _client(folder: Path) -> Iterator[tuple[Any, str]]:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with server(folder) as (api, _), temporary_settings({PREFECT_API_URL: api}):
        with get_client(sync_client=True) as found:
            yield found, api


@pytest.mark.slow
def test_a_server_sets_up_once_hands_over_once_and_crashes_silent_runs(tmp_path):
    store = Store(str(tmp_path / "data"))
    with _client(tmp_path) as (found, api):
        for name in NEXT.values():
            flow, _, deployment = name.partition("/")
            usual = {"params": {"root": "elsewhere", "workers": 8}}
            flow_id = found.create_flow_from_name(flow)
            found.create_deployment(flow_id, deployment, parameters=usual)
        assert actions(set_up(found, apply=True, silence=90)) == {"created"}
        assert actions(set_up(found, apply=True, silence=90)) == {"unchanged"}
        assert len(found.read_automations()) == 1 + len(NEXT)
        silent = _silent_run(api)
        for _ in range(3):
            assert announce(found, store, "label", "v1")
            # As if the flow had died before its record was written.
            store.delete("announced/label/v1.json")
        runs = until(lambda: _runs(api, "train-tokenizers"), 60, "the next step")
        assert runs[0]["parameters"]["params"] == {"root": store.url, "workers": 8}
        time.sleep(10)
        assert len(_runs(api, "train-tokenizers")) == 1
        until(lambda: _state(api, silent) == "CRASHED", 180, "the crash of the silent run")


def _runs(api: str, flow: str) -> list[dict[str, Any]]:
    return post(api, "/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}})


def _state(api: str, run_id: str) -> str:
    return get(api, f"/flow_runs/{run_id}")["state"]["type"]


def _silent_run(api: str) -> str:
    """A run of ours that has sent one heartbeat and is heard of no more."""
    flow = post(api, "/flows/", {"name": "label"})
    state = {"type": "RUNNING", "name": "Running"}
    made = post(api, "/flow_runs/", {"flow_id": flow["id"], "state": state})
    heartbeat = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{made['id']}"},
        "related": [
            {
                "prefect.resource.id": f"prefect.flow.{flow['id']}",
                "prefect.resource.role": "flow",
                "prefect.resource.name": "label",
            }
        ],
    }
    post(api, "/events", [heartbeat])
    return made["id"]
