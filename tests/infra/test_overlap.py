"""Prefetching keeps order, passes errors on, and ends its thread."""

import threading
import time

import pytest

from infra.runner import pipelined, prefetch


def test_items_arrive_in_order_through_all_stages():
    assert list(pipelined(range(50), lambda x: x + 1, lambda x: x * 2)) == [
        2 * (i + 1) for i in range(50)
    ]


def test_an_error_of_the_source_reaches_the_consumer_in_its_place():
    def source():
        yield 1
        raise OSError("torn")

    stream = prefetch(source())
    assert next(stream) == 1
    with pytest.raises(OSError, match="torn"):
        next(stream)


def test_an_error_of_a_stage_reaches_the_consumer():
    with pytest.raises(ZeroDivisionError):
        list(pipelined([1, 0], lambda x: 1 / x, str))


def test_the_source_runs_ahead_by_the_depth_alone_and_stops_with_the_consumer():
    made, before = [], set(threading.enumerate())
    stream = prefetch((made.append(i) or i for i in range(1000)), depth=2)
    next(stream)
    time.sleep(0.2)
    assert len(made) <= 4
    stream.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), "the thread outlives its consumer"


def test_stages_overlap():
    """Three stages meet while each has an item in hand: one after another they never would."""
    meeting = threading.Barrier(3, timeout=60)
    stages = [lambda x, at=at: meeting.wait() * 0 + x if x == at else x for at in (2, 1, 0)]
    assert list(pipelined(range(3), *stages)) == [0, 1, 2]
