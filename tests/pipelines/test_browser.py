"""What a person sees in Prefect's UI, in a real browser: runs, forms, tables, drawn pictures.

FOURM_SCREENSHOTS names a folder for pictures of the pages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.store import Store
from tests.infra.browser import Page, page
from tests.infra.serving import ROOT, post, server

PICTURE = "[...document.querySelectorAll('img')].some(i => i.src.startsWith('data:image/jpeg')" \
    " && i.complete && i.naturalWidth > 200)"
DIAGRAM = "[...document.querySelectorAll('svg')].some(s => s.textContent.includes('main v1'))"


@pytest.mark.browser
@pytest.mark.slow
def test_runs_forms_tables_and_pictures_are_drawn(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "data"))
    with page() as tab, server(tmp_path) as (api, environment):
        environment["PREFECT_LOGGING_EXTRA_LOGGERS"] = "fourm"
        program = Path(__file__).with_name("shown_flow.py")
        done = subprocess.run(
            [sys.executable, program, store.url], env=environment, cwd=ROOT, timeout=600
        )
        assert done.returncode == 0
        (run,) = post(api, "/flow_runs/filter", {})
        (deployment,) = post(api, "/deployments/filter", {})
        found = {a["key"]: a["id"] for a in post(api, "/artifacts/filter", {})}
        ui = f"{api.removesuffix('/api')}/v2"

        def see(path: str, expression: str, what: str) -> None:
            _see(tab, f"{ui}/{path}", expression, what)

        see(f"runs/flow-run/{run['id']}",
            _reads(run["name"], "Completed", "shards done 2"), "the run")
        see(f"deployments/deployment/{deployment['id']}/run",
            _reads("labelers", "Ray", "root"), "the form")
        see(f"artifacts/artifact/{found['gallery']}", PICTURE, "the gallery")
        see(f"artifacts/artifact/{found['lineage']}", DIAGRAM, "the lineage")
        see(f"artifacts/artifact/{found['label-status']}",
            _reads("2/3", "ValueError 1", "slowest", "time left"), "the status")


def _see(tab: Page, url: str, expression: str, what: str) -> None:
    tab.open(url)
    try:
        tab.wait_for(f"location.href.startsWith('{url}') && {expression}", what)
    finally:
        if folder := os.environ.get("FOURM_SCREENSHOTS"):
            tab.screenshot(Path(folder) / f"{what.replace(' ', '-')}.png")


def _reads(*words: str) -> str:
    """The page's text holds all words, whatever their case."""
    text = "document.body.innerText.toLowerCase()"
    return " && ".join(f"{text}.includes({word.lower()!r})" for word in words)
