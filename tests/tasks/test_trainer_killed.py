"""Trainings on several workers, and such whose workers, process or driver are killed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from infra.ray_session import Embedded, ray_session
from infra.store import Store
from tasks.run_store import Checkpoints
from tasks.trainer import Trainer
from tests.tasks.test_trainer import CONFIG, Linear

SHORT = dataclasses.replace(CONFIG, steps=8, log_every=1)


@pytest.mark.slow
def test_two_gloo_workers_train_what_one_process_trains(tmp_path):
    from tasks.distributed import fit_distributed

    store = Store(str(tmp_path))
    config = dataclasses.replace(CONFIG, steps=4, log_every=1)
    seen: list[tuple[int, int]] = []
    with ray_session(Embedded(num_cpus=3)):
        result = fit_distributed(
            store, "two", Linear(), config, num_workers=2,
            on_progress=lambda step, steps, metrics: seen.append((step, steps)),
        )
    assert result.steps == 4
    # What the workers log reaches the process that shows it, the last point by its end at least.
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4)
    one = Trainer(store, "one", Linear(), config).fit().model.state_dict()
    two, _ = Checkpoints(store, "two").newest()
    for name, value in two["model"].items():
        assert torch.allclose(value, one[name], atol=1e-6)


class Mortal(Linear):
    """One of its workers is killed, once, at step 5."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def batch(self, step: int, rank: int, world: int) -> torch.Tensor:
        # The pipeline runs two batches ahead: wait until a checkpoint is there to resume from.
        if step == 5 and rank == 1:
            while not Checkpoints(self.store, "run").steps():
                time.sleep(0.05)
            if self.store.create("killed", b""):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step, rank, world)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_killed_worker_is_restarted_and_goes_on_from_a_checkpoint(tmp_path):
    from tasks.distributed import fit_distributed

    store = Store(str(tmp_path))
    config = dataclasses.replace(CONFIG, steps=8, log_every=1)
    with ray_session(Embedded(num_cpus=3)):
        result = fit_distributed(store, "run", Mortal(store), config, num_workers=2)
    assert store.exists("killed")
    assert result.steps == 8
    one = Trainer(store, "one", Linear(), config).fit().model.state_dict()
    kept, _ = Checkpoints(store, "run").newest()
    for name, value in kept["model"].items():
        assert torch.allclose(value, one[name], atol=1e-6)


class Fatal(Linear):
    """Kills, once and at step 5, the process whose id `victim` holds in the store."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def batch(self, step: int, rank: int, world: int) -> torch.Tensor:
        if step == 5 and rank == 0:
            while not Checkpoints(self.store, "run").steps():
                time.sleep(0.05)
            if self.store.create("killed", b""):
                os.kill(int(self.store.read("victim")), signal.SIGKILL)
                time.sleep(600)
        return super().batch(step, rank, world)


def _alone(root: str) -> None:
    store = Store(root)
    store.write("victim", str(os.getpid()).encode())
    Trainer(store, "run", Fatal(store), SHORT).fit()


def _drive(root: str) -> None:
    from tasks.distributed import fit_distributed

    store = Store(root)
    store.write("victim", str(os.getpid()).encode())
    with ray_session(Embedded(num_cpus=3)):
        fit_distributed(store, "run", Fatal(store), SHORT, num_workers=2)


def _killed(target: Callable[[str], None], root: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=target, args=(root,))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert 0 < Checkpoints(Store(root), "run").steps()[-1] <= 5


@pytest.mark.slow
@pytest.mark.chaos
def test_a_training_that_was_killed_with_its_process_ends_in_the_same_bits(tmp_path):
    store = Store(str(tmp_path))
    _killed(_alone, str(tmp_path))
    resumed = Trainer(store, "run", Fatal(store), SHORT).fit().model.state_dict()
    whole = Trainer(store, "whole", Linear(), SHORT).fit().model.state_dict()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)


@pytest.mark.slow
@pytest.mark.chaos
def test_after_its_driver_was_killed_a_training_goes_on_with_another_number_of_workers(tmp_path):
    """The same samples: two workers, then one, train what one process does without a break."""
    store = Store(str(tmp_path))
    _killed(_drive, str(tmp_path))
    resumed = Trainer(store, "run", Fatal(store), SHORT).fit()
    assert resumed.steps == 8
    whole = Trainer(store, "whole", Linear(), SHORT).fit().model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.allclose(value, whole[name], atol=1e-6)
