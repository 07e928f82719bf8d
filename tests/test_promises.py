"""The documentation names tests as witnesses: every one of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def functions_in(path: Path) -> set[str]:
    found = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in found if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_tests_that_exist():
    lines = (ROOT / "docs" / "promises.md").read_text().splitlines()
    rows = [line.split("|")[1:4] for line in lines if re.match(r"\| \d+ ", line)]
    assert [int(number) for number, _, _ in rows] == list(range(1, 26))
    for _, promise, shown in rows:
        witnesses = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", shown)
        assert witnesses, promise
        assert shown.count("`") == 2 * len(witnesses), f"not file::name: {shown}"
        for file, name in witnesses:
            assert name in functions_in(ROOT / file), f"{file} has no {name}"


def test_every_row_of_bad_input_names_tests_that_exist():
    names = set().union(*map(functions_in, (ROOT / "tests").rglob("test_*.py")))
    lines = (ROOT / "docs" / "bad-input.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and "Shown by" not in line]
    for row in rows:
        witnesses = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert witnesses, row
        assert set(witnesses) <= names, row
