"""The `fourm` command: every flow, and what a person wants to know of a dataset.

Options of a command are the fields of its form in :mod:`pipelines.params`, so the command line and
the Prefect UI offer the same. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from pipelines import options, params
from pipelines.following import following

if TYPE_CHECKING:
    from infra.store import Store

_Form = TypeVar("_Form", bound=BaseModel)

EXAMPLES = """
[bold]First steps[/bold]

  fourm demo                                        the whole chain on rendered scenes, half an hour

  fourm status --root data/demo                     what is done, what is left, and how fast it goes

  fourm generate --root data/demo --from rgb=photo.jpg --to depth,caption

[bold]Your own pictures[/bold], from a list of links, a folder or WebDataset tars

  fourm ingest --root data/mine --source cc12m.tsv --limit 10000

  fourm label --root data/mine --preset modern

  fourm train-tokenizers --root data/mine, then tokenize, publish, train, evaluate

Each command can be stopped with Ctrl-C, or killed, and continues where it was when run again.
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Root = Annotated[str, typer.Option(help="Dataset: a folder, or s3://bucket/prefix.")]


@app.callback(epilog=EXAMPLES)
def _fourm() -> None:
    """Image URLs in, a trained any-to-any model out: the data engine of 4M."""


def _flow_command(name: str, form: type[params.Where], example: str) -> None:
    _form_command(name, form, example, lambda values: _run_flow(name.replace("-", "_"), values))


def _tool_command(name: str, form: type[BaseModel], example: str) -> None:
    def run(values: BaseModel) -> None:
        tool = importlib.import_module(f"pipelines.{name.replace('-', '_')}")
        with _sentences():
            for line in tool.run(values):
                typer.echo(line)

    _form_command(name, form, example, run)


def _form_command(
    name: str, form: type[_Form], example: str, run: Callable[[_Form], None]
) -> None:
    """A command whose options are the fields of a form."""

    def command(ctx: typer.Context, **given: Any) -> None:
        with _sentences():
            if ctx.args:
                raise ValueError(f"{ctx.args[0]!r} belongs to no option; a list of values is "
                                 "written without blanks: depth,normal")
            values = _validated(form, options.collect(form, given))
        run(values)

    context = inspect.Parameter(
        "ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    taken = [context, *options.parameters(form)]
    command.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in taken}
    head = "Examples" if "\n" in example else "Example"
    lines = "\n\n".join(f"  {line}" for line in example.splitlines())
    app.command(
        name, help=form.__doc__, epilog=f"{head}:\n\n{lines}",
        context_settings={"allow_extra_args": True},
    )(command)  # fmt: skip


_MODULES = {"import": "importing"}
"""Flows whose name no module can have."""


def _run_flow(name: str, values: params.Where) -> None:
    """Run a flow in this process, below a local Prefect server unless there is one."""
    from pipelines.server import prefect_server
    from tasks.checks import check

    with _sentences():
        check(name, values.model_dump())
    # Prefect's console shows our own loggers too, from this level on.
    logging.getLogger("fourm").setLevel(logging.INFO)
    with _sentences(code=1), prefect_server(_prefect_home(values.root)):
        module = importlib.import_module(f"pipelines.{_MODULES.get(name, name)}")
        getattr(module, f"{name}_flow")(values)
    if command := following(name, values):
        typer.echo(f"Next:  {command}")


def _prefect_home(root: str) -> Path:
    """The database of the UI lies beside a local dataset, else in ./data."""
    return (Path("data") if "://" in root else Path(root).parent) / "prefect"


@contextmanager
def _sentences(code: int = 2) -> Iterator[None]:
    """Turn expected failures into one sentence, and Ctrl-C into a goodbye that says how to go on.

    Args:
        code: Exit status of a failure: 2 for a bad value that is found before work starts.
    """
    try:
        yield
    except _failures() as error:
        typer.secho(f"fourm: {error}", fg="red", err=True)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        again = shlex.join(["fourm", *sys.argv[1:]])
        typer.secho(f"\nStopped. What is committed is kept; resume with:  {again}", err=True)
        raise typer.Exit(130) from None


