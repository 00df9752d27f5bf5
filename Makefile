# `make` alone prints what each target does.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= poise-report

.PHONY: help install compare test test-slow lint bench bench-full wheel wheel-test wheel-test-extras wheel-test-lowest docs clean install-test install-dev install-docs mlflow-server

help:  ## print what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

# torch goes in first, alone and pinned: every later install then keeps that build.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) -e '.[test,data,lm,trackers,peers]'
	@# Peers whose own requirements are older than NumPy 2 or ask for torchvision; what is compared with them needs neither.
	$(PIP) --no-deps dalib boat-torch higher
	@command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 \
	  || (command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium >/dev/null) \
	  || echo "no Chromium found: the browser tests will skip by name"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	@touch $@

install: $(VENV)/.installed  ## create .venv and install Poise into it

install-test: $(VENV)/.test

install-dev: $(VENV)/.dev

install-docs: $(VENV)/.docs

mlflow-server: $(VENV)/mlflow-server/bin/mlflow  ## install an MLflow server for the slow tests, apart: it asks for an older pandas

$(VENV)/mlflow-server/bin/mlflow: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)/mlflow-server
	$(VENV)/mlflow-server/bin/pip install --quiet --disable-pip-version-check 'mlflow>=2.19'

compare: $(VENV)/.installed  ## install, then compare two objectives on digits with 40 % wrong labels
	$(BIN)/poise compare digits "cross_entropy" "cross_entropy + 3*early_learning" --label-noise 0.4 --seeds 5 --out $(OUT)

test: $(VENV)/.test  ## install with the test extras, then run the everyday tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/.test  ## run the tests marked slow
	$(BIN)/python -m pytest -m slow --timeout 1800

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test  ## run every benchmark quickly; write docs/benchmarks.md and the trend; fail if a goal is lost
	$(BIN)/python -m benchmarks --quick

bench-full: $(VENV)/.test  ## the same at full size, for figures to quote (hours)
	$(BIN)/python -m benchmarks

wheel: $(VENV)/.dev  ## build wheel and sdist into dist and check what they hold
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m release.contents dist/*.whl dist/*.tar.gz

wheel-test: wheel  ## install the wheel into a clean environment and try it there
	$(BIN)/python -m release.install dist/*.whl

wheel-test-extras: wheel  ## the same, and with each extra alone
	$(BIN)/python -m release.install dist/*.whl --extras

wheel-test-lowest: wheel  ## the same with the lowest versions that pyproject.toml allows
	$(BIN)/python -m release.install dist/*.whl --lowest

docs: $(VENV)/.docs  ## build the documentation site, strictly
	$(BIN)/mkdocs build --strict

clean:  ## remove the environment, caches, built site and reports
	rm -rf $(VENV) site build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis poise-report*
