"""The command line: light to start, and one clear sentence for what is wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from infra.ledger import Ledger, ShardData, Stage
from infra.shards import write_tar
from infra.store import Store
from pipelines import cli
from pipelines.cli import app
from pipelines.params import (
    COMMANDS,
    TOOLS,
    IngestOptions,
    LabelOptions,
    LabelParams,
    PublishParams,
    TokenizeOptions,
    TokenizerOptions,
    TrainParams,
    Where,
)
from pipelines.server import prefect_server
from tasks import chain

ROOT = Path(__file__).resolve().parents[2]
PLAN_RGB = ["plan-tokenizers", "--modalities", "rgb", "--changes"]
HEAVY = ("torch", "ray", "prefect", "transformers", "diffusers", "pandas", "pyarrow")


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys, pipelines.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit: pass\n"
        f"sys.exit(','.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    )
    seconds = []
    for _ in range(2):
        before = os.times().children_user
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        # The CPU time of the child: wall-clock would measure the neighbours on a busy machine.
        seconds.append(os.times().children_user - before)
    assert min(seconds) < 5


def test_help_of_every_command_shows_an_example() -> None:
    for name in (*COMMANDS, *TOOLS, "plan", "export", "generate", "demo", "status", "verify"):
        code, output = _run(name, "--help")
        assert code == 0
        assert f"fourm {name}" in " ".join(output.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["label", "--labelers", "depth,nose"], "'normal'"),
        (["label", "--root", "{tmp}"], "run `fourm ingest` first"),
        (["tokenize", "--root", "{tmp}"], "run `fourm ingest` first"),
        (["train", "--root", "{tmp}"], "no manifest 'main'"),
        (["plan-train", "--root", "{tmp}"], "no manifest 'main'"),
        (["plan-train", "--mfu", "2"], "less than or equal to 1"),
        (["plan-train", "--recipe", "fourm_b", "--devices", "3"], "no multiple of 3 devices"),
        (["evaluate", "--root", "{tmp}", "--run", "nosuch"], "no trained run 'nosuch'"),
        (["status", "--root", "{tmp}"], "there is no dataset at"),
        (["verify", "--root", "{tmp}"], "there is no dataset at"),
        (["generate", "--from", "photo.jpg", "--to", "depth"], "modality=file-or-text"),
        (["generate", "--guide", "caption=x", "--to", "rgb"], "weight*modality=file-or-text"),
        (["generate", "--decode", "rgb=3", "--to", "rgb"], "target:setting=value"),
        (["generate", "--decode", "rgb:order=snake", "--to", "rgb"], "'maskgit', 'roar'"),
        (["generate", "--decode", "rgb:heat=2", "--to", "rgb"], "no field 'heat'; there are order"),
        (["generate", "--guide", "2*caption=x", "--guidance", "2", "--to", "rgb"], "give one of"),
        (["demo", "--root", "s3://bucket/demo"], "local folder"),
        (["ui", "--root", "{tmp}/nosuch"], "no runs are kept in {tmp}/prefect"),
        (["status", "--root", "s3:/bucket/demo"], "write s3://bucket/prefix"),
        (["janitor", "--root", "{tmp}"], "there is no dataset at"),
        (["label", "--models", "depth=x/y"], """takes JSON, such as '{{"depth": "hub/id@revis"""),
        (["label", "--models", "{{'depth': 'x/y'}}"], "is none: Expecting property name"),
        (["label", "--resources", '{{"depth": {{"gpu": 1}}}}'], "no field 'gpu'; there are gpus"),
        (["label", "--labelers", "depth,", "normal"], "without blanks"),
        (["ingest", "--source", "x", "--allow-hosts", "http://h:8"], "host, or host:port, alone"),
        (["retry", "--root", "{tmp}"], "run `fourm ingest` first"),
        (["retry", "--root", "{tmp}", "--reasons", "not_found"], "'server_error'"),
        (["plan", "--root", "{tmp}"], "name its list with --source"),
        (["export", "--root", "{tmp}", "--out", "{tmp}/x"], "there is no dataset at"),
        (["export", "--root", "{tmp}", "--out", "x", "--layout", "lmdb"], "'parquet'"),
        (["import", "--root", "{tmp}/d", "--source", "{tmp}"], "fourm ingest --format webdataset"),
        (["ingest", "--root", "{tmp}/d", "--source", "x.tsv"], "there is nothing at x.tsv"),
        (["ingest", "--root", "{tmp}/d", "--source", "{tmp}", "--format", "webdataset"],
         "there is nothing of format webdataset at"),
        (["ingest", "--source", "x.tsv", "--shard-rows", "0"], "greater than or equal to 1"),
        (["ingest", "--source", "x.tsv", "--max-aspect", "inf"], "finite number"),
        (["ingest", "--root", "{tmp}/d", "--source", os.devnull], "/dev/null holds no rows"),
        ([*PLAN_RGB, '{{"rgb": {{"steps": "many"}}}}'], "steps='many': Input should be a valid"),
        ([*PLAN_RGB, '{{"rgb": {{"levels": 8}}}}'], "levels=8: Input should be a valid tuple"),
        ([*PLAN_RGB, '{{"rgb": {{"levels": [1]}}}}'], "levels=(1,): at least one, and none below"),
        ([*PLAN_RGB, '{{"rgb": {{"kind": "blob"}}}}'], "kind='blob': Input should be 'rgb', "),
        ([*PLAN_RGB, '{{"rgb": {{"patch": 0}}}}'], "patch must be positive, got 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_any_work(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    code, output = _run(*[part.format(tmp=tmp_path) for part in arguments])
    assert code == 2
    assert sentence.format(tmp=tmp_path) in " ".join(output.split())
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir()), "work has begun"


