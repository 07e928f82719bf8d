"""Runs a folder of reference vectors through the public API: python -m tests.golden DIR

`registry` finds the cases of a folder and the functions that know them; every other module adds
families of cases.
"""
