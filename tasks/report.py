"""The report of a run: `results.json`, pictures, and one page that needs nothing else.

    <root>/reports/<run>/results.json
    <root>/reports/<run>/report.html
    <root>/reports/<run>/<picture>.png
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from infra import machine, ui
from infra.store import Store, json_bytes
from tasks.run_store import read_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tasks.evaluate import Evaluation

_ROWS = ("constant", "teacher", "tokenizer_bound", "fourm", "fourm_10")
_HEADS = ("constant", "teacher", "tokenizer bound", "4M", "4M, {samples} samples")
_UNITS = {
    "abs_rel": "AbsRel", "mean_angle": "mean angle, °", "miou": "mIoU", "ap50": "AP50",
    "attributes": "attributes right", "edge_f1": "edge F1", "fields": "fields right",
    "color_distance": "colour distance, of 255",
}  # fmt: skip
_TITLES = {
    "overview": "Every modality: labels, and below what 4M predicts from RGB",
    "chain": "A chain: each modality from all that were made before it",
    "rgb-to-depth": "RGB to depth", "rgb-to-normal": "RGB to surface normals",
    "rgb-to-semseg": "RGB to segmentation", "rgb-to-det": "RGB to boxes",
    "rgb-to-clip": "RGB to CLIP features", "rgb-to-dinov2": "RGB to DINOv2 features",
    "rgb-to-dinov2_global": "RGB to the DINOv2 vector of the picture",
    "rgb-to-canny_edge": "RGB to Canny edges", "rgb-to-color_palette": "RGB to colour palettes",
    "rgb-to-metadata": "RGB to metadata",
    "search-dinov2_global": "Search by a predicted DINOv2 vector, ten samples averaged",
    "caption-to-rgb": "Captions to RGB", "boxes-to-rgb": "Boxes to RGB",
    "moving-box": "A box moves, and the picture follows",
}  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; margin: 2rem auto; max-width: 70rem;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #dde2ea; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 600; } p.note, caption { color: #5a6578; text-align: left; }
img, svg { max-width: 100%; height: auto; } td.text { text-align: left; vertical-align: top; }
"""


def results(
    store: Store, run: str, evaluation: Evaluation, *, samples: int, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        store: The dataset.
        run: Name of the run.
        evaluation: What was measured.
        samples: Size of the training set.
        seconds: Time of each stage.
    """
    stages = {name: round(value, 1) for name, value in seconds.items()}
    stages.setdefault("evaluate", evaluation.seconds)
    total = sum(value for name, value in stages.items() if name != "total")
    return {
        "commit": machine.commit_hash(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "run": run,
        "samples": samples,
        "seconds": {**stages, "total": stages.get("total", round(total, 1))},
        "tasks": evaluation.tasks,
        "matrix": evaluation.matrix,
        "retrieval": evaluation.retrieval,
        "chain": evaluation.chain,
        "teachers": evaluation.teachers,
        "tokenizers": evaluation.tokenizers,
        "evaluation": evaluation.config,
        "peak_memory": machine.peak_rss(),
    }


def write_report(
    store: Store,
    run: str,
    evaluation: Evaluation,
    *,
    samples: int,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Writes results, pictures and page under `reports/<run>/`, and shows them in the UI.

    Args:
        store: The dataset.
        run: Name of the run.
        evaluation: What was measured.
        samples: Size of the training set.
        seconds: Time of each stage; a "total" among them is kept, else it is their sum.

    Returns:
        What `results.json` holds.
    """
    found = results(store, run, evaluation, samples=samples, seconds=seconds or {})
    folder = f"reports/{run}"
    for name, picture in evaluation.pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        store.write(f"{folder}/{name}.png", buffer.getvalue())
    store.write(f"{folder}/results.json", json_bytes(found))
    curve = read_curve(store, f"runs/{run}")
    page = render(found, curve, evaluation)
    store.write(f"{folder}/report.html", page.encode())
    _show(run, found, evaluation)
    return found


def render(
    found: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], evaluation: Evaluation
) -> str:
    """The report as one HTML page without outside references."""
    machine_line = ", ".join(
        f"{key} {html.escape(str(found['machine'][key]))}"
        for key in ("cpu", "cores", "python", "torch") if key in found["machine"]
    )  # fmt: skip
    parts = [
        f"<h1>4M, run {html.escape(found['run'])}</h1>",
        f"<p class=note>{found['samples']} samples, {_duration(found['seconds']['total'])} in all"
        f" · {found['date']} · commit {html.escape(found['commit'])} · {machine_line}</p>",
        "<h2>Results</h2>",
        _task_table(found["tasks"], evaluation.config.get("samples", 10)),
        "<p class=note>Gap recovered: 0 is the best constant, 1 the teacher that labelled the "
        "training set. Tokenizer bound: the truth encoded and decoded. ↓ lower is better.</p>",
    ]
    for name, found_by in evaluation.retrieval.items():
        parts += [f"<h2>Retrieval by a predicted {html.escape(name)}</h2>",
                  _retrieval_table(found_by, evaluation.config.get("samples", 10)),
                  f"<p class=note>Each of {found_by['pictures']} pictures is looked for among all "
                  "by the cosine with the teacher's vectors; the vector is predicted from the "
                  "row's modality alone.</p>"]  # fmt: skip
    if evaluation.chain:
        parts += ["<h2>A chain through many modalities</h2>", _chain_table(found)]
    for name, picture in evaluation.pictures.items():
        title = html.escape(_TITLES.get(name, name))
        parts += [f"<h2>{title}</h2>", f'<img alt="{title}" src="{ui.data_uri(picture)}">',
                  _lines(evaluation.notes.get(name, []))]  # fmt: skip
    if evaluation.captions:
        parts += ["<h2>RGB to caption</h2>", _caption_table(evaluation.captions)]
    if curve:
        parts += ["<h2>Training</h2>", _svg(curve_figure(curve))]
    if evaluation.matrix:
        parts += ["<h2>Loss per token, in nats: given a row's modality, predict a column's</h2>",
                  _svg(matrix_figure(evaluation.matrix))]  # fmt: skip
    parts += ["<h2>Tokenizers</h2>", _tokenizer_table(found["tokenizers"]),
              "<h2>Teachers</h2>", _teacher_table(found["teachers"]),
              "<h2>Time</h2>", _time_table(found["seconds"])]  # fmt: skip
    head = f"<meta charset=utf-8><title>4M: {html.escape(found['run'])}</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>"
    )