@pytest.mark.parametrize(
    "words",
    [
        ["ingest", "--source", "https://me:hidden@host/list.tsv"],
        ["publish", "--root", "s3://KEY:hidden@bucket/set"],
        ["train", "--data", '{"c4": "s3://KEY:hidden@bucket/set#main"}'],
        ["label", "--ray", "http://me:hidden@head:8265"],
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(words: list[str]) -> None:
    code, output = _run(*words)
    assert code == 2
    assert "an address must not hold a password" in " ".join(output.split())
    assert "hidden" not in output


def test_a_place_that_cannot_hold_a_dataset_is_refused_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "list.tsv"
    file.write_text("http://h/1\ta cat\n")
    code, output = _run("ingest", "--root", f"{file}/d", "--source", str(file))
    assert code == 2
    assert f"{file} is no folder" in " ".join(output.split())
    assert list(tmp_path.iterdir()) == [file]


def test_a_flow_whose_upstream_is_not_at_its_end_is_refused_before_any_work(tmp_path: Path) -> None:
    store, root = Store(str(tmp_path)), ["--root", str(tmp_path)]
    Ledger(store).write_plan({"num_shards": 1, "id": "x"})
    chain.remember(store, "ingest", IngestOptions(source="x").model_dump())
    label = LabelOptions(preset="scenes", labelers=["depth"])
    chain.remember(store, "label", label.model_dump())
    tokenizers = TokenizerOptions(modalities=["rgb", "depth"], size=128)
    store.write_json("runs/first/model/config.json", {})

    def refused(*words: str) -> str:
        code, output = _run(*words, *root)
        assert code == 2
        return " ".join(output.split())

    learn = refused("train-tokenizers", "--modalities", "rgb,depth")
    assert learn.endswith("has all of its labels; run `fourm label` first")
    chain.remember(store, "tokenizers", {**tokenizers.model_dump(), "shards": [0]})
    assert "run `fourm train-tokenizers`" in refused("tokenize")
    chain.remember(store, "tokenize", TokenizeOptions().model_dump())
    assert "run `fourm train-tokenizers`" in refused("publish")
    assert "no manifest 'nosuch'; `fourm publish` makes one" in refused(
        "evaluate", "--manifest", "nosuch"
    )


def test_a_prefect_server_that_does_not_answer_is_named_with_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "list.tsv"
    file.write_text("http://h/1\ta cat\n")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # taken, and nobody listens
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        ingest = ["ingest", "--root", str(tmp_path / "d"), "--source", str(file)]
        for words, status in ((["automations"], 2), (ingest, 1)):
            code, output = _run(*words)
            assert code == status
            assert f"no Prefect server answers at PREFECT_API_URL={url}" in output


def test_verify_says_what_to_do_about_what_a_copy_lacks(tmp_path: Path) -> None:
    ledger, stage = Ledger(Store(str(tmp_path))), Stage("label:depth", 1, {}, ("depth",))
    ledger.write_plan({"num_shards": 1, "id": "x"})
    tar, statuses = write_tar([("00000000000.png", b"x")]), [("00000000000", "ok", "")]
    data = ShardData(["00000000000"], {"depth": tar}, statuses, 1.0)
    commit = ledger.commit(stage, 0, data)
    assert _run("verify", "--root", str(tmp_path))[0] == 0
    ledger.store.delete(commit.outputs["depth"]["path"])
    code, output = _run("verify", "--root", str(tmp_path))
    assert code == 1
    assert "what a copy lacks comes with another copy" in output


def test_where_no_prefect_server_can_keep_its_runs_it_is_said_how_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "prefect").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"nothing .* to .*prefect.* PREFECT_API_URL"):
        with prefect_server(tmp_path / "prefect"):
            pass


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/data"),
        ConnectionError("s3://b cannot be reached: no credentials"),
        ModuleNotFoundError("pip install 'fourm[kubernetes]'"),
    ],
)
def test_trouble_with_store_or_packages_is_one_sentence(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, cli._sentences(code=1):
        raise error
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"fourm: {error}\n"


@pytest.mark.parametrize(
    ("text", "words", "sentence"),
    [
        ("a cat\thttp://h/1\n", [], "'a cat' is no URL"),
        ("http://h/1\ta cat\n", ["--url-column", "3"], "2 fields, column 3 is wanted"),
        ("http://h/1\ta cat\n" * 2, ["--format", "jsonl"], "none of the first 2 rows"),
        ("http://h/1\ta cat\n".encode("utf-16").decode("latin-1"), [], "is no URL"),
    ],
)
def test_a_list_whose_first_rows_are_all_of_no_use_is_refused_before_any_work(
    tmp_path: Path, text: str, words: list[str], sentence: str
) -> None:
    file = tmp_path / "list.tsv"
    file.write_text(text, encoding="latin-1")
    code, output = _run("ingest", "--root", f"{tmp_path}/d", "--source", str(file), *words)
    assert code == 2
    assert sentence in " ".join(output.split())
    assert "url_column" in output
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_in_quarantine_is_shown_with_its_reason_and_released_on_request(
    tmp_path: Path,
) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    ledger.write_plan({"num_shards": 3})
    stage = Stage("fetch", 1, {}, ("rgb",))
    for _ in range(3):
        ledger.attempt(stage, 1)
    ledger.quarantine(stage, 1, "3 attempts failed: ValueError: it is odd")
    code, output = _run("quarantine", "--root", str(tmp_path))
    assert code == 0
    assert f"{stage.id} shard 1: 3 attempts failed: ValueError: it is odd" in output
    assert ledger.todo(stage, range(3)) == [0, 2]
    assert "shards in quarantine: 1; released" in _run(
        "quarantine", "--root", str(tmp_path), "--release"
    )[1]
    assert ledger.todo(stage, range(3)) == [0, 1, 2]
    assert ledger.attempts(stage, 1) == 0
    code, output = _run("export", "--root", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "no manifest 'main' at" in output
    assert "CURRENT; `fourm publish` makes one" in " ".join(output.split())
    assert "shards in quarantine: 0" in _run("quarantine", "--root", str(tmp_path))[1]


@pytest.mark.parametrize(("flow", "form", "said"), [
    ("label", LabelParams(root="my set"), "train-tokenizers --root 'my set'"),
    ("publish", PublishParams(root="d"), "train --root d"),
    ("publish", PublishParams(root="d", name="better"), "train --root d --manifest better"),
    ("train", TrainParams(root="d", run="x", manifest="better@2"),
     "evaluate --root d --run x --manifest better"),
])  # fmt: skip
def test_the_next_command_is_told_what_names_were_chosen(
    flow: str, form: Where, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    done = SimpleNamespace(**{f"{flow}_flow": lambda _: None})
    monkeypatch.setattr("tasks.checks.check", lambda *_: None)
    monkeypatch.setattr("pipelines.server.prefect_server", lambda _: nullcontext())
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda _: done))
    cli._run_flow(flow, form)
    assert capsys.readouterr().out == f"Next:  fourm {said}\n"


def test_a_demo_is_not_put_into_a_dataset_that_is_none(tmp_path: Path) -> None:
    Store(str(tmp_path)).write_json("plan/plan.json", {})
    code, output = _run("demo", "--scale", "tiny", "--root", str(tmp_path))
    assert code == 2
    assert "holds a dataset that is no demo" in " ".join(output.split())
    assert not (tmp_path / "source").exists()


def test_a_service_that_cannot_be_reached_is_told_in_one_sentence(tmp_path: Path) -> None:
    # In processes of their own: this one may have connections from other tests.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), str(tmp_path / "x"))
    where = "s3://a-bucket/place"
    source = ["--source", f"{where}.csv"]
    for words in (["status", "--root", where], ["plan", "--root", str(tmp_path), *source]):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *words], capture_output=True, text=True,
            env={**kept, **nowhere, "AWS_EC2_METADATA_DISABLED": "true"}, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith("fourm: ")
        assert "Unable to locate credentials" in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr


