"""The table of `fourm status`."""

from __future__ import annotations

from rich.table import Table

from infra.status import StageStatus, status
from infra.store import Store
from tasks.run_store import read_curve

_COLUMNS = ("shards", "failed", "samples", "dropped", "samples/s", "spent", "left")


def table(store: Store) -> Table:
    """A line for each stage and each training run of a dataset."""
    lines = Table(title=store.url, title_justify="left")
    lines.add_column("stage", no_wrap=True)
    for name in _COLUMNS:
        lines.add_column(name, justify="left" if name == "dropped" else "right")
    for stage in status(store):
        lines.add_row(*_cells(stage))
    for path in sorted({"/".join(p.split("/")[:-1]) for p in store.list("runs/") if _curve(p)}):
        points = read_curve(store, path)
        if points:
            last = points[-1]
            loss = f"loss {last['loss']:.3f}" if "loss" in last else ""
            pace = f"{last.get('samples_per_second', 0):.1f}"
            lines.add_row(path, f"step {last['step']}", "", "", loss, pace, "", "")
    return lines


def _curve(path: str) -> bool:
    return path.endswith("/curve.jsonl")


def _cells(line: StageStatus) -> tuple[str, ...]:
    drops = sorted(line.drops.items(), key=lambda item: -item[1])
    left = line.total - line.done - line.quarantined
    return (
        line.stage,
        f"{line.done}/{line.total}",
        str(line.quarantined or ""),
        f"{line.samples:,}",
        ", ".join(f"{reason} {number}" for reason, number in drops[:4]),
        f"{line.rate:.1f}",
        _time(line.seconds),
        "" if not left else _time(line.eta),
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
