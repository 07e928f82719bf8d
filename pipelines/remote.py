"""A stage as a job on a Ray cluster; the flow's process follows it and shows what it shows.

    flow's process                             the job, on the cluster
    jobs/<id>/call.json  ------------------->  python -m pipelines.remote <root> <id>
    log, progress, tables  <-----------------  the stage's function with the target 'existing'
    its return value  <----------------------  jobs/<id>/result.json

The job runs the very function that would run here, so nothing is written twice. What passes between
the two goes through the dataset's store, apart from the log. A flow that dies leaves its job at
work, and finds it again when it is started again; a flow that is cancelled stops it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect import Task

from infra import ui
from infra.ray_jobs import OURS, JobFailed, JobRequest, Jobs, JobsApi, LastLines, attach, follow
from infra.ray_session import Existing, Job, RayJob
from infra.runner import SystemicFailure
from infra.store import Store, json_bytes
from pipelines import params as forms
from tasks.run_store import TakenOver

log = logging.getLogger("fourm.job")
R = TypeVar("R")

FINAL = (
    ValueError, TypeError, KeyError, ImportError, FileNotFoundError, SystemicFailure, MemoryError,
    TakenOver,
)  # fmt: skip
"""What another attempt cannot mend: bad values, or trouble that the runner has named already."""
ROOT = Path(__file__).resolve().parents[1]
SHOW_AGAIN_SECONDS = 30.0
"""How long what a server did not take is kept until it is shown again."""
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) ")


def is_remote(params: forms.Where) -> bool:
    """Whether the parameters ask for jobs elsewhere."""
    return isinstance(getattr(params, "ray", None), Job | RayJob)


def open_jobs(target: Job | RayJob) -> Jobs:
    """The place that runs the jobs of a target."""
    if isinstance(target, Job):
        return JobsApi(target)
    from infra.rayjob import KubeRay

    return KubeRay(target)


def run(function: Callable[..., R], params: Any, jobs: Jobs | None = None) -> R:
    """Run a stage's function as a job, and return what it returned.

    Args:
        function: of a module of this code base, called with the form; returns JSON values.
        params: its form, with a job's target.
        jobs: where; None: what the target says.

    Raises:
        JobFailed: the job failed or was stopped; holds the end of its log. Worth another attempt.
        SystemicFailure: the stage itself said that no attempt can succeed.
    """
    store = Store(params.root)
    jobs = open_jobs(params.ray) if jobs is None else jobs
    call = _call(function, params, store)
    digest = hashlib.sha256(json_bytes(call)).hexdigest()[:10]
    # A letter first, and short enough for a name in Kubernetes.
    stem = f"{OURS}{function.__name__.replace('_', '-').lower()[:20].strip('-')}-{digest}"

    def request(job_id: str) -> JobRequest:
        # A cluster that was made anew, or whose job was removed, gives out the same id again.
        for path in (*store.list(f"jobs/{job_id}/shown/"), f"jobs/{job_id}/result.json"):
            store.delete(path)
        store.create_json(f"jobs/{job_id}/call.json", call)
        command = f"python -m pipelines.remote {_plain(store.url)} {job_id}"
        return JobRequest(job_id, command, _owner(), {"FOURM_RUN_ID": _owner()})

    job_id = attach(jobs, stem, request, owner=_owner())
    return _await(jobs, job_id, store)


def _await(jobs: Jobs, job_id: str, store: Store) -> Any:
    last, shown = LastLines(), _Shown(store, job_id)

    def on_line(line: str) -> None:
        last.add(line)
        level = _LEVEL.match(line)
        number = logging.getLevelNamesMapping()[level[1]] if level else logging.INFO
        log.log(number, "%s", line[level.end() :] if level else line)

    with _stopped_on_cancel(jobs, job_id):
        info = follow(jobs, job_id, on_line=on_line, on_poll=shown.update)
    path = f"jobs/{job_id}/result.json"
    result = store.read_json(path) if store.exists(path) else {}
    if info.state == "succeeded" and "result" in result:
        return result["result"]
    if result.get("final"):
        raise SystemicFailure(f"{result['error']} (job {job_id})")
    raise last.failure(job_id, info)


@contextmanager
def _stopped_on_cancel(jobs: Jobs, job_id: str) -> Iterator[None]:
    """Stop the job when the run is cancelled; any other end of this process leaves it at work."""
    try:
        yield
    except (JobFailed, OSError):
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or _cancelled():
            log.warning("stopping job %s", job_id)
            _stop(jobs, job_id)
        else:
            log.warning("job %s goes on; the same run, started again, finds it", job_id)
        raise


def _stop(jobs: Jobs, job_id: str) -> None:
    """Stop a job; a cluster that is out of reach must not turn what was cancelled into a
    failure."""
    for pause in (1.0, 3.0, 0.0):
        try:
            jobs.stop(job_id)
            return
        except (OSError, RuntimeError) as error:
            log.warning("job %s could not be stopped: %s", job_id, error)
            time.sleep(pause)
    log.error("job %s goes on: stop it on its cluster, or let the janitor end it", job_id)


def _cancelled() -> bool:
    """Whether the present Prefect run is being cancelled, or one that it is a part of, which is all
    that Prefect marks before the end; True where there is none to ask."""
    if not _owner():
        return True
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            run_id: UUID | None = UUID(_owner())
            while run_id is not None:
                run = client.read_flow_run(run_id)
                if run.state is not None and run.state.type.value in ("CANCELLING", "CANCELLED"):
                    return True
                above = run.parent_task_run_id
                run_id = client.read_task_run(above).flow_run_id if above else None
    except Exception:
        log.warning("cannot ask whether the run is cancelled", exc_info=True)
    return False


def _owner() -> str:
    """Id of the present Prefect flow run, "" outside of one."""
    if "prefect" not in sys.modules:
        return ""
    from prefect.runtime import flow_run

    return flow_run.id or ""


def _call(function: Callable[..., Any], params: Any, store: Store) -> dict[str, Any]:
    """What a job runs, as JSON: the dataset by its full address, and the job's own Ray."""
    # By file: a deployment's entrypoint is loaded under another module name.
    file = Path(function.__code__.co_filename).resolve()
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    here = params.model_copy(update={"root": store.url, "ray": Existing()})
    return {
        "function": f"{module}:{function.__name__}",
        "form": type(params).__name__,
        "params": here.model_dump(mode="json"),
    }


def _plain(url: str) -> str:
    if not re.fullmatch(r"[\w@%+=:,./-]+", url):
        raise ValueError(f"the dataset's address {url!r} cannot be part of a job's command")
    return url


class _Shown:
    """Shows in the flow run what the job hands over."""

    def __init__(self, store: Store, job_id: str) -> None:
        self._store, self._prefix = store, f"jobs/{job_id}/shown/"
        self._seen: dict[str, str | None] = {}
        self._again: dict[str, float] = {}
        self._bars: dict[str, ui.Progress] = {}

    def update(self) -> None:
        """Show what is new; trouble with the store only delays it."""
        try:
            for path in self._store.list(self._prefix):
                version = self._store.version(path)
                if self._seen.get(path) != version and self._again.get(path, 0) < time.monotonic():
                    self._take(path, version)
        except OSError as error:
            log.warning("cannot read what the job shows: %s", error)

    def _take(self, path: str, version: str | None) -> None:
        try:
            shown = self._show(self._store.read_json(path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s tells nothing that can be shown: %r", path, error)
            shown = True
        if shown:
            self._seen[path] = version
        else:
            self._again[path] = time.monotonic() + SHOW_AGAIN_SECONDS

    def _show(self, event: dict[str, Any]) -> bool:
        """False where it may be tried again."""
        what, arguments = event["what"], event["arguments"]
        if what != "progress":
            return ui.replay(what, arguments) is not False
        bar = self._bars.setdefault(arguments["name"], ui.progress(arguments["name"]))
        bar.update(arguments["percent"], 100, arguments["text"])
        return True


# --- in the job -------------------------------------------------------------------------------


def main(root: str, job_id: str) -> int:
    """Run what `jobs/<id>/call.json` says; the result, or the failure, is written beside it.

    Returns:
        Exit status of the job.
    """
    store = Store(root)
    call = store.read_json(f"jobs/{job_id}/call.json")
    path = f"jobs/{job_id}/result.json"

    def send(what: str, arguments: dict[str, Any]) -> None:
        key = arguments.get("key") or arguments["name"]
        stem = re.sub(r"[^a-z0-9]+", "-", f"{what}-{key}".lower())
        store.write_json(f"jobs/{job_id}/shown/{stem}.json", {"what": what, "arguments": arguments})

    try:
        form = getattr(forms, call["form"])(**call["params"])
        with ui.relayed(send):
            result = _stage(call["function"]).fn(form)
    except Exception as error:
        log.exception("job %s failed", job_id)
        final = isinstance(error, FINAL)
        text = f"{type(error).__name__}: {error}"
        store.write_json(path, {"error": text, "final": final})
        return 1
    store.write(path, json.dumps({"result": result}, default=str).encode())
    return 0


def _stage(name: str) -> Task[..., Any]:
    """A declared stage by name; the store must not be able to name any other function."""
    module, _, attribute = name.partition(":")
    stage = getattr(importlib.import_module(module), attribute)
    if not isinstance(stage, Task):
        raise ValueError(f"{name} is no stage")
    return stage


if __name__ == "__main__":
    # Importing a flow must not start a server of its own.
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
    # In place of Prefect's own handlers: `_await` reads the level from the start of a line.
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("fourm").setLevel(logging.INFO)
    sys.exit(main(*sys.argv[1:]))