def test_generate_takes_the_words_of_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks.checks
    import tasks.generate
    from tasks.generate import How

    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(tasks.checks, "check", lambda *_: None)
    monkeypatch.setattr(
        tasks.generate, "generate", lambda store, *rest: asked.append(rest) or [Path("x.png")]
    )
    code, output = _run(
        "generate", "--from", "caption=a cube, red=1", "--from", "det=b.json", "--to", "rgb,depth",
        "--guide", "-2*caption=at night", "--guide", ".5*depth=near.png", "--preset", "halton",
        "--decode", "rgb:steps=12,top-k=0.1,temperature-schedule=onex:0.5:1", "--decode",
        "*:top-p=0.9", "--known", "det=0,0,1,0.5", "--samples", "4", "--combine", "--seed", "7",
    )  # fmt: skip
    assert (code, output.split()) == (0, ["x.png"])
    (run, inputs, targets, out, how), = asked
    assert (run, inputs, targets, out) == (
        "", {"caption": "a cube, red=1", "det": "b.json"}, ["rgb", "depth"], "generated"
    )  # fmt: skip
    assert how == How(
        samples=4, combine=True, seed=7, preset="halton", known={"det": "0,0,1,0.5"},
        guides=[({"caption": "at night"}, -2.0), ({"depth": "near.png"}, 0.5)],
        decoding={"rgb": {"steps": 12, "top_k": 0.1, "temperature_schedule": "onex:0.5:1"},
                  "*": {"top_p": 0.9}},
    )  # fmt: skip


