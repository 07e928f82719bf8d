"""Compares this project with the reference vectors of a folder: python -m tests.golden DIR

One line a case: its verdict, and the comparison that came closest to its tolerance (or exceeded
it). Ends with 1 on a mismatch, an error, a damaged file or a case that no family knows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tests.golden.registry import Case, cases, damaged, find


def verdict(case: Case) -> tuple[bool, str]:
    """Whether a case passes, and the rest of its line."""
    known = find(case.name)
    if known is None:
        return False, "unknown case"
    broken = damaged(case)
    if broken:
        return False, "; ".join(broken)
    try:
        checks = list(known(case))
    except Exception as error:  # noqa: BLE001 - the other cases still have to be run
        return False, f"{type(error).__name__}: {error}"
    if not checks:
        return False, "nothing was compared"
    worst = max(checks, key=lambda check: check.ratio)
    failed = sum(check.ratio > 1 for check in checks)
    text = f"{worst.what}: {worst.error:.2g}, tolerance {worst.tolerance:.2g}"
    return not failed, f"{text} ({len(checks)} compared, {failed} wrong)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases of a folder and returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with <case>.json files")
    parser.add_argument("--only", default="*", help="pattern of case names, e.g. 'fm_*'")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    chosen = [case for case in cases(options.folder) if fnmatchcase(case.name, options.only)]
    if not chosen:
        parser.error(f"{options.folder} holds no case that fits {options.only!r}")
    good = 0
    for case in chosen:
        passed, text = verdict(case)
        good += passed
        print(f"{'ok  ' if passed else 'FAIL'} {case.name:<24} {text}", flush=True)
    print(f"{good} of {len(chosen)} cases agree")
    return 0 if good == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