def _failures() -> tuple[type[Exception], ...]:
    """What is expected; also of S3's client, which is imported where a list or a store needs it."""
    errors: Any = sys.modules.get("botocore.exceptions")
    of_s3 = (errors.BotoCoreError,) if errors else ()
    return (ValueError, OSError, ImportError, RuntimeError, *of_s3)


def _validated(form: type[_Form], values: dict[str, Any]) -> _Form:
    try:
        return form(**values)
    except ValidationError as error:
        raise ValueError("; ".join(options.sentence(e) for e in error.errors())) from None


def _open(root: str) -> Store:
    from infra.store import Store

    store = Store(root)
    if not store.exists("plan/plan.json"):
        raise ValueError(f"there is no dataset at {root}; `fourm ingest --root {root}` makes one")
    return store


@app.command(epilog="Example:  fourm demo --scale tiny --root data/tiny")
def demo(
    scale: Annotated[
        Literal["demo", "long", "tiny"],
        typer.Option(help="demo: half an hour on two cores; long: 90 minutes; tiny: a few."),
    ] = "demo",
    root: Annotated[str, typer.Option(help="Dataset: a folder.")] = "data/demo",
    keep_ui: Annotated[bool, typer.Option(help="Keep the UI up at the end, until Ctrl-C.")] = False,
) -> None:
    """Run the whole chain on rendered scenes: ingest to a trained, measured model."""
    from pipelines.demo import prepare, run_demo

    with _sentences():
        chosen = prepare(scale, root)
    with _sentences(code=1):
        for line in run_demo(chosen, keep_ui=keep_ui):
            typer.echo(line)


@app.command(epilog="Example:  fourm ui --root data/mine")
def ui(root: Root = "data/demo") -> None:
    """Show the runs of a dataset in Prefect's user interface, until Ctrl-C."""
    import os
    import threading

    from pipelines.server import prefect_server

    home = _prefect_home(root)
    with _sentences():
        if not (home / "prefect.db").exists() and not os.environ.get("PREFECT_API_URL"):
            raise ValueError(f"no runs are kept in {home}: no flow has run on {root} yet, or it "
                             "is no dataset's folder")
    with _sentences(code=1), prefect_server(home) as url:
        typer.echo(f"The UI is at {url}; Ctrl-C ends it.")
        threading.Event().wait()


@app.command(epilog="Example:  fourm status --root data/demo")
def status(root: Root = "data/demo") -> None:
    """Show done, left, pace and time left of every stage, what it lost and what it waited for."""
    from pipelines.status import tables

    with _sentences():
        from rich.console import Console

        Console(width=max(Console().width, 110)).print(tables(_open(root)))


@app.command(epilog="Example:  fourm verify --root data/demo --deep")
def verify(
    root: Root = "data/demo",
    deep: Annotated[bool, typer.Option(help="Read and hash every byte, not only sizes.")] = False,
) -> None:
    """Check that every commit and manifest is whole and true; exit status 1 if not."""
    from infra.verify import verify as check_store
    from tasks.withdraw import come_back

    with _sentences():
        store = _open(root)
        report = check_store(store, deep=deep)
        back = [] if report.problems else come_back(store)
    if back:
        report.problems.append((f"{len(back)} samples that were withdrawn, such as {back[0]}",
                                "there again; run the same `fourm withdraw --apply` once more"))
    for path, problem in report.problems:
        typer.secho(f"{path}: {problem}", fg="red")
    if any(problem.startswith("missing, ") for _, problem in report.problems):
        typer.echo("what a copy lacks comes with another copy; where it is lost, remove the commit "
                   "that names it, and the next run of its stage makes it anew")
    if report.problems:
        typer.secho(f"{len(report.problems)} problems", fg="red", err=True)
        raise typer.Exit(1)
    typer.echo("everything that is committed is there and whole")


@app.command(epilog="Example:  fourm quarantine --root data/mine --release")
def quarantine(
    root: Root = "data/demo",
    release: Annotated[
        bool, typer.Option(help="Let them go: the next run of their stage tries them again.")
    ] = False,
) -> None:
    """Show the shards that were set aside after three attempts each, and why."""
    from infra.ledger import Ledger

    with _sentences():
        ledger = Ledger(_open(root))
        found = [(each, ledger.quarantined(each)) for each in ledger.quarantines()]
        for stage, shards in found:
            for shard, reason in shards.items():
                typer.echo(f"{stage} shard {shard}: {reason}")
                if release:
                    ledger.release(stage, shard)
    number = sum(len(shards) for _, shards in found)
    note = "released" if release else "--release tries them again" if number else "nothing to do"
    typer.echo(f"shards in quarantine: {number}; {note}")