def _lines(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<ol class=note>{items}</ol>" if items else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td class='{kind}'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def task_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The results table as text: task, metric, the five rows, gap recovered by one and many."""
    rows = []
    for name, task in tasks.items():
        arrow = "↓" if task["lower_is_better"] else "↑"
        metric = f"{_UNITS.get(task['metric'], task['metric'])} {arrow}"
        digits = 1 if task["metric"] == "mean_angle" else 3
        values = [_number(task[row], digits) for row in _ROWS]
        gaps = [_number(task[key], 2) for key in ("gap_recovered", "gap_recovered_10")]
        rows.append([name.replace("->", " → "), metric, *values, *gaps])
    return rows


def _heads(samples: int) -> list[str]:
    names = [name.format(samples=samples) for name in _HEADS]
    return ["task", "metric", *names, "gap recovered", f"gap, {samples} samples"]


def _task_table(tasks: Mapping[str, Mapping[str, Any]], samples: int) -> str:
    return _table(_heads(samples), task_rows(tasks))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _caption_table(captions: Sequence[Mapping[str, str]]) -> str:
    heads = list(captions[0])
    return _table(heads, [[row[name] for name in heads] for row in captions], "text")


def retrieval_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Searches by one embedding as text: from what, recall at 1 and 5, the same of many samples."""
    def cells(scores: Mapping[str, float]) -> list[str]:
        return [_number(scores[name], 3) for name in ("recall@1", "recall@5")]

    rows = [["chance", *cells(found["chance"]), "-", "-"]]
    rows += [[name, *cells(row["fourm"]), *cells(row["fourm_10"])]
             for name, row in found["from"].items()]  # fmt: skip
    return [*rows, ["the teacher's own, as tokens", *cells(found["tokenizer_bound"]), "-", "-"]]


def _retrieval_table(found: Mapping[str, Any], samples: int) -> str:
    heads = ["predicted from", "recall@1", "recall@5"]
    heads += [f"{name}, {samples} samples" for name in heads[1:]]
    return _table(heads, retrieval_rows(found))


def _chain_table(found: Mapping[str, Any]) -> str:
    """What the steps of the chain reach, beside what the same target reaches from RGB alone."""
    steps, rows = found["chain"]["steps"], []
    for number, name in enumerate(steps[1:], start=1):
        scores, task = found["chain"]["scores"].get(name), found["tasks"].get(f"rgb->{name}")
        if scores is None or task is None:
            rows.append([" → ".join(steps[number - 1 : number + 1]), "-", "-", "-", "-"])
            continue
        metric, arrow = task["metric"], "↓" if task["lower_is_better"] else "↑"
        values = (task["constant"], scores[metric], task["fourm"])
        rows.append([" → ".join(steps[number - 1 : number + 1]),
                     f"{_UNITS.get(metric, metric)} {arrow}", *(_number(v, 3) for v in values)])
    return _table(["step", "metric", "constant", "4M in the chain", "4M from RGB"], rows)


def _tokenizer_table(tokenizers: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, info in tokenizers.items():
        scores = ", ".join(f"{k} {v:.3g}" for k, v in info.get("metrics", {}).items())
        rows.append([name, str(info["vocab_size"]), str(info["num_tokens"] or "varies"), scores])
    return _table(["modality", "codes", "tokens", "on held-out labels"], rows)


def _teacher_table(teachers: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, info in teachers.items():
        scores = ", ".join(f"{k} {v:.3f}" for k, v in info.get("scores", {}).items())
        rows.append([name, info["model"], info["revision"], scores])
    return _table(["labeler", "model", "revision", "against the truth"], rows)


def _time_table(seconds: Mapping[str, float]) -> str:
    rows = [[name, _duration(value)] for name, value in seconds.items()]
    return _table(["stage", "time"], rows)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def curve_figure(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss over steps, one line for each modality and one for all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    names = sorted({key for line in curve for key in line if _is_loss(key)})
    for name in names:
        points = [(line["step"], line[name]) for line in curve if name in line]
        width = 2.2 if name == "loss" else 1.0
        axes.plot(*zip(*points, strict=True), label=name, linewidth=width)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return figure


def pace_figure(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Learning rate, gradient norm, token rates (of all, and of each modality) and utilisation
    over steps."""
    from matplotlib.figure import Figure

    panels = {"learning rate": "lr", "gradient norm": "grad_norm",
              "tokens a second": "tokens_per_second", "share of peak FLOP/s": "mfu"}  # fmt: skip
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in sorted({k for line in curve for k in line if k.partition("/")[0] == key}):
            points = [(line["step"], line[name]) for line in curve if name in line]
            axes.plot(*zip(*points, strict=True), label=name.partition("/")[2] or "all",
                      linewidth=2.2 if name == key else 1.0)  # fmt: skip
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=6, ncols=2)
    return figure