def test_the_plan_of_a_list_is_printed_and_nothing_is_written(tmp_path: Path) -> None:
    source = tmp_path / "l.csv"
    source.write_text("url,caption\n" + "http://a.org/1.jpg,x\n" * 4000)
    code, output = _run(
        "plan", "--root", str(tmp_path / "d"), "--source", str(source), "--labelers", "depth,det",
        "--shard-rows", "1000", "--workers", "2", "--gpus", "1",
    )  # fmt: skip
    assert code == 0
    words = " ".join(output.split())
    for expected in ("fetch │ 4 │ 4,000", "label:depth", "tokens:depth", "assumed", "GPU-hours"):
        assert expected in words
    assert "label:semseg" not in words
    assert "tokens:clip" not in words
    assert [path.name for path in tmp_path.iterdir()] == ["l.csv"]


def test_the_form_offers_all_formats_layouts_and_reasons() -> None:
    from typing import get_args

    from infra.download import RETRYABLE
    from infra.sources import Format
    from pipelines.params import ExportParams, RetryReason, SourceFormat
    from tasks.layouts import LAYOUTS

    assert get_args(SourceFormat) == get_args(Format)
    assert set(get_args(RetryReason)) == RETRYABLE
    assert get_args(ExportParams.model_fields["layout"].annotation) == LAYOUTS


