"""Prefetching keeps order, passes errors on, and ends its thread."""

import gc
import os
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from infra import overlap
from infra.overlap import GIVE_WAY, INPUT, OUTPUT, Depths, Lane, Waits, percentages, prefetch


@pytest.fixture
def lane():
    lane = Lane()
    yield lane
    lane.close()


def test_items_arrive_in_order_through_all_stages(lane):
    steps = (lambda x: x + 1, lambda x: x * 2, str)
    assert list(lane.pipelined(range(50), *steps)) == [str(2 * (i + 1)) for i in range(50)]


def test_an_error_of_the_source_reaches_the_consumer_in_its_place():
    def source():
        yield 1
        raise OSError("torn")

    stream = prefetch(source())
    assert next(stream) == 1
    with pytest.raises(OSError, match="torn"):
        next(stream)


@pytest.mark.parametrize("failing", range(3))
def test_an_error_of_a_stage_reaches_the_consumer_behind_what_was_done(lane, failing):
    steps = [lambda x: x] * 3
    steps[failing] = lambda x: 12 // x
    stream = lane.pipelined([1, 1, 1, 1, 0], *steps)
    assert next(stream) in (1, 12)
    with pytest.raises(ZeroDivisionError):
        list(stream)


def test_the_middle_stage_of_every_unit_runs_in_one_thread(lane):
    threads = [set(), set(), set()]
    steps = [lambda x, seen=seen: seen.add(threading.current_thread()) or x for seen in threads]
    for _ in range(2):
        list(lane.pipelined(range(9), *steps))
    assert len(threads[1]) == 1
    assert not threads[1] & (threads[0] | threads[2] | {threading.current_thread()})


