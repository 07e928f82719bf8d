"""What a Prefect server does by itself for fourm: set up by `fourm automations --apply`.

    silent runs      a run whose heartbeats stop (its machine died) becomes Crashed
    failures         a failed or crashed run is told to a notification block
    hand-over        a finished step of a dataset starts the deployment of the next step

Setting up is idempotent: automations are found by name, and made, changed or left. Hand-over is
exactly once for each version of a dataset. A step that has finished is *announced*: an event goes
to the server, then a record into the dataset, which silences every later announcement of the same
version. A step that dies between the two announces again, with an event of the same id, which the
server drops; and should one pass nevertheless, the next step finds its work done.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from infra.ledger import Ledger
from infra.stages import Stage
from infra.store import Store

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

log = logging.getLogger("fourm.automations")

FLOWS = (
    "ingest", "retry", "import", "label", "train-tokenizers", "tokenize", "publish", "train",
    "evaluate", "generate", "end-to-end", "janitor",
)  # fmt: skip
"""Names of our flows: automations look at no others."""
NEXT = {
    "label": "train-tokenizers/all",
    "train-tokenizers": "tokenize/all",
    "tokenize": "publish/main",
    "publish": "train/4m",
}
"""Flow that has finished -> deployment that goes on, as they are called in prefect.yaml."""
SILENCE_SECONDS = 600.0
"""Three times Prefect's own interval of heartbeats; the deployments of prefect.yaml send more."""

Action = Literal["created", "changed", "unchanged", "missing"]


@dataclass(frozen=True)
class Change:
    """What setting up does, or would do, to one automation."""

    name: str
    action: Action
    note: str = ""


# --- setting up -------------------------------------------------------------------------------


def set_up(
    client: SyncPrefectClient,
    *,
    apply: bool,
    silence: float = SILENCE_SECONDS,
    notify: str = "",
    deployment: str = "",
) -> list[Change]:
    """Make or change our automations; those of other names are not touched.

    Args:
        client: of the server.
        apply: False only says what would be done.
        silence: seconds without a heartbeat after which a run has crashed; at least three times
            the interval of heartbeats (PREFECT_FLOWS_HEARTBEAT_FREQUENCY where flows run).
        notify: notification block, "type/name" such as "slack-webhook/ops"; "" for none.
        deployment: name of the deployments to hand over to, such as "kubernetes"; "" for those of
            `NEXT`.

    Raises:
        ValueError: silence is too short, or there is no such block.
    """
    changes = []
    for automation in wanted(client, silence, notify, deployment):
        if isinstance(automation, Change):
            changes.append(automation)
            continue
        found = client.read_automations_by_name(automation.name)
        if not found:
            changes.append(Change(automation.name, "created"))
            if apply:
                client.create_automation(automation)
        elif _content(found[0]) != _content(automation):
            changes.append(Change(automation.name, "changed"))
            if apply:
                # Whoever switched it off wants it to stay off.
                kept = automation.model_copy(update={"enabled": found[0].enabled})
                client.update_automation(found[0].id, kept)
        else:
            changes.append(Change(automation.name, "unchanged"))
    return changes


def wanted(
    client: SyncPrefectClient, silence: float, notify: str, deployment: str
) -> Iterator[AutomationCore | Change]:
    """Our automations, and a "missing" for what cannot be made yet."""
    if silence < 90:
        raise ValueError(
            f"silence={silence:g}: at least 90 s, since heartbeats are 30 s apart at the least"
        )
    yield _silent_runs(silence)
    if notify:
        yield _failures(_block_id(client, notify), notify)
    for flow, usual in NEXT.items():
        name = f"{usual.split('/')[0]}/{deployment}" if deployment else usual
        yield _hand_over(client, flow, name)


def _silent_runs(silence: float) -> AutomationCore:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name="fourm: silent runs have crashed",
        description="A run that sends no heartbeat any more lost its process or its machine.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_ours(),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No heartbeat for {silence:g} s. Run it again: it resumes.",
            )
        ],
    )


