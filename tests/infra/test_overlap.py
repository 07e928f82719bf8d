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
    made = []
    stream = prefetch((made.append(i) or i for i in range(1000)), depth=2)
    next(stream)
    time.sleep(0.2)
    assert len(made) <= 4
    stream.close()
    deadline = time.monotonic() + 5
    while any(t.name == "prefetch" for t in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread outlives its consumer"
        time.sleep(0.02)


def test_closing_returns_after_the_item_under_way_where_asked():
    made, go, begun = [], threading.Event(), threading.Event()

    def source():
        yield 1
        begun.set()
        assert go.wait(60)
        made.append(2)
        yield 2

    stream = prefetch(source(), wait=True)
    next(stream)
    assert begun.wait(60)
    threading.Timer(0.2, go.set).start()
    stream.close()
    assert made == [2]
    assert not any(t.name == "prefetch" for t in threading.enumerate())


def test_stages_overlap():
    began = time.monotonic()
    slow = lambda x: time.sleep(0.02) or x  # noqa: E731
    list(pipelined(range(20), slow, slow, slow))
    assert time.monotonic() - began < 0.02 * 60 * 0.8
