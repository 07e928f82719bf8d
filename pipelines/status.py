"""The table of `fourm status`."""

from __future__ import annotations

from rich.table import Table

from infra.status import as_rows, status
from infra.store import Store
from tasks.run_store import read_curve

_COLUMNS = (
    "done", "left", "begun", "failed", "samples", "dropped", "samples/s", "workers", "waited for",
    "at work", "spent", "time left", "slowest",
)  # fmt: skip
_TEXTS = ("failed", "dropped", "waited for", "at work")


def table(store: Store) -> Table:
    """A line for each stage and each training run of a dataset."""
    lines = Table(title=store.url, title_justify="left")
    lines.add_column("stage", no_wrap=True)
    for name in _COLUMNS:
        lines.add_column(name, justify="left" if name in _TEXTS else "right")
    for row in as_rows(status(store)):
        lines.add_row(row["stage"], *(_cell(row[name]) for name in _COLUMNS))
    for path in sorted({"/".join(p.split("/")[:-1]) for p in store.list("runs/") if _curve(p)}):
        points = read_curve(store, path)
        if points:
            # Lines of evaluations have no loss of their own.
            last = next((point for point in reversed(points) if "loss" in point), points[-1])
            loss = f"loss {last['loss']:.3f}" if "loss" in last else ""
            cells = dict.fromkeys(_COLUMNS, "")
            cells |= {"done": f"step {last['step']}", "dropped": loss}
            cells["samples/s"] = f"{last.get('samples_per_second', 0):.1f}"
            lines.add_row(path, *cells.values())
    return lines


def _curve(path: str) -> bool:
    return path.endswith("/curve.jsonl")


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