def _failures(block: uuid.UUID, notify: str) -> AutomationCore:
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name="fourm: tell of failures",
        description=f"Failed and crashed runs are told to {notify}.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_ours(),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject="{{ flow.name }} {{ flow_run.state.name }}: {{ flow_run.name }}",
                body="{{ flow_run.state.message }}\n{{ flow_run | ui_url }}",
            )
        ],
    )


def _hand_over(client: SyncPrefectClient, flow: str, deployment: str) -> AutomationCore | Change:
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.exceptions import ObjectNotFound

    name = f"fourm: {flow} is followed by {deployment.split('/')[0]}"
    try:
        found = client.read_deployment_by_name(deployment)
    except ObjectNotFound:
        return Change(name, "missing", f"there is no deployment {deployment}: prefect deploy --all")
    # Everything as the deployment has it, but on the dataset that was announced.
    usual = dict((found.parameters or {}).get("params", {}))
    parameters = {"params": {**usual, "root": "{{ event.payload.root }}"}}
    return AutomationCore(
        name=name,
        description=f"When {flow} is complete for a version of a dataset, {deployment} goes on.",
        trigger=EventTrigger(
            expect={event_name(flow)},
            match={"prefect.resource.id": "fourm.dataset.*"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[RunDeployment(deployment_id=found.id, parameters=parameters)],
    )


def _ours() -> dict[str, Any]:
    return {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}


def _block_id(client: SyncPrefectClient, notify: str) -> uuid.UUID:
    from prefect.exceptions import ObjectNotFound

    kind, slash, name = notify.partition("/")
    if not slash:
        raise ValueError(f"notify={notify!r} is not of the form type/name, as slack-webhook/ops")
    try:
        return client.read_block_document_by_name(name, kind).id
    except ObjectNotFound as error:
        raise ValueError(f"there is no block {notify!r}; `prefect block ls` lists them") from error


def _content(automation: AutomationCore) -> str:
    fields = {"description", "trigger", "actions"}
    value = automation.model_dump(mode="json", include=fields)
    return json.dumps(_sorted(value), sort_keys=True)


def _sorted(value: Any) -> Any:
    """Lists that stand for sets come back in any order."""
    if isinstance(value, dict):
        return {name: _sorted(part) for name, part in value.items()}
    if isinstance(value, list):
        return sorted((_sorted(part) for part in value), key=repr)
    return value


# --- handing over -----------------------------------------------------------------------------


def event_name(flow: str) -> str:
    """The event that announces that a flow is complete."""
    return f"fourm.{flow}.complete"


def version_of(ledger: Ledger, stages: Iterable[Stage], shards: Iterable[int]) -> str | None:
    """Names what the stages have made of the shards; None while any shard is still to do."""
    wanted_shards, made = sorted(shards), {}
    for stage in stages:
        committed = ledger.committed(stage)
        if ledger.todo(stage, wanted_shards):
            return None
        made[stage.id] = [shard for shard in wanted_shards if shard in committed]
    if not wanted_shards or not made:
        return None
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def announce(client: SyncPrefectClient, store: Store, flow: str, version: str) -> bool:
    """Tell the server that a flow is complete for a version of the dataset; once.

    Returns:
        False where this version has been announced before.

    Raises:
        httpx.HTTPError: the server did not take the event; announce again.
    """
    from prefect.events.schemas.events import Event

    record = f"announced/{flow}/{version}.json"
    if store.exists(record):
        return False
    dataset = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    event = Event(
        id=uuid.uuid5(uuid.NAMESPACE_URL, f"{store.url}#{flow}@{version}"),
        event=event_name(flow),
        resource={
            "prefect.resource.id": f"fourm.dataset.{dataset}",
            "prefect.resource.name": store.url,
        },
        payload={"root": store.url, "version": version},
    )
    answer = client.request("POST", "/events", json=[event.model_dump(mode="json")])
    answer.raise_for_status()
    log.info("announced that %s is complete for version %s", flow, version)
    return store.create_json(record, {"event": str(event.id)})
