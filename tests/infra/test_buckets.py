"""Buckets: every item once and in order, batches of one kind, full ones where memory allows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from infra.buckets import Buckets

Item = tuple[int, str, int]


def through(
    items: list[tuple[str | None, int]], size: int, most: int, every: int = 3
) -> tuple[list[list[Item]], list[Item], list[int]]:
    """Batches that were run, items as they came out, and the cost held after each item."""
    batches: list[list[Item]] = []
    buckets: Buckets[Item] = Buckets(batches.append, size=size, most=most)
    out: list[Item] = []
    held: list[int] = []
    for number, (kind, cost) in enumerate(items):
        if kind is None:
            buckets.skip((number, "", cost))
        else:
            buckets.add((number, kind, cost), kind=kind, cost=cost)
        held.append(buckets._cost)
        if number % every == 0:
            out += buckets.finished()
    out += buckets.finished(last=True)
    return batches, out, held


ITEMS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.integers(0, 9)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(items=ITEMS, size=st.integers(1, 5), most=st.integers(0, 120), every=st.integers(1, 9))
def test_items_come_out_once_in_order_and_batches_hold_one_kind(items, size, most, every):
    batches, out, held = through(items, size, most, every)
    assert [number for number, _, _ in out] == list(range(len(items)))
    worked = sorted(item for batch in batches for item in batch)
    assert worked == [(n, kind, cost) for n, (kind, cost) in enumerate(items) if kind is not None]
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len({kind for _, kind, _ in batch}) == 1
        assert batch == sorted(batch)
    assert all(cost <= max(most, 2 * size * 9) for cost in held)
    assert through(items, size, most, every)[0] == batches


def test_alike_items_meet_across_others_and_nothing_waits_that_need_not():
    batches, _, _ = through([("a", 1), ("b", 1)] * 6, size=3, most=100)
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    one_kind, _, held = through([("a", 1)] * 7, size=3, most=100, every=1)
    assert [len(batch) for batch in one_kind] == [3, 3, 1]
    assert max(held) < 3


def test_a_rare_kind_goes_alone_once_it_holds_back_more_than_may_be_held():
    items = [("rare", 1), *[("a", 1)] * 50, ("rare", 1)]
    batches, _, _ = through(items, size=4, most=20)
    assert batches[5] == [(0, "rare", 1)]
    assert [len(batch) for batch in batches].count(4) == 12


def test_items_without_work_hold_nothing_up():
    buckets: Buckets[int] = Buckets(lambda batch: None, size=2, most=9)
    buckets.skip(0)
    assert buckets.finished() == [0]
    buckets.add(1, kind="a")
    buckets.skip(2)
    assert buckets.finished() == []
    assert buckets.finished(last=True) == [1, 2]
