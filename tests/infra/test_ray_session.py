"""An embedded Ray session leaves the process as it found it."""

import os
import signal

import psutil
import pytest
from pydantic import TypeAdapter, ValidationError

from infra import ray_session as module
from infra.ray_session import START_ATTEMPTS, Embedded, Existing, RayTarget, ray_session
from tests.infra.serving import alive, until


def test_targets_are_told_apart_by_kind():
    adapter = TypeAdapter(RayTarget)
    assert adapter.validate_python({"kind": "embedded", "num_cpus": 2}) == Embedded(num_cpus=2)
    target = adapter.validate_python({"kind": "existing", "address": "10.0.0.1:6379"})
    assert target == Existing(address="10.0.0.1:6379")
    with pytest.raises(ValidationError, match="num_cpus"):
        Embedded(num_cpus=0)


def test_session_keeps_handlers_and_environment_nests_and_leaves_no_process(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    own = psutil.Process()
    before = set(own.children(recursive=True))
    environment = dict(os.environ)

    def handler(number: int, frame: object) -> None: ...

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        with ray_session(Embedded(num_cpus=1)):
            assert signal.getsignal(signal.SIGTERM) is handler
            assert os.environ["RAY_AUTH_MODE"] == "disabled"
            assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"
            node = ray.get_runtime_context().get_node_id()
            with ray_session(Embedded(num_cpus=1)):
                assert ray.get_runtime_context().get_node_id() == node
            assert ray.is_initialized(), "leaving a nested session stops nothing"
            ray_processes = set(own.children(recursive=True)) - before
            _listen_on_loopback_only(ray_processes)
        assert not ray.is_initialized()
        assert signal.getsignal(signal.SIGTERM) is handler
        until(lambda: not any(map(alive, ray_processes)), 120, "the end of Ray's processes")
        added = os.environ.keys() - environment.keys()
        assert not {name for name in added if name.startswith("RAY_")}
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_workers_see_the_gpus_that_they_are_given_and_no_others(monkeypatch):
    import ray

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.delenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", raising=False)

    def seen() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    with ray_session(Embedded(num_cpus=1, num_gpus=1)):
        for gpus, visible in ((0, ""), (1, "7"), (0.5, "7")):
            assert ray.get(ray.remote(num_gpus=gpus)(seen).remote()) == visible


def test_a_cluster_of_others_is_asked_to_hide_gpus_unless_the_user_says_otherwise(monkeypatch):
    import ray

    told = []
    monkeypatch.setattr(ray, "init", lambda **options: told.append(options["runtime_env"]))
    name = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
    monkeypatch.delenv(name, raising=False)
    module._init(Existing(address="127.0.0.1:1"))
    monkeypatch.setenv(name, "0")
    module._init(Existing(address="127.0.0.1:1"))
    assert told == [{"env_vars": {name: "1"}}, {"env_vars": {}}]


def test_a_ray_that_does_not_start_in_time_is_tried_again(monkeypatch):
    outcomes = [RuntimeError("timed out during startup"), RuntimeError("once more"), None]

    def init(target: object) -> None:
        if error := outcomes.pop(0):
            raise error

    monkeypatch.setattr(module, "_init", init)
    with ray_session(Embedded()):
        assert outcomes == []
    outcomes += [RuntimeError("too busy")] * START_ATTEMPTS
    with pytest.raises(RuntimeError, match="too busy"), ray_session(Embedded()):
        pass
    outcomes += [ConnectionError("no such cluster"), None]
    with pytest.raises(ConnectionError), ray_session(Existing(address="127.0.0.1:1")):
        pass
    assert outcomes == [None], "a cluster that is not ours is not asked twice"


def _listen_on_loopback_only(processes: set[psutil.Process]) -> None:
    """Without authentication nobody else may reach the cluster."""
    addresses = set()
    for process in processes:
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:  # Ray's start has helpers that end by themselves
            continue
        addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
