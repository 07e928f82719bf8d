"""Runs are called after their dataset, and deployments bear tags that find them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.params import JanitorParams

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = [ROOT / "prefect.yaml", ROOT / "infra/deploy/k8s/prefect.yaml"]


def deployments(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(path.read_text())["deployments"]
    return found


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("data/cc12m", "cc12m"),
        ("s3://bucket/sets/cc12m/", "cc12m"),
        ("s3://bucket", "bucket"),
        (".", "dataset"),
        ("data/with blanks & <b>more</b>", "b"),
        ("data/a:{b}/c d", "c-d"),
        ("data/" + "x" * 99, "x" * 40),
    ],
)
def test_a_run_is_called_after_the_end_of_its_datasets_address(root: str, name: str) -> None:
    from pipelines.janitor import janitor_flow

    form = JanitorParams(root=root)
    assert str(janitor_flow.flow_run_name).format(params=form) == name


def test_every_deployed_flow_names_its_runs() -> None:
    for path in DEPLOYMENTS:
        for deployment in deployments(path):
            file, _, function = deployment["entrypoint"].partition(":")
            module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            flow = getattr(module, function)
            assert flow.flow_run_name == "{params.dataset}"  # beside the flow's


def test_every_deployment_bears_the_tag_of_all_and_that_of_its_part() -> None:
    for path in DEPLOYMENTS:
        for deployment in deployments(path):
            ours, part = deployment["tags"]
            assert ours == "fourm"
            assert part in ("data", "models", "upkeep")
