"""Workers of a run on Ray share the turns at a host, also when who lends them dies."""

import asyncio
import threading
from pathlib import Path

import pytest

from infra.addresses import AddressPolicy
from infra.download import DownloadPolicy
from infra.ledger import Ledger
from infra.ray_session import Embedded
from infra.runner import Resources, RunProgress, run_stages
from infra.store import Store
from tasks.fetch import FetchConfig, fetch_job, make_plan
from tests.infra.test_turns import Host


@pytest.fixture
def host():
    """A host in a thread, and its address."""
    site, ready, done = Host(seconds=0.02), threading.Event(), asyncio.Event()
    loop, found = asyncio.new_event_loop(), []

    async def serve() -> None:
        async with site.serving() as base:
            found.append(base)
            ready.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(60)
    yield site, found[0]
    loop.call_soon_threadsafe(done.set)
    thread.join(60)


@pytest.mark.slow
def test_two_workers_never_connect_twice_to_a_host_with_one_turn_though_its_keeper_dies(
    host, tmp_path, monkeypatch
):
    import ray

    site, base = host
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "list.tsv").write_text("".join(f"{base}/{row}\tc\n" for row in range(120)))
    store = Store(str(tmp_path / "data"))
    plan = make_plan(store, str(tmp_path / "list.tsv"), shard_rows=10)
    downloads = DownloadPolicy(
        addresses=AddressPolicy(frozenset({"127.0.0.1"})), per_host=1, timeout=2.0
    )
    job = fetch_job(plan, FetchConfig(downloads=downloads))
    killed: list[str] = []

    def kill_the_keeper(_: RunProgress) -> None:
        names = [] if killed else ray.util.list_named_actors()
        for name in names:
            ray.kill(ray.get_actor(name), no_restart=False)
            killed.append(name)

    report = run_stages(
        store, [job], target=Embedded(num_cpus=2), resources=Resources(workers=2),
        on_progress=kill_the_keeper,
    )[job.stage.id]
    assert [name.startswith("turns-") for name in killed] == [True]
    assert (report.done, report.drops) == (12, {"not_image": 120})
    assert site.most == 1
    assert sorted(site.asked.values()) == [1] * 120
    assert Ledger(store).quarantined(job.stage) == {}