def _is_loss(key: str) -> bool:
    return key.startswith("loss")


def matrix_figure(matrix: Mapping[str, Mapping[str, float]]) -> Figure:
    """Losses as a heat map; colours compare the inputs of one target."""
    import numpy as np
    from matplotlib.figure import Figure

    rows = list(matrix)
    columns = sorted({name for row in matrix.values() for name in row})
    values = np.array([[matrix[r].get(c, np.nan) for c in columns] for r in rows])
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    shade = (values - low) / np.maximum(high - low, 1e-9)
    figure = Figure(figsize=(1.6 + 0.95 * len(columns), 0.9 + 0.5 * len(rows)),
                    layout="constrained")  # fmt: skip
    axes = figure.subplots()
    axes.imshow(shade, cmap="viridis_r", vmin=0, vmax=1.4, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    data = base64.b64encode(buffer.getvalue().encode()).decode()
    return f'<img alt="" src="data:image/svg+xml;base64,{data}">'


def show_results(found: Mapping[str, Any]) -> None:
    """The scores of a run in the Prefect UI, from what `results.json` holds."""
    heads = _heads(found.get("evaluation", {}).get("samples", 10))
    rows = [dict(zip(heads, row, strict=True)) for row in task_rows(found["tasks"])]
    ui.table(f"results {found['run']}", rows, f"Results of run {found['run']}")


def _show(run: str, found: Mapping[str, Any], evaluation: Evaluation) -> None:
    """The same in the Prefect UI."""
    show_results(found)
    for name, picture in evaluation.pictures.items():
        title = _TITLES.get(name, name)
        ui.markdown(f"{run} {name}", f"## {title}\n\n![{title}]({ui.data_uri(picture)})\n")
    if evaluation.captions:
        ui.table(f"{run} captions", list(evaluation.captions), "RGB to caption")
