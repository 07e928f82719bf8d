"""The tables of `fourm status`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, JustifyMethod
from rich.table import Table

from infra.status import as_rows, status
from infra.store import Store
from tasks.run_store import read_curve

_NUMBERS = (
    "done", "left", "begun", "samples", "samples/s", "workers", "spent", "time left", "slowest",
)  # fmt: skip
_TEXTS = ("stored", "failed", "dropped", "waited for", "at work")


def tables(store: Store) -> Group:
    """How far each stage and each training run of a dataset is, and below what stages occupy and
    lost, what their work waited for, and how much was at each place of a worker, on average."""
    numbers = _table(store.url, _NUMBERS, "right")
    numbers.caption = "begun: under way, or broken off with their run"
    texts = _table("what is stored, what was lost, and what was waited for", _TEXTS, "left")
    texts.caption = "networks wait for input or output, fetching for arrivals or cleaning"
    for row in as_rows(status(store)):
        for lines, names in ((numbers, _NUMBERS), (texts, _TEXTS)):
            lines.add_row(row["stage"], *(_cell(row[name]) for name in names))
    for path in sorted({"/".join(p.split("/")[:-1]) for p in store.list("runs/") if _curve(p)}):
        points = read_curve(store, path)
        if points:
            # Lines of evaluations have no loss of their own.
            last = next((point for point in reversed(points) if "loss" in point), points[-1])
            cells = dict.fromkeys(_NUMBERS, "")
            cells["done"] = f"step {last['step']}"
            cells["samples"] = f"loss {last['loss']:.3f}" if "loss" in last else ""
            cells["samples/s"] = f"{last.get('samples_per_second', 0):.1f}"
            numbers.add_row(path, *cells.values())
    return Group(numbers, texts) if texts.row_count else Group(numbers)


def _table(title: str, columns: Sequence[str], justify: JustifyMethod) -> Table:
    lines = Table(title=title, title_justify="left", caption_justify="left")
    lines.add_column("stage", no_wrap=True)
    for name in columns:
        lines.add_column(name, justify=justify)
    return lines


def _curve(path: str) -> bool:
    return path.endswith("/curve.jsonl")


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
