# Everything a developer or a first-time user runs. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_MODEL := examples/zoo/weights/glyphs_vit_un.pt2

.DEFAULT_GOAL := help
.PHONY: help install test demo check format lint types layers zoo bench-cpu bench-engines bench-gpu bench-fold bench-accuracy bench-mixed bench-integers bench-scoring bench-minilm bench-peers bench-calibration fold-table clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

install: $(STAMP)  ## create .venv with the tested versions and normfuse in it

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

test: install  ## run the tests
	$(BIN)/python -m pytest -n auto

demo: install  ## compile a trained zoo model to int8 and compare it with the float model
	mkdir -p out/demo
	$(BIN)/python -m examples.zoo.data glyphs --split calib --count 256 --seed 0 -o out/demo/calib.npz
	$(BIN)/python -m examples.zoo.data glyphs --split test --count 4000 --seed 0 -o out/demo/test.npz
	rm -rf out/demo/int8
	$(BIN)/normfuse compile $(DEMO_MODEL) --calib out/demo/calib.npz --eval out/demo/test.npz -o out/demo/int8 || \
	  { test $$? -eq 1 && test -f out/demo/int8/manifest.json && echo "A guard fell back, see the verdict: try again on a quiet machine."; }

check: install format lint types layers test  ## format, lint, types, layers, tests

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

zoo: install  ## train the zoo again, from seeds (under two hours on two cores)
	$(BIN)/python -m examples.zoo.train

bench-cpu: install  ## DeiT-S on this CPU: PyTorch, onnxruntime, onnxruntime's own int8, normfuse
	$(BIN)/python -m benchmarks.cpu

bench-engines: install  ## sizes and kernels of TensorRT engines, built by what is installed
	$(BIN)/python -m benchmarks.engines

bench-gpu: install  ## a ViT on this GPU by PyTorch alone: eager, compiled, float8, int8, each with and without norms
	$(BIN)/python -m benchmarks.gpu

bench-fold: install  ## what folding alone gains: PyTorch, torch.compile, onnxruntime
	$(BIN)/python -m benchmarks.fold

bench-accuracy: install  ## what bits and effort cost on the zoo
	$(BIN)/python -m benchmarks.accuracy

bench-mixed: install  ## bits by every score at one budget and one quantizer, on the zoo (hours)
	$(BIN)/python -m benchmarks.mixed

bench-integers: install  ## integer-only engines of the zoo: accuracy, size, and whether they are their reference
	$(BIN)/python -m benchmarks.integers

bench-scoring: install  ## what every score costs on a DeiT-S, and the solver's time
	$(BIN)/python -m benchmarks.scoring

bench-minilm: install  ## a sentence encoder with its published weights: vectors, rankings, size, speed
	$(BIN)/python -m benchmarks.minilm

bench-peers: install  ## the accuracy of NNCF, onnxruntime, torchao and Brevitas on the zoo, beside normfuse's
	$(BIN)/python -m benchmarks.peers

bench-calibration: install  ## time and memory of calibrating to 8 bits: normfuse, onnxruntime, NNCF
	$(BIN)/python -m benchmarks.calibration

fold-table: install  ## what folding does to the architectures of transformers
	$(BIN)/python -m benchmarks.fold_table

clean:  ## remove what was built, but not .venv
	rm -rf out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
