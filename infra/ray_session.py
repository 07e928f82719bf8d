"""A Ray session that begins, nests and ends cleanly inside a flow.

    with ray_session(Embedded(num_cpus=2)):
        ...          # ray is initialised; a nested ray_session re-uses it

`ray.init` has side effects that matter to whoever calls it: it replaces the SIGTERM handler
(Prefect then reports a cancelled run as Crashed), turns on token authentication for new local
clusters, binds the machine's public address and reports usage. Here all four are taken back.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from infra.machine import gpus

if TYPE_CHECKING:
    import psutil

log = logging.getLogger("fourm.ray")

OBJECT_STORE_BYTES = 512 * 1024**2
"""Only small status rows travel through Ray's object store: the data goes through the store."""
START_ATTEMPTS = 3
_HIDE_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""Workers that were given no GPU see none. Ray by itself shows them all GPUs of their node, where
each of them would take the first one."""
STOP_SECONDS = 15.0
"""Most seconds for Ray to stop by itself. Prefect kills a cancelled run after 30 s."""


class Embedded(BaseModel):
    """Ray on this machine, started for the run and stopped after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["embedded"] = "embedded"
    num_cpus: int | None = Field(None, ge=1, description="CPU cores to use; empty means all.")
    num_gpus: int | None = Field(None, ge=0, description="GPUs to use; empty means all.")

    @property
    def gpus(self) -> int:
        """GPUs that Ray is given."""
        return gpus() if self.num_gpus is None else self.num_gpus

    def too_small(self, work: str, need: float, what: str, have: float) -> ValueError:
        """Says that work needs more than Ray has here, which it would wait for without end.

        Args:
            work: Such as "a worker".
            need: How much of it.
            what: "CPU" or "GPU".
            have: What there is of it.
        """
        less = "gpus, or leave it out" if what == "GPU" else "its num_cpus"
        there, more = f"Ray has {have:g}", f"raise num_{what.lower()}s in the Ray target"
        if what == "GPU" and self.num_gpus is None:
            there = f"torch finds {f'{have:g}' if have else 'none'} on this machine"
            more = "choose a cluster that has them as Ray target"
        return ValueError(f"{work} occupies {need:g} {what} and {there}: lower {less}, or {more}")


class Existing(BaseModel):
    """A Ray cluster that is already running; it is left as it was found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["existing"] = "existing"
    address: str = Field("auto", description="'auto', 'host:6379' or 'ray://host:10001'.")


class Job(BaseModel):
    """A job on a running Ray cluster: the flow only follows it, and finds it again when restarted.

    The package is installed on the cluster, and the dataset is where the cluster can reach it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["job"] = "job"
    address: str = Field(
        "http://127.0.0.1:8265", pattern=r"^https?://", description="Ray's dashboard."
    )
    entrypoint_cpus: float = Field(0, ge=0, description="CPU cores for the job's own process.")
    entrypoint_gpus: float = Field(0, ge=0, description="GPUs for the job's own process.")
    env: dict[str, str] = Field({}, description="Environment of the job; no secrets: it is shown.")


class RayJob(BaseModel):
    """A Ray cluster of its own on Kubernetes, made by KubeRay for the stage and removed after it.

    The template says what the cluster looks like; the times see to it that it never stays.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["rayjob"] = "rayjob"
    namespace: str = Field("default", min_length=1, description="Kubernetes namespace.")
    template: str = Field(
        "", description="RayJob manifest, a path or any fsspec URL; empty: the shipped one."
    )
    image: str = Field("", description="Image of every Ray container; empty: the template's.")
    replicas: int | None = Field(
        None, ge=0, description="Pods of each worker group; none: the template's."
    )
    start_seconds: int = Field(3600, ge=1, description="Most seconds until the cluster runs.")
    deadline_seconds: int = Field(7 * 86_400, ge=1, description="Most seconds for the whole job.")
    ttl_seconds: int = Field(300, ge=0, description="Seconds that a finished cluster stays.")
    entrypoint_cpus: float = Field(0, ge=0, description="CPU cores for the job's own process.")
    entrypoint_gpus: float = Field(0, ge=0, description="GPUs for the job's own process.")
    env: dict[str, str] = Field({}, description="Environment of the job; no secrets: it is shown.")


RayTarget = Annotated[Embedded | Existing | Job | RayJob, Field(discriminator="kind")]


@contextmanager
def ray_session(target: RayTarget) -> Iterator[None]:
    """Connect to or start Ray; on leaving, stop what was started and wait until it is gone.

    Where Ray is already initialised in this process the running session is used and left alone.

    Raises:
        ValueError: the target is a job: its process is another one, see `pipelines.remote`.
    """
    import ray

    if isinstance(target, Job | RayJob):
        raise ValueError(
            f"Ray target {target.kind!r} runs whole stages elsewhere and opens no session here; "
            "the targets of a session are 'embedded' and 'existing'"
        )
    if ray.is_initialized():
        yield
        return
    with _environment(target), _signal_handlers() as keep_handlers:
        before = _children()
        try:
            _start(target, before)
            keep_handlers()
            yield
        finally:
            _shutdown([p for p in _children() if p not in before])


def _start(target: Embedded | Existing, before: list[psutil.Process]) -> None:
    """Begin the session. Ray gives its helpers 15 s to start and ends where they take longer, as
    they do on a busy machine: an embedded Ray is tried again."""
    for left in reversed(range(START_ATTEMPTS if isinstance(target, Embedded) else 1)):
        try:
            return _init(target)
        except ValueError:
            raise
        except Exception as error:
            if not left:
                raise
            log.warning("Ray did not start and is tried again: %s", error)
            _shutdown([p for p in _children() if p not in before])


def _init(target: Embedded | Existing) -> None:
    import ray

    common: dict[str, Any] = {
        "namespace": f"fourm-{uuid.uuid4().hex[:12]}",
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    if isinstance(target, Existing):
        told = {name: value for name, value in _HIDE_GPUS.items() if name not in os.environ}
        ray.init(address=target.address, runtime_env={"env_vars": told}, **common)
        return
    with _loopback_allowed():
        ray.init(
            # "local" never joins a cluster that happens to run on this machine.
            address="local",
            num_cpus=target.num_cpus,
            num_gpus=target.gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            **common,
        )


@contextmanager
def _loopback_allowed() -> Iterator[None]:
    """Let Ray listen on 127.0.0.1 alone.

    On Linux it takes the machine's own address instead and then listens on every interface,
    unless it believes to be on a system without clusters. It reads that belief from the
    environment at its first import, which may be long past.
    """
    from ray._private import ray_constants

    kept = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept


@contextmanager
def _environment(target: Embedded | Existing) -> Iterator[None]:
    """Ray's environment variables for the session, unless the user has set them."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0"}
    # Ray's core prints an error about constructor arguments for every actor of Ray Data.
    wanted["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    if isinstance(target, Embedded):
        wanted |= _HIDE_GPUS
        # An embedded cluster listens on the loopback only and lives as long as this process.
        wanted["RAY_AUTH_MODE"] = "disabled"
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for Ray's own child processes
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _signal_handlers() -> Iterator[Callable[[], None]]:
    """Restore on leaving the handlers of SIGTERM and SIGINT; the yielded call does so early.

    A handler of the caller's own (Prefect's) returns as soon as Ray has started. Where SIGTERM
    had none, Ray's stays for the session: it raises SystemExit, so that clean-up runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore_own() -> None:
        for number, handler in kept.items():
            if callable(handler):
                signal.signal(number, handler)

    try:
        yield restore_own
    finally:
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)


def _children() -> list[psutil.Process]:
    import psutil

    return psutil.Process().children()


def _shutdown(daemons: list[psutil.Process]) -> None:
    """Disconnect and stop Ray, then wait for its processes; kill those that linger.

    Args:
        daemons: the direct children of this process that may be Ray's.
    """
    import psutil
    import ray

    started: list[psutil.Process] = []
    for daemon in daemons:
        try:
            if any("ray" in part for part in daemon.cmdline()):
                started += [daemon, *daemon.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    stopper = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    stopper.start()
    stopper.join(STOP_SECONDS)
    _, alive = psutil.wait_procs(started, timeout=2)
    for process in alive:
        log.warning("Ray process %d did not stop by itself and is killed", process.pid)
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=2)
