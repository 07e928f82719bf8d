"""What was measured is not measured again, unless something about it has changed."""

from types import SimpleNamespace

import pytest

from infra.store import Store
from pipelines import evaluate
from pipelines.params import EvaluateParams


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A dataset as evaluation sees it; `measured` grows with each evaluation."""
    store = Store(str(tmp_path))
    store.write("runs/r/model/model.safetensors", b"weights")
    depth = SimpleNamespace(id="label:depth@1")
    world = SimpleNamespace(root=str(tmp_path), store=store, version=1, depth=depth, measured=[])

    def manifest(_store, _name):
        return SimpleNamespace(version=world.version, shards=lambda _: [], samples=len)

    def write_report(store, run, found, **_):
        store.write_json(f"reports/{run}/results.json", {"number": len(world.measured)})
        return store.read_json(f"reports/{run}/results.json")

    chain = SimpleNamespace(labels={"depth": depth}, section=lambda _: {"preset": "scenes"})
    monkeypatch.setattr(evaluate.chain, "Chain", lambda _: chain)
    monkeypatch.setattr(evaluate, "load_manifest", manifest)
    monkeypatch.setattr(evaluate, "MODEL", "model")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: world.measured.append(1))
    monkeypatch.setattr(evaluate, "write_report", write_report)
    monkeypatch.setattr(evaluate, "seconds_spent", lambda _: {})
    monkeypatch.setattr(evaluate.ui, "progress", lambda _: SimpleNamespace(update=None))
    return world


def measure(world) -> int:
    return evaluate.measure.fn(EvaluateParams(root=world.root, run="r"))["number"]


def test_a_model_is_measured_once(world):
    assert [measure(world), measure(world)] == [1, 1]


@pytest.mark.parametrize("changed", ["version", "labels", "weights"])
def test_a_model_is_measured_again_against_another_set_other_labels_or_with_other_weights(
    world, changed
):
    assert measure(world) == 1
    if changed == "version":
        world.version = 2
    elif changed == "labels":
        world.depth.id = "label:depth@2"
    else:
        world.store.write("runs/r/model/model.safetensors", b"more weights")
    assert measure(world) == 2
