"""A RayJob is made from its template, found again, and removed on cancel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from infra import ray_jobs
from infra.ray_jobs import JobInfo, JobRequest, attach, follow
from infra.ray_session import RayJob
from infra.rayjob import OWNER, KubeRay, manifest, read_template

COMMAND = "python -m pipelines.remote s3://b/x 1"
REQUEST = JobRequest("fourm-label-1-0", COMMAND, "run-1", {"B": "2"})


class Refused(Exception):
    """As `kubernetes.client.ApiException` is."""

    def __init__(self, status: int, reason: str = "") -> None:
        super().__init__(status)
        self.status, self.reason = status, reason


class FakeApi:
    """Custom objects of a cluster, with the three calls that are used."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.policies: list[str] = []
        self.refuse: int | None = None

    def _check(self, group: str, version: str, plural: str) -> None:
        assert (group, version, plural) == ("ray.io", "v1", "rayjobs")
        if self.refuse:
            raise Refused(self.refuse, "Forbidden")

    def create_namespaced_custom_object(
        self, group, version, namespace, plural, body, _request_timeout
    ):
        self._check(group, version, plural)
        key = (namespace, body["metadata"]["name"])
        if key in self.objects:
            raise Refused(409)
        self.objects[key] = body

    def get_namespaced_custom_object(
        self, group, version, namespace, plural, name, _request_timeout
    ):
        self._check(group, version, plural)
        if (namespace, name) not in self.objects:
            raise Refused(404)
        return self.objects[namespace, name]

    def delete_namespaced_custom_object(
        self, group, version, namespace, plural, name, propagation_policy, _request_timeout
    ):
        self._check(group, version, plural)
        self.policies.append(propagation_policy)
        if self.objects.pop((namespace, name), None) is None:
            raise Refused(404)


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


def test_the_job_its_owner_and_all_deadlines_are_filled_in():
    target = RayJob(
        namespace="ml", image="here/fourm:2", replicas=80, env={"A": "1"}, entrypoint_gpus=1,
        start_seconds=60, deadline_seconds=3600, ttl_seconds=30,
    )  # fmt: skip
    template = read_template("")
    body = manifest(template, target, REQUEST)
    spec = body["spec"]
    assert body["metadata"]["name"] == spec["jobId"] == REQUEST.job_id
    assert body["metadata"]["namespace"] == "ml"
    assert body["metadata"]["annotations"][OWNER] == "run-1"
    assert spec["entrypoint"] == REQUEST.entrypoint
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"A": "1", "B": "2"}}
    assert spec["preRunningDeadlineSeconds"] == 60
    assert spec["activeDeadlineSeconds"] == 3600
    assert spec["ttlSecondsAfterFinished"] == 30
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == 0
    assert spec["entrypointNumGpus"] == 1
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["containers"][0]["image"] == "here/fourm:2"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] == 80 <= group["maxReplicas"]
    assert template == read_template(""), "the template itself is not touched"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not YAML"),
        ("- 1", "is no ray.io/v1 RayJob but something else"),
        ("{apiVersion: ray.io/v1, kind: RayCluster}", "but RayCluster"),
        ("{apiVersion: ray.io/v1, kind: RayJob, spec: {}}", "has no spec.rayClusterSpec"),
    ],
)
def test_a_template_that_is_none_is_refused(tmp_path, text, sentence):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_template(str(path))


@pytest.mark.parametrize("name", ["Fourm", "fourm_label", "fourm-", "f" * 48])
def test_a_name_that_kubernetes_refuses_is_refused_first(name):
    with pytest.raises(ValueError, match="cannot name a RayJob"):
        manifest(read_template(""), RayJob(), JobRequest(name, "x"))


def test_submitting_twice_makes_one_rayjob(api):
    kube = KubeRay(RayJob(), api)
    kube.submit(REQUEST)
    kube.submit(REQUEST)
    assert len(api.objects) == 1
    assert kube.find(REQUEST.job_id) == JobInfo("waiting", "", "run-1")


@pytest.mark.parametrize(
    ("deployment", "job", "state"),
    [
        ("", "", "waiting"),
        ("Initializing", "PENDING", "waiting"),
        ("Running", "RUNNING", "running"),
        ("Complete", "SUCCEEDED", "succeeded"),
        ("Complete", "FAILED", "failed"),
        ("Complete", "STOPPED", "stopped"),
        ("Failed", "", "failed"),
        ("Failed", "RUNNING", "failed"),
        ("ValidationFailed", "", "failed"),
    ],
)
def test_every_end_of_a_rayjob_is_known(api, deployment, job, state):
    kube = KubeRay(RayJob(), api)
    kube.submit(REQUEST)
    api.objects["default", REQUEST.job_id]["status"] = {
        "jobDeploymentStatus": deployment,
        "jobStatus": job,
        "reason": "DeadlineExceeded",
        "message": "too long",
    }
    info = kube.find(REQUEST.job_id)
    assert (info.state, info.message) == (state, "DeadlineExceeded too long")


