"""Contracts of budgets: floors plus picks, least and most of each, and where excess goes."""

from __future__ import annotations

import numpy as np

from models.fourm.budgets import draw_budgets, redistribute, split_budget
from models.fourm.draws import Draws


def test_budgets_are_floors_plus_the_picks():
    got = split_budget(np.array([[0.5, 0.3, 0.2]]), np.array([7]), np.array([[2, 2, 0]]))
    assert got.tolist() == [[3, 2, 2]]


def test_excess_goes_to_modalities_with_room_and_a_share():
    got = redistribute(np.array([[9, 1, 0]]), np.array([[4, 20, 20]]), np.array([[0.9, 0.1, 0.0]]))
    assert got.tolist() == [[4, 6, 0]]


def test_excess_is_shared_in_proportion():
    share = np.array([[0.5, 0.3, 0.2]])
    got = redistribute(np.array([[100, 0, 0]]), np.array([[0, 99, 99]]), share)
    assert got.tolist() == [[0, 60, 40]]


def test_budgets_that_give_each_its_least_are_those_of_the_first_draw():
    draws, one = Draws(0, 5, 40), np.ones((40, 3))
    total, limit = np.full(40, 12), np.full((40, 3), 20)
    free, share = draw_budgets(draws, "input", one, total, limit, np.zeros((40, 3), int))
    np.testing.assert_array_equal(share, draws.dirichlet("inputs", one))
    least = np.full((40, 3), 2)
    enough = (free >= least).all(1)
    assert 0 < enough.sum() < 40
    bound, _ = draw_budgets(draws, "input", one, total, limit, least)
    np.testing.assert_array_equal(bound[enough], free[enough])
    assert (bound >= least).all()
