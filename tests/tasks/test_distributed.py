"""What the workers of a training on Ray are given of a cluster."""

from __future__ import annotations

import pytest

from tasks.distributed import _scaling


@pytest.mark.parametrize(("there", "each", "on_gpu"), [
    ({"CPU": 9.0, "GPU": 8.0}, None, True), ({"CPU": 9.0}, {"CPU": 4}, False),
])
def test_workers_take_the_gpus_of_the_cluster_whatever_the_driver_has(
    monkeypatch, there, each, on_gpu
):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    found = _scaling(2)
    assert (found.num_workers, found.use_gpu, found.resources_per_worker) == (2, on_gpu, each)


def test_workers_that_are_to_have_gpus_wait_for_a_cluster_that_starts_with_none(
    monkeypatch, caplog
):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32.0})
    found = _scaling(2, on_gpus=True)
    assert (found.num_workers, found.use_gpu, found.resources_per_worker) == (2, True, None)
    assert "2 workers take a GPU each, and the cluster has 0 as yet" in caplog.text


def test_more_workers_than_the_cluster_has_room_for_are_told_of(monkeypatch, caplog):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 9.0, "GPU": 1.0})
    _scaling(2)
    assert "2 workers take a GPU each, and the cluster has 1 as yet" in caplog.text
