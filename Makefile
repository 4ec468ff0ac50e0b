# `make` lists the targets. They use .venv, which `make install` makes, or python3 where there is none;
# `make PYTHON=/path/to/python TARGET` uses another.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint types notebooks bench bench-peers bench-gpu clean

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

# Each answers one question and writes benchmarks/results/NAME.json; then docs/performance.md is written from these.
QUESTIONS = equal_shapes realistic lists distill_head growth memory profile_step compile_time
# Rounds of `make bench`, so that it is done in half an hour or so; `make bench-peers` takes each question's own number.
ROUNDS ?= 2
PEERS = --peers-python=.venv-peers/bin/python
# On a GPU: the heads of 8 billion parameters, then a model of 1.5 billion. The profile has no peers.
GPU_QUESTIONS = loss_head large_step realistic
LARGE = --vocabulary=128256 --dim=2048 --layers=16 --heads=16 --hidden-dim=7168
GPU_PROFILE = $(LARGE) --pairs=8 --row-length=4096 --rows=8 --block=128 --chunk=2048
# Temporary memory and speed of AlignDistil's head.
GPU_DISTILL = --vocabulary 128256 --width=2048 --targets=2048 --chunk=2048
GPU_OUT = --out=benchmarks/results/gpu
# What pip is told to find PyTorch without CUDA, which is gigabytes smaller; `TORCH='torch liger-kernel'` on a GPU.
TORCH ?= --extra-index-url=https://download.pytorch.org/whl/cpu torch

bench: ## measure speed and memory on the CPU, against plain JAX
	set -e; for question in $(QUESTIONS); do $(PYTHON) -m benchmarks.$$question --rounds=$(ROUNDS); done
	$(PYTHON) docs/make_performance.py

bench-peers: .venv-peers/made ## the same, against PyTorch and TRL too, in .venv-peers, which it makes
	set -e; for question in $(QUESTIONS) sampling loss_head; do $(PYTHON) -m benchmarks.$$question $(PEERS); done
	$(PYTHON) docs/make_performance.py

bench-gpu: .venv-peers/made ## the heads and steps of large models on a GPU; first `make TORCH='torch liger-kernel' .venv-peers/made`
	set -e; for question in $(GPU_QUESTIONS); do $(PYTHON) -m benchmarks.$$question $(PEERS) $(GPU_OUT); done
	$(PYTHON) -m benchmarks.distill_head $(GPU_DISTILL) $(PEERS) $(GPU_OUT)
	$(PYTHON) -m benchmarks.profile_step $(GPU_PROFILE) $(GPU_OUT)
	$(PYTHON) docs/make_performance.py

.venv-peers/made:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install $(TORCH) 'transformers>=5.23,<6' 'trl==1.16.*'
	touch $@

clean: ## remove caches and build products; runs/ and virtual environments stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .jax_cache
	find palign tests configs benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +
