"""RayJobs on Kubernetes: a cluster of its own for one job, made and removed by KubeRay.

What a cluster looks like (images, node groups, GPUs, secrets) is a manifest, see
`infra/deploy/rayjob.yaml`; what is filled in here is the job, and the times after which Kubernetes
removes the cluster by itself: one that never starts, a job that never ends, one that has ended.
The Kubernetes client comes with the extra `fourm[kubernetes]`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import AsyncIterator
from functools import cached_property
from importlib import resources
from typing import Any

import yaml

from infra.ray_jobs import ANSWER_SECONDS, JobInfo, JobRequest, JobsApi, State
from infra.ray_session import Job, RayJob

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
OWNER = "fourm/owner"
"""Annotation with the id of the flow run that asked."""
MAX_NAME = 47
"""KubeRay derives longer names from a RayJob's."""


class KubeRay:
    """RayJobs of one namespace, as `infra.ray_jobs.Jobs`.

    Args:
        target: namespace, template and times.
        api: a `kubernetes.client.CustomObjectsApi`; None connects to the cluster that this process
            runs in, else to the one of the kubeconfig.

    Raises:
        ModuleNotFoundError: the extra `fourm[kubernetes]` is not installed.
        ValueError: the template is no RayJob.
    """

    def __init__(self, target: RayJob, api: Any = None) -> None:
        self._target = target
        self._api = _connect() if api is None else api
        self._template = read_template(target.template)

    @cached_property
    def _where(self) -> dict[str, str]:
        return {
            "group": GROUP,
            "version": VERSION,
            "namespace": self._target.namespace,
            "plural": PLURAL,
        }

    def submit(self, request: JobRequest) -> None:
        body = manifest(self._template, self._target, request)
        try:
            self._api.create_namespaced_custom_object(
                **self._where, body=body, _request_timeout=ANSWER_SECONDS
            )
        except Exception as error:
            if _status(error) != 409:  # it exists already
                raise _reworded(error) from error

    def find(self, job_id: str) -> JobInfo | None:
        found = self._get(job_id)
        if found is None:
            return None
        metadata, status = found["metadata"], _object(found.get("status"))
        parts = (status.get("reason"), status.get("message"))
        owner = _object(metadata.get("annotations")).get(OWNER, "")
        # It is there until its cluster is gone, which takes a while, and is no job to wait for.
        state = "stopped" if "deletionTimestamp" in metadata else _state(status)
        return JobInfo(state, " ".join(str(part) for part in parts if part), str(owner))

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        """Through the dashboard of the job's own cluster, once there is one."""
        found = self._get(job_id)
        address = _object((found or {}).get("status")).get("dashboardURL")
        if not address or not isinstance(address, str):
            raise ConnectionError(f"the cluster of {job_id} has no dashboard yet")
        address = address if "://" in address else f"http://{address}"
        async for piece in JobsApi(Job(address=address)).tail(job_id):
            yield piece

    def stop(self, job_id: str) -> None:
        try:
            # In the foreground: the RayJob is gone only after its cluster.
            self._api.delete_namespaced_custom_object(
                **self._where, name=job_id, propagation_policy="Foreground",
                _request_timeout=ANSWER_SECONDS,
            )
        except Exception as error:
            if _status(error) != 404:
                raise _reworded(error) from error

    def _get(self, job_id: str) -> dict[str, Any] | None:
        try:
            found = self._api.get_namespaced_custom_object(
                **self._where, name=job_id, _request_timeout=ANSWER_SECONDS
            )
        except Exception as error:
            if _status(error) == 404:
                return None
            raise _reworded(error) from error
        if not isinstance(found, dict) or not isinstance(found.get("metadata"), dict):
            raise ConnectionError(f"Kubernetes answers with no RayJob: {found!r:.200}")
        return found