def test_letting_go_of_a_pipeline_ends_its_threads_and_frees_the_lane(lane):
    stream = lane.pipelined(iter(int, 1), abs, abs, abs)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 60
    while any(t.name.startswith(("prefetch", "trailing")) for t in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread outlives its consumer"
        time.sleep(0.02)
    assert list(lane.pipelined([1], abs, abs, abs)) == [1]


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


def test_stages_overlap(lane):
    """Three stages meet while each has an item in hand: one after another they never would."""
    meeting = threading.Barrier(3, timeout=60)
    stages = [lambda x, at=at: meeting.wait() * 0 + x if x == at else x for at in (2, 1, 0)]
    assert list(lane.pipelined(range(3), *stages)) == [0, 1, 2]


@pytest.mark.parametrize("slow", [INPUT, OUTPUT])
def test_a_slow_decoder_shows_as_waiting_for_input_and_a_slow_encoder_for_output(
    lane, monkeypatch, slow
):
    clock, entered = [0.0], Counter()
    monkeypatch.setattr(overlap, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Watched(Waits):
        @contextmanager
        def on(self, what):
            with super().on(what):
                entered[what] += 1
                yield

    def second(item):
        """Takes a second, which passes when the network waits for this very item."""
        deadline = time.monotonic() + 60
        while entered[slow] <= item and time.monotonic() < deadline:
            time.sleep(0.001)
        clock[0] += 1
        return item

    steps = {INPUT: (second, abs, abs), OUTPUT: (abs, abs, second)}[slow]
    waits = Watched()
    assert list(lane.pipelined(range(9), *steps, waits=waits)) == list(range(9))
    other = {INPUT: OUTPUT, OUTPUT: INPUT}[slow]
    assert waits.record() == {slow: 9.0, other: 0.0}
    assert waits.record(parts=2)[slow] == 4.5


def test_a_unit_prepares_while_another_has_the_lane_and_that_time_is_not_its_own(lane):
    """The second unit's first items are ready before the first unit lets the lane go."""
    ready, go, waits = threading.Event(), threading.Event(), Waits()
    order: list[str] = []

    def hold(item):
        order.append("first")
        assert go.wait(60)
        return item

    def prepared(item):
        ready.set()
        return item

    first = threading.Thread(target=lambda: list(lane.pipelined([1], abs, hold, abs)))
    first.start()
    while not order:
        time.sleep(0.001)
    second = threading.Thread(
        target=lambda: list(
            lane.pipelined([1], prepared, lambda x: order.append("second"), bool, waits=waits)
        )
    )
    second.start()
    assert ready.wait(60)
    began = time.monotonic()
    time.sleep(0.2)
    assert order == ["first"]
    held = time.monotonic() - began
    go.set()
    first.join(60)
    second.join(60)
    assert order == ["first", "second"]
    assert waits.turn >= held
    assert waits.record()[INPUT] < waits.turn


def test_two_units_of_two_lanes_each_never_wait_for_each_other():
    """As where labels are made and tokenized in one pass: a lane feeds another."""
    inner, outer = Lane(), Lane()

    def unit():
        made = inner.pipelined(range(9), abs, abs, abs)
        assert list(outer.pipelined(made, abs, abs, abs)) == list(range(9))
        done.append(1)

    done: list[int] = []
    threads = [threading.Thread(target=unit, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    inner.close()
    outer.close()
    assert len(done) == 4


def test_depths_are_means_over_the_time_since_a_mark():
    clock = [0.0]
    depths = Depths(clock=lambda: clock[0])
    with depths.at("a"), depths.at("b", 5):
        clock[0] = 2.0
        mark = depths.mark()
        with depths.at("a"):
            clock[0] = 3.0
    clock[0] = 4.0
    assert depths.since(mark) == {"a": 1.0, "b": 2.5}
    clock[0] = 6.0
    assert depths.since(mark) == {"a": 0.5, "b": 1.25}
    assert depths.since(depths.mark()) == {"a": 0.0, "b": 0.0}


def test_shares_read_as_percentages_the_largest_first():
    assert percentages({"output": 0.004, "input": 0.25}) == "input 25 %, output 0 %"
    assert percentages({}) == ""


@contextmanager
def lane_of(threads: int):
    """A lane whose maker has so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lane = Lane()
        yield lane
        lane.close()
    finally:
        torch.set_num_threads(before)


def test_a_stage_beside_the_lane_may_use_as_many_threads_as_torch_has():
    with lane_of(2) as lane:
        meeting = threading.Barrier(2)

        def both(item: int) -> tuple[int, int, int]:
            meeting.wait(60)  # breaks where they come one after the other
            return item, torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, 0)

        found = list(lane.pipelined([range(4)], *[lambda items: items] * 2,
                                    lambda items: lane.each(both, items)))
        own = os.getpriority(os.PRIO_PROCESS, 0)
        beside = min(own + GIVE_WAY, 19) if sys.platform == "linux" else own
        assert found == [[(item, 1, beside) for item in range(4)]]
        with pytest.raises(ZeroDivisionError):
            lane.each(lambda item: 1 // item, [2, 1, 0, 1])


def test_a_stage_beside_a_lane_of_one_thread_stays_in_its_own():
    with lane_of(1) as lane:
        assert set(lane.each(lambda _: threading.get_ident(), range(9))) == {threading.get_ident()}


def test_torch_has_one_thread_beside_the_lane_which_has_those_of_its_maker():
    threads = lambda found: [*found, torch.get_num_threads()]  # noqa: E731
    with lane_of(3) as lane:
        assert list(lane.pipelined([[]] * 4, *[threads] * 3)) == [[1, 3, 1]] * 4
        assert torch.get_num_threads() == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join(60)
        assert later == [3], "a thread that begins afterwards has what the caller set"


def test_the_lane_has_its_threads_whatever_others_set_before_its_first_operation():
    with lane_of(3) as lane:
        lane._thread.submit(lambda: None).result()  # it has begun, and has not asked torch yet
        torch.set_num_threads(1)  # as a stage beside it does at each of its items
        assert lane._thread.submit(torch.get_num_threads).result() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_threads_beside_the_lane_give_way_to_it(lane):
    own = os.getpriority(os.PRIO_PROCESS, 0)
    niceness = lambda x: [*x, os.getpriority(os.PRIO_PROCESS, 0)]  # noqa: E731
    found = list(lane.pipelined([[]] * 2, *[niceness] * 3))
    beside = min(own + GIVE_WAY, 19)
    assert found == [[beside, own, beside]] * 2
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_a_lane_is_left_although_what_comes_behind_it_fails():
    """A lane that feeds another one, as of labels that are tokenized in passing."""
    inner, outer = Lane(), Lane()

    def same(item: int) -> int:
        return item

    def fails(item: int) -> int:
        raise ValueError("no crop fits")

    failure = ""
    gc.disable()  # it would free what is left behind some day, and with it the lane
    try:
        try:
            list(outer.pipelined(inner.pipelined(range(9), same, same, same), fails, same, same))
        except ValueError as error:
            failure = str(error)
        assert failure == "no crop fits"
        assert inner._turn.acquire(timeout=20)
    finally:
        gc.enable()
    inner.close()
    outer.close()