def test_stopping_removes_the_cluster_and_may_be_repeated(api):
    kube = KubeRay(RayJob(), api)
    kube.submit(REQUEST)
    kube.stop(REQUEST.job_id)
    kube.stop(REQUEST.job_id)
    assert api.objects == {}
    assert api.policies == ["Foreground", "Foreground"]
    assert kube.find(REQUEST.job_id) is None


def test_a_rayjob_that_is_being_removed_is_followed_by_another(api):
    kube = KubeRay(RayJob(), api)
    kube.submit(REQUEST)
    about = api.objects["default", REQUEST.job_id]
    about["metadata"]["deletionTimestamp"] = "2026-11-22T12:00:00Z"
    about["status"] = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    assert kube.find(REQUEST.job_id).state == "stopped"

    def request(name: str) -> JobRequest:
        return JobRequest(name, COMMAND, "run-1")

    assert attach(kube, "fourm-label-1", request, owner="run-1") == "fourm-label-1-1"
    assert len(api.objects) == 2


def test_a_restarted_flow_finds_its_rayjob(api):
    def submit_or_find() -> str:
        kube = KubeRay(RayJob(), api)
        return attach(kube, "fourm-label-1", lambda name: REQUEST, owner="run-1")

    assert submit_or_find() == submit_or_find() == REQUEST.job_id
    assert len(api.objects) == 1


def test_what_kubernetes_forbids_is_said(api):
    api.refuse = 403
    with pytest.raises(ConnectionError, match="Kubernetes answers 403 Forbidden"):
        KubeRay(RayJob(), api).find("a")


def test_a_control_plane_that_is_away_for_a_while_is_borne(api, monkeypatch):
    """As for minutes while a managed cluster is upgraded; its client's errors are no OSErrors."""
    from urllib3.exceptions import MaxRetryError

    monkeypatch.setattr(ray_jobs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ray_jobs, "LAST_WORDS_SECONDS", 0.0)
    kube = KubeRay(RayJob(), api)
    kube.submit(REQUEST)
    asked = iter([MaxRetryError(None, "/apis", "refused"), Refused(503, "Unavailable")])
    answer = api.get_namespaced_custom_object

    def get(**where: Any) -> dict[str, Any]:
        trouble = next(asked, None)
        if trouble:
            raise trouble
        found = answer(**where)
        found["status"] = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
        return found

    monkeypatch.setattr(ray_jobs, "_Tail", lambda *_: SimpleNamespace(
        drain=lambda *_: None, finish=lambda *_: None))  # fmt: skip
    monkeypatch.setattr(api, "get_namespaced_custom_object", get)
    info = follow(kube, REQUEST.job_id, on_line=lambda line: None)
    assert info.state == "succeeded"
    assert next(asked, None) is None


def test_a_missing_client_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fourm\[kubernetes\]'"):
        KubeRay(RayJob())


@pytest.mark.parametrize("answer", ["<html>", None, [], {}, {"metadata": 3}])
def test_an_answer_of_kubernetes_that_is_no_rayjob_is_passing_trouble(api, answer):
    jobs = KubeRay(RayJob(namespace="ml"), api)
    api.objects["ml", "a"] = answer
    with pytest.raises(ConnectionError, match="answers with no RayJob"):
        jobs.find("a")


@pytest.mark.parametrize("status", [None, "x", [1], {"reason": 3, "message": ["m"]}])
def test_a_status_of_other_kinds_is_a_job_that_waits(api, status):
    jobs = KubeRay(RayJob(namespace="ml"), api)
    api.objects["ml", "a"] = {"metadata": {"annotations": 5}, "status": status}
    assert jobs.find("a").state == "waiting"


@pytest.mark.parametrize(("status", "remedy"), [
    (401, "log in again"), (403, "may not create"), (404, "KubeRay is not installed"), (500, "500"),
])
def test_refusals_of_kubernetes_say_what_to_do(api, status, remedy):
    api.refuse = status
    with pytest.raises(ConnectionError, match=remedy):
        KubeRay(RayJob(namespace="ml"), api).submit(REQUEST)
