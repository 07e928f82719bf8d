"""Batches are halved where memory runs out, and results do not tell."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.fitting import FittingBatches, gpu_lost


class Network:
    """Squares numbers; fails as torch does above so many at once."""

    def __init__(self, limit: int, error: BaseException) -> None:
        self.limit, self.error, self.sizes = limit, error, list[int]()

    def __call__(self, batch: Sequence[int]) -> list[int]:
        if len(batch) > self.limit:
            raise self.error
        self.sizes.append(len(batch))
        return [number**2 for number in batch]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    MemoryError(),
]


@given(st.lists(st.integers(0, 99), max_size=60), st.integers(1, 40), st.integers(1, 40))
def test_every_item_meets_the_network_once_and_in_order_whatever_fits(items, size, limit):
    network = Network(limit, ERRORS[0])
    found = list(FittingBatches(size, "test")(network, items))
    assert [number for batch, _ in found for number in batch] == items
    assert [number for _, squares in found for number in squares] == [n**2 for n in items]
    assert all(length <= min(size, limit) for length in network.sizes)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_size_that_fitted_stays_and_is_told_once(error, caplog):
    network, batches = Network(3, error), FittingBatches(8, "labeler depth")
    for _ in range(2):
        list(batches(network, range(8)))
    assert network.sizes == [2] * 8
    assert [record.getMessage() for record in caplog.records] == [
        "labeler depth: out of memory with 8 items, going on with 4",
        "labeler depth: out of memory with 4 items, going on with 2",
    ]


def test_a_single_item_that_does_not_fit_is_an_error_that_names_the_network():
    with pytest.raises(MemoryError, match=r"labeler depth.*single item.*CUDA"):
        list(FittingBatches(8, "labeler depth")(Network(0, ERRORS[0]), range(8)))


def test_other_errors_pass_at_once():
    network, batches = Network(3, RuntimeError("shapes differ")), FittingBatches(8, "test")
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(batches(network, range(8)))
    assert batches.size == 8


def test_batches_hold_at_least_one_item():
    with pytest.raises(ValueError, match="batches of 0 for test"):
        FittingBatches(0, "test")


LOST = torch.AcceleratorError("CUDA error: device-side assert triggered")


def test_a_gpu_that_answers_no_more_is_lost_and_one_that_refused_a_kernel_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu_lost(LOST)

    def dead() -> None:
        raise LOST

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    assert gpu_lost(LOST)
    for error in (*ERRORS, ValueError("odd"), torch.AcceleratorError("CUDA error: out of memory")):
        assert not gpu_lost(error)
