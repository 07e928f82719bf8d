"""The files of infra/deploy parse, use fields that exist, and agree with the code and the lock.

The tables below are our own short account of the fields that each kind has, as far as these files
use them: a misspelt or misplaced field is found without a cluster and without a network.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.automations import NEXT
from pipelines import params as forms

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "infra" / "deploy"
MANIFESTS = [DEPLOY / "rayjob.yaml", DEPLOY / "k8s/worker.yaml", DEPLOY / "k8s/raycluster.yaml"]
DEPLOYMENTS = [ROOT / "prefect.yaml", DEPLOY / "k8s/prefect.yaml"]

Spec = dict[str, Any]
NAMES = {str: str}
META: Spec = {"name": str, "labels": NAMES, "annotations": NAMES}
RESOURCES: Spec = {"requests": NAMES, "limits": NAMES}
CONTAINER: Spec = {
    "name": str, "image": str, "args": [str], "command": [str], "resources": RESOURCES,
    "ports": [{"containerPort": int, "name": str}],
    "env": [{"name": str, "value": str}],
    "envFrom": [{"secretRef": {"name": str}}],
    "livenessProbe": {
        "httpGet": {"path": str, "port": int}, "initialDelaySeconds": int, "periodSeconds": int,
    },
    "securityContext": {"allowPrivilegeEscalation": bool},
}  # fmt: skip
POD: Spec = {
    "containers": [CONTAINER], "restartPolicy": {"Never", "Always", "OnFailure"},
    "serviceAccountName": str, "terminationGracePeriodSeconds": int,
    "tolerations": [{"key": str, "operator": {"Exists", "Equal"}, "effect": str}],
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int},
}  # fmt: skip
TEMPLATE: Spec = {"metadata": META, "spec": POD}
RAY_CLUSTER: Spec = {
    "rayVersion": str, "enableInTreeAutoscaling": bool,
    "headGroupSpec": {"rayStartParams": NAMES, "template": TEMPLATE},
    "workerGroupSpecs": [{
        "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
        "rayStartParams": NAMES, "template": TEMPLATE,
    }],
}  # fmt: skip
RAY_JOB: Spec = {
    "entrypoint": str, "jobId": str, "metadata": NAMES, "runtimeEnvYAML": str,
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int, "preRunningDeadlineSeconds": int, "backoffLimit": int,
    "entrypointNumCpus": float, "entrypointNumGpus": float, "rayClusterSpec": RAY_CLUSTER,
}  # fmt: skip
BINDING: Spec = {
    "roleRef": {"apiGroup": str, "kind": {"Role", "ClusterRole"}, "name": str},
    "subjects": [{"kind": {"ServiceAccount"}, "name": str, "namespace": str}],
}
SELECTOR: Spec = {"matchLabels": NAMES}
KINDS: dict[tuple[str, str], Spec] = {
    ("ray.io/v1", "RayJob"): {"spec": RAY_JOB},
    ("ray.io/v1", "RayCluster"): {"spec": RAY_CLUSTER},
    ("v1", "ServiceAccount"): {},
    ("rbac.authorization.k8s.io/v1", "Role"): {
        "rules": [{"apiGroups": [str], "resources": [str], "verbs": [str]}]
    },
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): BINDING,
    ("apps/v1", "Deployment"): {
        "spec": {"replicas": int, "selector": SELECTOR, "template": TEMPLATE}
    },
    ("networking.k8s.io/v1", "NetworkPolicy"): {
        "spec": {
            "podSelector": SELECTOR, "policyTypes": [{"Ingress", "Egress"}],
            "ingress": [{"from": [{"podSelector": SELECTOR, "namespaceSelector": SELECTOR}]}],
        }
    },
}  # fmt: skip
CHECK: Spec = {"test": [str], "interval": str, "timeout": str, "retries": int}
SERVICE: Spec = {
    "image": str, "build": {"context": str, "dockerfile": str}, "command": [str], "ports": [str],
    "restart": {"no", "always", "on-failure", "unless-stopped"}, "environment": NAMES,
    "volumes": [str], "healthcheck": CHECK, "init": bool, "stop_grace_period": str,
    "shm_size": str, "depends_on": {str: {"condition": {
        "service_started", "service_healthy", "service_completed_successfully",
    }}},
}  # fmt: skip


def faults(value: Any, spec: Any, where: str = "") -> Iterator[str]:
    """What of a parsed file its spec does not allow: a type, a set of words, a list or fields."""
    if isinstance(spec, dict):
        if not isinstance(value, dict):
            yield f"{where} is no mapping"
            return
        for name, part in value.items():
            inner = spec[str] if str in spec else spec.get(name)
            if inner is None:
                yield f"{where}.{name} does not exist"
            else:
                yield from faults(part, inner, f"{where}.{name}")
    elif isinstance(spec, list):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for number, part in enumerate(value):
            yield from faults(part, spec[0], f"{where}[{number}]")
    elif isinstance(spec, set):
        if value not in spec:
            yield f"{where} is {value!r}, not one of {sorted(spec)}"
    elif type(value) is not spec:
        yield f"{where} is {value!r}, not a {spec.__name__}"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M)
    assert found, package
    return found[1]


def manifest_faults(body: dict[str, Any]) -> list[str]:
    spec = KINDS[body["apiVersion"], body["kind"]]
    head = {"apiVersion": str, "kind": str, "metadata": {**META, "namespace": str}}
    return list(faults(body, head | spec, body["kind"]))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_manifest_uses_fields_that_exist(path: Path) -> None:
    for body in documents(path):
        assert manifest_faults(body) == []


def test_a_misspelt_or_misplaced_field_is_found() -> None:
    (body,) = documents(DEPLOY / "rayjob.yaml")
    body["spec"]["ttlSeconds"] = 3
    body["spec"]["rayClusterSpec"]["headGroupSpec"]["replicas"] = "1"
    body["spec"]["submissionMode"] = "FaxMode"
    body["spec"]["activeDeadlineSeconds"] = "60"
    assert [fault.split()[0] for fault in manifest_faults(body)] == [
        "RayJob.spec.activeDeadlineSeconds",
        "RayJob.spec.rayClusterSpec.headGroupSpec.replicas",
        "RayJob.spec.ttlSeconds",
        "RayJob.spec.submissionMode",
    ]


def test_what_is_made_from_the_template_uses_fields_that_exist() -> None:
    from infra.ray_jobs import JobRequest
    from infra.ray_session import RayJob
    from infra.rayjob import manifest, read_template

    target = RayJob(image="x:1", replicas=3, entrypoint_cpus=2, entrypoint_gpus=1, env={"A": "1"})
    body = manifest(read_template(""), target, JobRequest("fourm-a-0", "python -c 0", "run"))
    assert manifest_faults(body) == []


def _groups(path: Path) -> list[dict[str, Any]]:
    spec = documents(path)[0]["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("name", ["rayjob.yaml", "k8s/raycluster.yaml"])
def test_ray_clusters_run_the_locked_ray_within_their_bounds(name: str) -> None:
    spec = documents(DEPLOY / name)[0]["spec"]
    assert spec.get("rayClusterSpec", spec)["rayVersion"] == locked("ray")
    for group in _groups(DEPLOY / name)[1:]:
        cluster = spec.get("rayClusterSpec", spec)
        assert cluster.get("enableInTreeAutoscaling") or group["replicas"], "it would never start"
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in _groups(DEPLOY / name):
        for container in group["template"]["spec"]["containers"]:
            asked, most = container["resources"]["requests"], container["resources"]["limits"]
            assert asked["memory"] == most["memory"], "Ray sizes itself by the limit"


def test_compose_is_whole() -> None:
    value = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = value["services"]
    assert {"postgres", "redis", "server", "services", "worker", "s3"} <= services.keys()
    for name, service in services.items():
        assert list(faults(service, SERVICE, name)) == []
        assert service.get("depends_on", {}).keys() <= services.keys()
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for the health of {other}"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in value["volumes"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} would be open to everybody"


def test_volumes_of_our_image_belong_to_its_user() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    text = (DEPLOY / "Dockerfile").read_text()
    owned = re.search(r"chown fourm (.+)$", text, re.M)
    assert owned
    folders = [volume.split(":")[1] for service in services.values()
               if service["image"].startswith("fourm:") for volume in service.get("volumes", [])]
    assert folders
    assert set(folders) <= set(owned[1].split())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


def test_the_server_of_compose_has_postgres_and_redis() -> None:
    from prefect.settings import Settings

    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("server", "services"):
        environment = services[name]["environment"]
        assert "@postgres:5432/" in environment["PREFECT_API_DATABASE_CONNECTION_URL"]
        assert environment["PREFECT_MESSAGING_BROKER"] == "prefect_redis.messaging"
        assert environment["PREFECT_REDIS_MESSAGING_HOST"] in services
        with pytest.MonkeyPatch.context() as patch:
            for key, text in environment.items():
                patch.setenv(key, text)
            settings = Settings().server
        assert settings.events.messaging_broker == "prefect_redis.messaging"
        alone = [text for text in _texts(settings.model_dump())
                 if text.endswith(".memory") or text.startswith("memory:")]
        assert alone == [], "what one process keeps in memory the other one never sees"


def test_a_server_whose_way_to_redis_is_cut_does_not_spin_on_it() -> None:
    """Keep-alive ends such a connection with ETIMEDOUT, which redis-py takes for a read that found
    nothing, at once and for ever."""
    from redis.asyncio import ConnectionPool

    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("server", "services"):
        url = services[name]["environment"]["PREFECT_SERVER_DOCKET_URL"]
        assert ConnectionPool.from_url(url).connection_kwargs["socket_keepalive"] is False


def test_runs_ask_again_while_the_servers_database_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import Settings

    from pipelines.server import _SETTINGS

    pools = [yaml.safe_load(path.read_text())["definitions"]["pool"] for path in DEPLOYMENTS]
    for environment in (_SETTINGS, *(pool["job_variables"]["env"] for pool in pools)):
        monkeypatch.delenv("PREFECT_CLIENT_RETRY_EXTRA_CODES", raising=False)
        for key, text in environment.items():
            monkeypatch.setenv(key, text)
        assert 500 in Settings().client.retry_extra_codes


def test_browsers_and_notifications_find_the_server_of_compose_where_its_port_is() -> None:
    from prefect.settings import Settings

    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    (published,) = services["server"]["ports"]
    port = published.split(":")[1]
    for name in ("server", "services"):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PREFECT_API_URL", raising=False)
            patch.setenv("PREFECT_SERVER_API_HOST", "0.0.0.0")  # as `--host` sets it
            for key, text in services[name]["environment"].items():
                patch.setenv(key, text)
            settings = Settings()
        assert settings.server.ui.api_url == f"http://localhost:{port}/api"
        assert settings.ui_url == f"http://localhost:{port}"


def test_what_the_image_adds_is_locked_too() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (DEPLOY / "Dockerfile").read_text()
    for extra in re.search(r"'\.\[(.+)\]'", text)[1].split(","):
        for wanted in extras["optional-dependencies"][extra]:
            assert locked(re.match(r"[\w-]+", wanted)[0])


def test_workers_with_gpus_have_the_image_whose_torch_can_use_them() -> None:
    page, text = ((DEPLOY / name).read_text() for name in ("README.md", "Dockerfile"))
    built = set(re.findall(r"-t (fourm:\S+)", page))
    assert built == set(re.findall(r"-t (fourm:\S+)", text))
    for group in _groups(DEPLOY / "rayjob.yaml"):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] in built
        on_gpus = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith("-cuda") == on_gpus


def test_what_deployments_write_by_default_outlives_the_containers_of_compose() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    folders = [volume.split(":")[1] for volume in services["worker"]["volumes"]]
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        root = Path("/app") / deployment["parameters"]["params"]["root"]
        assert any(root.is_relative_to(folder) for folder in folders), root


def test_images_are_pinned_and_ours_has_the_packages_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [*MANIFESTS, *DEPLOYMENTS, DEPLOY / "compose.yaml", DEPLOY / "Dockerfile"]
    images = [
        match[1]
        for path in files
        for match in re.finditer(r"^\s*-?\s*(?:image:|FROM)\s+(\S+)", path.read_text(), re.M)
    ]
    assert len(images) > 10
    for image in images:
        name, _, tag = image.partition(":")
        assert tag not in ("", "latest"), image
        if name == "fourm":
            assert tag.removesuffix("-cuda") == project["version"]
    base = re.search(r"FROM python:(\d+\.\d+)", (DEPLOY / "Dockerfile").read_text())
    assert base
    assert project["requires-python"] == f">={base[1]}"


def test_the_image_holds_every_floor_and_the_extras_that_exist() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for floor in ("infra", "tokenizers_vq", "models", "tasks", "pipelines"):
        assert f"COPY {floor} {floor}\n" in text
    for line in re.findall(r"^COPY (.+) \./$", text, re.M):
        for name in line.split():
            assert (ROOT / name).exists(), name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.search(r"'\.\[(.+)\]'", text)[1].split(","):
        assert extra in extras["optional-dependencies"]


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_deployment_names_a_flow_and_fills_its_form(path: Path) -> None:
    value = yaml.safe_load(path.read_text())
    assert value["prefect-version"] == locked("prefect")
    names = set()
    for deployment in value["deployments"]:
        file, _, function = deployment["entrypoint"].partition(":")
        tree = ast.parse((ROOT / file).read_text())
        (flow,) = [
            node for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name == function
        ]  # fmt: skip
        form = getattr(forms, ast.unparse(flow.args.args[0].annotation))
        form(**deployment["parameters"]["params"])
        names.add((function, deployment["name"]))
        pool = deployment["work_pool"]
        assert pool["job_variables"]["env"]["PREFECT_LOGGING_EXTRA_LOGGERS"] == "fourm"
        assert deployment["concurrency_limit"]["limit"] == 1
        assert all(schedule["active"] is False for schedule in deployment.get("schedules", []))
    assert len(names) == len(value["deployments"])


def test_steps_hand_over_to_deployments_that_exist_as_the_page_says_on_kubernetes_too() -> None:
    def names(path: Path) -> set[str]:
        found = yaml.safe_load(path.read_text())["deployments"]
        flows = [each["entrypoint"].partition(":")[2].removesuffix("_flow") for each in found]
        return {f"{flow.replace('_', '-')}/{each['name']}"
                for flow, each in zip(flows, found, strict=True)}  # fmt: skip

    assert set(NEXT.values()) <= names(ROOT / "prefect.yaml")
    page = (DEPLOY / "README.md").read_text()
    (given,) = re.findall(r"^fourm automations --apply --deployment (\S+)$", page, re.MULTILINE)
    there = names(DEPLOY / "k8s/prefect.yaml")
    assert {f"{usual.partition('/')[0]}/{given}" for usual in NEXT.values()} <= there


def test_flow_runs_on_kubernetes_may_do_what_the_code_does() -> None:
    bodies = documents(DEPLOY / "k8s/worker.yaml")
    named = {(body["kind"], body["metadata"]["name"]): body for body in bodies}
    (rule,) = named["Role", "fourm-flow"]["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
    assert {"get", "create", "delete"} <= set(rule["verbs"])
    value = yaml.safe_load((DEPLOY / "k8s/prefect.yaml").read_text())
    account = value["definitions"]["pool"]["job_variables"]["service_account_name"]
    assert ("ServiceAccount", account) in named
    for kind, name in named:
        if kind == "RoleBinding":
            binding = named[kind, name]
            assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in named
            assert all((s["kind"], s["name"]) in named for s in binding["subjects"])


def test_a_flow_run_on_kubernetes_has_the_stores_secret_and_may_reach_ray() -> None:
    template = json.loads((DEPLOY / "k8s/pool.json").read_text())
    variables = template["variables"]["properties"]
    asked = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert asked == set(variables)
    value = yaml.safe_load((DEPLOY / "k8s/prefect.yaml").read_text())
    assert value["definitions"]["pool"]["job_variables"].keys() <= variables.keys()
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]
    head = _groups(DEPLOY / "rayjob.yaml")[0]["template"]["spec"]["containers"][0]
    assert pod["spec"]["containers"][0]["envFrom"] == head["envFrom"]
    (policy,) = (body for body in documents(DEPLOY / "k8s/raycluster.yaml")
                 if body["kind"] == "NetworkPolicy")  # fmt: skip
    allowed = [each["podSelector"]["matchLabels"] for each in policy["spec"]["ingress"][0]["from"]]
    assert pod["metadata"]["labels"] in allowed


def test_the_worker_on_kubernetes_looks_only_where_its_role_lets_it() -> None:
    (worker,) = (body for body in documents(DEPLOY / "k8s/worker.yaml")
                 if body["kind"] == "Deployment")  # fmt: skip
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    template = container["args"][container["args"].index("--base-job-template") + 1]
    path = ROOT / template.removeprefix("/app/")
    pool = json.loads(path.read_text())["variables"]["properties"]
    env = {each["name"]: each["value"] for each in container["env"]}
    watched = env["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"]
    assert watched == pool["namespace"]["default"]