@app.command(epilog="Example:  fourm automations --apply --notify slack-webhook/ops")
def automations(
    apply: Annotated[bool, typer.Option(help="Make the changes; else only list them.")] = False,
    silence: Annotated[
        float, typer.Option(help="Seconds without a heartbeat after which a run has crashed.")
    ] = 600.0,
    notify: Annotated[
        str, typer.Option(help="Notification block that failures are told to: type/name.")
    ] = "",
    deployment: Annotated[
        str, typer.Option(help="Name of the deployments that go on; empty: as in prefect.yaml.")
    ] = "",
) -> None:
    """Set up what the Prefect server does by itself: detect crashes, tell failures, hand over."""
    import os

    from pipelines.server import check_reachable

    with _sentences():
        if not (url := os.environ.get("PREFECT_API_URL")):
            raise ValueError("set PREFECT_API_URL to the Prefect server's API")
        check_reachable(url)
    from prefect.client.orchestration import get_client

    from infra.automations import set_up

    with _sentences(), get_client(sync_client=True) as client:
        changes = set_up(
            client, apply=apply, silence=silence, notify=notify, deployment=deployment
        )
        for change in changes:
            note = f" ({change.note})" if change.note else ""
            typer.echo(f"{'' if apply else 'to be '}{change.action:10} {change.name}{note}")
    if not apply:
        typer.echo("nothing was changed; --apply does it")


@app.command(epilog="Train one again:  python -m tasks.teachers depth")
def teachers() -> None:
    """List the networks that label scenes and ship with the package."""
    from models.labelers import preset, weights_revision
    from models.labelers.base import SHIPPED

    with _sentences():
        for name, spec in preset("scenes").items():
            if not spec.model_id.startswith(SHIPPED):
                continue
            megabytes = sum(f.stat().st_size for f in Path(spec.source).rglob("*")) / 1e6
            typer.echo(f"{name:8} {megabytes:5.1f} MB  {weights_revision(spec)[:12]}")


def _plan(values: params.PlanParams) -> None:
    from rich.console import Console

    from pipelines.plan import lines, table
    from pipelines.workers import resources

    with _sentences():
        found = lines(values)
    Console(width=max(Console().width, 100)).print(table(found, resources(values).workers or 1))
    if any(line.basis == "assumed" for line in found):
        typer.echo(
            "assumed: nothing is measured yet; run the chain over a thousand rows and ask again."
        )


def _generate(values: params.GenerateParams) -> None:
    from infra.store import Store
    from tasks.checks import check
    from tasks.generate import generate

    with _sentences():
        how = values.how()
        check("generate", values.model_dump())
        files = generate(
            Store(values.root), values.run, values.inputs, values.targets, values.out_dir, how
        )
    for file in files:
        typer.echo(file)


def _export(values: params.ExportParams) -> None:
    from infra.store import Store
    from tasks.interchange import export_set

    with _sentences():
        done = export_set(
            _open(values.root),
            Store(values.out),
            layout=values.layout,
            manifest=values.manifest,
            parts=values.parts,
        )
    left = f", {done.left_out} with a hole left out" if done.left_out else ""
    typer.echo(
        f"{done.samples:,} samples in {done.shards} shards{left}: {', '.join(done.parts)}"
    )


def main() -> None:
    """Entry point of the console script."""
    app()


for _name, (_form, _example) in params.COMMANDS.items():
    _flow_command(_name, _form, _example)
_form_command(
    "plan", params.PlanParams, "fourm plan --root data/mine --source cc12m.tsv --gpus 1", _plan
)
_form_command(
    "export", params.ExportParams, "fourm export --root data/mine --out exports/set", _export
)
_form_command("generate", params.GenerateParams, params.GENERATE, _generate)
for _tool, (_options, _example) in params.TOOLS.items():
    _tool_command(_tool, _options, _example)

if __name__ == "__main__":
    main()
