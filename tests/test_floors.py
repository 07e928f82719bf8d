"""The shape of the code base: imports go down only, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ["infra", "tokenizers_vq", "models", "tasks", "pipelines"]
MODULES = [
    path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))
]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_a_module_imports_only_its_own_floor_and_those_below(path: Path) -> None:
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    upward = _imports(_tree(path)) & {*FLOORS[floor + 1 :], "tests"}
    assert not upward, f"{_id(path)} imports upward: {sorted(upward)}"


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, f"{_id(path)}: {', '.join(long)}"


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_nothing_prints_or_unpickles(path: Path) -> None:
    tree = _tree(path)
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in calls
    assert not _imports(tree) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}


def test_no_unsafe_torch_load() -> None:
    for path in MODULES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
                assert safe == "True", f"{_id(path)}:{node.lineno}"


def test_no_generated_data_is_tracked() -> None:
    done = subprocess.run(
        ["git", "ls-files", "-ci", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    assert not done.stdout