def read_template(path: str) -> dict[str, Any]:
    """The RayJob manifest at a path or URL, the shipped one for "".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no RayJob, or one without a cluster.
    """
    if path:
        import fsspec

        with fsspec.open(path, "rt") as file:
            text = file.read()
    else:
        path = "infra/deploy/rayjob.yaml"
        text = resources.files("infra").joinpath("deploy/rayjob.yaml").read_text("utf-8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind != "RayJob" or value.get("apiVersion") != f"{GROUP}/{VERSION}":
        raise ValueError(f"{path} is no {GROUP}/{VERSION} RayJob but {kind or 'something else'}")
    if "headGroupSpec" not in value.get("spec", {}).get("rayClusterSpec", {}):
        raise ValueError(f"{path} has no spec.rayClusterSpec.headGroupSpec")
    return value


def manifest(template: dict[str, Any], target: RayJob, request: JobRequest) -> dict[str, Any]:
    """The RayJob of a request: the template with job, owner, environment, image and times.

    Raises:
        ValueError: the id is no Kubernetes name of at most `MAX_NAME` characters.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", request.job_id) or (
        len(request.job_id) > MAX_NAME
    ):
        raise ValueError(f"{request.job_id!r} cannot name a RayJob of at most {MAX_NAME} letters")
    body = copy.deepcopy(template)
    metadata = body.setdefault("metadata", {})
    metadata["name"], metadata["namespace"] = request.job_id, target.namespace
    metadata.setdefault("annotations", {})[OWNER] = request.owner
    spec = body["spec"]
    env = {**target.env, **request.env}
    spec |= {
        "jobId": request.job_id,
        "entrypoint": request.entrypoint,
        # KubeRay hands the job over itself: no pod that could be evicted on its own.
        "submissionMode": "HTTPMode",
        "metadata": {"owner": request.owner},
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": env}),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": target.ttl_seconds,
        "activeDeadlineSeconds": target.deadline_seconds,
        "preRunningDeadlineSeconds": target.start_seconds,
        # A retry would be a new cluster; the flow's own retries know what is left to do.
        "backoffLimit": 0,
    }
    if target.entrypoint_cpus:
        spec["entrypointNumCpus"] = target.entrypoint_cpus
    if target.entrypoint_gpus:
        spec["entrypointNumGpus"] = target.entrypoint_gpus
    _size(spec["rayClusterSpec"], target)
    return body


def _size(cluster: dict[str, Any], target: RayJob) -> None:
    """Image and number of pods."""
    groups = cluster.get("workerGroupSpecs") or []
    if target.replicas is not None:
        for group in groups:
            group["replicas"] = target.replicas
            group["minReplicas"] = min(group.get("minReplicas", target.replicas), target.replicas)
            group["maxReplicas"] = max(group.get("maxReplicas", target.replicas), target.replicas)
    if target.image:
        for group in (cluster["headGroupSpec"], *groups):
            for container in group["template"]["spec"]["containers"]:
                if container["name"].startswith("ray-"):
                    container["image"] = target.image


def _state(status: dict[str, Any]) -> State:
    """Ours for KubeRay's two: that of the Ray job, and that of the whole deployment."""
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if deployment in ("Failed", "ValidationFailed"):
        return "stopped" if job == "STOPPED" else "failed"
    if deployment == "Complete":
        ended: dict[str, State] = {"SUCCEEDED": "succeeded", "STOPPED": "stopped"}
        return ended.get(job, "failed")
    return "running" if job == "RUNNING" else "waiting"


_REMEDIES = {
    401: ": its token is not valid any more; log in again",
    403: ": who asks may not create, get and delete rayjobs in the namespace",
    404: ": there is no such namespace, or KubeRay is not installed in the cluster",
}


def _object(value: Any) -> dict[str, Any]:
    """A part of an answer that should be an object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def _status(error: Exception) -> int | None:
    return getattr(error, "status", None)


def _reworded(error: Exception) -> Exception:
    """Errors of Kubernetes and of its client's connections derive from Exception alone: as the
    OSError that a network trouble is."""
    from urllib3.exceptions import HTTPError

    if isinstance(error, HTTPError):
        return ConnectionError(f"Kubernetes cannot be reached: {error}")
    if _status(error) is None:
        return error
    status, reason = _status(error), getattr(error, "reason", "") or ""
    remedy = _REMEDIES.get(status or 0, "")
    return ConnectionError(f"Kubernetes answers {status} {reason}".rstrip() + remedy)


def _connect() -> Any:
    try:
        from kubernetes import client, config
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the Ray target 'rayjob' needs the Kubernetes client: pip install 'fourm[kubernetes]'"
        ) from error
    try:
        config.load_incluster_config()
    except config.ConfigException:
        config.load_kube_config()
    return client.CustomObjectsApi()
