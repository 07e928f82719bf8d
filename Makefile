# `make demo` is the place to start. Everything lives in .venv and in DATA.
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PYTHON ?= python3
DATA   ?= data
PYTEST := $(PY) -m pytest

# Ray's workers and Prefect's processes import the code of this folder.
export PYTHONPATH := $(CURDIR)

.PHONY: help setup ready demo demo-long test test-all lint bench ui clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## Create .venv with the pinned packages

$(STAMP): pyproject.toml requirements.lock
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[dev]' --constraint requirements.lock
	touch $@

# What setup made follows the pins; an environment that was installed some other way is as good.
ready:
	@test ! -f $(STAMP) && test -x $(PY) && $(PY) -c 'import importlib.util as u; \
	raise SystemExit(any(u.find_spec(m) is None for m in \
	("torch", "transformers", "ray", "prefect", "s3fs", "simplejpeg", "typer", "torchmetrics", \
	"segment_anything", "diffusers", "peft", "uvloop")))' \
	|| $(MAKE) --silent setup

demo: ready  ## Scenes in, a trained model out: the whole chain (28 minutes on 2 cores)
	$(PY) -m pipelines.cli demo --root $(DATA)/demo

demo-long: ready  ## The same chain with more scenes and training (sized for 90 minutes)
	$(PY) -m pipelines.cli demo --scale long --root $(DATA)/demo-long

test: ready  ## The tests that continuous integration runs
	$(PYTEST) -m 'not chaos and not slow and not browser'

test-all: ready  ## All tests, with the ones that kill processes
	$(PYTEST)

lint: ready  ## Style and types
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: ready  ## Measure the fast paths
	$(PY) -m tests.benchmarks all --json $(DATA)/benchmarks.json

ui: ready  ## The Prefect UI over the runs of the demo
	$(PY) -m pipelines.cli ui --root $(DATA)/demo

clean:  ## Remove caches, not data
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
