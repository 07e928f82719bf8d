"""Buckets: every item once, batches of one kind, full ones where memory allows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from infra.buckets import Buckets

Item = tuple[int, str, int]


def through(items: list[tuple[str, int]], size: int, most: int) -> tuple[list[list[Item]], int]:
    """Batches of a stream, and the largest cost that waited beyond a batch's worth of items."""
    buckets: Buckets[Item] = Buckets(size=size, most=most)
    batches: list[list[Item]] = []
    waiting: dict[int, int] = {}
    worst = 0
    for number, (kind, cost) in enumerate(items):
        waiting[number] = cost
        for batch in buckets.add((number, kind, cost), kind=kind, cost=cost):
            batches.append(batch)
            for each, _, _ in batch:
                del waiting[each]
        if len(waiting) > size:
            worst = max(worst, sum(waiting.values()))
    return batches + buckets.rest(), worst


@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9)), max_size=60),
    size=st.integers(1, 5),
    most=st.integers(0, 60),
)
def test_each_item_is_in_one_batch_of_its_kind_and_no_more_waits_than_may(items, size, most):
    batches, worst = through(items, size, most)
    assert sorted(item for batch in batches for item in batch) == [
        (number, kind, cost) for number, (kind, cost) in enumerate(items)
    ]
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len({kind for _, kind, _ in batch}) == 1
        assert batch == sorted(batch)
    assert worst <= most
    assert through(items, size, most)[0] == batches


def test_alike_items_meet_across_others_and_what_is_left_over_goes_last():
    batches, _ = through([("a", 1), ("b", 1)] * 6 + [("c", 1)], size=3, most=100)
    assert ["".join(kind for _, kind, _ in batch) for batch in batches] == [
        "aaa", "bbb", "aaa", "bbb", "c",
    ]  # fmt: skip


def test_where_more_waits_than_may_the_fullest_bucket_goes():
    batches, _ = through([*zip("abacdbe", [5] * 7, strict=True)], size=4, most=25)
    assert ["".join(kind for _, kind, _ in batch) for batch in batches] == [
        "aa", "bb", "c", "d", "e",
    ]  # fmt: skip


def test_one_batch_of_one_kind_fills_whatever_it_costs():
    batches, _ = through([("large", 1000)] * 8, size=4, most=10)
    assert [len(batch) for batch in batches] == [4, 4]
