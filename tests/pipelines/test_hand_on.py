"""A complete step is announced by deployed runs that stand alone, and never fails the step."""

from __future__ import annotations

import contextlib

import pytest

from infra.store import Store
from pipelines.stages import hand_on


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    made: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "infra.automations.announce", lambda client, store, *what: made.append(what)
    )
    monkeypatch.setattr(
        "prefect.client.orchestration.get_client", lambda **_: contextlib.nullcontext()
    )
    return made


@pytest.mark.parametrize(
    ("of", "parent", "version", "expected"),
    [
        ("deployment", None, "v1", True),
        (None, None, "v1", False),
        ("deployment", "end-to-end", "v1", False),
        ("deployment", None, None, False),
    ],
)
def test_only_a_deployed_run_that_stands_alone_hands_on(
    announced, monkeypatch, tmp_path, of, parent, version, expected
):
    _as_run(monkeypatch, of, parent)
    hand_on(Store(str(tmp_path)), "label", version)
    assert announced == ([("label", "v1")] if expected else [])


def test_a_server_that_is_away_does_not_fail_the_step(announced, monkeypatch, tmp_path, caplog):
    def fail(*args: object) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr("infra.automations.announce", fail)
    _as_run(monkeypatch, "deployment", None)
    hand_on(Store(str(tmp_path)), "label", "v1")
    assert "could not be announced" in caplog.text


def _as_run(patch: pytest.MonkeyPatch, deployment: str | None, parent: str | None) -> None:
    """Prefect's own way to pretend, in tests, that code runs in a flow run."""
    for name, value in (("DEPLOYMENT__ID", deployment), ("FLOW_RUN__PARENT_FLOW_RUN_ID", parent)):
        if value is None:
            patch.delenv(f"PREFECT__RUNTIME__{name}", raising=False)
        else:
            patch.setenv(f"PREFECT__RUNTIME__{name}", value)