def test_the_forms_offer_every_labeler_and_every_learned_modality_to_choose_from() -> None:
    from models.labelers import kinds
    from pipelines.params import LabelParams, TrainTokenizersParams
    from tasks.tokenizer_recipes import recipe_names

    labels = LabelParams.model_json_schema()["properties"]["labelers"]
    assert labels["items"]["enum"] == kinds()
    learned = TrainTokenizersParams.model_json_schema()["properties"]["modalities"]
    assert learned["items"]["enum"] == recipe_names()
    every = {"canny_edge", "sam_edge", "dinov2", "dinov2_global", "imagebind", "imagebind_global",
             "sam_instance", "clip", "rgb", "depth", "normal", "semseg"}  # fmt: skip
    assert every <= set(recipe_names())


def test_a_plan_is_printed_without_data_or_gpu() -> None:
    code, output = _run("plan-train", "--recipe", "fourm_21_b", "--devices", "64")
    assert code == 0
    assert "256 + 256 tokens each: 500 B tokens" in output
    assert "198,8" in output


def test_lists_and_addresses_are_given_as_words() -> None:
    from pipelines import options
    from pipelines.params import Existing, LabelParams

    values = options.collect(
        LabelParams, {"labelers": "depth, clip", "ray": "10.0.0.1:6379", "workers": None}
    )
    form = LabelParams(**values)
    assert form.labelers == ["depth", "clip"]
    assert form.ray == Existing(address="10.0.0.1:6379")
    assert form.workers is None


def test_the_form_of_generation_offers_what_decoding_knows() -> None:
    import dataclasses
    from typing import get_args

    from models.fourm.decoding import ORDERS, Decoding
    from models.fourm.presets import PRESETS
    from pipelines.model_params import DecodingOptions, GenerateParams

    settings = DecodingOptions.model_fields
    assert get_args(GenerateParams.model_fields["preset"].annotation) == PRESETS
    assert set(settings) <= {field.name for field in dataclasses.fields(Decoding)}
    offered = get_args(get_args(settings["order"].annotation)[0])
    assert {*offered, "autoregressive"} == set(ORDERS)


def test_a_labelers_own_resources_come_from_the_terminal_and_reach_its_workers():
    from pipelines.options import collect
    from pipelines.params import LabelParams
    from pipelines.workers import resources

    given = {
        "gpus": 1, "share": "depth+normal,det+clip",
        "resources": '{"sam": {"gpus": 0.5, "workers": 3, "accelerator": "A100", "compile": true}}',
    }  # fmt: skip
    form = LabelParams(**collect(LabelParams, given))
    assert form.share == ["depth+normal", "det+clip"]
    assert form.resources["sam"].compile
    own = resources(form, form.resources["sam"])
    assert (own.num_gpus, own.workers, own.accelerator) == (0.5, 3, "A100")
    assert (resources(form).num_gpus, resources(form).accelerator) == (1, "")
    with pytest.raises(ValueError, match=r"A999|no such accelerator; there are .*A100"):
        LabelParams(resources={"sam": {"accelerator": "A999"}})
    with pytest.raises(ValueError, match="no such labeler"):
        LabelParams(resources={"nose": {"gpus": 1}})


def test_the_form_offers_all_recipes_and_modalities() -> None:
    from typing import get_args

    from models.labelers import KINDS, PRESETS
    from pipelines.params import ALL_DENSE, LabelOptions, RecipeName, TokenizerOptions
    from tasks.recipes import RECIPES

    assert set(get_args(RecipeName)) == set(RECIPES)
    assert LabelOptions(labelers=list(KINDS)).labelers == list(KINDS)
    assert set(get_args(LabelOptions.model_fields["preset"].annotation)) == set(PRESETS)
    assert TokenizerOptions(modalities=ALL_DENSE).modalities == ALL_DENSE
