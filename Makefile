# `make` lists the targets. They use .venv, which `make install` makes, or python3 where there is none;
# `make PYTHON=/path/to/python TARGET` uses another.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint types notebooks bench bench-peers clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  %-11s %s\n", $$1, $$2}'

install: ## make .venv (Python 3.11 or newer) and install palign with everything that tests need
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e '.[dev]'

demo: ## train, compare and improve a small model on a CPU; runs/demo/report.html
	$(PYTHON) -m palign.cli.demo --workdir=runs/demo

test: ## the tests and doctests, then the notebook
	$(PYTHON) -m pytest -n 2 -m 'not slow'
	$(MAKE) notebooks

test-slow: ## the tests that are too slow for every change
	$(PYTHON) -m pytest -n 2 -m slow

lint: ## ruff: rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: ## mypy
	$(PYTHON) -m mypy

notebooks: ## run the notebooks, shortened
	PALIGN_SMOKE=1 $(PYTHON) -m pytest --nbmake notebooks --nbmake-timeout=600

# Each answers one question and writes benchmarks/results/NAME.json.
QUESTIONS = equal_shapes realistic lists distill_head sampling growth memory profile_step compile_time
# What pip is told to find PyTorch without CUDA, which is gigabytes smaller.
TORCH ?= --extra-index-url=https://download.pytorch.org/whl/cpu torch

bench: ## measure speed and memory on the CPU, against plain JAX
	set -e; for question in $(QUESTIONS); do $(PYTHON) -m benchmarks.$$question; done

bench-peers: .venv-peers/made ## the same, against PyTorch and TRL too, in .venv-peers, which it makes
	set -e; for question in $(QUESTIONS); do $(PYTHON) -m benchmarks.$$question --peers-python=.venv-peers/bin/python; done

.venv-peers/made:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install $(TORCH) 'transformers>=5.23,<6' 'trl==1.16.*'
	touch $@

clean: ## remove caches and build products; runs/ and virtual environments stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .jax_cache
	find palign tests configs benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +
